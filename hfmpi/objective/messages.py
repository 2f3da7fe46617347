"""The messages of an objective: one vector per loss, gradient or product.

The last number of each message, stop, counts the ranks that want to stop or failed (`DataParallel.total`).

==================  ====================================================================================
gradient            g (D,), squares (D,) or sums for factors if requested, the loss in four parts, stop
product             G v (D,), stop
projection          V G V' (C, C), stop; float64 on the host
rows                g (D,), the sum over slices of the number of rows per example, the number of micro-batches
                    whose rows do not determine the gradient, the loss in four parts, stop
numbers of rows     one number for each row (M,), stop; float64 on the host
Gram matrix         S S' (M, M), stop; float64 on the host; S'S (D, D) has the same form
results of tasks    each rank's results, stop, sent to all ranks without adding; float64 on the host
loss                the loss, or one loss per candidate, stop; float64 on the host
==================  ====================================================================================
"""

from __future__ import annotations

import math

import numpy as np

from hfmpi.optim.layout import Layout

__all__ = ["ROW_NUMBERS", "gradient_message", "message_sizes", "pack", "unpack"]

ROW_NUMBERS = 2
"""Number of additional numbers in the message of a gradient with rows."""

GRIDS = 2.0**-10, 2.0**-24, 2.0**-38, 2.0**-52
"""Spacings of the grids on which the parts of a packed scalar lie; see `pack`."""


def gradient_message(parameters: int, extra: int = 0) -> Layout[str]:
    """Return the layout of a gradient's message, with `extra` numbers for squares, factors or rows."""
    return Layout({"gradient": (parameters,), "extra": (extra,), "loss": (len(GRIDS),), "stop": (1,)})


def pack(value: float, dtype: np.dtype | type = np.float32) -> np.ndarray:
    """Split a float64 into four numbers of the dtype of a message; `unpack` adds them up.

    A loss is part of the message of its gradient, which may be float32, but must be sent in double precision.
    In a float64 message it is not split, so that a loss of 1e-18 keeps all digits. In a float32 message the
    parts are multiples of fixed grids, so that their sums over up to 2,048 ranks (below 2^14 in total) fit
    the 24 bits of a float32 without rounding, in any order of addition.
    """
    if dtype == np.float64 or not math.isfinite(value):
        return np.array([value, 0, 0, 0], dtype)
    parts = []
    for grid in GRIDS:
        parts.append(round(value / grid) * grid)
        value -= parts[-1]
    with np.errstate(over="ignore"):  # a part that overflows float32 is sent as infinity
        return np.array(parts, np.float32)


def unpack(parts: np.ndarray) -> float:
    """Return the float64 sum of the parts (4,) from `pack`."""
    return float(np.sum(parts[::-1].astype(np.float64)))  # the smallest first


def message_sizes(parameters: int, extra: int = 0) -> dict[str, int]:
    """Return the lengths of the messages of a gradient (with `extra` numbers), a product and a loss."""
    return {"gradient": gradient_message(parameters, extra).size, "product": parameters + 1, "loss": 2}
