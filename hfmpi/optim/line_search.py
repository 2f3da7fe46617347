"""Backtracking, which chooses one of the saved iterates, and the line search along it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from hfmpi.optim.cg import Iterate
from hfmpi.optim.layout import Vector

__all__ = ["Armijo", "Choice", "LineSearch", "backtrack"]


class Choice(NamedTuple):
    """The chosen iterate, its risk, and the number of evaluations of the risk."""

    iterate: Iterate
    loss: float
    evaluations: int


class LineSearch(NamedTuple):
    """The rate (0 if no rate is accepted), the risk there, and the number of evaluations of the risk."""

    rate: float
    loss: float
    evaluations: int


def backtrack(loss: Callable[[Vector], float], iterates: list[Iterate]) -> Choice:
    """Choose an iterate: go back from the last one while the risk decreases (Martens 2010, section 4.6).

    Parameters
    ----------
    loss : callable
        p (D,) -> f(theta + p).
    iterates : list of Iterate
        At least one iterate, in the order of their steps.
    """
    best, lowest, evaluations = iterates[-1], loss(iterates[-1].x), 1
    for candidate in reversed(iterates[:-1]):
        value = loss(candidate.x)
        evaluations += 1
        if math.isfinite(lowest) and not value < lowest:
            break
        best, lowest = candidate, value
    return Choice(best, lowest, evaluations)


@dataclass(frozen=True)
class Armijo:
    """Settings of a line search along p by Armijo's rule.

    Attributes
    ----------
    sufficient, shrink : float
    tries : int
        The values in Martens' released code are 1e-2, 0.8 and 60. With tries = 1 only the full step is
        tested.
    """

    sufficient: float = 1e-2
    shrink: float = 0.8
    tries: int = 60

    def search(
        self,
        loss: Callable[[Vector], float],
        p: Vector,
        loss_at_zero: float,
        loss_at_one: float,
        slope: float,
    ) -> LineSearch:
        """Search for the largest rate among 1, shrink, shrink^2, ... that meets Armijo's condition.

        The condition is f(theta + rate p) <= f(theta) + sufficient * rate * slope.

        Parameters
        ----------
        loss : callable
            p (D,) -> f(theta + p).
        loss_at_one : float
            f(theta + p), from backtracking.
        slope : float
            g' p. If it is not negative, p is rejected without evaluating the risk.

        Returns
        -------
        LineSearch
            Its rate is 0 if no rate meets the condition.
        """
        rate, value, evaluations = 1.0, loss_at_one, 0
        if not slope < 0:
            return LineSearch(0.0, loss_at_zero, 0)
        for attempt in range(self.tries):
            if attempt:
                rate *= self.shrink
                value = loss(p * p.dtype.type(rate))
                evaluations += 1
            if math.isfinite(value) and value <= loss_at_zero + self.sufficient * rate * slope:
                return LineSearch(rate, value, evaluations)
        return LineSearch(0.0, loss_at_zero, evaluations)
