"""A map-style data set that is not copied to memory: examples are read when a batch needs them."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import numpy as np

from hfmpi.data.batches import BadExample, Batch, checked_indices
from hfmpi.data.examples import Examples
from hfmpi.data.items import Items
from hfmpi.errors import UserError, shown

__all__ = ["Dataset"]

KEPT = 1 << 28
"""The number of bytes of examples that are cached, because a step reads its batch several times."""


class Dataset:
    """A map-style data set whose examples are read batch by batch; each rank reads the examples of its shard.

    `hfmpi.train` uses this class for a data set that takes more than a quarter of the free memory, and reads
    any other data set into memory at the start.

    Parameters
    ----------
    dataset : map-style data set
        An object with a length that returns (x, y) or (x, y, weight) for an index: arrays, tensors or
        numbers, with the same shape and type for all examples; x may be a tuple of several inputs. Reading an
        example twice must return the same values. If the third part is of whole numbers, it is a mask of 0
        and 1; if it is of real numbers, it contains weights, as in `Examples`.
    burn_in : int
        As in `Examples`.
    kept : int
        The maximum number of bytes of examples that this rank caches after reading; 0: no cache.

    Raises
    ------
    UserError
        If `dataset` is not such a data set.

    Examples
    --------
    >>> data = hfmpi.Dataset(torch.utils.data.TensorDataset(x, y))
    >>> result = hfmpi.train(model, data, max_steps=10)
    """

    def __init__(self, dataset: Any, *, burn_in: int = 0, kept: int = KEPT) -> None:
        if isinstance(kept, bool) or not isinstance(kept, int) or kept < 0:
            raise UserError(f"kept must be a number of bytes, 0 or more, not {shown(kept)}")
        self._items = Items(dataset)
        self.burn_in, self.kept = burn_in, kept
        self._make: Callable[..., Examples] = Examples
        self._scoring: Callable[[Examples], Examples] | None = None
        self._checks = list[tuple[Callable[[Examples], None], str]]()
        self._read, self._bytes = OrderedDict[int, list[np.ndarray]](), 0
        self._each: float | None = None  # scored targets per example, if it is the same for all

    def of_model(self, make: Callable[..., Any]) -> Dataset:
        """Return the data set with batches that are converted by `make`, such as `Arrays`."""
        return self._with(_make=make)

    def with_scoring(self, scoring: Callable[[Examples], Examples]) -> Dataset:
        """Return the data set with the mask or weights that `scoring` adds to the examples of a batch."""
        return self._with(_scoring=scoring)

    def _with(self, **changes: Any) -> Dataset:
        other = copy.copy(self)
        other.__dict__.update(changes, _checks=[*self._checks], _read=OrderedDict(), _bytes=0, _each=None)
        return other

    def has(self, kind: type) -> bool:
        """Return whether batches are made of examples of a class, such as `Arrays`."""
        return isinstance(self._make, type) and issubclass(self._make, kind)

    def add_check(self, check: Callable[[Examples], None], name: str) -> None:
        """Add a check of all examples that are read from now on; its errors start with the name."""
        self._checks.append((check, name))

    def forget(self) -> None:
        """Clear the cache, so that all examples are read again."""
        self._read.clear()
        self._bytes = 0

    @property
    def count(self) -> int:
        """The number of examples."""
        return self._items.count

    @property
    def unread(self) -> bool:
        """Whether examples must be read to determine which of their targets are scored."""
        return self._items.weighted is not None or self._scoring is not None

    def take(self, indices: np.ndarray) -> Batch:
        """Read the examples `indices` (B,), B >= 1, as a batch of C-contiguous arrays.

        Raises
        ------
        UserError
            If an example cannot be read, or has a different shape or a target that the model does not accept.
        IndexError
            If an example does not exist.
        """
        return self._examples(indices).take(np.arange(len(indices)))

    def scored(self, indices: np.ndarray) -> float:
        """Return the number of scored targets of the examples `indices` (B,), or the sum of their weights."""
        if not self.unread:
            if self._each is None:
                first = np.zeros(1, np.int64)
                self._each = self._examples(first).scored(first)
            return len(indices) * self._each
        return self._sum(indices, lambda some, at: some.scored(at))

    def weight(self, indices: np.ndarray) -> float:
        """Return the sum of the weights of the examples `indices` (B,), each the mean of its scored ones."""
        if not self.unread:
            return len(indices)
        return self._sum(indices, lambda some, at: some.weight(at))

    def _sum(self, indices: np.ndarray, number: Callable[[Examples, np.ndarray], float]) -> float:
        """Sum a number over examples, with only a few of them in memory at a time."""
        parts = np.array_split(indices, -(-len(indices) // 256)) if len(indices) else []
        return sum(number(self._examples(part), np.arange(len(part))) for part in parts)

    def _examples(self, indices: np.ndarray) -> Examples:
        at = checked_indices(indices, self.count, "example")
        columns = [np.stack(column) for column in zip(*map(self._item, at.tolist()), strict=True)]
        inputs, (targets, *third) = columns[: self._items.inputs], columns[self._items.inputs :]
        more = dict(zip(("weights",) if self._items.weighted else ("mask",), third, strict=False))
        try:
            examples = self._make(
                tuple(inputs) if self._items.several else inputs[0], targets, burn_in=self.burn_in, **more
            )
        except UserError as error:
            raise UserError(f"{_among(at)}: {error}") from None
        if self._scoring is not None:
            examples = self._scoring(examples)
        for check, name in self._checks:
            try:
                check(examples)
            except BadExample as error:
                raise error.renamed(int(at[error.example]), name) from None
            except UserError as error:
                raise UserError(f"{name}: {_among(at)}: {error}") from None
        return examples

    def _item(self, i: int) -> list[np.ndarray]:
        """Return the parts of an example, from the cache if possible."""
        if i in self._read:
            self._read.move_to_end(i)
            return self._read[i]
        item = self._items.read(i)
        size = sum(part.nbytes for part in item)
        if size <= self.kept:
            self._read[i] = item
            self._bytes += size
        while self._bytes > self.kept:
            _, oldest = self._read.popitem(last=False)
            self._bytes -= sum(part.nbytes for part in oldest)
        return item


def _among(indices: np.ndarray) -> str:
    """Return a phrase that names the range of the examples of a batch."""
    return f"among examples {indices.min():,} to {indices.max():,} of the data set"
