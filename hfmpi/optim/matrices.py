"""Sharing of work on the matrices of theta, one matrix per rank; and the rotations of K-FAC and SOAP."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np

from hfmpi.measure.cost import Counts
from hfmpi.measure.linear_algebra import product
from hfmpi.optim.base import Objective
from hfmpi.optim.layout import BlockLayout, Vector

__all__ = ["Arrays", "rotated", "rotation", "share_out"]

Arrays = dict[str, Vector]
"""The arrays of a block by name."""


def share_out(
    objective: Objective, layout: BlockLayout, like: Vector, fill: Callable[[int, Arrays], None]
) -> list[Arrays]:
    """Compute the arrays of each block on one of the ranks; return those of all blocks on every rank.

    Parameters
    ----------
    objective : Objective
        Its ranks share the work.
    layout : BlockLayout
        The arrays of each block.
    like : vector
        A vector with the dtype and device of the arrays.
    fill : callable
        (index of the block, its arrays) -> None; writes the result into the arrays, which are zero before.
    """

    def work(index: int) -> Vector:
        vector = np.zeros_like(like, shape=layout.layouts[index].size)
        fill(index, layout.layouts[index].views(vector))
        return vector

    works = [partial(work, index) for index in range(len(layout.layouts))]
    results = objective.spread(works, [each.size for each in layout.layouts])
    return [each.views(result) for each, result in zip(layout.layouts, results, strict=True)]


def rotated(matrix: Vector, left: Vector, right: Vector) -> Vector:
    """Compute left @ matrix @ right; an empty array as rotation stands for the identity."""
    matrix = np.matmul(left, matrix) if left.size else matrix
    return np.matmul(matrix, right) if right.size else matrix


def rotation(rows: int, columns: int, left: int, right: int) -> Counts:
    """Return the cost of `rotated` for a matrix (rows, columns); `left` or `right` is 0 for no rotation."""
    work = product(rows, rows, columns) if left else Counts()
    return work + product(rows, columns, columns) if right else work
