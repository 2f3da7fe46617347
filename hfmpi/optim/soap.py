"""SOAP: Adam in the eigenbasis of Shampoo's factors (Vyas et al. 2025, arXiv 2409.11321, algorithm 3).

    G      the gradient of a block of theta, m x n          L, R   running means of G G' and of G' G
    Q_L    eigenvectors of L, columns                       Q_R    eigenvectors of R, columns
    G'     Q_L' G Q_R, the gradient in the eigenbasis       M, V   Adam's means, of G and of the squares of G'

The step is -rate Q_L (M' / (sqrt(V) + epsilon)) Q_R' with M' = Q_L' M Q_R, means corrected for their start. A
side longer than `longest_side` is not rotated, and a block of one row or column is Adam's. The eigenvectors
are exact at the first update; every `refresh` updates they follow by one orthogonal iteration, Q <- qr(L Q).
The authors take no step at the first gradient; here it counts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, ClassVar

import numpy as np

from hfmpi.optim.base import Objective
from hfmpi.optim.checks import check_blocks, check_vector
from hfmpi.optim.first_order import Adaptive, AdaptiveState
from hfmpi.optim.layout import Block, Vector
from hfmpi.settings import POSITIVE, at_least, within

__all__ = ["SOAP", "SOAPState"]

TIES = 1e-3
"""Of the mean eigenvalue: what the last number on a diagonal gains, those before it in proportion.

A factor has many eigenvalues of zero at first. What is added tells them apart, where rounding would, which
depends on the number of ranks.
"""


@dataclass(frozen=True)
class SOAPState(AdaptiveState):
    """Means of gradients and of squares in the eigenbasis, factors and bases.

    The means are (D,); `factors` has L and R of all blocks, one after the other, `bases` Q_L and Q_R.
    """

    mean: Vector
    mean_square: Vector
    factors: Vector
    bases: Vector


@dataclass(frozen=True)
class SOAP(Adaptive[SOAPState]):
    """SOAP on the blocks of theta.

    Attributes
    ----------
    rate, beta1, beta2, epsilon : float
        As of Adam. The authors: 3e-3, 0.95, 0.95, 1e-8, for transformers.
    factor_decay : float
        Of the running means L and R. The authors: 0.95.
    refresh : int
        Updates from one eigen-decomposition to the next. The authors: 10.
    longest_side : int
        Rows or columns beyond so many are not rotated. The authors: 10,000.
    decay, averaging, schedule, schedule_steps, schedule_end, warm_up
        See `Adaptive` and `Schedule`.
    """

    _state: ClassVar[type] = SOAPState

    rate: Annotated[float, POSITIVE] = 3e-3
    beta1: Annotated[float, within("[0, 1)")] = 0.95
    beta2: Annotated[float, within("[0, 1)")] = 0.95
    epsilon: Annotated[float, POSITIVE] = 1e-8
    factor_decay: Annotated[float, within("[0, 1)")] = 0.95
    refresh: Annotated[int, at_least(1)] = 10
    longest_side: Annotated[int, at_least(1)] = 10_000

    def init(self, theta: Vector, blocks: Sequence[Block] = ()) -> SOAPState:
        """Give the state before the first update.

        Raises
        ------
        UserError
            Without blocks.
        """
        check_vector("theta", theta)
        check_blocks("soap", blocks)
        count = sum(size * size for block in blocks for size in self._sides(block))
        factors, bases = np.zeros_like(theta, shape=count), np.zeros_like(theta, shape=count)
        means = theta * 0, theta * 0
        return SOAPState(*means, factors, bases, updates=0, average=self._first(theta))

    def direction(
        self, g: Vector, norm: float, state: SOAPState, objective: Objective, factor: float
    ) -> tuple[Vector, SOAPState]:
        """Make the matrix products and decompositions of each block on one of the ranks."""
        kind, t, blocks = g.dtype.type, state.updates + 1, objective.blocks
        mean = kind(self.beta1) * state.mean + kind(1 - self.beta1) * g
        works, sizes, start = list[Callable[[], Vector]](), list[int](), 0
        for block in blocks:
            end = start + sum(size * size for size in self._sides(block))
            works.append(self._work(block, start, end, g, mean, state))
            sizes.append(2 * block.rows * block.columns + 2 * (end - start))
            start = end
        mean_square, p, factors, bases = (v * 0 for v in (mean, mean, state.factors, state.bases))
        start = 0
        for block, size, found in zip(blocks, sizes, objective.spread(works, sizes), strict=True):
            own = block.rows * block.columns
            end = start + size // 2 - own
            block.of(mean_square).reshape(-1)[...] = found[:own]
            block.of(p).reshape(-1)[...] = found[own : 2 * own]
            factors[start:end] = found[2 * own : 2 * own + end - start]
            bases[start:end] = found[2 * own + end - start :]
            start = end
        p = kind(self.rate * factor / (1 - self.beta1**t)) * p
        return p, replace(state, mean=mean, mean_square=mean_square, factors=factors, bases=bases)

    def _sides(self, block: Block) -> tuple[int, ...]:
        """Give the sizes of the factors of a block: of its rows, of its columns; 0 for one without."""
        shape = block.rows, block.columns
        return tuple(size if min(shape) > 1 and size <= self.longest_side else 0 for size in shape)

    def _work(
        self, block: Block, start: int, end: int, g: Vector, mean: Vector, state: SOAPState
    ) -> Callable[[], Vector]:
        """Give the work of a block: V, the direction, L, R, Q_L and Q_R, one after the other."""
        kind, t, (rows, columns) = g.dtype.type, state.updates + 1, self._sides(block)
        keep = self.factor_decay if state.updates else 0.0

        def work() -> Vector:
            size = block.rows * block.columns
            found = np.zeros_like(g, shape=2 * size + 2 * (end - start))
            square, p = found[: 2 * size].reshape(2, block.rows, block.columns)
            factors, bases = found[2 * size :].reshape(2, -1)
            bases[...] = state.bases[start:end]
            own, ahead = block.of(g), block.of(mean)
            left, right = _split(bases, rows, columns)
            for matrix, a in zip(_split(factors, rows, columns), (own, own.T), strict=True):
                if matrix.size:
                    np.matmul(a, a.T, out=matrix)
            factors[...] = kind(keep) * state.factors[start:end] + kind(1 - keep) * factors
            if state.updates % self.refresh == 0:
                for matrix, basis in zip(_split(factors, rows, columns), (left, right), strict=True):
                    if matrix.size:
                        basis[...] = _eigenvectors(matrix, basis if state.updates else None)
            rotated, turned = (_rotated(m, left, right) for m in (own, ahead))
            before = block.of(state.mean_square)
            square[...] = kind(self.beta2) * before + kind(1 - self.beta2) * rotated * rotated
            corrected = np.sqrt(square / kind(1 - self.beta2**t)) + kind(self.epsilon)
            p[...] = _rotated(turned / corrected, left.T, right.T)
            return found

        return work


def _split(flat: Vector, rows: int, columns: int) -> tuple[Vector, Vector]:
    """Give the two square matrices that lie in a vector one after the other: views."""
    return flat[: rows * rows].reshape(rows, rows), flat[rows * rows :].reshape(columns, columns)


def _rotated(matrix: Vector, left: Vector, right: Vector) -> Vector:
    """Give left' matrix right; a side without a basis stays as it is."""
    matrix = np.matmul(left.T, matrix) if left.size else matrix
    return np.matmul(matrix, right) if right.size else matrix


def _eigenvectors(matrix: Vector, before: Vector | None) -> Vector:
    """Give the eigenvectors of a symmetric matrix, largest eigenvalue first, NaN where its numbers have none.

    From those of the update before by one orthogonal iteration, which moves each of them only as far as the
    matrix has changed: V goes with them.
    """
    size, kind = len(matrix), matrix.dtype.type
    matrix = matrix * 1
    tie = np.einsum("ii->", matrix) * kind(TIES / size**2)
    matrix.reshape(-1)[:: size + 1] += tie * np.arange(size, dtype=matrix.dtype, like=matrix)
    try:
        if before is not None:
            return np.linalg.qr(np.matmul(matrix, before))[0]
        return np.linalg.eigh(matrix)[1][:, ::-1]
    except np.linalg.LinAlgError:
        return matrix * kind(np.nan)
