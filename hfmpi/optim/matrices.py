"""Work on the matrices of theta, each of which is one rank's; and the rotations of K-FAC and SOAP.

NumPy's decompositions work on several copies of a matrix in double precision, which are larger than theta.
SciPy's overwrite the matrix, and keep its precision.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import cast

import numpy as np
from scipy import linalg

from hfmpi.measure.cost import Counts
from hfmpi.measure.linear_algebra import product
from hfmpi.optim.base import Objective
from hfmpi.optim.layout import Layout, Vector

__all__ = ["Arrays", "eigensystem", "orthonormal", "positive_solution", "rotated", "rotation", "share_out"]

Arrays = dict[str, Vector]
"""The arrays of a block by name."""


def share_out(
    objective: Objective, targets: Sequence[Arrays], like: Vector, fill: Callable[[int, Arrays], None]
) -> None:
    """Compute the arrays of each block on one of the ranks, and write them to the targets on every rank.

    One rank computes them in place. Several ranks send them in one message.

    Parameters
    ----------
    objective : Objective
        Its ranks share the work.
    targets : sequence of Arrays
        The arrays of each block, which are overwritten.
    like : vector
        A vector with the dtype and device of the arrays.
    fill : callable
        (index of the block, its arrays) -> None; writes the result into all of the arrays.
    """
    layouts = [Layout({name: array.shape for name, array in each.items()}) for each in targets]
    alone = objective.ranks == 1

    def work(i: int) -> Vector:
        if alone:
            fill(i, targets[i])
            for array in targets[i].values():
                array += 0  # no -0.0, as with several ranks
            return like[:0]
        vector = np.zeros_like(like, shape=layouts[i].size)
        fill(i, layouts[i].views(vector))
        return vector

    works = [partial(work, i) for i in range(len(targets))]
    results = objective.spread(works, [layout.size for layout in layouts])
    if alone:
        return
    for layout, target, result in zip(layouts, targets, results, strict=True):
        for name, array in layout.views(result).items():
            target[name][...] = array


def eigensystem(matrix: Vector) -> tuple[Vector, Vector]:
    """Return the eigenvalues of a symmetric matrix, the smallest first, and its eigenvectors, columns.

    They are computed in the precision of the matrix, whose own rounding is as large. If that fails in
    float32, float64 is tried.

    Raises
    ------
    LinAlgError
        If that fails.
    """
    if not isinstance(matrix, np.ndarray):
        return cast("tuple[Vector, Vector]", np.linalg.eigh(matrix))
    try:
        values, vectors = _eigensystem(matrix * 1)
    except np.linalg.LinAlgError:
        if matrix.dtype == np.float64:
            raise
        values, vectors = _eigensystem(matrix.astype(np.float64))
    return values.astype(matrix.dtype, copy=False), vectors.astype(matrix.dtype, order="C", copy=False)


def _eigensystem(matrix: Vector) -> tuple[Vector, Vector]:
    """Return the eigenvalues and eigenvectors of a matrix of the host, which is overwritten."""
    # LAPACK stores by columns: the transpose equals the matrix.
    values, vectors = linalg.eigh(matrix.T, driver="evd", overwrite_a=True, check_finite=False)
    return values, vectors


def orthonormal(matrix: Vector) -> Vector:
    """Return the factor Q of a square matrix, which may be overwritten, in its precision.

    Raises
    ------
    LinAlgError
        If that fails.
    """
    if isinstance(matrix, np.ndarray):
        return linalg.qr(matrix, overwrite_a=True, mode="economic", check_finite=False)[0]
    return np.linalg.qr(matrix)[0]


def positive_solution(matrix: Vector, scale: float, shift: float, right: Vector) -> Vector:
    """Return (scale matrix + shift)^-1 right' as a row (1, n), computed in double precision.

    The matrix is positive semidefinite up to rounding: where a Cholesky decomposition fails, a general one
    follows.

    Raises
    ------
    LinAlgError
        If that fails too.
    """

    def shifted() -> Vector:
        result = matrix.astype(np.float64)
        result *= scale
        result.reshape(-1)[:: len(matrix) + 1] += shift
        return result

    wide = right.astype(np.float64).T
    if isinstance(matrix, np.ndarray):
        _, solution, info = linalg.lapack.dposv(shifted().T, wide, lower=True, overwrite_a=True)
        if not info:
            return solution.T
    return np.linalg.solve(shifted(), wide).T


def rotated(matrix: Vector, left: Vector, right: Vector) -> Vector:
    """Compute left @ matrix @ right; an empty array as rotation stands for the identity."""
    matrix = np.matmul(left, matrix) if left.size else matrix
    return np.matmul(matrix, right) if right.size else matrix


def rotation(rows: int, columns: int, left: int, right: int) -> Counts:
    """Return the cost of `rotated` for a matrix (rows, columns); `left` or `right` is 0 for no rotation."""
    work = product(rows, rows, columns) if left else Counts()
    return work + product(rows, columns, columns) if right else work
