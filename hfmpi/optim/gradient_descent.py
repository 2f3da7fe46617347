"""Gradient descent with a bounded step: clipping, normalising, or normalising an RMSprop direction."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated

import numpy as np

from hfmpi.optim.base import Objectives, StepReport, Vector, Work, agreement, inner_product
from hfmpi.settings import POSITIVE, Rule, check, within

__all__ = ["RULES", "GradientDescent", "GradientDescentState"]

RULES = ("clip", "normalised", "rms-normalised")


@dataclass(frozen=True)
class GradientDescentState:
    """Number of updates so far, and the running mean of squared gradients (rms-normalised only)."""

    updates: int
    mean_square: Vector


@dataclass(frozen=True)
class GradientDescent:
    """Gradient descent without momentum.

    Attributes
    ----------
    rule : {'clip', 'normalised', 'rms-normalised'}
        `clip`: `-rate * g * min(1, threshold / |g|)` (Pascanu et al. 2013).
        `normalised`: a step of length `rate` along -g.
        `rms-normalised`: a step of length `rate` along -g / (sqrt(mean square) + epsilon), the "variant of
        gradient descent with norm clipping" of Krause's released code (2016).
    rate : float
        Learning rate, or length of the step. Krause: 10 for mLSTM, 2 for LSTM.
    decay : float
        The rate is multiplied by it after each update. Krause: 0.9999.
    floor : float
        The rate never falls below it; at most `rate`. Krause: 0.01.
    threshold : float
        Of `clip`, in the unit of the gradient's norm.
    mean_square_decay, epsilon : float
        Of `rms-normalised`. Krause: 0.9 (the mean starts at the first square, without bias) and 1e-6.
    """

    rule: Annotated[str, Rule(f"must be one of {', '.join(RULES)}", RULES.__contains__)] = "rms-normalised"
    rate: Annotated[float, POSITIVE] = 2.0
    decay: Annotated[float, within("(0, 1]")] = 0.9999
    floor: float = 0.01
    threshold: Annotated[float, POSITIVE] = 1.0
    mean_square_decay: Annotated[float, within("[0, 1)")] = 0.9
    epsilon: Annotated[float, POSITIVE] = 1e-6

    def __post_init__(self) -> None:
        check(self)
        if not 0 <= self.floor <= self.rate:
            raise ValueError("floor must lie between 0 and rate")

    def init(self, theta: Vector) -> GradientDescentState:
        """Give the state before the first update."""
        return GradientDescentState(0, theta * 0 if self.rule == "rms-normalised" else theta[:0])

    def step(
        self, theta: Vector, state: GradientDescentState, objectives: Objectives
    ) -> tuple[Vector, GradientDescentState, StepReport]:
        """Take one update; one whose gradient is not finite is rejected."""
        at = objectives.gradient.gradient(theta)
        inner = inner_product(objectives.gradient)
        g, norm = at.vector, math.sqrt(inner(at.vector, at.vector))
        rate = max(self.rate * self.decay**state.updates, self.floor)
        loss = agreement(objectives.gradient)(at.loss)
        after, length, wrong, message = state, 0.0, "", ""
        if not math.isfinite(loss):
            wrong = "the risk is not finite"
        elif not norm < self._longest(theta):
            wrong = "the gradient, or its square, is not finite"
        elif norm == 0:
            message = "the gradient is zero: nothing to do"
        else:
            later, direction, length = self._direction(g, norm, rate, state, inner)
            if direction is None:
                wrong, length = "the update is not finite", 0.0
            else:
                theta, after = theta - direction, later
        report = StepReport(
            loss=loss,
            accepted=not wrong,
            message=f"update rejected: {wrong}" if wrong else message,
            work=Work(gradients=1),
            details={
                "gradient_norm": norm if math.isfinite(norm) else None,
                "step_norm": length,
                "rate": rate,
            },
        )
        return theta, after, report

    def _longest(self, theta: Vector) -> float:
        """Give the bound below which the gradient's norm, and where needed its square, is finite."""
        return math.sqrt(np.finfo(theta.dtype).max) if self.rule == "rms-normalised" else math.inf

    def _direction(
        self,
        g: Vector,
        norm: float,
        rate: float,
        state: GradientDescentState,
        inner: Callable[[Vector, Vector], float],
    ) -> tuple[GradientDescentState, Vector, float]:
        """Give the next state, the vector to subtract (None where it would overflow), and its length."""
        kind = g.dtype.type
        if self.rule == "rms-normalised":
            keep = self.mean_square_decay if state.updates else 0.0
            mean_square = kind(keep) * state.mean_square + kind(1 - keep) * g * g
            g = g / (np.sqrt(mean_square) + kind(self.epsilon))
            norm = math.sqrt(inner(g, g))
        else:
            mean_square = state.mean_square
        after = GradientDescentState(state.updates + 1, mean_square)
        if norm == 0:  # underflow
            return after, None, 0.0
        scale = rate * min(1.0, self.threshold / norm) if self.rule == "clip" else rate / norm
        fits = max(scale, scale * norm) < float(np.finfo(g.dtype).max)
        return after, kind(scale) * g if fits else None, scale * norm
