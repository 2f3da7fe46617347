"""A digest of the data, by which ranks and resumed runs check that they use the same data."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from hfmpi.data.augmented import Augmented
from hfmpi.data.batches import Batch, Cases, Sequences
from hfmpi.data.by_index import Dataset
from hfmpi.data.examples import Arrays, Examples
from hfmpi.errors import UserError

__all__ = ["digest_of", "sample_digest_of"]

SAMPLED = 64
"""The number of evenly spread examples from which the digest of data that are not in memory is computed."""

AUGMENTED = " augmented"
"""The suffix of the digest of augmented data."""

PART = 1024
"""The number of examples that are read at a time."""


def digest_of(cases: Cases) -> str:
    """Return a hexadecimal digest of all examples, or of some of them if they are not in memory.

    Raises
    ------
    UserError
        If reading the same examples twice returns different values.
    """
    if isinstance(cases, Augmented):
        return digest_of(cases.data) + AUGMENTED
    if isinstance(cases, Examples):
        return _digest(cases, np.arange(cases.count))
    indices = np.unique(np.linspace(0, cases.count - 1, SAMPLED).astype(np.int64))
    digest = _digest(cases, indices)
    if isinstance(cases, Dataset):
        cases.forget()
    if _digest(cases, indices) != digest:
        raise UserError(
            "reading the same examples twice returned different values (random augmentation?): the data must "
            "be deterministic, because a step reads its batch several times; use hfmpi.Augmented for random "
            "changes"
        )
    return digest


def sample_digest_of(cases: Cases) -> str:
    """Return the digest of the same examples if they are not in memory, as they may be in a resumed run."""
    if isinstance(cases, Augmented):
        return sample_digest_of(cases.data) + AUGMENTED
    if not isinstance(cases, Examples):
        return digest_of(cases)
    return _digest(cases, np.unique(np.linspace(0, cases.count - 1, SAMPLED).astype(np.int64)), sample=True)


def _digest(cases: Cases, indices: np.ndarray, sample: bool = False) -> str:
    content = hashlib.blake2b(str(cases.count).encode(), digest_size=32)
    for part in np.array_split(indices, -(-len(indices) // PART)):
        batch = cases.take(part)
        if type(batch) is Batch:
            if (sample or isinstance(cases, Dataset)) and not batch.weighted and np.all(batch.mask):
                batch = batch._replace(mask=None)  # examples outside this part decide whether there is a mask
            batch = _as_before(cases, batch)
        _add(content, batch)
    return content.hexdigest()


def _as_before(cases: Cases, batch: Batch) -> tuple[Any, ...]:
    """Return a batch in the form of version 0.2, so that digests in checkpoints of 0.2 remain valid."""
    if isinstance(cases, (Arrays, Sequences)) or (isinstance(cases, Dataset) and cases.has(Arrays)):
        return tuple(part if part is None else part.swapaxes(0, 1) for part in batch[:3])  # time first
    burn_in = (batch.burn_in,) if batch.burn_in else ()
    return (*batch[:3], len(batch.targets), *burn_in)


def _add(content: Any, value: Any, depth: int = 4) -> None:
    """Add the arrays in nested containers to a digest, and the types of all other values."""
    if isinstance(value, Mapping):
        value = tuple(value.items())
    if isinstance(value, (tuple, list)) and depth:
        for part in value:
            _add(content, part, depth - 1)
        return
    try:
        array = np.asarray(value)
    except (ValueError, TypeError, RuntimeError):
        array = np.asarray(None)
    content.update(f"{type(value).__name__} {array.dtype.str} {array.shape}".encode())
    if array.dtype.kind in "biufcUS":
        content.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    elif hasattr(value, "__dict__") and depth:
        _add(content, vars(value), depth - 1)
