"""Adam (Kingma and Ba 2015), the usual baseline of comparisons."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated, ClassVar

import numpy as np

from hfmpi.optim.base import Objective
from hfmpi.optim.checks import check_vector
from hfmpi.optim.first_order import Adaptive, AdaptiveState
from hfmpi.optim.layout import Block, Vector
from hfmpi.settings import POSITIVE, within

__all__ = ["Adam", "AdamState"]


@dataclass(frozen=True)
class AdamState(AdaptiveState):
    """The running means of gradients and of their squares, (D,) each."""

    mean: Vector
    mean_square: Vector


@dataclass(frozen=True)
class Adam(Adaptive[AdamState]):
    """Adam with the constants of its paper, and clipping by norm; with `decay` it is AdamW.

    Attributes
    ----------
    rate, beta1, beta2, epsilon : float
        Learning rate, decays of the two means, and the constant that keeps the quotient finite.
    threshold : float
        Longer gradients are first scaled to this length (Pascanu et al. 2013).
    decay, averaging, schedule, schedule_steps, schedule_end, warm_up
        See `Adaptive` and `Schedule`.
    """

    _state: ClassVar[type] = AdamState

    rate: Annotated[float, POSITIVE] = 2e-3
    beta1: Annotated[float, within("[0, 1)")] = 0.9
    beta2: Annotated[float, within("[0, 1)")] = 0.999
    epsilon: Annotated[float, POSITIVE] = 1e-8
    threshold: Annotated[float, POSITIVE] = 1.0

    def init(self, theta: Vector, blocks: Sequence[Block] = ()) -> AdamState:
        """Return the state before the first update."""
        check_vector("theta", theta)
        return AdamState(theta * 0, theta * 0, updates=0, average=self._first(theta))

    def direction(
        self, g: Vector, norm: float, state: AdamState, objective: Objective, factor: float
    ) -> tuple[Vector, AdamState]:
        """Compute the step and the means after g (`Adaptive.direction`)."""
        kind, t = g.dtype.type, state.updates + 1
        g = g * kind(min(1.0, self.threshold / norm)) if norm > 0 else g
        mean = kind(self.beta1) * state.mean + kind(1 - self.beta1) * g
        mean_square = kind(self.beta2) * state.mean_square + kind(1 - self.beta2) * g * g
        corrected = np.sqrt(mean_square / kind(1 - self.beta2**t)) + kind(self.epsilon)
        p = kind(self.rate * factor / (1 - self.beta1**t)) * mean / corrected
        return p, replace(state, mean=mean, mean_square=mean_square)
