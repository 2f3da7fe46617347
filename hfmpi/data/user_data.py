"""Convert user-supplied data to `Cases`: a tuple of arrays or tensors, a map-style data set, or `Cases`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from hfmpi.data.batches import Cases
from hfmpi.data.examples import Examples, converted
from hfmpi.errors import UserError, shown
from hfmpi.measure.machine import free_memory

__all__ = ["as_cases"]


def as_cases(data: Any, make: Callable[..., Cases] = Examples) -> Cases:
    """Return data as `Cases`.

    Parameters
    ----------
    data : tuple, data set or Cases
        (x, y) or (x, y, mask), arrays or tensors whose first axis counts the examples; x may be a tuple of
        several inputs. A map-style data set, which has a length and returns a pair (x, y) for an index as in
        PyTorch, is read into memory.
    make : callable
        Converts x, y and optionally mask to `Cases` that the model accepts.

    Raises
    ------
    UserError
        If the data are none of these, or their parts do not fit one another.
    """
    if isinstance(data, Cases) and not isinstance(data, type):
        if data.count < 1:
            raise UserError("there are no cases")
        return data
    if not isinstance(data, tuple):
        data = _read(data)
    if len(data) not in (2, 3):
        raise UserError(f"a tuple must be (x, y) or (x, y, mask), not of {len(data)} parts")
    return make(*data)


def _read(data: Any) -> tuple[Any, np.ndarray]:
    """Read all pairs of a map-style data set into arrays."""
    map_style = hasattr(data, "__len__") and hasattr(data, "__getitem__")
    if not map_style or isinstance(data, (type, str, bytes, np.ndarray, Mapping)):
        loader = hasattr(data, "dataset") and hasattr(data, "__iter__")
        raise UserError(
            f"data must be a tuple (x, y) of arrays or tensors, a map-style data set of pairs, "
            f"or cases such as hfmpi.Examples, not {shown(data)}"
            + ("; give its data set, loader.dataset" if loader else "")
        )
    try:
        count = len(data)
    except Exception as error:
        raise UserError(f"the length of the data set cannot be read: {_words(error)}") from error
    if count < 1:
        raise UserError("the data set is empty")
    several = isinstance(_pair(data, 0)[0], tuple)
    first = _parts(data, 0)
    again = _parts(data, 0)
    if not all(
        np.array_equal(a, b, equal_nan=a.dtype.kind == "f") for a, b in zip(first, again, strict=True)
    ):
        raise UserError(
            "reading case 0 of the data set twice returned different values (random augmentation?): the data "
            "must be deterministic, because a step reads its batch several times"
        )
    need, free = count * sum(part.nbytes for part in first) / 2**30, free_memory() / 2**30
    if need > free:
        raise UserError(
            f"the data set takes {need:,.1f} GiB, and {free:,.1f} GiB are free: give cases that read it in "
            "parts (hfmpi.data.batches.Cases)"
        )
    arrays = [np.empty((count, *part.shape), part.dtype) for part in first]
    for i in range(count):
        parts = _parts(data, i)
        if [(p.shape, p.dtype) for p in parts] != [(p.shape, p.dtype) for p in first]:
            raise UserError(f"case {i:,} of the data set is of another shape or type than case 0: pad it")
        for array, part in zip(arrays, parts, strict=True):
            array[i] = part
    *inputs, targets = arrays
    return (tuple(inputs) if several else inputs[0]), targets


def _pair(data: Any, i: int) -> tuple[Any, Any]:
    """Return pair i."""
    try:
        pair = data[i]
    except (UserError, MemoryError):
        raise
    except Exception as error:
        raise UserError(
            f"case {i:,} of the data set, whose length is {len(data):,}, cannot be read: {_words(error)}"
        ) from error
    if not isinstance(pair, (tuple, list)) or len(pair) != 2:
        raise UserError(f"a data set must give pairs (x, y), not {shown(pair)}")
    x, y = pair
    return x, y


def _parts(data: Any, i: int) -> list[np.ndarray]:
    """Return the inputs and the target of pair i as arrays."""
    x, y = _pair(data, i)
    name = f"the parts of case {i:,} of the data set"
    parts = [converted(part, name) for part in (*(x if isinstance(x, tuple) else (x,)), y)]
    for part in parts:
        if part.dtype.kind not in "iufb":
            raise UserError(f"{name} must be whole or real numbers, not {part.dtype}")
    return parts


def _words(error: Exception) -> str:
    """Return an exception as a part of a sentence."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}".removesuffix(": ")
