"""K-FAC: the gradient preconditioned by a Kronecker-factored curvature (Martens and Grosse 2015).

The curvature of a block of theta is approximated by A x B, A for its rows (inputs) and B for its columns
(outputs); every group of columns has a separate B. With A = Q_A diag(a) Q_A' and B = Q_B diag(b) Q_B' the
preconditioned gradient for a damping gamma is, exactly,

    (A x B + gamma)^-1 G = Q_A ((Q_A' G Q_B) / (a_i b_j + gamma)) Q_B'

Each gamma costs one product with the eigenvectors of each side, in addition to one per side that all gammas
share. If the block is a vector (one row), systems with a B + gamma are solved instead, which takes a fraction
of the time of computing eigenvectors.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from hfmpi.measure.cost import Counts
from hfmpi.measure.linear_algebra import cholesky, eigh, repeated, together, triangular_solve
from hfmpi.optim.base import Objective
from hfmpi.optim.layout import Block, BlockLayout, Shape, Vector, factor_shape, split_factors
from hfmpi.optim.matrices import (
    Arrays,
    eigensystem,
    positive_solution,
    rotated,
    rotation,
    share_out,
)

__all__ = ["decomposition_layout", "preconditioned_gradients", "preconditioning"]


class _Group(NamedTuple):
    """The columns of a block that share a factor B; one rank computes each group.

    Attributes
    ----------
    block : Block
    number : int
        The index of the block.
    left, columns : int
        The index of the first column, and the number of columns.
    """

    block: Block
    number: int
    left: int
    columns: int

    def of(self, vector: Vector) -> Vector:
        """Return these columns of a vector (D,), as a view (rows, columns); of (n, D), (n, rows, columns)."""
        return self.block.of(vector)[..., self.left : self.left + self.columns]

    def factor(self, b: Vector) -> Vector:
        """Return the factor B of these columns, from the factor of the block."""
        return b[self.left // self.columns] if b.ndim == 3 else b


def _groups(blocks: Sequence[Block]) -> list[_Group]:
    """Return the groups of all blocks; the columns of a block whose factor B is diagonal form one group."""
    groups = list[_Group]()
    for number, block in enumerate(blocks):
        count = block.groups if len(factor_shape(block.columns, block.groups)) == 3 else 1
        width = block.columns // count
        groups += [_Group(block, number, left, width) for left in range(0, block.columns, width)]
    return groups


def decomposition_layout(blocks: Sequence[Block]) -> BlockLayout:
    """Return the layout of the eigenvalues a, b and the eigenvectors Q_A, Q_B of all groups of all blocks.

    The first group of a block also holds a and Q_A.
    """
    return BlockLayout(_groups(blocks), _decomposition)


def _decomposition(group: _Group) -> dict[str, Shape]:
    """Return the shapes of the arrays of a group; (0, 0) for a diagonal factor, which has no eigenvectors."""
    first = group.left == 0
    rows, left, right = group.block.rows, _vectors(group.block.rows), _vectors(group.columns)
    return {"a": (first * rows,), "Q_A": left if first else (0, 0), "b": (group.columns,), "Q_B": right}


def _vectors(side: int) -> Shape:
    return (side, side) if len(factor_shape(side)) == 2 else (0, 0)


def preconditioned_gradients(
    objective: Objective,
    gradient: Vector,
    factors: Vector,
    decomposition: Vector,
    dampings: Sequence[float],
    refresh: bool,
) -> tuple[Vector, Vector]:
    """Compute (A x B + gamma)^-1 g for each gamma, (n, D), and the decomposition of the factors.

    With `refresh` the factors are decomposed; otherwise `decomposition` is used and returned. If
    `decomposition` is empty, the new one is not stored, and the returned one is empty too.
    """
    kind, blocks = gradient.dtype.type, objective.blocks
    groups, both, layout = _groups(blocks), split_factors(blocks, factors), decomposition_layout(blocks)
    returned = refresh and decomposition.size > 0
    before = [] if refresh else layout.views(decomposition)
    of_rows = {group.number: old for group, old in zip(groups, before, strict=False) if not group.left}

    @lru_cache(maxsize=1)  # a rank computes its groups of a block in sequence
    def rows_decomposed(number: int) -> tuple[Vector, Vector]:
        return _decompose(both[number][1])

    def fill(i: int, new: Arrays) -> None:
        group = groups[i]
        if refresh and not returned and _is_vector(group):
            a, b = float(both[group.number][1][0, 0]), group.factor(both[group.number][2])
            for gamma, out in zip(dampings, new["gradients"], strict=True):
                out[...] = _solved(b, max(a, 0.0), gamma, group.of(gradient))
            return
        if refresh:
            a, q_a = rows_decomposed(group.number)
            b, q_b = _decompose(group.factor(both[group.number][2]))
        else:
            a, q_a = of_rows[group.number]["a"], of_rows[group.number]["Q_A"]
            b, q_b = before[i]["b"], before[i]["Q_B"]
        if returned:
            new["b"][...], new["Q_B"][...] = b, q_b
            if not group.left:
                new["a"][...], new["Q_A"][...] = a, q_a
        inside = rotated(group.of(gradient), q_a.T, q_b)
        for gamma, out in zip(dampings, new["gradients"], strict=True):
            scaled = a.reshape(-1, 1) * b
            scaled += kind(gamma)
            np.divide(inside, scaled, out=scaled)
            out[...] = rotated(scaled, q_a, q_b.T)

    preconditioned = np.zeros_like(gradient, shape=(len(dampings), gradient.size))
    targets: list[Arrays] = [{"gradients": group.of(preconditioned)} for group in groups]
    if returned:
        decomposition = np.zeros_like(decomposition)
        for target, arrays in zip(targets, layout.views(decomposition), strict=True):
            target |= arrays
    share_out(objective, targets, gradient, fill)
    return preconditioned, decomposition


def preconditioning(blocks: Sequence[Block], dampings: int, refresh: bool, kept: bool = False) -> Counts:
    """Return the linear algebra of `preconditioned_gradients` for this number of dampings.

    `kept` is True if the decomposition is stored.
    """

    def of(group: _Group) -> Counts:
        if refresh and not kept and _is_vector(group):
            n = group.columns
            return together([cholesky(n) + repeated(triangular_solve(n), 2)] * dampings)
        left, right = _vectors(group.block.rows)[0], _vectors(group.columns)[0]
        sides = (left if group.left == 0 else 0, right)  # A is decomposed for all groups of the block
        decompositions = together([eigh(side) for side in sides if side and refresh])
        rotations = [rotation(group.block.rows, group.columns, left, right)] * dampings
        return decompositions + rotations[0] + together(rotations)

    return together(map(of, _groups(blocks)))


def _is_vector(group: _Group) -> bool:
    """Return whether the block is a vector and the factor B of the group is a full matrix."""
    return group.block.rows == 1 and len(factor_shape(group.columns)) == 2


def _solved(b: Vector, a: float, gamma: float, right: Vector) -> Vector:
    """Return (a B + gamma)^-1 right' as a row (1, n); NaN where that fails."""
    try:
        return positive_solution(b, a, gamma, right)
    except np.linalg.LinAlgError:
        return right * np.nan


def _decompose(factor: Vector) -> tuple[Vector, Vector]:
    """Compute the eigenvalues, with negative ones set to zero, and the eigenvectors; NaN if that fails.

    For a diagonal factor the array of eigenvectors is empty, (0, 0).
    """
    values, vectors = factor, np.zeros_like(factor, shape=(0, 0))
    if factor.ndim == 2:
        try:
            values, vectors = eigensystem(factor)
        except np.linalg.LinAlgError:
            values, vectors = factor[0] * np.nan, factor * np.nan
    return np.maximum(values, values.dtype.type(0)), vectors
