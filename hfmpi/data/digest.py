"""A digest of cases, by which ranks compare their data, and a run that goes on knows its own again."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from hfmpi.data.batches import Batch, Cases, Sequences
from hfmpi.data.examples import Arrays, Examples
from hfmpi.errors import UserError

__all__ = ["digest_of"]

SAMPLED = 64
"""Cases, evenly spread, that stand for data which do not lie in memory."""

PART = 1024
"""Cases that are taken at a time."""


def digest_of(cases: Cases) -> str:
    """Give a digest of cases, hexadecimal: of all where they lie in memory, else of some.

    Raises
    ------
    UserError
        If the same cases are others the second time.
    """
    whole, count = isinstance(cases, Examples), cases.count
    chosen = np.arange(count) if whole else np.unique(np.linspace(0, count - 1, SAMPLED).astype(np.int64))
    found = _digest(cases, chosen)
    if not whole and _digest(cases, chosen) != found:
        raise UserError(
            "the same cases are others each time, as with random augmentation: a step looks at its batch "
            "several times, so they must stay as they are"
        )
    return found


def _digest(cases: Cases, indices: np.ndarray) -> str:
    content = hashlib.blake2b(str(cases.count).encode(), digest_size=32)
    for part in np.array_split(indices, -(-len(indices) // PART)):
        batch = cases.take(part)
        _enter(content, _as_before(cases, batch) if type(batch) is Batch else batch)
    return content.hexdigest()


def _as_before(cases: Cases, batch: Batch) -> tuple[Any, ...]:
    """Return a batch in the form of version 0.2, so that the digests in its checkpoints are still valid."""
    if isinstance(cases, (Arrays, Sequences)):
        return tuple(part if part is None else part.swapaxes(0, 1) for part in batch)  # time first
    return (*batch, len(batch.targets))


def _enter(content: Any, value: Any, depth: int = 4) -> None:
    """Let arrays enter a digest, however they are packed, but not deeper; of all else the type."""
    if isinstance(value, Mapping):
        value = tuple(value.items())
    if isinstance(value, (tuple, list)) and depth:
        for own in value:
            _enter(content, own, depth - 1)
        return
    try:
        array = np.asarray(value)
    except (ValueError, TypeError, RuntimeError):
        array = np.asarray(None)
    content.update(f"{type(value).__name__} {array.dtype.str} {array.shape}".encode())
    if array.dtype.kind in "biufcUS":
        content.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    elif hasattr(value, "__dict__") and depth:
        _enter(content, vars(value), depth - 1)
