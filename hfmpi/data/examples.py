"""Cases of any shape in memory, for models of users: arrays or tensors whose first axis counts the cases."""

from __future__ import annotations

from math import prod
from typing import Any, NamedTuple

import numpy as np

from hfmpi.data.batches import checked_indices
from hfmpi.errors import UserError

__all__ = ["ExampleBatch", "Examples"]


class ExampleBatch(NamedTuple):
    """B cases, one after the other.

    Attributes
    ----------
    inputs : ndarray (B, ...), or a tuple of such
    targets : ndarray (B, ...) of integers, or (B, ..., O) of real numbers
    mask : ndarray (B, ...) or None
        1 where a target is scored, else 0; None: all are.
    cases : int
        B.
    """

    inputs: Any
    targets: np.ndarray
    mask: np.ndarray | None
    cases: int


class Examples:
    """N cases of any shape.

    Parameters
    ----------
    inputs : array (N, ...), or a tuple of such
        What the model is called with, one argument each.
    targets : array (N, ...) of integers, or (N, ..., O) of real numbers
        Symbols, each of them scored; or vectors, a row of outputs each. Numbers (N,) are of one output.
    mask : array (N, ...), optional
        1 where a target is scored, else 0. Without it all are.

    Raises
    ------
    UserError
        If the arrays do not fit one another.
    """

    def __init__(self, inputs: Any, targets: Any, mask: Any = None) -> None:
        several = isinstance(inputs, tuple)
        found = tuple(_array(own, "inputs") for own in (inputs if several else (inputs,)))
        if not found:
            raise UserError("inputs must be an array or a tuple of arrays, not an empty tuple")
        self.inputs = found if several else found[0]
        self.targets = _array(targets, "targets")
        self.mask = None if mask is None else np.asarray(mask)
        for array in found:
            if len(array) != len(self.targets):
                raise UserError(
                    f"there are {len(array):,} cases of inputs and {len(self.targets):,} of targets"
                )
        symbols = self.targets.dtype.kind in "iu"
        self._rows = self.targets.shape if symbols else self.targets.shape[: max(1, self.targets.ndim - 1)]
        if self.mask is not None:
            if self.mask.shape != self._rows:
                raise UserError(f"the mask has shape {self.mask.shape}, not {self._rows}")
            if not np.isin(self.mask, (0, 1)).all():
                raise UserError("the mask must be 0 or 1 everywhere")

    @property
    def count(self) -> int:
        """The number of cases."""
        return len(self.targets)

    def take(self, indices: np.ndarray) -> ExampleBatch:
        """Return the cases `indices` (B,) as a batch.

        Raises
        ------
        IndexError
            If there is no such case.
        """
        at = checked_indices(indices, self.count, "case")
        several = isinstance(self.inputs, tuple)
        inputs = tuple(own[at] for own in self.inputs) if several else self.inputs[at]
        mask = None if self.mask is None else self.mask[at]
        return ExampleBatch(inputs, self.targets[at], mask, len(at))

    def scored(self, indices: np.ndarray) -> int:
        """Return how many targets of the cases `indices` (B,) are scored."""
        if self.mask is None:
            return len(indices) * prod(self._rows[1:])
        return int(self.mask[indices].sum())


def _array(values: Any, name: str) -> np.ndarray:
    try:
        array = np.asarray(values)
    except (ValueError, TypeError, RuntimeError):  # ragged rows; a tensor on a GPU or with a gradient
        raise UserError(f"{name} must be an array, or a tensor on the CPU without a gradient") from None
    if array.dtype.kind not in "iufb" or 0 in array.shape or not array.ndim:
        raise UserError(
            f"{name} must be whole or real numbers, one row or more, not {array.dtype} of shape {array.shape}"
        )
    return array
