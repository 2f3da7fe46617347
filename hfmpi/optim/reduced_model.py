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

from hfmpi.optim.base import Block, Matrix, Objective, Vector, inner_product

__all__ = ["ReducedModel", "Step", "parts", "rows"]

RELATIVE = 1e-9
"""Of the system's diagonal, added to it: directions may be the same, or parallel, to rounding."""


class Step(NamedTuple):
    """A step p (D,), -g' p and p' G p."""

    p: Vector
    descent: float
    curvature: float


@dataclass(frozen=True)
class ReducedModel:
    """The model on the directions v (k, D): M and N (k, k), and V g (k,)."""

    objective: Objective
    v: Vector
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
            return Step(self.v[0] * np.nan, 0.0, 0.0)
        along = vectors.T @ (scale * self.slopes) / (np.maximum(values, 0) + RELATIVE)
        c = -scale * (vectors @ along)
        bound = -float(self.slopes @ c), max(float(c @ self.m @ c), 0.0)
        *weights, descent, curvature = self.objective.agree((*map(float, c), *bound))
        p, kind = self.v[0] * 0, self.v.dtype.type
        for weight, row in zip(weights, self.v, strict=True):
            p = p + kind(weight) * row
        return Step(p, max(descent, 0.0), curvature)


def rows(objective: Objective, found: list[Vector]) -> Vector | None:
    """Give directions as rows of length one, without those of length zero; None if one is not finite."""
    lengths = objective.agree(tuple(inner_product(v, v) for v in found))
    if not all(map(math.isfinite, lengths)):
        return None
    v = np.zeros_like(found[0], shape=(sum(length > 0 for length in lengths), found[0].size))
    left = iter(v)
    for direction, length in zip(found, lengths, strict=True):
        if length > 0:
            next(left)[...] = v.dtype.type(1 / math.sqrt(length)) * direction
    return v


def parts(blocks: Sequence[Block], v: Vector) -> list[Vector]:
    """Cut a vector (D,) into its parts: a kind of inputs and a kind of outputs of a block each."""
    found = []
    for block in blocks:
        edges, width = (0, *block.cuts, block.rows), block.columns // block.groups
        for top, bottom in pairwise(edges):
            for group in range(block.groups):
                part = v * 0
                columns = slice(group * width, (group + 1) * width)
                block.of(part)[top:bottom, columns] = block.of(v)[top:bottom, columns]
                found.append(part)
    return found
