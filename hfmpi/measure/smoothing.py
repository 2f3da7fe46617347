"""The loss of single batches as a curve that can be read."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

__all__ = ["smoothed"]


def smoothed(values: ArrayLike) -> np.ndarray:
    """Give the running mean over the last twentieth of the steps so far, one at least: batches are noisy.

    The oldest step counts for what is left of its width, so that the window grows without jumps or kinks.

    Parameters
    ----------
    values : (n,) float
        NaN where a step has none: such a step has no mean, and takes no part in others'.
    """
    given = np.asarray(values, float)
    means, seen = np.full(len(given), np.nan), ~np.isnan(given)
    known = given[seen]
    count = np.arange(1, len(known) + 1)
    width = np.maximum(1.0, count / 20)
    first = (count - width).astype(int)
    sums = np.append(0.0, np.cumsum(known))
    means[seen] = (sums[1:] - sums[first] - (count - width - first) * known[first]) / width
    return means
