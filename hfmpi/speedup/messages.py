"""Compute the bytes that the ranks of a job sum after each kind of pass, and for the work on matrices."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hfmpi.measure.cost import Counts
from hfmpi.objective.messages import ROW_NUMBERS, message_sizes
from hfmpi.optim.base import Optimizer
from hfmpi.optim.layout import Block

__all__ = ["messages"]


def messages(
    optimizer: Optimizer[Any], counts: Counts, parameters: int, itemsize: int, blocks: Sequence[Block]
) -> dict[str, float]:
    """Return the bytes of the message that follows each kind of pass; 0 if there is none.

    Parameters
    ----------
    optimizer : Optimizer
    counts : Counts
        Counts of some steps; the number of vectors of a pass is the mean over these steps.
    parameters, itemsize : int
        D, and the bytes of each number of a vector.
    blocks : sequence of Block
        The matrices of theta.
    """
    sent = optimizer.messages(parameters, blocks)
    steps = max(1, counts.gradients)
    directions = 1 + counts.directions // (counts.projections or steps)
    candidates = 1 + counts.candidates // max(1, counts.losses)
    with_rows = ROW_NUMBERS if optimizer.needs.rows else 0
    sizes = message_sizes(parameters, sent.with_gradient + with_rows)
    return {
        "gradient": itemsize * sizes["gradient"],
        "product": itemsize * sizes["product"],
        "row product": itemsize * sizes["product"],
        "projection": 8 * _with_stop(directions**2),  # float64 for any type of vectors, as losses are
        # This message follows the last adjoint of a step.
        "sketch": 8 * _with_stop(directions**2 + 1) * steps / max(1, counts.sketches),
        "loss": 8 * _with_stop(candidates),
        "linearisation": 0,
        "bend": itemsize * sizes["product"],
        "matrices": itemsize * _with_stop(sent.matrices) if sent.matrices else 0,
        "inner products": 8 * _with_stop(sent.inner_products) if sent.inner_products else 0,
    }


def _with_stop(numbers: int) -> int:
    return message_sizes(numbers)["product"]
