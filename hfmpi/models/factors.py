"""Kronecker factors of the curvature of each matrix of a model of a framework.

The Fisher matrix of a block W (rows, columns) of theta, at the targets of the data (the empirical one), is
taken for A x B, A of its rows and B of its columns. N are the scored outputs, whose mean loss all gradients
are of.

- Where W is known to map inputs z to outputs y, as in a linear layer, with da the gradients of y,

      N sum of da da'  x  sum of z z' / n

  over all n such products, as if they were independent (Martens and Grosse 2015; for the steps of recurrent
  networks Martens, Ba and Johnson 2018). A bias has z = 1.
- Else, with the gradients G of single cases and s, the sum of the squares of all their numbers,

      N sum of G G'  x  sum of G' G / s

  which has the trace of the Fisher matrix, and is that matrix where all G are multiples of one of rank one.

Sums over cases have those of A and B, block after block, and then the number of each block that they are
divided by: n or s. N multiplies A and the number divides B; only their product matters.
"""

from __future__ import annotations

from collections.abc import Container, Sequence
from typing import Any

import numpy as np

from hfmpi.optim.layout import Block, factor_shape, kronecker_layout, split_factors

__all__ = ["add_cases", "normalise", "size", "square"]


def size(blocks: Sequence[Block]) -> int:
    """Give the numbers of all sums."""
    return kronecker_layout(blocks).size + len(blocks)


def normalise(blocks: Sequence[Block], sums: np.ndarray, scored: int) -> np.ndarray:
    """Turn sums over all cases into A and B, block after block, in place, and give them."""
    factors, over = np.split(sums, [-len(blocks)])
    for (_, a, b), number in zip(split_factors(blocks, factors), over, strict=True):
        a *= sums.dtype.type(scored)
        b /= number if number > 0 else 1
    return factors


def square(rows: Any) -> Any:
    """Give the sum of z z' over rows z (n, side), an array of any framework: a factor, or its diagonal."""
    return rows.T @ rows if len(factor_shape(rows.shape[1])) == 2 else (rows * rows).sum(0)


def add_cases(
    blocks: Sequence[Block], gradients: np.ndarray, sums: np.ndarray, only: Container[int] | None = None
) -> None:
    """Add what the gradients of some cases (B, D) bring to the sums, of all blocks or `only` some."""
    over = sums[-len(blocks) :]
    for i, (block, a, b) in enumerate(split_factors(blocks, sums[: -len(blocks)])):
        if only is not None and i not in only:
            continue
        g = gradients[:, block.start : block.start + block.rows * block.columns]
        g = g.reshape(-1, block.rows, block.columns)
        for axis, out in (1, a), (2, b):
            out += square(np.moveaxis(g, axis, 0).reshape(len(out), -1).T)
        over[i] += np.vdot(g, g)
