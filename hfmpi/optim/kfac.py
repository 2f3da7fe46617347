"""Directions of K-FAC: the gradient over a Kronecker-factored curvature (Martens and Grosse 2015).

The curvature of a block of theta is about A x B, A of its rows (inputs) and B of its columns (outputs). With
A = Q_A diag(a) Q_A' and B = Q_B diag(b) Q_B' the damped direction is, exactly,

    (A x B + gamma)^-1 G = Q_A ((Q_A' G Q_B) / (a_i b_j + gamma)) Q_B'

for every gamma at the cost of two products each.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from hfmpi.optim.base import Matrix, Objective
from hfmpi.optim.layout import Block, Vector, factor_shape, split_factors

__all__ = ["decomposition_size", "directions", "products"]


def decomposition_size(blocks: Sequence[Block]) -> int:
    """Give the numbers of eigenvalues and eigenvectors of A and B of all blocks."""
    return sum(_own(block) for block in blocks)


def _own(block: Block) -> int:
    return sum(side + _vectors(side) ** 2 for side in (block.rows, block.columns))


def _vectors(side: int) -> int:
    """Give the eigenvectors of a factor, of which a diagonal has none."""
    return side if len(factor_shape(side)) == 2 else 0


def directions(
    objective: Objective,
    gradient: Vector,
    factors: Vector,
    decomposition: Vector,
    dampings: Sequence[float],
    refresh: bool,
) -> tuple[list[Vector], Vector]:
    """Give (A x B + gamma)^-1 g for each gamma, (D,) each, and the decomposition of the factors.

    A block is one rank's business. With `refresh` its factors are decomposed anew, else the decomposition is
    the one that is given.
    """
    works, sizes, places = list[Callable[[], Vector]](), list[int](), list[tuple[Block, int, int]]()
    at = 0
    for block, *both in split_factors(objective.blocks, factors):
        before = decomposition[at : at + _own(block)]
        works.append(_work(block.of(gradient), both if refresh else [], before, dampings))
        sizes.append(_own(block) + len(dampings) * block.rows * block.columns)
        places.append((block, at, at + _own(block)))
        at += _own(block)
    found, after = [gradient * 0 for _ in dampings], decomposition * 0
    for (block, at, end), result in zip(places, objective.spread(works, sizes), strict=True):
        after[at:end] = result[: end - at]
        for direction, own in zip(found, result[end - at :].reshape(len(dampings), -1), strict=True):
            block.of(direction).reshape(-1)[...] = own
    return found, after


def products(blocks: Sequence[Block], factors: Vector, v: Vector) -> Matrix:
    """Give V (A x B) V' of all blocks, (k, k) float64, for directions v (k, D)."""
    found = np.zeros((len(v), len(v)))
    for block, a, b in split_factors(blocks, factors):
        own = v[:, block.start : block.start + block.rows * block.columns]
        mapped = _times(_times(own.reshape(-1, block.rows, block.columns), a, -2), b, -1)
        found += np.array(np.matmul(own, mapped.reshape(own.shape).T).tolist())
    return (found + found.T) / 2


def _work(
    g: Vector, factors: Sequence[Vector], before: Vector, dampings: Sequence[float]
) -> Callable[[], Vector]:
    """Give the work of a block: a, Q_A, b, Q_B and the directions, one after the other."""
    kind, (rows, columns) = g.dtype.type, g.shape

    def work() -> Vector:
        found = np.zeros_like(g, shape=before.size + len(dampings) * g.size)
        found[: before.size] = before
        (a, q_a), (b, q_b) = _parts(found[: before.size], rows, columns)
        if factors:
            for factor, values, vectors in zip(factors, (a, b), (q_a, q_b), strict=True):
                _decompose(factor, values, vectors)
        turned = _turned(_turned(g, q_a.T, -2), q_b, -1)
        curvature = a.reshape(-1, 1) * b
        for gamma, out in zip(dampings, found[before.size :].reshape(len(dampings), -1), strict=True):
            damped = _turned(_turned(turned / (curvature + kind(gamma)), q_a, -2), q_b.T, -1)
            out[...] = damped.reshape(-1)
        return found

    return work


def _parts(decomposition: Vector, rows: int, columns: int) -> list[tuple[Vector, Vector]]:
    """Give eigenvalues (side,) and eigenvectors (side, side), or (0, 0), of both factors: views."""
    found, start = [], 0
    for side in (rows, columns):
        middle, many = start + side, _vectors(side)
        end = middle + many * many
        found.append((decomposition[start:middle], decomposition[middle:end].reshape(many, many)))
        start = end
    return found


def _times(matrix: Vector, factor: Vector, axis: int) -> Vector:
    """Give factor @ matrix along axis -2, or matrix @ factor along axis -1; a factor may be a diagonal."""
    if factor.ndim == 1:
        return matrix * (factor if axis == -1 else factor.reshape(-1, 1))
    return np.matmul(matrix, factor) if axis == -1 else np.matmul(factor, matrix)


def _turned(matrix: Vector, vectors: Vector, axis: int) -> Vector:
    """Give `_times` with eigenvectors, of which a diagonal has none."""
    return _times(matrix, vectors, axis) if vectors.size else matrix


def _decompose(factor: Vector, values: Vector, vectors: Vector) -> None:
    """Write eigenvalues, those below zero by rounding as zero, and eigenvectors; NaN where there are none."""
    if factor.ndim == 1:
        values[...] = factor
    else:
        try:
            values[...], vectors[...] = np.linalg.eigh(factor)
        except np.linalg.LinAlgError:
            values[...] = vectors[...] = factor.dtype.type(np.nan)
    np.maximum(values, values.dtype.type(0), out=values)
