"""Directions of K-FAC: the gradient over a Kronecker-factored curvature (Martens and Grosse 2015).

The curvature of a block of theta is about A x B, A of its rows (inputs) and B of its columns (outputs). With
A = Q_A diag(a) Q_A' and B = Q_B diag(b) Q_B' the damped direction is, exactly,

    (A x B + gamma)^-1 G = Q_A ((Q_A' G Q_B) / (a_i b_j + gamma)) Q_B'

for every gamma at the cost of two products each.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from hfmpi.optim.base import Block, Matrix, Objective, Vector

__all__ = ["decomposition_size", "directions", "factors_size", "products", "split"]


def factors_size(blocks: Sequence[Block]) -> int:
    """Give the numbers of A and B of all blocks."""
    return sum(block.rows**2 + block.columns**2 for block in blocks)


def split(blocks: Sequence[Block], factors: Vector) -> list[tuple[Block, Vector, Vector]]:
    """Give each block with its A and B, which lie one after the other in a vector: views."""
    found, start = [], 0
    for block in blocks:
        middle, end = start + block.rows**2, start + block.rows**2 + block.columns**2
        a = factors[start:middle].reshape(block.rows, block.rows)
        found.append((block, a, factors[middle:end].reshape(block.columns, block.columns)))
        start = end
    return found


def decomposition_size(blocks: Sequence[Block]) -> int:
    """Give the numbers of eigenvalues and eigenvectors of A and B of all blocks."""
    return sum(_own(block) for block in blocks)


def _own(block: Block) -> int:
    return block.rows * (block.rows + 1) + block.columns * (block.columns + 1)


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
    for block, *both in split(objective.blocks, factors):
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
    for block, a, b in split(blocks, factors):
        own = v[:, block.start : block.start + block.rows * block.columns]
        mapped = np.matmul(np.matmul(a, own.reshape(-1, block.rows, block.columns)), b)
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
        own = found[: before.size]
        split = rows * (rows + 1)
        a, q_a = own[:rows], own[rows:split].reshape(rows, rows)
        b, q_b = own[split : split + columns], own[split + columns :].reshape(columns, columns)
        if factors:
            for factor, values, vectors in zip(factors, (a, b), (q_a, q_b), strict=True):
                values[...], vectors[...] = _eigen(factor)
        turned = np.matmul(np.matmul(q_a.T, g), q_b)
        curvature = a.reshape(-1, 1) * b
        for gamma, out in zip(dampings, found[before.size :].reshape(len(dampings), -1), strict=True):
            damped = np.matmul(np.matmul(q_a, turned / (curvature + kind(gamma))), q_b.T)
            out[...] = damped.reshape(-1)
        return found

    return work


def _eigen(matrix: Vector) -> tuple[Vector, Vector]:
    """Give eigenvalues, those below zero by rounding as zero, and eigenvectors; NaN where there are none."""
    try:
        values, vectors = np.linalg.eigh(matrix)
    except np.linalg.LinAlgError:
        nothing = matrix * matrix.dtype.type(np.nan)
        return nothing[0], nothing
    return np.maximum(values, values.dtype.type(0)), vectors
