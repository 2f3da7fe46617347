"""Smooth the losses of single batches, which are noisy, by a running mean."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

__all__ = ["smoothed"]


def smoothed(values: ArrayLike) -> np.ndarray:
    """Return the running mean over the last twentieth of the steps so far, at least over one step.

    The oldest step has a fractional weight, so that the window grows without jumps or kinks.

    Parameters
    ----------
    values : (n,) float
        NaN at steps without a value: the mean at such a step is NaN, and other means do not include it.
    """
    values = np.asarray(values, float)
    means, seen = np.full(len(values), np.nan), ~np.isnan(values)
    known = values[seen]
    count = np.arange(1, len(known) + 1)
    width = np.maximum(1.0, count / 20)
    first = (count - width).astype(int)
    sums = np.append(0.0, np.cumsum(known))
    means[seen] = (sums[1:] - sums[first] - (count - width - first) * known[first]) / width
    return means
