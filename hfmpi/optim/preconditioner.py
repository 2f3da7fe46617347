"""Diagonal preconditioner from squared gradients (Martens 2010, section 4.7)."""

from __future__ import annotations

import numpy as np

from hfmpi.optim.base import Operator
from hfmpi.optim.layout import Vector

__all__ = ["diagonal"]


def diagonal(squares: Vector, damping: float, exponent: float) -> Operator:
    """Return r -> M^-1 r with M = (mean_i g_i^2 + lambda)^exponent, g_i the gradient of example i.

    Parameters
    ----------
    squares : (D,)
        mean_i g_i^2.
    damping : float
        lambda.
    exponent : float
        0.75 in Martens' paper and code.
    """
    shifted = squares + squares.dtype.type(damping)
    # All ranks must get the same result: all processors round square roots alike, but not general powers.
    root = np.sqrt(shifted)
    m = root * np.sqrt(root) if exponent == 0.75 else shifted**exponent
    return lambda r: r / m
