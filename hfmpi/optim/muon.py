"""Muon: momentum with orthogonalised matrices (Jordan et al. 2024, kellerjordan.github.io/posts/muon).

    B <- momentum B + G,    step = -rate max(1, m / n)^(1/2) orthogonal(G + momentum B)    for blocks m x n

The orthogonal factor of a matrix U S V' is U V', the nearest matrix whose singular values are all one. Five
Newton-Schulz iterations approximate it well enough: the singular values then lie between 0.7 and 1.2. Adam
updates the blocks that have only one row or column.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated, ClassVar

import numpy as np

from hfmpi.measure.cost import Counts
from hfmpi.measure.linear_algebra import gram, product, together
from hfmpi.optim.base import Messages, Needs, Objective
from hfmpi.optim.checks import check_blocks, check_vector
from hfmpi.optim.first_order import Adaptive, AdaptiveState, Beta1, Beta2, Epsilon, Rate
from hfmpi.optim.layout import Block, Vector
from hfmpi.optim.matrices import Arrays, share_out
from hfmpi.settings import POSITIVE, Meaning, at_least, documented, within

__all__ = ["Muon", "MuonState", "NewtonSchulzSteps", "orthogonal"]

COEFFICIENTS = 3.4445, -4.7750, 2.0315
"""Jordan's coefficients of the quintic polynomial whose iteration drives singular values to about one."""


def orthogonal(matrix: Vector, steps: int = 5) -> Vector:
    """Approximate the nearest matrix whose singular values are one; return zero for a zero matrix."""
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


def orthogonalisation(rows: int, columns: int, steps: int) -> Counts:
    """Return the linear algebra of `orthogonal` for a matrix (rows, columns) that is not zero."""
    short, long = sorted((rows, columns))
    each = gram(short, long) + product(short, short, short) + product(short, short, long)
    return Counts(operations=steps * each.operations, depth=steps * each.depth)


@dataclass(frozen=True)
class MuonState(AdaptiveState):
    """The momentum (D,), and Adam's running mean of squared gradients (D,), used only for vectors."""

    momentum: Vector
    mean_square: Vector


NewtonSchulzSteps = Annotated[
    int,
    at_least(1),
    Meaning(
        "Number of Newton-Schulz iterations, which make a matrix nearly orthogonal. Jordan: 5.",
        unit="iterations",
        torch="ns_steps",
        optax="ns_steps",
    ),
]


@documented
@dataclass(frozen=True)
class Muon(Adaptive[MuonState]):
    """Muon for the matrices of theta, Adam for its vectors.

    Jordan's constants are rate 0.02 and momentum 0.95, with Nesterov's look-ahead.

    Examples
    --------
    >>> optimizer = hfmpi.Muon(rate=0.2, averaging=0.999)  # doctest: +SKIP
    >>> result = hfmpi.train(model, data, optimizer=optimizer, max_steps=1000)  # doctest: +SKIP
    """

    _state: ClassVar[type] = MuonState
    _means: ClassVar[tuple[str, ...]] = "momentum", "mean_square"

    rate: Rate = 0.02
    momentum: Annotated[
        float,
        within("[0, 1)"),
        Meaning(
            "Decay of the running sum of gradients, which is used with Nesterov's look-ahead.",
            torch="momentum",
            optax="beta",
        ),
    ] = 0.95
    newton_schulz_steps: NewtonSchulzSteps = 5
    vector_rate: Annotated[
        float,
        POSITIVE,
        Meaning(
            "Learning rate of Adam, which updates the vectors; the schedule multiplies it as it does rate."
        ),
    ] = 3e-3
    beta1: Beta1 = 0.9
    beta2: Beta2 = 0.95
    epsilon: Epsilon = 1e-8

    def init(self, theta: Vector, blocks: Sequence[Block] = ()) -> MuonState:
        """Return the state before the first update.

        Raises
        ------
        UserError
            If there are no blocks.
        """
        check_vector("theta", theta)
        check_blocks("muon", blocks)
        return MuonState(theta * 0, theta * 0, updates=0, average=self._first(theta))

    @property
    def needs(self) -> Needs:
        """Muon needs the matrices of theta."""
        return Needs(blocks=True)

    @property
    def rates(self) -> tuple[str, ...]:
        """The settings that a schedule of the learning rate multiplies."""
        return "rate", "vector_rate"

    def messages(self, parameters: int, blocks: Sequence[Block]) -> Messages:
        """Return the sizes of the messages: the matrices; the few vectors are counted too."""
        return Messages(matrices=parameters)

    def algebra(self, state: MuonState, blocks: Sequence[Block]) -> Counts:
        """Return the linear algebra of `direction`; all matrices are processed concurrently."""
        return together(
            orthogonalisation(block.rows, block.columns, self.newton_schulz_steps)
            for block in blocks
            if _is_matrix(block)
        )

    def direction(
        self, g: Vector, norm: float, state: MuonState, objective: Objective, factor: float
    ) -> tuple[Vector, MuonState]:
        """Compute the step; each matrix is orthogonalised by one rank."""
        kind, t, p = g.dtype.type, state.updates + 1, g * 0
        momentum, mean_square = state.momentum * 1, state.mean_square * 1
        matrices = list[Block]()
        for block in objective.blocks:
            gradient, step, mean, square = (block.of(v) for v in (g, p, momentum, mean_square))
            if _is_matrix(block):
                mean[...] = kind(self.momentum) * mean + gradient
                matrices.append(block)
                continue
            mean[...] = kind(self.beta1) * mean + kind(1 - self.beta1) * gradient
            square[...] = kind(self.beta2) * square + kind(1 - self.beta2) * gradient * gradient
            corrected = np.sqrt(square / kind(1 - self.beta2**t)) + kind(self.epsilon)
            step[...] = kind(factor * self.vector_rate / (1 - self.beta1**t)) * mean / corrected

        def fill(i: int, arrays: Arrays) -> None:
            block = matrices[i]
            ahead = block.of(g) + kind(self.momentum) * block.of(momentum)
            scale = factor * self.rate * max(1.0, block.rows / block.columns) ** 0.5
            arrays["step"][...] = kind(scale) * orthogonal(ahead, self.newton_schulz_steps)

        share_out(objective, [{"step": block.of(p)} for block in matrices], g, fill)
        return p, replace(state, momentum=momentum, mean_square=mean_square)


def _is_matrix(block: Block) -> bool:
    return min(block.rows, block.columns) > 1
