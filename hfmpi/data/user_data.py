"""What a user calls data, as cases: a tuple of arrays or tensors, a map-style data set, or cases."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from hfmpi.data.arrays import Arrays
from hfmpi.data.batches import Cases
from hfmpi.data.examples import Examples
from hfmpi.errors import UserError, shown
from hfmpi.measure.machine import free_memory

__all__ = ["as_cases"]


def as_cases(given: Any, steps: bool) -> Cases:
    """Give data as cases.

    Parameters
    ----------
    given : tuple, data set or Cases
        (x, y) or (x, y, mask), arrays or tensors whose first axis counts the cases; x may be a tuple of
        several inputs. A map-style data set, as PyTorch calls what has a length and gives a pair (x, y) for
        an index, is read into memory.
    steps : bool
        Whether the model reads sequences step by step, as the built-in networks do.

    Raises
    ------
    UserError
        If it is none of these, or its parts do not fit one another.
    """
    if isinstance(given, Cases) and not isinstance(given, type):
        if given.count < 1:
            raise UserError("there are no cases")
        return given
    if not isinstance(given, tuple):
        given = _read(given)
    if len(given) not in (2, 3):
        raise UserError(f"a tuple must be (x, y) or (x, y, mask), not of {len(given)} parts")
    if not steps:
        return Examples(*given)
    mask = given[2] if len(given) > 2 and given[2] is not None else None
    return Arrays(_on_host(given[0]), _on_host(given[1]), None if mask is None else _on_host(mask))


def _on_host(part: Any) -> np.ndarray:
    """Give a part for sequences as an array."""
    try:
        return np.asarray(part)
    except (ValueError, TypeError, RuntimeError):  # ragged rows; a tensor on a GPU or with a gradient
        raise UserError(
            "x and y must be arrays, or tensors on the CPU without a gradient, with rows of one length"
        ) from None


def _read(data: Any) -> tuple[Any, np.ndarray]:
    """Read all pairs of a map-style data set into arrays."""
    map_style = hasattr(data, "__len__") and hasattr(data, "__getitem__")
    if not map_style or isinstance(data, (type, str, bytes, np.ndarray, Mapping)):
        raise UserError(
            f"data must be a tuple (x, y) of arrays or tensors, a map-style data set of pairs, "
            f"or cases such as hfmpi.Examples, not {shown(data)}"
        )
    count = len(data)
    if count < 1:
        raise UserError("the data set is empty")
    first = _parts(data, 0)
    again = _parts(data, 0)
    if not all(
        np.array_equal(a, b, equal_nan=a.dtype.kind == "f") for a, b in zip(first, again, strict=True)
    ):
        raise UserError(
            "the data set gives another case 0 each time, as with random augmentation: a step looks at its "
            "batch several times, so the cases must stay as they are"
        )
    need, free = count * sum(part.nbytes for part in first) / 2**30, free_memory() / 2**30
    if need > free:
        raise UserError(
            f"the data set takes {need:,.1f} GiB, and {free:,.1f} GiB are free: give cases that read it in "
            "parts (hfmpi.data.batches.Cases)"
        )
    whole = [np.empty((count, *part.shape), part.dtype) for part in first]
    for i in range(count):
        parts = _parts(data, i)
        if [(p.shape, p.dtype) for p in parts] != [(p.shape, p.dtype) for p in first]:
            raise UserError(f"case {i:,} of the data set is of another shape or type than case 0: pad it")
        for all_of_them, part in zip(whole, parts, strict=True):
            all_of_them[i] = part
    *inputs, targets = whole
    return (tuple(inputs) if isinstance(data[0][0], tuple) else inputs[0]), targets


def _parts(data: Any, i: int) -> list[np.ndarray]:
    """Give the inputs of a pair, and its target, as arrays."""
    pair = data[i]
    if not isinstance(pair, (tuple, list)) or len(pair) != 2:
        raise UserError(f"a data set must give pairs (x, y), not {shown(pair)}")
    x, y = pair
    try:
        parts = [np.asarray(part) for part in (*(x if isinstance(x, tuple) else (x,)), y)]
    except (ValueError, TypeError, RuntimeError):
        parts = []
    if not parts or any(part.dtype.kind not in "iufb" for part in parts):
        raise UserError(
            f"case {i:,} of the data set must be numbers, arrays, or tensors on the CPU without a gradient"
        )
    return parts
