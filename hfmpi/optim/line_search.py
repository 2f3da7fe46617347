"""The choice among the saved iterates (backtracking) and of the distance along it (line search)."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from hfmpi.optim.cg import Iterate
from hfmpi.optim.layout import Vector

__all__ = ["Armijo", "Choice", "LineSearch", "backtrack"]


class Choice(NamedTuple):
    """An iterate, the risk there, and the number of risks that were computed."""

    iterate: Iterate
    loss: float
    evaluations: int


class LineSearch(NamedTuple):
    """The rate (0: no rate suffices), the risk there, and the number of risks that were computed."""

    rate: float
    loss: float
    evaluations: int


def backtrack(loss: Callable[[Vector], float], iterates: list[Iterate]) -> Choice:
    """Go back from the last saved iterate while the risk decreases (Martens 2010, section 4.6).

    Parameters
    ----------
    loss : callable
        p (D,) -> f(theta + p).
    iterates : list of Iterate
        In the order of their steps, at least one.
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
    sufficient, shrink, tries
        1e-2, 0.8 and 60 in Martens' released code. tries = 1 tests only the full step.
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
        """Find the largest rate 1, shrink, ... with f(theta + rate p) <= f(theta) + sufficient rate slope.

        Parameters
        ----------
        loss : callable
            p (D,) -> f(theta + p).
        loss_at_one : float
            f(theta + p), which is known already.
        slope : float
            g' p. A p that does not descend (slope >= 0) is rejected at once.

        Returns
        -------
        LineSearch
            With rate 0 if there is no such rate.
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
