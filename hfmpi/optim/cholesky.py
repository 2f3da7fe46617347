"""Solutions of (A + shift I) x = b for a symmetric matrix A by Cholesky factorization, shared by the ranks.

A is positive semidefinite and the same on all ranks. If A is small, one rank per shift factors the matrix and
sends only the solution. A larger matrix is factored from left to right (Golub and Van Loan, Matrix
Computations, section 4.2): a panel of columns is

    C = A[k:, k:k+b] + shift I - L[k:, :k] L[k:k+b, :k]'        L[k:k+b, k:k+b] = cholesky(C[:b])
    L[k+b:, k:k+b] = C[b:] L[k:k+b, k:k+b]^-T

The rows of a panel are divided among the ranks in blocks of fixed height, with one message per panel
(`Objective.spread`). Every rank that has a block also computes the small corner. On processors of the same
kind the result of a block does not depend on the rank that computes it, and every number that all ranks use
comes from one rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, partial

import numpy as np
from scipy.linalg import cho_solve
from scipy.linalg.blas import dtrsm
from scipy.linalg.lapack import dpotrf

from hfmpi.optim.base import Matrix, Objective

__all__ = ["ALONE", "solutions"]

PANEL = 256
"""Columns of a panel, and rows of a block."""

ALONE = 2_000
"""Matrices up to this side are factored by one rank each, because that is fast and the factor is not sent."""


Factors = dict[float, Matrix | None]
"""The factors that this rank has computed, by shift; None if the matrix has no Cholesky factor."""


def solutions(
    objective: Objective,
    matrix: Matrix,
    shifts: Sequence[float],
    bs: Sequence[Matrix | None],
    known: Factors,
) -> list[Matrix | None]:
    """Compute (A + shift I)^-1 b for several shifts, each with a separate b; collective.

    Parameters
    ----------
    objective : Objective
        Its ranks share the work.
    matrix : (n, n) float64
        A, the same on all ranks; it is not changed.
    shifts : sequence of float
    bs : sequence of (n, k) float64 or None
        b of each shift; None if the solution of a shift is not needed now. A shift is assigned to the same
        rank in every call that lists the same shifts, so that the rank can reuse its factor.
    known : dict
        Factors of this matrix that this rank computed before; the new ones are added.

    Returns
    -------
    list of (n, k) or None
        None if the matrix is not positive definite up to rounding, or if b is None.
    """
    if len(matrix) > ALONE:
        for shift, b in zip(shifts, bs, strict=True):
            if b is not None and shift not in known:  # the same decision on all ranks
                known[shift] = _shared(objective, matrix, shift)
    works = [partial(_solution, matrix, shift, b, known) for shift, b in zip(shifts, bs, strict=True)]
    found = objective.spread(works, [len(matrix) if b is None else b.size for b in bs], True)
    return [
        None if b is None or not np.isfinite(x).all() else x.reshape(b.shape)
        for x, b in zip(found, bs, strict=True)
    ]


def _solution(matrix: Matrix, shift: float, b: Matrix | None, known: Factors) -> Matrix:
    """Compute the solution (n * k,) on this rank; return NaN if there is no factor and 0 if b is None."""
    if b is None:
        return np.zeros(len(matrix))
    if shift not in known:
        known[shift] = _factored(matrix, shift)
    return _substituted(known[shift], b)


def _factored(matrix: Matrix, shift: float) -> Matrix | None:
    """Return the factor L, whose upper triangle is undefined, or None if there is no factor."""
    shifted = matrix.copy()
    shifted.reshape(-1)[:: len(matrix) + 1] += shift
    # LAPACK stores matrices by columns: the transpose, which equals the matrix, is factored without a copy.
    # OpenBLAS needs 10 % more time for the upper triangle.
    lower: Matrix
    lower, info = dpotrf(shifted.T, lower=True, overwrite_a=True, clean=False)
    return None if info else lower


def _shared(objective: Objective, matrix: Matrix, shift: float) -> Matrix | None:
    """Compute the factor L on all ranks together; return None if there is no factor."""
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
    """The work on a panel of columns; all columns to its left in `lower` have been computed."""

    matrix: Matrix
    shift: float
    lower: Matrix
    columns: slice[int, int, int]

    def block(self, rows: slice[int, int, int]) -> Matrix:
        """Compute a block of rows of the panel, (m * n,) in C order; return NaN if there is no factor."""
        if rows == self.columns and self._corner is not None:
            return np.tril(self._corner).reshape(-1)
        return _divided(self._corner, self._updated(rows)).reshape(-1)

    @cached_property
    def _corner(self) -> Matrix | None:
        """The diagonal block of L, or None if there is no factor."""
        return _factored(self._updated(self.columns), self.shift)

    def _updated(self, rows: slice[int, int, int]) -> Matrix:
        left = self.columns.start
        done: Matrix = np.matmul(self.lower[rows, :left], self.lower[self.columns, :left].T)
        return self.matrix[rows, self.columns] - done


def _divided(lower: Matrix | None, block: Matrix) -> Matrix:
    """Return B L^-T for a C-contiguous block B (m, n), which is overwritten; NaN without a factor."""
    if lower is None:
        return np.full(block.shape, np.nan)
    by_columns: Matrix = dtrsm(1.0, lower, block.T, lower=True, overwrite_b=True)  # L^-1 B' without a copy
    return by_columns.T


def _substituted(lower: Matrix | None, b: Matrix) -> Matrix:
    """Return L'^-1 L^-1 b as a vector (n * k,); NaN without a factor."""
    if lower is None:
        return np.full(b.size, np.nan)
    by_columns = (lower, True) if lower.flags.f_contiguous else (lower.T, False)  # avoids a copy
    x: Matrix = cho_solve(by_columns, b, check_finite=False)
    return x.reshape(-1)
