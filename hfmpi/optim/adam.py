"""Adam (Kingma and Ba 2015), because it is what people would compare with."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated

import numpy as np

from hfmpi.optim.base import Objectives, StepReport, Vector
from hfmpi.optim.checks import check_state, check_vector, checked
from hfmpi.optim.first_order import Update, agreed_norm, first_order_step
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
        check_vector("theta", theta)
        return AdamState(0, theta * 0, theta * 0)

    def step(
        self, theta: Vector, state: AdamState, objectives: Objectives
    ) -> tuple[Vector, AdamState, StepReport]:
        """Take one update; one whose gradient is not finite is rejected."""
        objectives = checked(theta, objectives)
        check_state(state, AdamState, theta, "mean", "mean_square")
        objective, kind = objectives.gradient, theta.dtype.type

        def update(g: Vector, norm: float) -> Update[AdamState] | None:
            g = g * kind(min(1.0, self.threshold / norm)) if norm > 0 else g
            t = state.updates + 1
            mean = kind(self.beta1) * state.mean + kind(1 - self.beta1) * g
            mean_square = kind(self.beta2) * state.mean_square + kind(1 - self.beta2) * g * g
            corrected = np.sqrt(mean_square / kind(1 - self.beta2**t)) + kind(self.epsilon)
            p = kind(self.rate / (1 - self.beta1**t)) * mean / corrected
            length = agreed_norm(objective, p)
            if not math.isfinite(length):
                return None
            message = "" if norm > 0 else "the gradient is zero"
            return Update(theta - p, AdamState(t, mean, mean_square), length, message)

        return first_order_step(theta, state, objective, self.rate, update)
