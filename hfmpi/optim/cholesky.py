"""Solutions of (A + shift I) x = b of a symmetric matrix A by Cholesky factorization, shared by the ranks.

A is positive semidefinite and the same on all ranks. A small matrix is factored by one rank, which sends the
solutions alone. A larger one is factored from left to right (Golub and Van Loan, Matrix Computations, section
4.2): a panel of columns is

    C = A[k:, k:k+b] + shift I - L[k:, :k] L[k:k+b, :k]'        L[k:k+b, k:k+b] = cholesky(C[:b])
    L[k+b:, k:k+b] = C[b:] L[k:k+b, k:k+b]^-T

whose rows are divided among the ranks in blocks of fixed height, with one message a panel
(`Objective.spread`). Every rank that has a block computes the small corner itself. Whichever rank computes a
block, the numbers are the same on processors of one kind; and every number that all ranks go on with comes
from one rank.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, partial

import numpy as np

from hfmpi.optim.base import Matrix, Objective

__all__ = ["Cholesky"]

PANEL = 256
"""Columns of a panel, and rows of a block."""

ALONE = 1_000
"""Matrices up to this side are factored by one rank: their factor is soon computed, and is not sent."""


class Cholesky:
    """The factor L of A + shift I = L L'.

    Parameters
    ----------
    objective : Objective
        Its ranks share the work; all of them call the same methods.
    matrix : (n, n) float64
        A, the same on all ranks; unchanged.
    shift : float
    """

    def __init__(self, objective: Objective, matrix: Matrix, shift: float) -> None:
        self.objective, self.matrix, self.shift = objective, matrix, shift
        self._shared = _shared(objective, matrix, shift) if len(matrix) > ALONE else None

    def solve(self, b: Matrix) -> Matrix | None:
        """Compute (A + shift I)^-1 b of b (n, k); None if the matrix is not positive definite up to rounding.

        One rank computes it, so that all ranks have the same numbers.
        """

        def work() -> Matrix:
            lower = self._shared if len(self.matrix) > ALONE else _factored(self.matrix, self.shift)
            return np.full(b.size, np.nan) if lower is None else _substituted(lower, b).reshape(-1)

        (x,) = self.objective.spread([work], [b.size], True)
        return x.reshape(b.shape) if np.isfinite(x).all() else None


def _factored(matrix: Matrix, shift: float) -> Matrix | None:
    """Return the factor, computed on this rank, or None."""
    shifted = matrix.copy()
    shifted.reshape(-1)[:: len(matrix) + 1] += shift
    try:
        lower: Matrix = np.asarray(np.linalg.cholesky(shifted), np.float64)
    except np.linalg.LinAlgError:
        return None
    return lower


def _shared(objective: Objective, matrix: Matrix, shift: float) -> Matrix | None:
    """Return the factor, computed by all ranks, or None."""
    size = len(matrix)
    lower = np.zeros((size, size))
    for left in range(0, size, PANEL):
        columns = slice(left, min(left + PANEL, size))
        panel = _Panel(matrix, shift, lower, columns)
        blocks = [slice(top, min(top + PANEL, size)) for top in range(left, size, PANEL)]
        works = [partial(panel.block, rows) for rows in blocks]
        width = columns.stop - left
        sizes = [(rows.stop - rows.start) * width for rows in blocks]
        for rows, part in zip(blocks, objective.spread(works, sizes, True), strict=True):
            lower[rows, columns] = part.reshape(-1, width)
        if not np.isfinite(lower[left:, columns]).all():
            return None
    return lower


@dataclass(frozen=True, eq=False)
class _Panel:
    """The work on a panel of columns, where all columns to its left in `lower` are known."""

    matrix: Matrix
    shift: float
    lower: Matrix
    columns: slice[int, int, int]

    def block(self, rows: slice[int, int, int]) -> Matrix:
        """Compute a block of rows of the panel, one after the other; NaN where there is no factor."""
        factor, inverse = self._corner
        block = factor if rows == self.columns else np.matmul(self._updated(rows), inverse.T)
        return block.reshape(-1)

    @cached_property
    def _corner(self) -> tuple[Matrix, Matrix]:
        """The corner of L and its inverse."""
        updated = self._updated(self.columns)
        factor = _factored(updated, self.shift)
        if factor is None:
            return np.full_like(updated, np.nan), np.full_like(updated, np.nan)
        return factor, _inverse(factor)

    def _updated(self, rows: slice[int, int, int]) -> Matrix:
        left = self.columns.start
        done: Matrix = np.matmul(self.lower[rows, :left], self.lower[self.columns, :left].T)
        return self.matrix[rows, self.columns] - done


def _inverse(lower: Matrix) -> Matrix:
    """Return the inverse of a small triangular matrix, by halves.

    [A 0; B C]^-1 = [A^-1 0; -C^-1 B A^-1 C^-1]
    """
    half, inverse = len(lower) // 2, np.zeros_like(lower)
    if half < 16:
        inverse[...] = np.tril(np.linalg.inv(lower))
        return inverse
    top, bottom = _inverse(lower[:half, :half]), _inverse(lower[half:, half:])
    inverse[:half, :half], inverse[half:, half:] = top, bottom
    inverse[half:, :half] = -bottom @ (lower[half:, :half] @ top)
    return inverse


def _substituted(lower: Matrix, b: Matrix) -> Matrix:
    """Return L'^-1 L^-1 b."""
    x, size = b.copy(), len(lower)
    parts = [slice(start, min(start + PANEL, size)) for start in range(0, size, PANEL)]
    for part in parts:
        x[part] = np.linalg.solve(lower[part, part], x[part] - lower[part, : part.start] @ x[: part.start])
    for part in reversed(parts):
        rest = x[part] - lower[part.stop :, part].T @ x[part.stop :]
        x[part] = np.linalg.solve(lower[part, part].T, rest)
    return x
