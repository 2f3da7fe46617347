"""Muon: momentum whose matrices are made orthogonal (Jordan et al. 2024, kellerjordan.github.io/posts/muon).

    B <- momentum B + G,    step = -rate max(1, m / n)^(1/2) orthogonal(G + momentum B)    for blocks m x n

The orthogonal factor of a matrix is the nearest matrix whose singular values are all one: U V' of U S V'.
Five steps of a Newton-Schulz iteration come near enough; singular values then lie between 0.7 and 1.2.
Blocks of one row or column are Adam's business.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Annotated

import numpy as np

from hfmpi.errors import UserError
from hfmpi.optim.base import Block, Objectives, StepReport, Vector
from hfmpi.optim.first_order import Update, agreed_norm, first_order_step
from hfmpi.optim.schedule import KNOWN, Schedule
from hfmpi.settings import NOT_NEGATIVE, POSITIVE, at_least, check, within

__all__ = ["Muon", "MuonState", "orthogonal"]

COEFFICIENTS = 3.4445, -4.7750, 2.0315
"""Of the quintic polynomial whose iteration drives singular values to about one; Jordan's."""


def orthogonal(matrix: Vector, steps: int = 5) -> Vector:
    """Give about the nearest matrix with singular values of one; zero for zero."""
    kind, (a, b, c) = matrix.dtype.type, COEFFICIENTS
    x = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    length = float(np.sqrt(np.einsum("ij,ij->", x, x, dtype=np.float64)))
    if length == 0:
        return matrix * 0
    x = x * kind(1 / length)
    for _ in range(steps):
        square = np.matmul(x, x.T)
        x = kind(a) * x + np.matmul(kind(b) * square + kind(c) * np.matmul(square, square), x)
    return x if matrix.shape[0] <= matrix.shape[1] else x.T


@dataclass(frozen=True)
class MuonState:
    """Number of updates so far, momentum (D,), and Adam's mean of squares (D,), used by the vectors alone."""

    updates: int
    momentum: Vector
    mean_square: Vector


@dataclass(frozen=True)
class Muon:
    """Muon on the blocks of theta, Adam on its vectors.

    Attributes
    ----------
    rate, momentum : float
        Jordan: 0.02 and 0.95, with Nesterov's look-ahead.
    newton_schulz_steps : int
        Jordan: 5.
    vector_rate, beta1, beta2, epsilon : float
        Of Adam, for vectors. The schedule is that of the rate.
    decay : float
        Weight decay, decoupled.
    schedule, schedule_steps, schedule_end, warm_up
        See `Schedule`.
    """

    rate: Annotated[float, POSITIVE] = 0.02
    momentum: Annotated[float, within("[0, 1)")] = 0.95
    newton_schulz_steps: Annotated[int, at_least(1)] = 5
    vector_rate: Annotated[float, POSITIVE] = 3e-3
    beta1: Annotated[float, within("[0, 1)")] = 0.9
    beta2: Annotated[float, within("[0, 1)")] = 0.95
    epsilon: Annotated[float, POSITIVE] = 1e-8
    decay: Annotated[float, NOT_NEGATIVE] = 0.0
    schedule: Annotated[str, KNOWN] = Schedule.name
    schedule_steps: Annotated[int, at_least(1)] = Schedule.steps
    schedule_end: Annotated[float, within("[0, 1]")] = Schedule.end
    warm_up: Annotated[int, NOT_NEGATIVE] = Schedule.warm_up

    def __post_init__(self) -> None:
        check(self)

    def init(self, theta: Vector, blocks: Sequence[Block] = ()) -> MuonState:
        """Give the state before the first update.

        Raises
        ------
        UserError
            Without blocks.
        """
        if not blocks:
            raise UserError("muon needs the matrices of theta: init(theta, objective.blocks)")
        return MuonState(0, theta * 0, theta * 0)

    def step(
        self, theta: Vector, state: MuonState, objectives: Objectives
    ) -> tuple[Vector, MuonState, StepReport]:
        """Take one update; one whose numbers are not finite is rejected.

        Each matrix is made orthogonal on one of the ranks.
        """
        objective, kind, blocks = objectives.gradient, theta.dtype.type, objectives.gradient.blocks
        schedule = Schedule(self.schedule, self.schedule_steps, self.schedule_end, self.warm_up)
        factor = schedule.factor(state.updates)

        def update(g: Vector, norm: float) -> Update[MuonState] | None:
            t, p = state.updates + 1, theta * 0
            momentum, mean_square = state.momentum * 1, state.mean_square * 1
            matrices = [block for block in blocks if min(block.rows, block.columns) > 1]
            works = list[Callable[[], Vector]]()
            for block in blocks:
                own, step, mean, square = (block.of(v) for v in (g, p, momentum, mean_square))
                if block in matrices:
                    mean[...] = kind(self.momentum) * mean + own
                    works.append(partial(self._orthogonal, own + kind(self.momentum) * mean))
                    continue
                mean[...] = kind(self.beta1) * mean + kind(1 - self.beta1) * own
                square[...] = kind(self.beta2) * square + kind(1 - self.beta2) * own * own
                corrected = np.sqrt(square / kind(1 - self.beta2**t)) + kind(self.epsilon)
                step[...] = kind(factor * self.vector_rate / (1 - self.beta1**t)) * mean / corrected
            sizes = [block.rows * block.columns for block in matrices]
            for block, found in zip(matrices, objective.spread(works, sizes), strict=True):
                scale = factor * self.rate * max(1.0, block.rows / block.columns) ** 0.5
                block.of(p).reshape(-1)[...] = kind(scale) * found
            p = p + kind(factor * self.rate * self.decay) * theta
            length = agreed_norm(objective, p)
            if not math.isfinite(length):
                return None
            message = "" if norm > 0 else "the gradient is zero"
            return Update(theta - p, MuonState(t, momentum, mean_square), length, message)

        return first_order_step(theta, state, objective, factor * self.rate, update)

    def _orthogonal(self, matrix: Vector) -> Vector:
        return orthogonal(matrix, self.newton_schulz_steps).reshape(-1)
