"""Examples in memory: inputs and targets as arrays or tensors whose first axis counts the examples."""

from __future__ import annotations

import copy
from math import prod
from typing import Any

import numpy as np

from hfmpi.data.batches import Batch, check_steps, checked_indices, scored_targets
from hfmpi.errors import UserError, shown

__all__ = ["Arrays", "Examples", "converted", "native", "one_hot_remedy"]


LEAST_LARGEST = 1e-20
"""The smallest allowed value of the largest weight; its inverse is the largest allowed value.

Both are well inside the range of float32.
"""


class Examples:
    """N examples of any shape, in memory.

    Parameters
    ----------
    inputs : array (N, ...), or a tuple of such arrays
        The arguments of the model.
    targets : array (N, ...) of integers, or (N, ..., O) of real numbers
        Symbols, or vectors of O numbers. Real numbers (N,) are the targets of a single output.
        In a masked array of NumPy (`numpy.ma`), masked targets are not scored.
    mask : array (N, ...), optional
        1 where a target is scored, 0 where it is not, without the axis O. Default: all targets are scored.
        Numbers other than 0 and 1 are weights.
    weights : array (N,) or (N, ...), optional
        Weights of examples, or of targets in the shape of a mask: real numbers, 0 or more. The risk is the
        mean sum(w l) / sum(w) of the losses l, so that only the ratio of weights matters. Default: all are 1.
    burn_in : int
        The number of outputs at the start of every example (axis 1) that have no target.

    Raises
    ------
    UserError
        If the arrays have the wrong kind of numbers, or their shapes do not match.

    Examples
    --------
    >>> data = hfmpi.Examples(np.zeros((4, 3)), np.array([0, 1, 1, 0]), mask=np.array([1, 1, 0, 1]))
    >>> data.take(np.array([2, 3])).inputs.shape, data.scored(np.array([2, 3]))
    ((2, 3), 1)
    >>> hfmpi.Examples(np.zeros((2, 3)), np.array([0, 1]), weights=np.array([0.5, 2])).scored(np.arange(2))
    2.5
    """

    def __init__(
        self, inputs: Any, targets: Any, mask: Any = None, weights: Any = None, *, burn_in: int = 0
    ) -> None:
        several = isinstance(inputs, tuple)
        arrays = tuple(_array(x, "inputs") for x in (inputs if several else (inputs,)))
        if not arrays:
            raise UserError("inputs must be an array or a tuple of arrays, not an empty tuple")
        if isinstance(burn_in, bool) or not isinstance(burn_in, int) or burn_in < 0:
            raise UserError(f"burn_in must be a number of outputs, 0 or more, not {shown(burn_in)}")
        targets, mask = _unmasked(targets, mask)
        self.inputs = arrays if several else arrays[0]
        self.targets = _array(targets, "targets")
        self.burn_in = burn_in
        for array in arrays:
            if len(array) != len(self.targets):
                raise UserError(
                    f"inputs have {len(array):,} examples, but targets have {len(self.targets):,}"
                )
        symbols = self.targets.dtype.kind in "iu"
        self._scored = self.targets.shape if symbols else self.targets.shape[: max(1, self.targets.ndim - 1)]
        if burn_in and len(self._scored) < 2:
            raise UserError(
                f"burn_in requires targets of several steps, (examples, steps, ...), not of shape "
                f"{self.targets.shape}"
            )
        self.mask: np.ndarray | None = None
        self.weighted = False
        for name, values in (("the mask", mask), ("weights", weights)):
            if values is not None:
                numbers = _weights(name, values, self._scored)
                self.weighted |= name == "weights" or not _is_mask(numbers)
                self.mask = numbers if self.mask is None else self.mask * numbers

    @property
    def count(self) -> int:
        """The number of examples."""
        return len(self.targets)

    def masked(self, mask: np.ndarray) -> Examples:
        """Return the examples with an additional mask or weights, in the shape of the scored outputs."""
        other = copy.copy(self)
        weighted = mask.dtype != bool
        other.weighted = self.weighted or weighted
        if self.mask is not None:
            other.mask = self.mask * mask
        else:
            other.mask = mask if weighted else mask.astype(int)
        return other

    def with_class_weights(self, weights: Any) -> Examples:
        """Return the examples with the weight of every target multiplied by the weight of its class.

        Parameters
        ----------
        weights : array (O,)
            The weight of each class, 0 ... O - 1. The weights of negative targets, such as -100, do not
            change, because a loss either ignores or refuses these targets.

        Raises
        ------
        UserError
            If the targets are not symbols, the class of a scored target has no weight, or `weights` are not
            valid weights.
        """
        if self.targets.dtype.kind not in "iu":
            raise UserError(
                f"class weights require targets that are whole numbers (symbols), not {self.targets.dtype}"
            )
        table = _weights("class weights", weights, np.shape(weights)[:1]).astype(np.float64)
        scored = True if self.mask is None else self.mask > 0
        without = (self.targets >= len(table)) & scored
        if without.any():
            at = np.unravel_index(int(np.argmax(without)), without.shape)
            raise UserError(
                f"class weights have {len(table)} classes, but example {at[0]:,} has target "
                f"{self.targets[at]}: pass one weight for each class, or mask the target"
            )
        return self.weighted_by_class(table)

    def weighted_by_class(self, table: np.ndarray) -> Examples:
        """Return the examples with the weight of each symbol in the table multiplied by its entry there."""
        inside = (self.targets >= 0) & (self.targets < len(table))
        return self.masked(np.where(inside, table[np.where(inside, self.targets, 0)], 1.0))

    def take(self, indices: np.ndarray) -> Batch:
        """Return the examples `indices` (B,) as a batch of C-contiguous arrays.

        Raises
        ------
        IndexError
            If an example does not exist.
        """
        at = checked_indices(indices, self.count, "example")
        several = isinstance(self.inputs, tuple)
        inputs = tuple(x[at] for x in self.inputs) if several else self.inputs[at]
        mask = None if self.mask is None else self.mask[at]
        return Batch(inputs, self.targets[at], mask, self.burn_in, self.weighted)

    def scored(self, indices: np.ndarray) -> float:
        """Return the number of scored targets of the examples `indices` (B,), or the sum of their weights."""
        if self.mask is None:
            return len(indices) * prod(self._scored[1:])
        total = self.mask[indices].sum(dtype=np.float64)
        return float(total) if self.weighted else int(total)

    def weight(self, indices: np.ndarray) -> float:
        """Return the sum of the weights of the examples `indices` (B,), each the mean of its scored ones."""
        if self.mask is None or not self.weighted:
            return len(indices)
        by_example = self.mask[indices].reshape(len(indices), -1).astype(np.float64, copy=False)
        return float((by_example.sum(axis=1) / np.maximum(1, (by_example > 0).sum(axis=1))).sum())


class Arrays(Examples):
    """N sequences of equal length, for the built-in networks.

    Parameters
    ----------
    inputs : array (N, L) of integers, or (N, L, I) of real numbers
        The symbols or vectors of each sequence, step by step; symbols are stored as int32.
    targets : array (N, T) of integers, or (N, T, O) of real numbers
        The targets of the T = L - burn_in last steps. Masked targets of a NumPy masked array are not scored.
    mask : array (N, T), optional
        1 where a target is scored, 0 where it is not. Default: all targets are scored.
    weights : array (N,) or (N, T), optional
        As in `Examples`.
    burn_in : int
        The number of steps at the start that have no target.

    Raises
    ------
    UserError
        If the arrays have the wrong kind of numbers, or their shapes do not match.

    Examples
    --------
    >>> x = np.random.default_rng(0).integers(0, 2, (500, 12))
    >>> hfmpi.Arrays(x, x.cumsum(axis=1) % 2).take(np.array([3, 1])).inputs.shape
    (2, 12)
    >>> hfmpi.Arrays(x, x[:, 10:], burn_in=10).take(np.array([3, 1])).targets.shape
    (2, 2)
    """

    def __init__(
        self, inputs: Any, targets: Any, mask: Any = None, weights: Any = None, *, burn_in: int = 0
    ) -> None:
        targets, mask = _unmasked(targets, mask)
        inputs = _steps(inputs, "inputs")
        targets = _steps(targets, "targets", weights if mask is None else mask)
        super().__init__(inputs, targets, mask, weights, burn_in=burn_in)
        check_steps(inputs.shape, targets.shape, burn_in)


def _unmasked(targets: Any, mask: Any) -> tuple[Any, Any]:
    """Split a masked array into targets, which are zero where masked, and a mask of the scored targets.

    The targets are returned unchanged, with `mask`, if they are not a masked array.
    """
    if not isinstance(targets, np.ma.MaskedArray):
        return targets, mask
    missing = np.ma.getmaskarray(targets)
    if targets.dtype.kind == "f" and targets.ndim > 1:
        if (missing.any(axis=-1) != missing.all(axis=-1)).any():
            raise UserError("the masked array of targets must mask all numbers of a target, or none of them")
        missing = missing[..., 0]
    scored = (~missing).astype(int)
    return targets.filled(0), scored if mask is None else scored * _weights("the mask", mask, scored.shape)


def _weights(name: str, values: Any, shape: tuple[int, ...]) -> np.ndarray:
    """Check a mask or weights, and return a mask unchanged and weights in float64.

    Weights (N,) of examples are expanded to `shape`, as a view.

    Raises
    ------
    UserError
        If the shape is wrong, a weight is negative or not finite, or the largest is too far from 1.
    """
    array = converted(values, name)
    have = "has" if name == "the mask" else "have"
    if array.shape not in (shape, shape[:1]) or not shape:
        either = f"{shape[:1]} or {shape}" if len(shape) > 1 and name != "the mask" else f"{shape}"
        raise UserError(f"{name} {have} shape {array.shape}, not {either}")
    if array.dtype.kind not in "iufb":
        raise UserError(f"{name} must be numbers, 0 or more, not {array.dtype}")
    bad = ~(np.isfinite(array) & (array >= 0))
    if bad.any():
        at = np.unravel_index(int(np.argmax(bad)), bad.shape)
        raise UserError(
            f"{name} must be finite numbers, 0 or more, not {array[at]} as in example {at[0]:,}: use 0 for a "
            "target that should not be scored"
        )
    if name != "the mask" or not _is_mask(array):
        array = array.astype(np.float64)
        if array.any() and not LEAST_LARGEST <= array.max() <= 1 / LEAST_LARGEST:
            raise UserError(
                f"the largest of {name} is {array.max():.3g}, which is too far from 1 for single precision: "
                "divide all weights by it, because only their ratio matters"
            )
    if array.shape != shape:
        array = np.broadcast_to(array.reshape(-1, *(1 for _ in shape[1:])), shape)
    return array


def _is_mask(array: np.ndarray) -> bool:
    """Return whether all numbers are 0 or 1."""
    return bool(((array == 0) | (array == 1)).all())


def _array(values: Any, name: str) -> np.ndarray:
    array = converted(values, name)
    if array.dtype.kind not in "iufb" or 0 in array.shape or not array.ndim:
        raise UserError(
            f"{name} must be whole or real numbers with at least one row, not {array.dtype} of shape "
            f"{array.shape}"
        )
    return array


def native(array: np.ndarray) -> np.ndarray:
    """Convert an array to the byte order of this machine, which frameworks and kernels require."""
    return array if array.dtype.isnative else array.astype(array.dtype.newbyteorder("="))


def converted(values: Any, name: str) -> np.ndarray:
    """Convert array-like values or a tensor to an array in the byte order of this machine.

    Raises
    ------
    UserError
        If NumPy cannot convert them; for a tensor the message names the methods to call first.
    """
    if isinstance(values, np.ma.MaskedArray) and np.ma.getmaskarray(values).any():
        raise UserError(f"{name} are a masked array with masked values: fill them first (array.filled(...))")
    try:
        array = native(np.asarray(values))
    except (ValueError, TypeError, RuntimeError):  # ragged rows; a tensor on a GPU or with a gradient
        raise UserError(
            f"{name} must be an array with rows of equal length, or a tensor on the CPU without a gradient"
            f"{_remedy(values[0] if isinstance(values, (list, tuple)) and values else values)}"
        ) from None
    if array.dtype.kind == "V" and array.dtype.names is None:  # bfloat16 of JAX, for example
        raise UserError(f"{name} must be whole or real numbers, not {array.dtype}: pass x.astype('float32')")
    return array


def _remedy(values: Any) -> str:
    """Return a clause with the calls that make a PyTorch tensor readable by NumPy, or ""."""
    kind = str(getattr(values, "dtype", "")).removeprefix("torch.")
    calls = [
        call
        for call, wanted in (
            (".detach()", bool(getattr(values, "requires_grad", False))),
            (".to_dense()", "sparse" in str(getattr(values, "layout", ""))),
            (".float()", kind == "bfloat16" or kind.startswith("float8")),
            (".cpu()", str(getattr(values, "device", "cpu")).partition(":")[0] not in ("cpu", "")),
        )
        if wanted
    ]
    why = f", because NumPy has no {kind}" if ".float()" in calls else ""
    return f"; pass tensor{''.join(calls)}{why}" if calls and hasattr(values, "detach") else ""


def one_hot_remedy(targets: np.ndarray) -> str:
    """Return a clause with advice if each row of the targets has a single 1 (one-hot), or ""."""
    rows = targets.ndim > 1 and targets.shape[-1] > 1 and targets.size > 0
    if rows and bool(((targets == 0) | (targets == 1)).all() and (targets.sum(axis=-1) == 1).all()):
        return "; each row has a single 1: if these are one-hot vectors, pass their symbols, y.argmax(-1)"
    return ""


def _steps_remedy(array: np.ndarray) -> str:
    if array.dtype.kind == "b" and array.ndim == 2:
        return "; pass the symbols 0 and 1, .astype(int)"
    if array.dtype.kind in "iub" and array.ndim == 3:
        return one_hot_remedy(array) or "; pass vectors as real numbers, .astype(float)"
    return ""


def _steps(values: Any, name: str, mask: Any = None) -> np.ndarray:
    """Check sequences and return symbols as int32 and vectors unchanged; raise a UserError for other values.

    Symbols whose mask or weight is zero are not checked.
    """
    array = converted(values, name)
    symbols = array.ndim == 2 and np.issubdtype(array.dtype, np.integer)
    vectors = array.ndim == 3 and np.issubdtype(array.dtype, np.floating)
    if not (symbols or vectors) or 0 in array.shape:
        raise UserError(
            f"{name} must be symbols (examples, steps) or real vectors (examples, steps, numbers), "
            f"not {array.dtype} of shape {array.shape}{_steps_remedy(array)}"
        )
    if not symbols:
        return array
    read = array
    if mask is not None:
        scored = converted(mask, "the mask")
        scored = scored.reshape(-1, 1) if scored.shape == array.shape[:1] else scored
        read = scored_targets(array, scored) if scored.shape in (array.shape, (len(array), 1)) else array
    if read.min() < 0 or read.max() > np.iinfo(np.int32).max:
        raise UserError(f"{name} must be symbols 0, 1, 2, ..., not {read.min()} to {read.max()}")
    return array.astype(np.int32)
