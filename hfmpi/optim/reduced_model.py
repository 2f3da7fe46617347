"""The quadratic model of a risk in the space of few vectors, which are cut into parts and normalised first.

    V     the vectors, k x D, rows of length one           g   the gradient, D
    M     V G V', k x k

V is not stored: its rows are parts of a few vectors of D numbers, times a scale each.

The step of a lambda is V' c with c = -(S + r diag S)^-1 V g and S = M + lambda V V'; r is in RELATIVE.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import NamedTuple

import numpy as np

from hfmpi.measure.cost import Counts
from hfmpi.measure.linear_algebra import eigh, gram, product, together
from hfmpi.optim.base import Matrix, Objective
from hfmpi.optim.layout import Along, Directions, Part, Vector

__all__ = ["Basis", "ReducedModel", "Step", "normalised"]

RELATIVE = {"float32": 1e-6, "float64": 1e-12}
"""Part of the system's diagonal that is added to it: vectors may be equal or parallel up to rounding.

Below the rounding of the vectors the step would depend on the order of summation. What is added also limits
how fast the step converges, so that float64 has less.
"""

STACKED = 2**18
"""Entries of the parts of vectors that are multiplied in float64 at a time: few enough for the cache."""


class Row(NamedTuple):
    """A row of V: the part of a vector, by its index, times a scale."""

    part: Part
    vector: int
    scale: float


class Basis(Directions):
    """Vectors of length one, each zero outside one part, so that inner products are computed part by part.

    Parameters
    ----------
    vectors : sequence of (D,)
        Of which the rows are parts. They must not change.
    rows : sequence of Row
        Those of a part follow one another.
    """

    def __init__(self, vectors: Sequence[Vector], rows: Sequence[Row]) -> None:
        self.vectors, self.rows = vectors, rows
        self.shape, self.dtype = (len(rows), vectors[0].size), vectors[0].dtype

    def fill(self, start: int, out: Vector) -> None:
        """Fill out (C, D) with C rows, from `start` on."""
        out[...] = 0
        for row, values in zip(self.rows[start : start + len(out)], out, strict=True):
            self._fill(row, row.part, row.part.of(values))

    def dense(self) -> Vector:
        """Return V (k, D), a new array."""
        v = np.zeros_like(self.vectors[0], shape=self.shape)
        self.fill(0, v)
        return v

    def _fill(self, row: Row, part: Part, out: Vector) -> None:
        """Fill out with what a row of V has in a part, which may be some of its own."""
        np.multiply(part.of(self.vectors[row.vector]), self.dtype.type(row.scale), out=out)

    def _stacked(self, indices: Sequence[int], part: Part) -> Vector:
        """Return what some rows of V have in a part (n, size), a new array."""
        stack = np.zeros_like(self.vectors[0], shape=(len(indices), *part.of(self.vectors[0]).shape))
        for i, out in zip(indices, stack, strict=True):
            self._fill(self.rows[i], part, out)
        return stack.reshape(len(indices), -1)

    def _by_part(self) -> list[tuple[Part, list[int]]]:
        """Return the parts, and the indices of the rows of each."""
        indices = range(len(self))
        return [(part, [*each]) for part, each in groupby(indices, lambda i: self.rows[i].part)]

    def inner_products(self, g: Vector) -> tuple[Matrix, Matrix]:
        """Compute V V' (k, k) and V g (k,), in float64."""
        gram, slopes = np.zeros((len(self), len(self))), np.zeros(len(self))
        for whole, indices in self._by_part():
            count = len(indices)
            products, along = (np.zeros_like(g, np.float64, shape=(count, n)) for n in (count, 1))
            for part in whole.divided(STACKED // count):
                wide = self._stacked(indices, part).astype(np.float64)
                products += np.matmul(wide, wide.T)
                along += np.matmul(wide, part.of(g).reshape(-1, 1).astype(np.float64))
            gram[np.ix_(indices, indices)] = products.tolist()
            slopes[indices] = along[:, 0].tolist()
        return gram, slopes

    def along(self) -> Along:
        """Return the function of rows S (n, D) that computes V S' (k, n), in the type of the rows.

        It keeps the part of every row of V where it is not zero: as many numbers as the vectors have.
        """
        return Along([(part, self._stacked(indices, part)) for part, indices in self._by_part()])

    def along_work(self, rows: int) -> Counts:
        """Return the linear algebra of `along` for so many rows, and of the products among them."""
        each = together(product(len(indices), part.size, rows) for part, indices in self._by_part())
        return each + gram(len(self), rows)

    @property
    def work(self) -> Counts:
        """The linear algebra of `inner_products`."""
        return together(
            work
            for part, indices in self._by_part()
            for work in (gram(len(indices), part.size), product(len(indices), part.size))
        )

    def combined(self, weights: Sequence[float]) -> Vector:
        """Compute V' c, (D,)."""
        p, kind = self.vectors[0] * 0, self.dtype.type
        for row, weight in zip(self.rows, weights, strict=True):
            for part in row.part.divided(STACKED):
                total = part.of(p)
                total += kind(weight) * (kind(row.scale) * part.of(self.vectors[row.vector]))
        return p


def normalised(objective: Objective, vectors: Sequence[Vector], parts: Sequence[Part]) -> Basis | None:
    """Cut vectors (D,) into parts of length one, without those of length zero; None if one is not finite."""
    every = [(part, i) for part in parts for i in range(len(vectors))]
    agreed = objective.agree(tuple(_square(part.of(vectors[i])) for part, i in every))
    if not all(map(math.isfinite, agreed)):
        return None
    rows = [
        Row(part, i, 1 / math.sqrt(square))
        for (part, i), square in zip(every, agreed, strict=True)
        if square > 0
    ]
    return Basis(vectors, rows)


def _square(values: Vector) -> float:
    """Compute the sum of the squares, accumulated in float64."""
    return float(np.einsum("ij,ij->", values, values, dtype=np.float64))


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
            return Step(self.basis.vectors[0] * np.nan, math.nan, math.nan)
        floor = RELATIVE[self.basis.dtype.name]
        along = np.matmul(vectors.T, scale * self.slopes) / (np.maximum(values, 0) + floor)
        c = -scale * np.matmul(vectors, along)
        bounds = -float(self.slopes @ c), max(float(np.matmul(c, self.m) @ c), 0.0)
        *weights, descent, curvature = self.objective.agree((*map(float, c), *bounds))
        return Step(self.basis.combined(weights), max(descent, 0.0), curvature)
