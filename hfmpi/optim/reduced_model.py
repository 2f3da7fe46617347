"""The quadratic model of a risk in the space of a few vectors, which are first cut into parts and normalised.

    V     the vectors, k x D, rows of length one           g   the gradient, (D,)
    M     V G V', k x k

V is not stored: each of its rows is a part of one of a few vectors (D,), times a scale. The lengths of these
parts, V V' and V g are computed in one pass over the vectors, which the ranks share.

The step for a lambda is V' c with c = -(S + r diag S)^-1 V g and S = M + lambda V V'; RELATIVE has r.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from typing import NamedTuple

import numpy as np

from hfmpi.measure.cost import Counts
from hfmpi.measure.linear_algebra import eigh, gram, product, together
from hfmpi.optim.base import Matrix, Objective
from hfmpi.optim.layout import Along, Directions, Part, Vector

__all__ = ["Basis", "ReducedModel", "Step", "normalised", "pieces"]

RELATIVE = {"float32": 1e-6, "float64": 1e-12}
"""Fraction of the system's diagonal that is added to it, because vectors may be parallel up to rounding.

With a smaller fraction than the rounding of the vectors, the step would depend on the order of summation. The
addition also limits how fast the method converges, so that the fraction is smaller in float64.
"""

STACKED = 2**18
"""Number of vector entries that are multiplied in float64 at a time: few enough for the cache."""

SHARES = 64
"""Minimum number of pieces into which the inner products are divided: this many ranks can share them."""

SCALES = 1e-12, 1e12
"""Bounds of the scales for which products of unscaled vectors neither overflow nor underflow in float32."""


class Row(NamedTuple):
    """A row of V: a part of the vector with this index, times a scale."""

    part: Part
    vector: int
    scale: float


class Basis(Directions):
    """Vectors of length one, each zero outside one part, so that inner products are computed part by part.

    Parameters
    ----------
    stacks : sequence of (n, D)
        The vectors of which the rows are parts. They must not be modified.
    rows : sequence of Row
        Rows with the same part are consecutive, in the order of the vectors.
    """

    def __init__(self, stacks: Sequence[Vector], rows: Sequence[Row]) -> None:
        self.stacks, self.rows = stacks, rows
        self.vectors = [vector for stack in stacks for vector in stack]
        self.shape, self.dtype = (len(rows), stacks[0].shape[1]), stacks[0].dtype

    def fill(self, start: int, out: Vector) -> None:
        """Write C consecutive rows, from index `start` on, to `out` (C, D)."""
        out[...] = 0
        for row, values in zip(self.rows[start : start + len(out)], out, strict=True):
            self._fill(row, row.part, row.part.of(values))

    def dense(self) -> Vector:
        """Return V (k, D), a new array."""
        v = np.zeros_like(self.vectors[0], shape=self.shape)
        self.fill(0, v)
        return v

    def _fill(self, row: Row, part: Part, out: Vector) -> None:
        """Write the entries of a row of V in `part`, which may be smaller than the row's part, to `out`."""
        np.multiply(part.of(self.vectors[row.vector]), self.dtype.type(row.scale), out=out)

    def _stacked(self, indices: Sequence[int], part: Part) -> Vector:
        """Return the entries of some rows of V in a part, a new array (n, size)."""
        stack = np.zeros_like(self.vectors[0], shape=(len(indices), *part.of(self.vectors[0]).shape))
        for i, out in zip(indices, stack, strict=True):
            self._fill(self.rows[i], part, out)
        return stack.reshape(len(indices), -1)

    def _by_part(self) -> list[tuple[Part, list[int]]]:
        """Return the parts, and the indices of the rows of each."""
        indices = range(len(self))
        return [(part, [*each]) for part, each in groupby(indices, lambda i: self.rows[i].part)]

    def along(self) -> Along:
        """Return the function S (n, D) -> V S' (k, n), up to the scales of V.

        It uses views of the vectors for parts that are contiguous in them, and copies the other parts.
        """
        stacks, scales = list[tuple[Part, Vector]](), np.array([row.scale for row in self.rows])
        for part, indices in self._by_part():
            of_vectors = [self.rows[i].vector for i in indices]
            least, most = scales[indices].min(), scales[indices].max()
            if part.contiguous and SCALES[0] < least and most < SCALES[1]:
                stacks += [(part, part.of(run).reshape(len(run), -1)) for run in self._runs(of_vectors)]
            else:
                stacks.append((part, self._stacked(indices, part)))
                scales[indices] = 1.0
        return Along(stacks, scales)

    def _runs(self, vectors: Sequence[int]) -> Iterator[Vector]:
        """Yield these vectors as views (c, D) of consecutive vectors in a stack."""
        start = 0
        for stack in self.stacks:
            inside = [i - start for i in vectors if start <= i < start + len(stack)]
            for _, run in groupby(enumerate(inside), lambda pair: pair[1] - pair[0]):
                first, *others = (i for _, i in run)
                yield stack[first : first + 1 + len(others)]
            start += len(stack)

    def along_work(self, rows: int) -> Counts:
        """Return the linear algebra of `along` for this number of rows, and of the product of its results."""
        each = together(product(len(indices), part.size, rows) for part, indices in self._by_part())
        return each + gram(len(self), rows)

    def combined(self, weights: Sequence[float]) -> Vector:
        """Compute V' c, (D,)."""
        p, kind = self.vectors[0] * 0, self.dtype.type
        for row, weight in zip(self.rows, weights, strict=True):
            for part in row.part.divided(STACKED):
                total = part.of(p)
                total += kind(weight) * (kind(row.scale) * part.of(self.vectors[row.vector]))
        return p


def normalised(
    objective: Objective, stacks: Sequence[Vector], parts: Sequence[Part], g: Vector
) -> tuple[Basis, Matrix, Matrix] | None:
    """Cut vectors (n, D) into parts and scale them to length one, omitting zero parts; collective.

    Returns
    -------
    basis : Basis
        V.
    gram : (k, k) float64
        V V'.
    slopes : (k,) float64
        V g.

    The result is None if an entry is not finite.
    """
    vectors = [*(vector for stack in stacks for vector in stack), g]
    count, cut = len(vectors), pieces(parts, len(vectors), g.size)
    works = [partial(_products, vectors, piece) for _, piece in cut]
    found = objective.spread(works, [count * count] * len(works), True, "of directions ")
    products = np.zeros((len(parts), count, count))
    for (i, _), product_of_piece in zip(cut, found, strict=True):
        products[i] += product_of_piece.reshape(count, count)
    if not np.isfinite(products).all():
        return None
    rows, grams, slopes = list[Row](), list[Matrix](), list[float]()
    for part, matrix in zip(parts, products, strict=True):
        some = [i for i in range(count - 1) if matrix[i, i] > 0]
        scales = 1 / np.sqrt(matrix[some, some])
        rows += [Row(part, i, scale) for i, scale in zip(some, scales.tolist(), strict=True)]
        grams.append(scales[:, None] * matrix[np.ix_(some, some)] * scales)
        slopes += (scales * matrix[some, -1]).tolist()
    gram, start = np.zeros((len(rows), len(rows))), 0
    for each in grams:
        gram[start : start + len(each), start : start + len(each)] = each
        start += len(each)
    return Basis(stacks, rows), gram, np.array(slopes)


def pieces(parts: Sequence[Part], count: int, size: int) -> list[tuple[int, Part]]:
    """Divide parts of `count` vectors (`size`,) into pieces for the ranks; return (index of part, piece)."""
    most = max(1, min(STACKED // count, size // SHARES))
    return [(i, piece) for i, part in enumerate(parts) for piece in part.divided(most)]


def _products(vectors: Sequence[Vector], part: Part) -> Matrix:
    """Compute the inner products of all pairs of vectors in a part, (n * n,) float64 on the host."""
    wide = np.zeros_like(vectors[0], np.float64, shape=(len(vectors), *part.of(vectors[0]).shape))
    for vector, out in zip(vectors, wide, strict=True):
        out[...] = part.of(vector)
    wide = wide.reshape(len(vectors), -1)
    return np.array(np.matmul(wide, wide.T).tolist()).reshape(-1)


class Step(NamedTuple):
    """A step: p (D,), -g' p and p' G p."""

    p: Vector
    descent: float
    curvature: float

    @property
    def promise(self) -> float:
        """The decrease of the risk that the model predicts."""
        return self.descent - self.curvature / 2

    def shortened(self, part: float) -> Step:
        """Return the step multiplied by `part`."""
        p = self.p.dtype.type(part) * self.p
        return Step(p, part * self.descent, part * part * self.curvature)


@dataclass(frozen=True)
class ReducedModel:
    """The quadratic model in the space of a basis: M and V V' (k, k), and V g (k,)."""

    objective: Objective
    basis: Basis
    m: Matrix
    gram: Matrix
    slopes: Matrix

    @property
    def work(self) -> Counts:
        """The linear algebra of one step: an eigendecomposition and three matrix-vector products."""
        k = len(self.m)
        return eigh(k) + product(k, k) + product(k, k) + product(k, k)

    def step(self, damping: float) -> Step:
        """Compute the step V' c for this damping."""
        system = self.m + damping * self.gram
        diagonal = np.diag(system)
        scale = 1 / np.sqrt(np.where(diagonal > 0, diagonal, 1.0))
        try:
            values, vectors = np.linalg.eigh(scale[:, None] * system * scale)
        except np.linalg.LinAlgError:  # the system contains numbers that are not finite
            return Step(self.basis.vectors[0] * np.nan, math.nan, math.nan)
        floor = RELATIVE[self.basis.dtype.name]
        along = np.matmul(vectors.T, scale * self.slopes) / (np.maximum(values, 0) + floor)
        c = -scale * np.matmul(vectors, along)
        bounds = -float(self.slopes @ c), max(float(np.matmul(c, self.m) @ c), 0.0)
        *weights, descent, curvature = self.objective.agree((*map(float, c), *bounds))
        return Step(self.basis.combined(weights), max(descent, 0.0), curvature)
