"""Adam (Kingma and Ba 2015), the usual baseline for comparisons."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated, ClassVar

import numpy as np

from hfmpi.optim.base import Objective
from hfmpi.optim.checks import check_vector
from hfmpi.optim.first_order import Adaptive, AdaptiveState, Beta1, Beta2, Epsilon, Rate
from hfmpi.optim.layout import Block, Vector
from hfmpi.settings import NOT_NEGATIVE, Meaning, documented

__all__ = ["Adam", "AdamState"]


@dataclass(frozen=True)
class AdamState(AdaptiveState):
    """The running means of the gradients and of their squares, (D,) each."""

    mean: Vector
    mean_square: Vector


@documented
@dataclass(frozen=True)
class Adam(Adaptive[AdamState]):
    """Adam with the constants of its paper; a nonzero `decay` makes it AdamW.

    Examples
    --------
    >>> optimizer = hfmpi.Adam(rate=1e-3, decay=0.01)  # doctest: +SKIP
    >>> result = hfmpi.train(model, data, optimizer=optimizer, max_steps=1000)  # doctest: +SKIP
    """

    _state: ClassVar[type] = AdamState

    rate: Rate = 2e-3
    beta1: Beta1 = 0.9
    beta2: Beta2 = 0.999
    epsilon: Epsilon = 1e-8
    threshold: Annotated[
        float,
        NOT_NEGATIVE,
        Meaning(
            "Gradients longer than this are first scaled to this length (Pascanu et al. 2013). 0: gradients "
            "are not clipped.",
            unit="that of the gradient",
            torch="clip_grad_norm_(max_norm)",
            optax="clip_by_global_norm(max_norm)",
            others=("clip", "clip_norm", "max_norm", "clip_grad_norm", "gradient_clip_val"),
        ),
    ] = 0.0

    def init(self, theta: Vector, blocks: Sequence[Block] = ()) -> AdamState:
        """Return the state before the first update."""
        check_vector("theta", theta)
        return AdamState(theta * 0, theta * 0, updates=0, average=self._first(theta))

    def direction(
        self, g: Vector, norm: float, state: AdamState, objective: Objective, factor: float
    ) -> tuple[Vector, AdamState]:
        """Compute the step and the means updated by g (`Adaptive.direction`)."""
        kind, t = g.dtype.type, state.updates + 1
        if self.threshold and norm > 0:
            g = g * kind(min(1.0, self.threshold / norm))
        mean = kind(self.beta1) * state.mean + kind(1 - self.beta1) * g
        mean_square = kind(self.beta2) * state.mean_square + kind(1 - self.beta2) * g * g
        corrected = np.sqrt(mean_square / kind(1 - self.beta2**t)) + kind(self.epsilon)
        p = kind(self.rate * factor / (1 - self.beta1**t)) * mean / corrected
        return p, replace(state, mean=mean, mean_square=mean_square)
