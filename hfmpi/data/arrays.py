"""Cases in memory: inputs and targets as arrays, one row a case."""

from __future__ import annotations

import numpy as np

from hfmpi.data.batches import Batch, checked_indices
from hfmpi.errors import UserError

__all__ = ["Arrays"]


class Arrays:
    """N cases of equal length.

    Parameters
    ----------
    inputs : ndarray (N, L) of integers, or (N, L, I) of real numbers
        The symbols or vectors of each case, step by step.
    targets : ndarray (N, T) of integers, or (N, T, O) of real numbers
        Of the last T <= L steps.
    mask : ndarray (N, T), optional
        1 where a target is scored, else 0. Without it all are.

    Raises
    ------
    UserError
        If the arrays do not fit one another.
    """

    def __init__(self, inputs: np.ndarray, targets: np.ndarray, mask: np.ndarray | None = None) -> None:
        self.inputs = _steps(_array(inputs, "inputs"), "inputs")
        self.targets = _steps(_array(targets, "targets"), "targets")
        self.mask = None if mask is None else _array(mask, "the mask")
        cases, steps = self.inputs.shape[:2]
        if self.targets.shape[0] != cases:
            raise UserError(f"there are {cases:,} cases of inputs and {self.targets.shape[0]:,} of targets")
        if self.targets.shape[1] > steps:
            raise UserError(f"{self.targets.shape[1]:,} steps have targets, but only {steps:,} have inputs")
        if self.mask is not None:
            if self.mask.shape != self.targets.shape[:2]:
                raise UserError(f"the mask has shape {self.mask.shape}, not {self.targets.shape[:2]}")
            if not np.isin(self.mask, (0, 1)).all():
                raise UserError("the mask must be 0 or 1 everywhere")

    @property
    def count(self) -> int:
        """The number of cases."""
        return len(self.inputs)

    def take(self, indices: np.ndarray) -> Batch:
        """Return the cases `indices` (B,) as a batch of C-contiguous arrays, time first.

        Raises
        ------
        IndexError
            If there is no such case.
        """
        at = checked_indices(indices, self.count, "case")
        mask = None if self.mask is None else _time_first(self.mask[at])
        return Batch(_time_first(self.inputs[at]), _time_first(self.targets[at]), mask)

    def scored(self, indices: np.ndarray) -> int:
        """Return how many targets of the cases `indices` (B,) are scored."""
        if self.mask is None:
            return len(indices) * self.targets.shape[1]
        return int(self.mask[indices].sum())


def _array(rows: object, name: str) -> np.ndarray:
    try:
        return np.asarray(rows)
    except ValueError:
        raise UserError(f"{name} must be an array: its rows must be of one length") from None


def _steps(array: np.ndarray, name: str) -> np.ndarray:
    """Give symbols as int32 and vectors as they are; raise a UserError if the array is neither."""
    symbols = array.ndim == 2 and np.issubdtype(array.dtype, np.integer)
    vectors = array.ndim == 3 and np.issubdtype(array.dtype, np.floating)
    if not (symbols or vectors) or 0 in array.shape:
        raise UserError(
            f"{name} must be symbols (cases, steps) or real vectors (cases, steps, numbers), "
            f"not {array.dtype} of shape {array.shape}"
        )
    if not symbols:
        return array
    if array.min() < 0 or array.max() > np.iinfo(np.int32).max:
        raise UserError(f"{name} must be symbols 0, 1, 2, ..., not {array.min()} to {array.max()}")
    return array.astype(np.int32)


def _time_first(rows: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(rows.swapaxes(0, 1))
