"""The messages of an objective: one vector a loss, gradient or product, each ending in the wish to stop.

==================  ====================================================================================
gradient            g (D,), squares (D,) or factors where wanted, the loss in four parts (`pack`), stop
product             G v (D,), or G V (C, D) of columns, stop
projection          V G V' (C, C), stop; float64 on the host
loss                the loss, or that of each candidate, stop; float64 on the host
==================  ====================================================================================
"""

from __future__ import annotations

import math

import numpy as np

__all__ = ["PARTS", "message_sizes", "pack", "unpack"]

GRIDS = 2.0**-10, 2.0**-24, 2.0**-38, 2.0**-52
"""Grids of the parts of a packed scalar; see `pack`."""

PARTS = slice(-len(GRIDS) - 1, -1)
"""Where the parts of the loss stand in the message of a gradient."""


def pack(value: float) -> np.ndarray:
    """Split a float64 into float32 numbers (4,) whose sums over many ranks are exact.

    A loss travels in the message of its gradient, which may be float32, yet has to arrive in double
    precision. The parts are multiples of fixed grids, so that their sums over up to 2,048 ranks (below 2^14
    in all) fit the 24 bits of a float32 without rounding, in whatever order they are added.
    """
    if not math.isfinite(value):
        return np.array([value, 0, 0, 0], np.float32)
    parts = []
    for grid in GRIDS:
        parts.append(round(value / grid) * grid)
        value -= parts[-1]
    with np.errstate(over="ignore"):  # what no float32 holds arrives as infinity
        return np.array(parts, np.float32)


def unpack(parts: np.ndarray) -> float:
    """Give the float64 sum of what `pack` split, from the summed parts (4,)."""
    return float(np.sum(parts[::-1].astype(np.float64)))  # the smallest first


def message_sizes(parameters: int, beside: int = 0) -> dict[str, int]:
    """Give the numbers in the message of a gradient (with so many beside it), a product and a loss."""
    return {
        "gradient": parameters + beside + len(GRIDS) + 1,
        "product": parameters + 1,
        "loss": 2,
    }
