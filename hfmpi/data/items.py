"""The examples of a map-style data set as arrays, checked one by one."""

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
        It has a length and returns an example for an index.

    Attributes
    ----------
    count : int
        The number of examples.
    several : bool
        Whether x is a tuple of inputs.
    inputs : int
        How many they are.
    weighted : bool or None
        Whether the third part of an example has weights; False: a mask; None: there is none.
    nbytes : int
        The bytes of all examples in memory.

    Raises
    ------
    UserError
        If it is not such a data set, or reading the first example twice returns different values.
    """

    def __init__(self, dataset: Any) -> None:
        map_style = hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")
        if not map_style or isinstance(dataset, (type, str, bytes, np.ndarray, Mapping)):
            loader = hasattr(dataset, "dataset") and hasattr(dataset, "__iter__")
            raise UserError(
                f"data must be a tuple (x, y) of arrays or tensors, a map-style data set of pairs, "
                f"or cases such as hfmpi.Examples, not {shown(dataset)}"
                + ("; give its data set, loader.dataset" if loader else "")
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
                "reading case 0 of the data set twice returned different values (random augmentation?): the "
                "data must be deterministic, because a step reads its batch several times; random changes "
                "belong into hfmpi.Augmented"
            )
        self.weighted = first[-1].dtype.kind == "f" if len(rest) == 2 else None
        self._forms = [(part.shape, part.dtype) for part in first]
        self.nbytes = self.count * sum(part.nbytes for part in first)

    def read(self, i: int) -> list[np.ndarray]:
        """Return the inputs, the target and the weight, if there is one, of example i.

        Raises
        ------
        UserError
            If it cannot be read, or has another form than the first one.
        """
        parts = self._parts(i)
        if [(part.shape, part.dtype) for part in parts] != self._forms:
            raise UserError(f"case {i:,} of the data set is of another shape or type than case 0: pad it")
        if self.weighted is False and not np.isin(parts[-1], (0, 1)).all():
            raise UserError(
                f"the mask of case {i:,} of the data set must be 0 or 1: give weights as real numbers"
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
                f"case {i:,} of the data set, whose length is {self.count:,}, cannot be read: {_words(error)}"
            ) from error
        if not isinstance(item, (tuple, list)) or len(item) not in (2, 3):
            raise UserError(f"a data set must give pairs (x, y), or (x, y, weight), not {shown(item)}")
        return tuple(item)

    def _parts(self, i: int) -> list[np.ndarray]:
        x, *rest = self._raw(i)
        name = f"the parts of case {i:,} of the data set"
        parts = [converted(part, name) for part in (*(x if isinstance(x, tuple) else (x,)), *rest)]
        for part in parts:
            if part.dtype.kind not in "iufb":
                raise UserError(f"{name} must be whole or real numbers, not {part.dtype}")
        return parts


def _words(error: Exception) -> str:
    """Return an exception as a part of a sentence."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}".removesuffix(": ")
