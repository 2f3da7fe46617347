"""Adam (Kingma and Ba 2015), because it is what people would compare with."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated

import numpy as np

from hfmpi.optim.base import Objectives, StepReport, Vector, Work, agreement, inner_product
from hfmpi.settings import POSITIVE, check, within

__all__ = ["Adam", "AdamState"]


@dataclass(frozen=True)
class AdamState:
    """Number of updates so far, and the running means of gradients and of their squares, (D,) each."""

    updates: int
    mean: Vector
    mean_square: Vector


@dataclass(frozen=True)
class Adam:
    """Adam with the constants of its paper, and clipping by norm.

    Attributes
    ----------
    rate, beta1, beta2, epsilon : float
        Learning rate, decays of the two means, and the number that keeps the quotient finite.
    threshold : float
        Gradients longer than it are scaled to it first (Pascanu et al. 2013).
    """

    rate: Annotated[float, POSITIVE] = 2e-3
    beta1: Annotated[float, within("[0, 1)")] = 0.9
    beta2: Annotated[float, within("[0, 1)")] = 0.999
    epsilon: Annotated[float, POSITIVE] = 1e-8
    threshold: Annotated[float, POSITIVE] = 1.0

    def __post_init__(self) -> None:
        check(self)

    def init(self, theta: Vector) -> AdamState:
        """Give the state before the first update."""
        return AdamState(0, theta * 0, theta * 0)

    def step(
        self, theta: Vector, state: AdamState, objectives: Objectives
    ) -> tuple[Vector, AdamState, StepReport]:
        """Take one update; one whose gradient is not finite is rejected."""
        at = objectives.gradient.gradient(theta)
        inner = inner_product(objectives.gradient)
        loss = agreement(objectives.gradient)(at.loss)
        norm = math.sqrt(inner(at.vector, at.vector))
        if not (math.isfinite(norm) and math.isfinite(loss)):
            return theta, state, self._rejected(loss, norm, "gradient" if math.isfinite(loss) else "risk")
        kind = theta.dtype.type
        g = at.vector * kind(min(1.0, self.threshold / norm)) if norm > 0 else at.vector
        t = state.updates + 1
        mean = kind(self.beta1) * state.mean + kind(1 - self.beta1) * g
        mean_square = kind(self.beta2) * state.mean_square + kind(1 - self.beta2) * g * g
        corrected = np.sqrt(mean_square / kind(1 - self.beta2**t)) + kind(self.epsilon)
        p = kind(self.rate / (1 - self.beta1**t)) * mean / corrected
        length = math.sqrt(inner(p, p))
        if not math.isfinite(length):
            return theta, state, self._rejected(loss, norm, "update")
        message = "" if norm > 0 else "the gradient is zero"
        details = self._details(norm, length)
        report = StepReport(loss, True, message, Work(gradients=1), details)
        return theta - p, AdamState(t, mean, mean_square), report

    def _rejected(self, loss: float, norm: float, what: str) -> StepReport:
        message = f"update rejected: the {what} is not finite"
        return StepReport(loss, False, message, Work(gradients=1), self._details(norm, 0.0))

    def _details(self, norm: float, length: float) -> dict[str, float | int | str | None]:
        finite = norm if math.isfinite(norm) else None
        return {"gradient_norm": finite, "step_norm": length, "rate": self.rate}
