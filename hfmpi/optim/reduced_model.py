"""The quadratic model of a risk in the space of few vectors, which are cut into parts and normalised first.

    V     the vectors, k x D, rows of length one           g   the gradient, D
    M     V G V', k x k

The step of a lambda is V' c with c = -(S + r diag S)^-1 V g and S = M + lambda V V'; r is in RELATIVE.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from hfmpi.measure.cost import Counts
from hfmpi.measure.linear_algebra import eigh, gram, product, together
from hfmpi.optim.base import Matrix, Objective
from hfmpi.optim.layout import Block, Vector

__all__ = ["Basis", "Part", "ReducedModel", "Step", "normalised", "parts_of"]

RELATIVE = {"float32": 1e-6, "float64": 1e-12}
"""Part of the system's diagonal that is added to it: vectors may be equal or parallel up to rounding.

Below the rounding of the vectors the step would depend on the order of summation. What is added also limits
how fast the step converges, so that float64 has less.
"""


class Part(NamedTuple):
    """The rows from top to bottom and columns from left to right of a block."""

    block: Block
    top: int
    bottom: int
    left: int
    right: int

    def of(self, vector: Vector) -> Vector:
        """Return the part of a vector (D,) as a view (rows, columns)."""
        return self.block.of(vector)[self.top : self.bottom, self.left : self.right]

    @property
    def size(self) -> int:
        """The number of parameters."""
        return (self.bottom - self.top) * (self.right - self.left)

    def stacked(self, vectors: Sequence[Vector]) -> Vector:
        """Return the part of several vectors, one row each."""
        parts = [self.of(vector) for vector in vectors]
        stack = np.zeros_like(parts[0], shape=(len(parts), *parts[0].shape))
        for row, values in zip(stack, parts, strict=True):
            row[...] = values
        return stack.reshape(len(parts), -1)


def parts_of(blocks: Sequence[Block]) -> list[Part]:
    """Cut blocks into parts, each with one kind of inputs and one kind of outputs of a block."""
    parts = []
    for block in blocks:
        edges, width = (0, *block.cuts, block.rows), block.columns // block.groups
        for top, bottom in pairwise(edges):
            starts = range(0, block.groups * width, width)
            parts += [Part(block, top, bottom, left, left + width) for left in starts]
    return parts


@dataclass(frozen=True)
class Basis:
    """Vectors of length one, each zero outside one part, so that inner products are computed part by part.

    Attributes
    ----------
    v : (k, D)
    parts : list of (Part, list of int)
        The parts, and the rows of v that lie in each.
    """

    v: Vector
    parts: list[tuple[Part, list[int]]]

    def inner_products(self, g: Vector) -> tuple[Matrix, Matrix]:
        """Compute V V' (k, k) and V g (k,), in float64."""
        count = len(self.v)
        gram, slopes = np.zeros((count, count)), np.zeros(count)
        for part, rows in self.parts:
            stack = part.stacked([self.v[row] for row in rows]).astype(np.float64)
            gram[np.ix_(rows, rows)] = np.matmul(stack, stack.T).tolist()
            slopes[rows] = np.matmul(stack, part.of(g).reshape(-1).astype(np.float64)).tolist()
        return gram, slopes

    def along(self, rows: Vector) -> Vector:
        """Compute V S' (k, n) of rows S (n, D), which is left in the type of the rows."""
        products = np.zeros_like(rows, shape=(len(self.v), len(rows)))
        for part, indices in self.parts:
            stack = part.stacked([self.v[row] for row in indices])
            products[indices[0] : indices[-1] + 1] = np.matmul(stack, part.stacked(rows).T)
        return products

    def along_work(self, rows: int) -> Counts:
        """Return the linear algebra of `along` for so many rows, and of the products among them."""
        each = together(product(len(indices), part.size, rows) for part, indices in self.parts)
        return each + gram(len(self.v), rows)

    @property
    def work(self) -> Counts:
        """The linear algebra of `inner_products`."""
        return together(
            work
            for part, rows in self.parts
            for work in (gram(len(rows), part.size), product(len(rows), part.size))
        )

    def combined(self, weights: Sequence[float]) -> Vector:
        """Compute V' c, (D,)."""
        p, kind = self.v[0] * 0, self.v.dtype.type
        for part, rows in self.parts:
            total = part.of(p)
            for row in rows:
                total += kind(weights[row]) * part.of(self.v[row])
        return p


def normalised(objective: Objective, vectors: Sequence[Vector], parts: Sequence[Part]) -> Basis | None:
    """Cut vectors (D,) into parts of length one, without those of length zero; None if one is not finite."""
    stacks = [part.stacked(vectors) for part in parts]
    squares = [np.einsum("ij,ij->i", stack, stack, dtype=np.float64).tolist() for stack in stacks]
    agreed = objective.agree(tuple(square for each in squares for square in each))
    if not all(map(math.isfinite, agreed)):
        return None
    v = np.zeros_like(vectors[0], shape=(sum(square > 0 for square in agreed), vectors[0].size))
    remaining, nonzero, row = iter(agreed), [], 0
    for part, stack in zip(parts, stacks, strict=True):
        first = row
        for values in stack:
            square = next(remaining)
            if square > 0:
                out = part.of(v[row])
                out[...] = (v.dtype.type(1 / math.sqrt(square)) * values).reshape(out.shape)
                row += 1
        if row > first:
            nonzero.append((part, [*range(first, row)]))
    return Basis(v, nonzero)


class Step(NamedTuple):
    """A step p (D,), -g' p and p' G p."""

    p: Vector
    descent: float
    curvature: float

    @property
    def promise(self) -> float:
        """The decrease that the model predicts."""
        return self.descent - self.curvature / 2

    def shortened(self, part: float) -> Step:
        """Return this part of the step."""
        p = self.p.dtype.type(part) * self.p
        return Step(p, part * self.descent, part * part * self.curvature)


@dataclass(frozen=True)
class ReducedModel:
    """The model in the space of a basis: M and V V' (k, k), and V g (k,)."""

    objective: Objective
    basis: Basis
    m: Matrix
    gram: Matrix
    slopes: Matrix

    @property
    def work(self) -> Counts:
        """The linear algebra of one step: eigenvalues, and three products of a matrix and a vector."""
        k = len(self.m)
        return eigh(k) + product(k, k) + product(k, k) + product(k, k)

    def step(self, damping: float) -> Step:
        """Compute the step V' c of a damping."""
        system = self.m + damping * self.gram
        diagonal = np.diag(system)
        scale = 1 / np.sqrt(np.where(diagonal > 0, diagonal, 1.0))
        try:
            values, vectors = np.linalg.eigh(scale[:, None] * system * scale)
        except np.linalg.LinAlgError:  # numbers that are not finite
            return Step(self.basis.v[0] * np.nan, math.nan, math.nan)
        floor = RELATIVE[self.basis.v.dtype.name]
        along = np.matmul(vectors.T, scale * self.slopes) / (np.maximum(values, 0) + floor)
        c = -scale * np.matmul(vectors, along)
        bounds = -float(self.slopes @ c), max(float(np.matmul(c, self.m) @ c), 0.0)
        *weights, descent, curvature = self.objective.agree((*map(float, c), *bounds))
        return Step(self.basis.combined(weights), max(descent, 0.0), curvature)
