"""Conversion of the examples of a map-style data set to arrays; each example is checked."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from hfmpi.data.examples import converted
from hfmpi.errors import UserError, shown

__all__ = ["Items"]


class Items:
    """A map-style data set of examples (x, y) or (x, y, weight).

    Parameters
    ----------
    dataset : object
        An object with a length that returns an example for an index.

    Attributes
    ----------
    count : int
        The number of examples.
    several : bool
        Whether x is a tuple of inputs.
    inputs : int
        The number of inputs.
    weighted : bool or None
        True if the third part of an example contains weights, False if it is a mask, None if there is none.
    nbytes : int
        The number of bytes that all examples would occupy in memory.

    Raises
    ------
    UserError
        If `dataset` is not such a data set, or reading the first example twice returns different values.
    """

    def __init__(self, dataset: Any) -> None:
        map_style = hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")
        if not map_style or isinstance(dataset, (type, str, bytes, np.ndarray, Mapping)):
            loader = hasattr(dataset, "dataset") and hasattr(dataset, "__iter__")
            raise UserError(
                f"data must be a tuple (x, y) of arrays or tensors, a map-style data set of pairs, "
                f"or an object such as hfmpi.Examples, not {shown(dataset)}"
                + ("; pass its data set, loader.dataset" if loader else "")
            )
        self._dataset = dataset
        try:
            self.count = len(dataset)
        except Exception as error:
            raise UserError(f"the length of the data set cannot be read: {_words(error)}") from error
        if self.count < 1:
            raise UserError("the data set is empty")
        x, *rest = self._raw(0)
        self.several, self.inputs = isinstance(x, tuple), len(x) if isinstance(x, tuple) else 1
        first, again = self._parts(0), self._parts(0)
        if not all(
            np.array_equal(a, b, equal_nan=a.dtype.kind == "f") for a, b in zip(first, again, strict=True)
        ):
            raise UserError(
                "reading example 0 of the data set twice returned different values (random augmentation?): "
                "the data must be deterministic, because a step reads its batch several times; use "
                "hfmpi.Augmented for random changes"
            )
        self.weighted = first[-1].dtype.kind == "f" if len(rest) == 2 else None
        self._forms = [(part.shape, part.dtype) for part in first]
        self.nbytes = self.count * sum(part.nbytes for part in first)

    def read(self, i: int) -> list[np.ndarray]:
        """Return the inputs, the target and, if there is one, the weight of example i.

        Raises
        ------
        UserError
            If the example cannot be read, or its shapes or types differ from those of the first example.
        """
        parts = self._parts(i)
        if [(part.shape, part.dtype) for part in parts] != self._forms:
            raise UserError(
                f"example {i:,} of the data set has a different shape or type than example 0: pad them to "
                "one shape"
            )
        if self.weighted is False and not np.isin(parts[-1], (0, 1)).all():
            raise UserError(
                f"the mask of example {i:,} of the data set must be 0 or 1: return weights as real numbers"
            )
        return parts

    def all(self) -> list[np.ndarray]:
        """Read all examples into arrays whose first axis counts them."""
        arrays = [np.empty((self.count, *shape), dtype) for shape, dtype in self._forms]
        for i in range(self.count):
            for array, part in zip(arrays, self.read(i), strict=True):
                array[i] = part
        return arrays

    def _raw(self, i: int) -> tuple[Any, ...]:
        try:
            item = self._dataset[i]
        except (UserError, MemoryError):
            raise
        except Exception as error:
            raise UserError(
                f"example {i:,} of the data set, which has length {self.count:,}, cannot be read: "
                f"{_words(error)}"
            ) from error
        if not isinstance(item, (tuple, list)) or len(item) not in (2, 3):
            raise UserError(
                f"a data set must return (x, y) or (x, y, weight) for each index, not {shown(item)}"
            )
        return tuple(item)

    def _parts(self, i: int) -> list[np.ndarray]:
        x, *rest = self._raw(i)
        name = f"the parts of example {i:,} of the data set"
        parts = [converted(part, name) for part in (*(x if isinstance(x, tuple) else (x,)), *rest)]
        for part in parts:
            if part.dtype.kind not in "iufb":
                raise UserError(f"{name} must be whole or real numbers, not {part.dtype}")
        return parts


def _words(error: Exception) -> str:
    """Return the type and the message of an exception in one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}".removesuffix(": ")
