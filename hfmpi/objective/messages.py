"""The messages of an objective: one vector per loss, gradient or product.

The last number of each message counts the ranks that want to stop or have failed (`DataParallel.total`).

==================  ====================================================================================
gradient            g (D,), squares (D,) or sums for factors if asked for, the loss in four parts, stop
product             G v (D,), stop
projection          V G V' (C, C), stop; float64 on the host
rows                g (D,), the sum over slices of the rows of an example, the number of micro-batches whose
                    rows do not determine the gradient, the loss in four parts, stop
numbers of rows     one number for each row (M,), stop; float64 on the host
Gram matrix         S S' (M, M), stop; float64 on the host; S'S (D, D) likewise
results of works    what each rank computed, stop, sent to all and not added; float64 on the host
loss                the loss, or that of each candidate, stop; float64 on the host
==================  ====================================================================================
"""

from __future__ import annotations

import math

import numpy as np

from hfmpi.optim.layout import Layout

__all__ = ["ROW_NUMBERS", "gradient_message", "message_sizes", "pack", "unpack"]

ROW_NUMBERS = 2
"""Further numbers in the message of a gradient with rows."""

GRIDS = 2.0**-10, 2.0**-24, 2.0**-38, 2.0**-52
"""Grids of the parts of a packed scalar; see `pack`."""


def gradient_message(parameters: int, extra: int = 0) -> Layout[str]:
    """Return the layout of the message of a gradient, with `extra` numbers for squares, factors or rows."""
    return Layout({"gradient": (parameters,), "extra": (extra,), "loss": (len(GRIDS),), "stop": (1,)})


def pack(value: float, dtype: np.dtype | type = np.float32) -> np.ndarray:
    """Split a float64 into numbers (4,) of a message of this type, which `unpack` adds up.

    A loss is part of the message of its gradient, which may be float32, but must arrive in double precision.
    In a message of float64 it stays as it is, so that a loss of 1e-18 keeps all of its digits. For float32
    the parts are multiples of fixed grids, so that their sums over up to 2,048 ranks (below 2^14 in all) fit
    the 24 bits of a float32 without rounding, in whatever order they are added.
    """
    if dtype == np.float64 or not math.isfinite(value):
        return np.array([value, 0, 0, 0], dtype)
    parts = []
    for grid in GRIDS:
        parts.append(round(value / grid) * grid)
        value -= parts[-1]
    with np.errstate(over="ignore"):  # what no float32 holds arrives as infinity
        return np.array(parts, np.float32)


def unpack(parts: np.ndarray) -> float:
    """Return the float64 sum of the parts (4,) that `pack` made."""
    return float(np.sum(parts[::-1].astype(np.float64)))  # the smallest first


def message_sizes(parameters: int, extra: int = 0) -> dict[str, int]:
    """Return the numbers in the message of a gradient (with `extra` further ones), a product and a loss."""
    return {"gradient": gradient_message(parameters, extra).size, "product": parameters + 1, "loss": 2}
