"""Gradient descent with steps of bounded length: clipped, normalised, or normalised after RMSprop."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import numpy as np

from hfmpi.errors import UserError
from hfmpi.optim.base import Objectives, Optimizer, StepReport
from hfmpi.optim.checks import check_state, check_vector, checked
from hfmpi.optim.first_order import Update, agreed_norm, first_order_step
from hfmpi.optim.layout import Block, Vector
from hfmpi.settings import POSITIVE, Meaning, check, documented, one_of, within

__all__ = ["RULES", "GradientDescent", "GradientDescentState"]

RULES = ("clip", "normalised", "rms-normalised")


@dataclass(frozen=True)
class GradientDescentState:
    """The number of updates so far, and the running mean of squared gradients (rms-normalised only)."""

    updates: int
    mean_square: Vector


@documented
@dataclass(frozen=True)
class GradientDescent(Optimizer[GradientDescentState]):
    """Gradient descent without momentum.

    It is not known whether Krause et al. (2015) normalised the steps, as Krause's released code (2016) does
    (docs/theory.md).
    """

    rule: Annotated[
        str,
        one_of(*RULES),
        Meaning(
            "clip: the step is -rate * g * min(1, threshold / norm(g)) (Pascanu et al. 2013). normalised: a "
            "step of length rate along -g. rms-normalised: a step of length rate along -g / (sqrt(mean "
            "square) + epsilon), as in Krause's released code (2016)."
        ),
    ] = "rms-normalised"
    rate: Annotated[
        float,
        POSITIVE,
        Meaning(
            "Learning rate; with the normalised rules it is the length of the step. Krause's code: 10 for "
            "mLSTM, 2 for LSTM.",
            unit="length of theta, if normalised",
            torch="lr",
            optax="learning_rate",
        ),
    ] = 2.0
    decay: Annotated[
        float,
        within("(0, 1]"),
        Meaning(
            "The rate is multiplied by this factor after each update. Krause's code: 0.9999.",
            torch="ExponentialLR(gamma)",
            optax="decay_rate",
        ),
    ] = 0.9999
    floor: Annotated[
        float,
        Meaning(
            "Lower bound of the decaying rate; it must not exceed rate. Krause's code: 0.01.",
            unit="that of the rate",
            optax="end_value",
        ),
    ] = 0.01
    threshold: Annotated[
        float,
        POSITIVE,
        Meaning(
            "With clip, gradients longer than this are scaled to this length.",
            unit="that of the gradient",
            torch="clip_grad_norm_(max_norm)",
            optax="clip_by_global_norm(max_norm)",
            others=("clip", "clip_norm", "max_norm", "clip_grad_norm", "gradient_clip_val"),
        ),
    ] = 1.0
    mean_square_decay: Annotated[
        float,
        within("[0, 1)"),
        Meaning(
            "With rms-normalised, the decay of the running mean of squared gradients. The mean starts at the "
            "first squared gradient, so that it has no bias. Krause's code: 0.9.",
            torch="alpha",
            optax="decay",
        ),
    ] = 0.9
    epsilon: Annotated[
        float,
        POSITIVE,
        Meaning(
            "With rms-normalised, added to the root mean square. Krause's code: 1e-6.",
            unit="that of the gradient",
            torch="eps",
            optax="eps",
        ),
    ] = 1e-6

    def __post_init__(self) -> None:
        check(self)
        if not 0 <= self.floor <= self.rate:
            raise UserError(f"floor must lie between 0 and rate, {self.rate:g}, not {self.floor:g}")

    @property
    def rates(self) -> tuple[str, ...]:
        """The settings that a schedule of the learning rate multiplies."""
        return "rate", "floor"

    @property
    def degree(self) -> int:
        """0 for rms-normalised, otherwise 1 (`Optimizer.degree`)."""
        return 0 if self.rule == "rms-normalised" else 1

    def init(self, theta: Vector, blocks: Sequence[Block] = ()) -> GradientDescentState:
        """Return the state before the first update."""
        check_vector("theta", theta)
        return GradientDescentState(0, theta * 0 if self.rule == "rms-normalised" else theta[:0])

    def step(
        self, theta: Vector, state: GradientDescentState, objectives: Objectives
    ) -> tuple[Vector, GradientDescentState, StepReport]:
        """Compute one update and take it unless the gradient is not finite."""
        objective = checked(theta, objectives).gradient
        vectors = ("mean_square",) if self.rule == "rms-normalised" else ()
        check_state(state, GradientDescentState, theta, *vectors)
        rate = max(self.rate * self.decay**state.updates, self.floor)
        largest = float(np.finfo(theta.dtype).max)

        def update(g: Vector, norm: float) -> Update[GradientDescentState] | None:
            if norm == 0:
                return Update(theta, state, 0.0, "the gradient is zero: nothing to do")
            kind, mean_square = g.dtype.type, state.mean_square
            if self.rule == "rms-normalised":
                keep = self.mean_square_decay if state.updates else 0.0
                mean_square = kind(keep) * mean_square + kind(1 - keep) * g * g
                g = g / (np.sqrt(mean_square) + kind(self.epsilon))
                norm = agreed_norm(objective, g)
                if norm == 0:  # underflow
                    return None
            scale = rate * min(1.0, self.threshold / norm) if self.rule == "clip" else rate / norm
            if not max(scale, scale * norm) < largest:
                return None
            later = GradientDescentState(state.updates + 1, mean_square)
            return Update(theta - kind(scale) * g, later, scale * norm)

        # rms-normalised squares the gradient, so that the squares must be finite too.
        longest = math.sqrt(largest) if self.rule == "rms-normalised" else math.inf
        too_long = "the gradient, or its square,"
        return first_order_step(theta, state, objective, rate, update, longest, too_long)
