"""Checkpoints: all data that a run needs to continue, in one HDF5 file with a digest of its content.

In addition to the header of every HDF5 file of hfmpi, the root has the attribute meta (one JSON string), the
dataset theta and the group state, whose datasets are the arrays of the optimizer's state and whose attributes
are its numbers and strings. There are no pickles, links or references, and the reader accepts none. The file
`BEST` has the same format, with an empty state.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from hfmpi.errors import UserError
from hfmpi.files.hdf5 import Damage, Format, InUse, array, attribute, attributes, members, opened, set_text
from hfmpi.measure.machine import free_memory

__all__ = [
    "BEST",
    "NEWEST",
    "PREVIOUS",
    "Checkpoint",
    "Entry",
    "identity",
    "latest",
    "load",
    "save",
    "trained_on",
]

NEWEST = "checkpoint.h5"
PREVIOUS = "checkpoint.previous.h5"
BEST = "best.h5"
_FORMAT = Format("checkpoint", 1)

Entry = int | float | str | np.ndarray


@dataclass(frozen=True)
class Checkpoint:
    """The content of a checkpoint.

    Attributes
    ----------
    theta : ndarray
        The parameters, (D,).
    state : dict
        The optimizer's state by name: bool, int, float, str or ndarray. Empty: a run creates a new state.
    meta : dict
        The remaining description of the run, as JSON values.
    message : str or None
        A note for the user if `latest` returned the previous checkpoint, because the newest is damaged.
    """

    theta: np.ndarray
    state: dict[str, Entry]
    meta: dict[str, Any]
    message: str | None = None


def save(
    path: str | Path,
    theta: np.ndarray,
    state: Mapping[str, Entry],
    meta: Mapping[str, Any],
    previous: str | None = PREVIOUS,
) -> None:
    """Write a checkpoint completely or not at all; an existing one becomes the previous checkpoint.

    Parameters
    ----------
    path : path
        Usually the file `NEWEST` in the run's folder.
    theta : ndarray
        The parameters, (D,).
    state : mapping
        Maps names to bool, int, float, str or numeric ndarray of any shape.
    meta : mapping
        A small nested dict that JSON can represent.
    previous : str or None
        The new name of an existing checkpoint, in the same folder. None: the existing checkpoint is replaced.

    Raises
    ------
    UserError
        If the file cannot be written; existing files are then unchanged.
    TypeError
        If an entry of the state has a different type.
    """
    path = Path(path)
    text = json.dumps(meta, sort_keys=True)
    keep = path.with_name(previous) if previous is not None and _is_good(path) else None
    with _FORMAT.written(path, _digest(theta, state, text), load, keep) as file:
        set_text(file, "meta", text)
        _write(file, "theta", theta)
        file["theta"].dims[0].label = "parameter"
        arrays = file.create_group("state")
        for name, entry in state.items():
            _write(arrays, name, entry)


def load(path: str | Path) -> Checkpoint:
    """Read a checkpoint and verify its digest.

    Raises
    ------
    UserError
        If the file is missing, damaged, or not a checkpoint of this version.
    """
    path = Path(path)
    if not os.path.lexists(path):
        raise UserError(f"there is no checkpoint {path}")
    with opened(path) as (file, size):
        digest = _FORMAT.digest(file)
        if set(members(file)) != {"theta", "state"} or not isinstance(file["state"], h5py.Group):
            raise Damage("is damaged: a checkpoint contains exactly the dataset theta and the group state")
        limit = min(size, free_memory())
        theta = array(file, "theta", limit)
        limit -= theta.nbytes
        arrays, state = file["state"], dict[str, Entry]()
        for name in members(arrays):
            state[name] = entry = array(arrays, name, limit)
            limit -= entry.nbytes
        for name in attributes(arrays):
            state[name] = attribute(arrays, name)
        text = str(attribute(file, "meta", "S"))
        if digest != _digest(theta, state, text):
            raise Damage("is damaged: its content does not match its digest")
        meta = json.loads(text)
        if not isinstance(meta, dict):
            raise Damage("is damaged: its attribute meta is not a JSON object")
    return Checkpoint(theta, state, meta)


def latest(folder: str | Path) -> Checkpoint:
    """Read a run's newest checkpoint, or the previous one, with a message, if the newest is damaged.

    Raises
    ------
    UserError
        If neither can be read, or another program has locked the newest one.
    """
    newest, previous = Path(folder) / NEWEST, Path(folder) / PREVIOUS
    try:
        return load(newest)
    except InUse:  # the file may be valid: falling back would discard the steps since the previous one
        raise
    except UserError as error:
        if not previous.exists():
            raise
        try:
            checkpoint = load(previous)
        except UserError as second:
            raise UserError(f"{error}; {second}") from second
        return replace(checkpoint, message=f"{error}; continuing from {previous}")


def trained_on(folder: str | Path) -> tuple[str | None, bytes]:
    """Return the digest of a run's data and the symbols of its text, or None and b"" if they are unknown."""
    try:
        meta = latest(folder).meta
        digests = identity(meta)
        return digests.get("corpus") or digests["cases"], bytes(list(meta.get("vocabulary", ())))
    except (UserError, LookupError, TypeError, ValueError):
        return None, b""


def identity(meta: Mapping[str, Any]) -> dict[str, str]:
    """Return the digests of a run's data and of a user-defined model; raise a KeyError if one is missing."""
    if "corpus" in meta:
        return {"corpus": str(meta["corpus"])}
    return {name: str(meta[name]) for name in ("cases", "valid_cases", "model")}


def _is_good(path: Path) -> bool:
    """Return whether a checkpoint is valid, so that it may replace the previous one."""
    try:
        load(path)
    except UserError:
        return False
    return True


def _write(group: h5py.Group, name: str, entry: Entry) -> None:
    if isinstance(entry, np.ndarray) and entry.dtype.kind in "biuf":
        group.create_dataset(name, data=entry)
    elif isinstance(entry, str):
        set_text(group, name, entry)
    elif isinstance(entry, (bool, int, float)):
        group.attrs[name] = entry
    else:
        raise TypeError(f"a checkpoint cannot contain {name} of type {type(entry).__name__}")


def _digest(theta: np.ndarray, state: Mapping[str, Entry], meta: str) -> str:
    """Return the SHA-256 of the names, types, shapes and bytes of meta, theta and the sorted state."""
    content = hashlib.sha256()
    entries = [("meta", meta), ("theta", theta)] + [(f"state/{name}", state[name]) for name in sorted(state)]
    for name, entry in entries:
        if isinstance(entry, np.ndarray):
            kind, shape, data = entry.dtype.str, list(entry.shape), entry.tobytes()
        elif isinstance(entry, float):
            kind, shape, data = "float", [], np.float64(entry).tobytes()
        else:
            kind, shape, data = type(entry).__name__, [], str(entry).encode()
        content.update(json.dumps([name, kind, shape, len(data)]).encode() + data)
    return content.hexdigest()
