"""Convert user-supplied data to `Cases`: a tuple of arrays or tensors, a map-style data set, or `Cases`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from hfmpi.data.augmented import Augmented
from hfmpi.data.batches import Cases
from hfmpi.data.by_index import Dataset
from hfmpi.data.examples import Examples
from hfmpi.data.items import Items
from hfmpi.data.loader import ITERABLE, LOADER_NOTE, dataset_of, is_iterable, is_loader
from hfmpi.errors import UserError
from hfmpi.measure.machine import free_memory

__all__ = ["as_cases"]

SHARE = 4
"""A data set is read into memory if it takes at most 1 / SHARE of the free memory of a rank."""


def as_cases(
    data: Any,
    make: Callable[..., Cases] = Examples,
    memory: int | None = None,
    note: Callable[[str], None] = lambda sentence: None,
) -> Cases:
    """Convert user-supplied data to `Cases`.

    Parameters
    ----------
    data : tuple, data set, DataLoader, Augmented or Cases
        (x, y) or (x, y, mask or weights), arrays or tensors whose first axis counts the examples; x may be a
        tuple of several inputs. A map-style data set has a length and returns (x, y) or (x, y, weight) for an
        index, as in PyTorch. It is read into memory if it takes at most a quarter of the free memory, and
        otherwise read by index.
    make : callable
        Converts x, y and optionally mask or weights to `Cases` that the model accepts.
    memory : int, optional
        The free memory in bytes, which must be the same on all ranks, because it determines how a data set is
        read. Default: the free memory of this rank.
    note : callable
        Called with a sentence on how the data are read, if that is not obvious.

    Raises
    ------
    UserError
        If the data have none of these forms, or their parts do not match.
    """
    if isinstance(data, Augmented):
        return data.of(as_cases(data.data, make, memory, note))
    if isinstance(data, Dataset):
        return data.of_model(make)
    if isinstance(data, Cases) and not isinstance(data, type):
        if data.count < 1:
            raise UserError("the data contain no examples")
        return data
    if isinstance(data, tuple):
        if len(data) not in (2, 3):
            raise UserError(f"a tuple of data must be (x, y) or (x, y, mask), but it has {len(data)} parts")
        return make(*data)
    if is_loader(data) and not isinstance(data, type):
        data = dataset_of(data)
        note(LOADER_NOTE)
    if is_iterable(data):
        raise UserError(f"the data set is an IterableDataset: {ITERABLE}")
    items, free = Items(data), free_memory() if memory is None else memory
    if items.nbytes > free / SHARE:
        note(
            f"the data set would take {items.nbytes / 2**30:,.3g} GiB of memory, more than 1/{SHARE} of the "
            f"{free / 2**30:,.3g} GiB that are free: its examples are read by index, batch by batch"
        )
        return Dataset(data).of_model(make)
    arrays = items.all()
    inputs, (targets, *third) = arrays[: items.inputs], arrays[items.inputs :]
    more = {"weights" if items.weighted else "mask": part for part in third}
    return make(tuple(inputs) if items.several else inputs[0], targets, **more)
