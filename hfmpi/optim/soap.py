"""SOAP: Adam in the eigenbasis of Shampoo's factors (Vyas et al. 2025, arXiv 2409.11321, algorithm 3).

    G      the gradient of a block of theta, m x n          L, R   running means of G G' and of G' G
    Q_L    eigenvectors of L, columns                       Q_R    eigenvectors of R, columns
    G'     Q_L' G Q_R, the gradient in the eigenbasis       M, V   Adam's means, of G and of the squares of G'

The step is -rate Q_L (M' / (sqrt(V) + epsilon)) Q_R' with M' = Q_L' M Q_R and means corrected for their
initial bias. A side longer than `longest_side` is not rotated, and Adam updates a block that has only one row
or column. The eigenvectors are exact at the first update; afterwards one orthogonal iteration, Q <- qr(L Q),
updates them every `refresh` updates. The authors take no step at the first gradient; this implementation
does.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated, ClassVar

import numpy as np

from hfmpi.measure.cost import Counts
from hfmpi.measure.linear_algebra import eigh, gram, product, qr, together
from hfmpi.optim.base import Messages, Needs, Objective
from hfmpi.optim.checks import check_blocks, check_vector
from hfmpi.optim.first_order import Adaptive, AdaptiveState, Beta1, Beta2, Epsilon, Rate
from hfmpi.optim.layout import LONGEST_SIDE, Block, BlockLayout, Shape, Vector
from hfmpi.optim.matrices import Arrays, eigensystem, orthonormal, rotated, rotation, share_out
from hfmpi.settings import Meaning, at_least, documented, within

__all__ = ["SOAP", "Nesterov", "Refresh", "SOAPState"]

TIES = 1e-3
"""The addition to a factor's diagonal rises linearly from zero to this fraction of the mean eigenvalue.

At first a factor has many eigenvalues of zero. The addition separates them; otherwise rounding errors would,
and these depend on the number of ranks.
"""


Refresh = Annotated[
    int,
    at_least(1),
    Meaning(
        "Number of updates after which the eigenvectors are recomputed. The authors: 10.",
        unit="updates",
        others=("precondition_frequency",),
    ),
]
Nesterov = Annotated[
    bool,
    Meaning(
        "Precondition beta1 M + (1 - beta1) G instead of M, as Muon and Nadam do (Dozat 2016).",
        torch="nesterov",
        optax="nesterov",
    ),
]


@dataclass(frozen=True)
class SOAPState(AdaptiveState):
    """Running means of gradients and of squares in the eigenbasis, factors and eigenvectors.

    The means are (D,); `factors` holds L and R of each block, `bases` holds Q_L and Q_R.
    """

    mean: Vector
    mean_square: Vector
    factors: Vector
    bases: Vector


@documented
@dataclass(frozen=True)
class SOAP(Adaptive[SOAPState]):
    """SOAP for the matrices of theta, Adam for its vectors.

    Except for `longest_side` the defaults are those of the authors, which are for transformers.

    Examples
    --------
    >>> optimizer = hfmpi.SOAP(rate=0.1, beta1=0.9, refresh=2)  # doctest: +SKIP
    >>> result = hfmpi.train(model, data, optimizer=optimizer, max_steps=1000)  # doctest: +SKIP
    """

    _name: ClassVar[str] = "soap"
    _state: ClassVar[type] = SOAPState

    rate: Rate = 3e-3
    beta1: Beta1 = 0.95
    beta2: Beta2 = 0.95
    epsilon: Epsilon = 1e-8
    factor_decay: Annotated[
        float,
        within("[0, 1)"),
        Meaning(
            "Decay of the running means L and R, per update. The authors: 0.95.",
            others=("shampoo_beta",),
        ),
    ] = 0.95
    refresh: Refresh = 10
    longest_side: Annotated[
        int,
        at_least(1),
        Meaning(
            "Sides (rows or columns) longer than this are not rotated. The authors: 10,000, for which an "
            "eigendecomposition takes minutes.",
            unit="rows or columns",
            others=("max_precond_dim",),
        ),
    ] = LONGEST_SIDE
    nesterov: Nesterov = False

    def init(self, theta: Vector, blocks: Sequence[Block] = ()) -> SOAPState:
        """Return the state before the first update.

        Raises
        ------
        UserError
            If there are no blocks.
        """
        check_vector("theta", theta)
        check_blocks(self._name, blocks)
        size = BlockLayout(blocks, self._factors).size
        factors, bases = np.zeros_like(theta, shape=size), np.zeros_like(theta, shape=size)
        return SOAPState(theta * 0, theta * 0, factors, bases, updates=0, average=self._first(theta))

    @property
    def needs(self) -> Needs:
        """SOAP needs the matrices of theta."""
        return Needs(blocks=True)

    def messages(self, parameters: int, blocks: Sequence[Block]) -> Messages:
        """Return what the ranks exchange: means of squares, steps and factors, at times eigenvectors."""
        factors = BlockLayout(blocks, self._factors).size
        return Messages(matrices=2 * parameters + factors + factors // self.refresh)

    def algebra(self, state: SOAPState, blocks: Sequence[Block]) -> Counts:
        """Return the linear algebra of `direction`; blocks and the two sides of a block run concurrently."""

        def of(block: Block) -> Counts:
            left, right = (shape[0] for shape in self._factors(block).values())
            turned = rotation(block.rows, block.columns, left, right)
            sides = together(
                gram(side, block.size // side) + self._eigenvectors(state, side)
                for side in (left, right)
                if side
            )
            return sides + together([turned, turned]) + turned + self._finishing(block)

        return together(map(of, blocks))

    def _eigenvectors(self, state: SOAPState, side: int) -> Counts:
        """Return the cost of computing the eigenvectors of a side in this state."""
        if not self._refreshes(state):
            return Counts()
        return product(side, side, side) + qr(side) if state.updates else eigh(side)

    def _refreshes(self, state: SOAPState) -> bool:
        return state.updates % self.refresh == 0

    def direction(
        self, g: Vector, norm: float, state: SOAPState, objective: Objective, factor: float
    ) -> tuple[Vector, SOAPState]:
        """Compute the step; one rank computes the matrix products and decompositions of each block."""
        kind, t, blocks = g.dtype.type, state.updates + 1, objective.blocks
        mean, refreshes = kind(self.beta1) * state.mean + kind(1 - self.beta1) * g, self._refreshes(state)
        keep = self.factor_decay if state.updates else 0.0
        layout = BlockLayout(blocks, self._factors)
        old_factors, old_bases = layout.views(state.factors), layout.views(state.bases)

        def fill(i: int, new: Arrays) -> None:
            gradient, old_square = blocks[i].of(g), blocks[i].of(state.mean_square)
            bases = {side: new[f"Q_{side}"] if refreshes else old for side, old in old_bases[i].items()}
            for side, a in ("L", gradient), ("R", gradient.T):
                matrix = new[side]
                if not matrix.size:
                    continue
                np.matmul(a, a.T, out=matrix)
                matrix *= kind(1 - keep)
                matrix += kind(keep) * old_factors[i][side]
                if refreshes:
                    bases[side][...] = _eigenvectors(matrix, old_bases[i][side] if state.updates else None)
            left, right, square, step = bases["L"], bases["R"], new["mean_square"], new["step"]
            inside = rotated(gradient, left.T, right)
            square[...] = kind(self.beta2) * old_square + kind(1 - self.beta2) * inside * inside
            np.divide(square, kind(1 - self.beta2**t), out=step)
            np.sqrt(step, out=step)
            step += kind(self.epsilon)
            inside = rotated(self._momentum(blocks[i].of(mean), gradient, t), left.T, right)
            np.divide(inside, step, out=step)
            step[...] = self._finished(blocks[i], rotated(step, left, right.T))
            step *= kind(self.rate * factor)

        mean_square, p, factors = np.zeros_like(g), np.zeros_like(g), np.zeros_like(state.factors)
        bases = np.zeros_like(state.bases) if refreshes else state.bases
        targets = [
            {"mean_square": block.of(mean_square), "step": block.of(p), **new_factors}
            for block, new_factors in zip(blocks, layout.views(factors), strict=True)
        ]
        if refreshes:
            for target, new_bases in zip(targets, layout.views(bases), strict=True):
                target |= {f"Q_{side}": basis for side, basis in new_bases.items()}
        share_out(objective, targets, g, fill)
        return p, replace(state, mean=mean, mean_square=mean_square, factors=factors, bases=bases)

    def _momentum(self, mean: Vector, g: Vector, t: int) -> Vector:
        """Return the mean of t gradients that is preconditioned, without its bias."""
        kind = g.dtype.type
        if self.nesterov:
            mean, t = kind(self.beta1) * mean + kind(1 - self.beta1) * g, t + 1
        return mean / kind(1 - self.beta1**t)

    def _finished(self, block: Block, step: Vector) -> Vector:
        """Return the step of a block (rows, columns) from its preconditioned mean; subclasses override it."""
        return step

    def _finishing(self, block: Block) -> Counts:
        """Return the linear algebra of `_finished`."""
        return Counts()

    def _factors(self, block: Block) -> dict[str, Shape]:
        """Return the shapes of L and R, which Q_L and Q_R share; (0, 0) for a side that is not rotated."""
        sides = block.rows, block.columns
        left, right = (side if min(sides) > 1 and side <= self.longest_side else 0 for side in sides)
        return {"L": (left, left), "R": (right, right)}


def _eigenvectors(matrix: Vector, before: Vector | None) -> Vector:
    """Compute the eigenvectors of a symmetric matrix, largest eigenvalue first; NaN if that fails.

    If the eigenvectors of an earlier update are passed, one orthogonal iteration updates them. It changes
    them only as much as the matrix has changed, so that V remains valid.
    """
    size, kind = len(matrix), matrix.dtype.type
    matrix = matrix * 1
    tie = np.einsum("ii->", matrix) * kind(TIES / size**2)
    matrix.reshape(-1)[:: size + 1] += tie * np.arange(size, dtype=matrix.dtype, like=matrix)
    try:
        if before is not None:
            return orthonormal(np.matmul(before.T, matrix).T)  # by columns, as LAPACK stores it
        return eigensystem(matrix)[1][:, ::-1]
    except np.linalg.LinAlgError:
        return matrix * kind(np.nan)
