"""Sums over examples that become the Kronecker factors A and B of each matrix of theta.

The Fisher matrix of a block W (rows, columns) of theta, at the targets of the data (the empirical one), is
approximated by A x B, with A of its rows and B of its columns. N is the number of scored outputs, of whose
mean loss all gradients are, or the sum of their weights. An example of weight w counts w times in each sum
and in n.

- Where W maps inputs z to outputs y, as in a linear layer, with da the gradient in y,

      N sum of da da'  x  sum of z z' / n

  over all n such products, as if they were independent (Martens and Grosse 2015; for the steps of recurrent
  networks Martens, Ba and Johnson 2018). A bias has z = 1.
- Otherwise, with the gradients G of single examples and s, the sum of the squares of all their entries,

      N sum of G G'  x  sum of G' G / s

  which has the trace of the Fisher matrix, and equals that matrix where all G are multiples of one of rank
  one.

Only the product of N, 1 / n and 1 / s matters, not the factor that it is applied to.
"""

from __future__ import annotations

from collections.abc import Container, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from hfmpi.optim.layout import Block, BlockLayout, Layout, Vector, factor_shape, kronecker_layout

__all__ = ["FactorSums", "add_examples", "square"]


@dataclass(frozen=True)
class FactorSums:
    """The vector of the sums for the factors of some blocks.

    It holds the sums for A and B, block after block, and then the counts n (or s) that they are divided by.

    Attributes
    ----------
    blocks : tuple of Block
    shared : bool
        One count n for all blocks, as where every product has the same number of steps and sequences.
    """

    blocks: tuple[Block, ...]
    shared: bool = False

    @cached_property
    def factors(self) -> BlockLayout:
        """The layout of A and B."""
        return kronecker_layout(self.blocks)

    @cached_property
    def layout(self) -> Layout[str]:
        """The layout of the full vector."""
        counts = 1 if self.shared else len(self.blocks)
        return Layout({"factors": (self.factors.size,), "counts": (counts,)})

    @property
    def size(self) -> int:
        """The length of the vector."""
        return self.layout.size

    def views(self, sums: Vector) -> tuple[list[dict[str, Vector]], Vector]:
        """Return the arrays "A" and "B" of each block, and the counts, as views of sums (size,)."""
        parts = self.layout.views(sums)
        return self.factors.views(parts["factors"]), parts["counts"]

    def normalise(self, sums: Vector, scored: float) -> Vector:
        """Turn sums (size,) over all examples, of which N is `scored`, into A and B; in place, as a view."""
        blocks, counts = self.views(sums)
        number = sums.dtype.type
        if self.shared:
            count = float(counts[0])
            for views in blocks:
                views["A"] *= number(1 / count if count > 0 else 1)
                views["B"] *= number(scored)
        else:
            for views, count in zip(blocks, counts, strict=True):
                views["A"] *= number(scored)
                views["B"] /= count if count > 0 else 1
        return self.layout.views(sums)["factors"]


def square(rows: Any, groups: int = 1) -> Any:
    """Return the sum of z z' over rows z (n, side), an array of any framework: a factor of a side."""
    dimensions = len(factor_shape(rows.shape[1], groups))
    if dimensions == 3:
        rows = rows.reshape(len(rows), groups, -1).swapaxes(0, 1)
        return rows.swapaxes(1, 2) @ rows
    return rows.T @ rows if dimensions == 2 else (rows * rows).sum(0)


def add_examples(
    blocks: Sequence[Block], gradients: np.ndarray, sums: np.ndarray, only: Container[int] | None = None
) -> None:
    """Add to the sums, of all or `only` some blocks, what gradients (B, D) of single examples contribute."""
    factors, counts = FactorSums(tuple(blocks)).views(sums)
    for i, (block, views) in enumerate(zip(blocks, factors, strict=True)):
        if only is not None and i not in only:
            continue
        g = gradients[:, block.start : block.start + block.size].reshape(-1, block.rows, block.columns)
        for axis, groups, out in (1, 1, views["A"]), (2, block.groups, views["B"]):
            out += square(np.moveaxis(g, axis, 2).reshape(-1, g.shape[axis]), groups)
        counts[i] += np.vdot(g, g)
