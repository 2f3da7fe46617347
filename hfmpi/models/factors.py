"""Sums over examples from which the Kronecker factors A and B of each matrix of theta are computed.

The empirical Fisher matrix (at the targets of the data) of a block W (rows, columns) of theta is approximated
by A x B, where A belongs to the rows and B to the columns of W. N is the number of scored outputs, or the sum
of their weights; all gradients are gradients of their mean loss. An example of weight w counts w times in
each sum and in n.

- If W maps inputs z to outputs y, as in a linear layer, and da is the gradient with respect to y, A x B is

      N sum of da da'  x  sum of z z' / n

  over all n such products, as if they were independent (Martens and Grosse 2015; for the steps of recurrent
  networks Martens, Ba and Johnson 2018). A bias has z = 1.
- Otherwise G is the gradient of a single example, s is the sum of the squared entries of all G, and A x B is

      N sum of G G'  x  sum of G' G / s

  It has the same trace as the Fisher matrix, and equals it if all G are multiples of one matrix of rank one.

N, 1 / n and 1 / s may be applied to either factor, because only their product matters.
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
    """The layout of the vector of sums from which the factors of some blocks are computed.

    The vector contains the sums for A and B of every block, followed by the divisors n (or s).

    Attributes
    ----------
    blocks : tuple of Block
    shared : bool
        Whether all blocks have the same n, which is then stored once. That is so if every product is summed
        over the same steps and sequences.
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
        """Return the sums "A" and "B" of each block, and the divisors, as views of sums (size,)."""
        parts = self.layout.views(sums)
        return self.factors.views(parts["factors"]), parts["counts"]

    def normalise(self, sums: Vector, scored: float) -> Vector:
        """Convert the sums (size,) over all examples to A and B in place, and return a view of these.

        `scored` is N.
        """
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
    """Return the sum of z z' over rows z (n, side), as the factor of this side of a block.

    The rows are an array of any framework. For a long side the result has one matrix per group, or is only
    the diagonal; see `hfmpi.optim.layout.factor_shape`.
    """
    dimensions = len(factor_shape(rows.shape[1], groups))
    if dimensions == 3:
        rows = rows.reshape(len(rows), groups, -1).swapaxes(0, 1)
        return rows.swapaxes(1, 2) @ rows
    return rows.T @ rows if dimensions == 2 else (rows * rows).sum(0)


def add_examples(
    blocks: Sequence[Block], gradients: np.ndarray, sums: np.ndarray, only: Container[int] | None = None
) -> None:
    """Add the contributions of the gradients (B, D) of single examples to the sums.

    With `only`, the sums of the other blocks do not change.
    """
    factors, counts = FactorSums(tuple(blocks)).views(sums)
    for i, (block, views) in enumerate(zip(blocks, factors, strict=True)):
        if only is not None and i not in only:
            continue
        g = gradients[:, block.start : block.start + block.size].reshape(-1, block.rows, block.columns)
        for axis, groups, out in (1, 1, views["A"]), (2, block.groups, views["B"]):
            out += square(np.moveaxis(g, axis, 2).reshape(-1, g.shape[axis]), groups)
        counts[i] += np.vdot(g, g)
