"""K-FAC: the gradient over a Kronecker-factored curvature (Martens and Grosse 2015).

The curvature of a block of theta is about A x B, A of its rows (inputs) and B of its columns (outputs). With
A = Q_A diag(a) Q_A' and B = Q_B diag(b) Q_B' the preconditioned gradient of a damping gamma is, exactly,

    (A x B + gamma)^-1 G = Q_A ((Q_A' G Q_B) / (a_i b_j + gamma)) Q_B'

at the cost of two products on each side for every gamma.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from hfmpi.measure.cost import Counts
from hfmpi.measure.linear_algebra import eigh, together
from hfmpi.optim.base import Objective
from hfmpi.optim.layout import Block, BlockLayout, Shape, Vector, factor_shape, split_factors
from hfmpi.optim.matrices import Arrays, rotated, rotation, share_out

__all__ = ["decomposition_layout", "preconditioned_gradients", "preconditioning"]


def decomposition_layout(blocks: Sequence[Block]) -> BlockLayout:
    """Return the layout of the eigenvalues a, b and the eigenvectors Q_A, Q_B of all blocks."""
    return BlockLayout(blocks, _decomposition)


def _decomposition(block: Block) -> dict[str, Shape]:
    """Return the shapes for a block; a diagonal factor has no eigenvectors, (0, 0)."""
    a, b = ((side, side) if len(factor_shape(side)) == 2 else (0, 0) for side in (block.rows, block.columns))
    return {"a": (block.rows,), "Q_A": a, "b": (block.columns,), "Q_B": b}


def preconditioned_gradients(
    objective: Objective,
    gradient: Vector,
    factors: Vector,
    decomposition: Vector,
    dampings: Sequence[float],
    refresh: bool,
) -> tuple[list[Vector], Vector]:
    """Compute (A x B + gamma)^-1 g for each gamma, (D,) each, and the decomposition of the factors.

    Each block is one rank's work. With `refresh` its factors are decomposed, otherwise the decomposition is
    the one that was passed.
    """
    kind, blocks = gradient.dtype.type, objective.blocks
    layout, both = decomposition_layout(blocks), split_factors(blocks, factors)
    before = layout.views(decomposition)

    def fill(i: int, new: Arrays) -> None:
        block, *matrices = both[i]
        for matrix, values, vectors in zip(matrices, ("a", "b"), ("Q_A", "Q_B"), strict=True):
            if refresh:
                _decompose(matrix, new[values], new[vectors])
            else:
                new[values][...], new[vectors][...] = before[i][values], before[i][vectors]
        q_a, q_b = new["Q_A"], new["Q_B"]
        inside = rotated(block.of(gradient), q_a.T, q_b)
        curvature = new["a"].reshape(-1, 1) * new["b"]
        for gamma, out in zip(dampings, new["gradients"], strict=True):
            out[...] = rotated(inside / (curvature + kind(gamma)), q_a, q_b.T)

    def results(block: Block) -> dict[str, Shape]:
        return {**_decomposition(block), "gradients": (len(dampings), block.rows, block.columns)}

    preconditioned, after = [gradient * 0 for _ in dampings], decomposition * 0
    new_blocks = share_out(objective, BlockLayout(blocks, results), gradient, fill)
    for block, new, arrays in zip(blocks, new_blocks, layout.views(after), strict=True):
        for vector, matrix in zip(preconditioned, new["gradients"], strict=True):
            block.of(vector)[...] = matrix
        for name, array in arrays.items():
            array[...] = new[name]
    return preconditioned, after


def preconditioning(blocks: Sequence[Block], dampings: int, refresh: bool) -> Counts:
    """Return the linear algebra of `preconditioned_gradients` for so many dampings."""

    def of(block: Block) -> Counts:
        left, right = (shape[0] for name, shape in _decomposition(block).items() if name.startswith("Q"))
        decompositions = together([eigh(side) for side in (left, right) if side and refresh])
        rotations = [rotation(block.rows, block.columns, left, right)] * dampings
        return decompositions + rotations[0] + together(rotations)

    return together(map(of, blocks))


def _decompose(factor: Vector, values: Vector, vectors: Vector) -> None:
    """Write eigenvalues, with negative ones set to zero, and eigenvectors; NaN where that fails."""
    if factor.ndim == 1:
        values[...] = factor
    else:
        try:
            values[...], vectors[...] = np.linalg.eigh(factor)
        except np.linalg.LinAlgError:
            values[...] = vectors[...] = factor.dtype.type(np.nan)
    np.maximum(values, values.dtype.type(0), out=values)
