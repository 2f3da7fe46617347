"""Examples in memory: inputs and targets as arrays or tensors whose first axis counts the examples."""

from __future__ import annotations

from math import prod
from typing import Any

import numpy as np

from hfmpi.data.batches import Batch, checked_indices
from hfmpi.errors import UserError

__all__ = ["Arrays", "Examples"]


class Examples:
    """N examples of any shape, in memory.

    Parameters
    ----------
    inputs : array (N, ...), or a tuple of such arrays
        The arguments of the model.
    targets : array (N, ...) of integers, or (N, ..., O) of real numbers
        Symbols, or vectors of O numbers; real numbers (N,) are the targets of one output.
    mask : array (N, ...), optional
        1 where a target is scored, 0 where it is not, without the axis O. Default: all targets are scored.

    Raises
    ------
    UserError
        If the arrays have the wrong kind of numbers, or do not fit one another.

    Examples
    --------
    >>> data = hfmpi.Examples(np.zeros((4, 3)), np.array([0, 1, 1, 0]), mask=np.array([1, 1, 0, 1]))
    >>> data.take(np.array([2, 3])).inputs.shape, data.scored(np.array([2, 3]))
    ((2, 3), 1)
    """

    def __init__(self, inputs: Any, targets: Any, mask: Any = None) -> None:
        several = isinstance(inputs, tuple)
        arrays = tuple(_array(x, "inputs") for x in (inputs if several else (inputs,)))
        if not arrays:
            raise UserError("inputs must be an array or a tuple of arrays, not an empty tuple")
        self.inputs = arrays if several else arrays[0]
        self.targets = _array(targets, "targets")
        self.mask = None if mask is None else _converted(mask, "the mask")
        for array in arrays:
            if len(array) != len(self.targets):
                raise UserError(
                    f"there are {len(array):,} cases of inputs and {len(self.targets):,} of targets"
                )
        symbols = self.targets.dtype.kind in "iu"
        self._scored = self.targets.shape if symbols else self.targets.shape[: max(1, self.targets.ndim - 1)]
        if self.mask is not None:
            if self.mask.shape != self._scored:
                raise UserError(f"the mask has shape {self.mask.shape}, not {self._scored}")
            if not np.isin(self.mask, (0, 1)).all():
                raise UserError("the mask must be 0 or 1 everywhere")

    @property
    def count(self) -> int:
        """The number of examples."""
        return len(self.targets)

    def take(self, indices: np.ndarray) -> Batch:
        """Return the examples `indices` (B,) as a batch of C-contiguous arrays.

        Raises
        ------
        IndexError
            If an example does not exist.
        """
        at = checked_indices(indices, self.count, "case")
        several = isinstance(self.inputs, tuple)
        inputs = tuple(x[at] for x in self.inputs) if several else self.inputs[at]
        return Batch(inputs, self.targets[at], None if self.mask is None else self.mask[at])

    def scored(self, indices: np.ndarray) -> int:
        """Return the number of scored targets of the examples `indices` (B,)."""
        if self.mask is None:
            return len(indices) * prod(self._scored[1:])
        return int(self.mask[indices].sum())


class Arrays(Examples):
    """N sequences of equal length, for the built-in networks.

    Parameters
    ----------
    inputs : array (N, L) of integers, or (N, L, I) of real numbers
        The symbols or vectors of each sequence, step by step; symbols are stored as int32.
    targets : array (N, T) of integers, or (N, T, O) of real numbers
        The targets of the last T <= L steps.
    mask : array (N, T), optional
        1 where a target is scored, 0 where it is not. Default: all targets are scored.

    Raises
    ------
    UserError
        If the arrays have the wrong kind of numbers, or do not fit one another.

    Examples
    --------
    >>> x = np.random.default_rng(0).integers(0, 2, (500, 12))
    >>> hfmpi.Arrays(x, x.cumsum(axis=1) % 2).take(np.array([3, 1])).inputs.shape
    (2, 12)
    """

    def __init__(self, inputs: Any, targets: Any, mask: Any = None) -> None:
        inputs, targets = _steps(inputs, "inputs"), _steps(targets, "targets")
        super().__init__(inputs, targets, mask)
        steps, scored = inputs.shape[1], targets.shape[1]
        if scored > steps:
            raise UserError(f"{scored:,} steps have targets, but only {steps:,} have inputs")


def _array(values: Any, name: str) -> np.ndarray:
    array = _converted(values, name)
    if array.dtype.kind not in "iufb" or 0 in array.shape or not array.ndim:
        raise UserError(
            f"{name} must be whole or real numbers, one row or more, not {array.dtype} of shape {array.shape}"
        )
    return array


def _converted(values: Any, name: str) -> np.ndarray:
    try:
        return np.asarray(values)
    except (ValueError, TypeError, RuntimeError):  # ragged rows; a tensor on a GPU or with a gradient
        raise UserError(
            f"{name} must be an array with rows of one length, or a tensor on the CPU without a gradient"
        ) from None


def _steps(values: Any, name: str) -> np.ndarray:
    """Return symbols as int32 and vectors as they are; raise a UserError if the values are neither."""
    array = _converted(values, name)
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
