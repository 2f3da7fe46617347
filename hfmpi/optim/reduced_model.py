"""The quadratic model of a risk on few directions, and the directions cut and brought to length one.

    V     the directions, k x D, rows of length one        g   the gradient, D
    M     V G V', k x k                                    N   what lambda damps, k x k

The step of a lambda is V' c with c = -(M + lambda N + 1e-9 diag)^-1 V g.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from hfmpi.optim.base import Matrix, Objective
from hfmpi.optim.layout import Block, Vector

__all__ = ["Directions", "Part", "ReducedModel", "Step", "directions", "parts"]

RELATIVE = 1e-9
"""Of the system's diagonal, added to it: directions may be the same, or parallel, to rounding."""


class Part(NamedTuple):
    """The rows from top to bottom and columns from left to right of a block, where a direction is not 0."""

    block: Block
    top: int
    bottom: int
    left: int
    right: int

    def of(self, vector: Vector) -> Vector:
        """Give the part of a vector (D,), a view (rows, columns)."""
        return self.block.of(vector)[self.top : self.bottom, self.left : self.right]

    def stacked(self, vectors: Sequence[Vector]) -> Vector:
        """Give the part of several vectors, a row each."""
        found = [self.of(vector) for vector in vectors]
        own = np.zeros_like(found[0], shape=(len(found), *found[0].shape))
        for out, values in zip(own, found, strict=True):
            out[...] = values
        return own.reshape(len(found), -1)


def parts(blocks: Sequence[Block]) -> list[Part]:
    """Cut blocks into parts: a kind of inputs and a kind of outputs of a block each."""
    found = []
    for block in blocks:
        edges, width = (0, *block.cuts, block.rows), block.columns // block.groups
        for top, bottom in pairwise(edges):
            starts = range(0, block.groups * width, width)
            found += [Part(block, top, bottom, left, left + width) for left in starts]
    return found


@dataclass(frozen=True)
class Directions:
    """Directions of length one, each 0 outside of one part: what they have in common is found part by part.

    Attributes
    ----------
    v : (k, D)
    places : list of (Part, list of int)
        Parts, and the rows of v along each.
    """

    v: Vector
    places: list[tuple[Part, list[int]]]

    def with_more(self, more: Directions) -> Directions:
        """Give these and others, cut alike."""
        known, both = len(self.v), dict(self.places)
        for part, rows in more.places:
            both[part] = [*both.get(part, []), *(known + row for row in rows)]
        return Directions(np.concatenate([self.v, more.v]), [*both.items()])

    def inner_products(self, g: Vector) -> tuple[Matrix, Matrix]:
        """Give V V' (k, k), and V g (k,) accumulated in float64."""
        count = len(self.v)
        gram, slopes = np.zeros((count, count)), np.zeros(count)
        for part, rows in self.places:
            own = part.stacked([self.v[row] for row in rows])
            gram[np.ix_(rows, rows)] = np.matmul(own, own.T).tolist()
            slopes[rows] = np.einsum("ij,j->i", own, part.of(g).reshape(-1), dtype=np.float64).tolist()
        return gram, slopes

    def combined(self, weights: Sequence[float]) -> Vector:
        """Give V' c, (D,)."""
        p, kind = self.v[0] * 0, self.v.dtype.type
        for part, rows in self.places:
            own = part.of(p)
            for row in rows:
                own += kind(weights[row]) * part.of(self.v[row])
        return p


def directions(objective: Objective, whole: Sequence[Vector], places: Sequence[Part]) -> Directions | None:
    """Cut vectors (D,) into parts, without those of length zero; None if one is not finite."""
    own = [part.stacked(whole) for part in places]
    squares = [np.einsum("ij,ij->i", rows, rows, dtype=np.float64).tolist() for rows in own]
    agreed = objective.agree(tuple(square for each in squares for square in each))
    if not all(map(math.isfinite, agreed)):
        return None
    v = np.zeros_like(whole[0], shape=(sum(square > 0 for square in agreed), whole[0].size))
    left, found, at = iter(agreed), [], 0
    for part, rows in zip(places, own, strict=True):
        begin = at
        for values in rows:
            square = next(left)
            if square > 0:
                out = part.of(v[at])
                out[...] = (v.dtype.type(1 / math.sqrt(square)) * values).reshape(out.shape)
                at += 1
        if at > begin:
            found.append((part, [*range(begin, at)]))
    return Directions(v, found)


class Step(NamedTuple):
    """A step p (D,), -g' p and p' G p."""

    p: Vector
    descent: float
    curvature: float


@dataclass(frozen=True)
class ReducedModel:
    """The model on directions: M and N (k, k), and V g (k,)."""

    objective: Objective
    directions: Directions
    m: Matrix
    metric: Matrix
    slopes: Matrix

    def step(self, damping: float) -> Step:
        """Give the step V' c of a damping."""
        system = self.m + damping * self.metric
        diagonal = np.diag(system)
        scale = 1 / np.sqrt(np.where(diagonal > 0, diagonal, 1.0))
        try:
            values, vectors = np.linalg.eigh(scale[:, None] * system * scale)
        except np.linalg.LinAlgError:  # numbers that are not finite
            return Step(self.directions.v[0] * np.nan, 0.0, 0.0)
        along = vectors.T @ (scale * self.slopes) / (np.maximum(values, 0) + RELATIVE)
        c = -scale * (vectors @ along)
        bound = -float(self.slopes @ c), max(float(c @ self.m @ c), 0.0)
        *weights, descent, curvature = self.objective.agree((*map(float, c), *bound))
        return Step(self.directions.combined(weights), max(descent, 0.0), curvature)
