"""Gradient descent with a bounded step: a clipped or normalised gradient, or a normalised RMSprop step."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import numpy as np

from hfmpi.optim.base import Objectives, Optimizer, StepReport
from hfmpi.optim.checks import check_state, check_vector, checked
from hfmpi.optim.first_order import Update, agreed_norm, first_order_step
from hfmpi.optim.layout import Block, Vector
from hfmpi.settings import POSITIVE, Rule, check, within

__all__ = ["RULES", "GradientDescent", "GradientDescentState"]

RULES = ("clip", "normalised", "rms-normalised")


@dataclass(frozen=True)
class GradientDescentState:
    """The number of updates so far, and the running mean of squared gradients (rms-normalised only)."""

    updates: int
    mean_square: Vector


@dataclass(frozen=True)
class GradientDescent(Optimizer[GradientDescentState]):
    """Gradient descent without momentum.

    Attributes
    ----------
    rule : {'clip', 'normalised', 'rms-normalised'}
        `clip`: `-rate * g * min(1, threshold / |g|)` (Pascanu et al. 2013).
        `normalised`: a step of length `rate` along -g.
        `rms-normalised`: a step of length `rate` along -g / (sqrt(mean square) + epsilon), as in Krause's
        released code (2016). Whether his paper of 2015 did so is unknown (docs/theory.md).
    rate : float
        Learning rate, or length of the step. Krause's code: 10 for mLSTM, 2 for LSTM.
    decay : float
        Factor of the rate after each update. Krause's code: 0.9999.
    floor : float
        Lower bound of the rate; at most `rate`. Krause's code: 0.01.
    threshold : float
        Of `clip`, in the unit of the gradient's norm.
    mean_square_decay, epsilon : float
        Of `rms-normalised`. Krause's code: 0.9 (the mean starts at the first square, without bias) and 1e-6.
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

    @property
    def rates(self) -> tuple[str, ...]:
        """The settings that a schedule of the learning rate multiplies."""
        return "rate", "floor"

    @property
    def degree(self) -> int:
        """How a parameter's step depends on the size of its gradients."""
        return 0 if self.rule == "rms-normalised" else 1

    def init(self, theta: Vector, blocks: Sequence[Block] = ()) -> GradientDescentState:
        """Return the state before the first update."""
        check_vector("theta", theta)
        return GradientDescentState(0, theta * 0 if self.rule == "rms-normalised" else theta[:0])

    def step(
        self, theta: Vector, state: GradientDescentState, objectives: Objectives
    ) -> tuple[Vector, GradientDescentState, StepReport]:
        """Take one update; reject it if the gradient is not finite."""
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

        # If the squares are used, they must be finite too.
        longest = math.sqrt(largest) if self.rule == "rms-normalised" else math.inf
        too_long = "the gradient, or its square,"
        return first_order_step(theta, state, objective, rate, update, longest, too_long)
