"""Checkpoints: everything a run needs to go on, in one HDF5 file that proves itself whole.

The root has the attributes format, version, digest and meta (one JSON string), the dataset theta and the
group state, whose datasets are the arrays of the optimizer's state and whose attributes are its numbers
and strings. There are no pickles, links or references, and the reader accepts none.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from hfmpi.errors import UserError
from hfmpi.files import replace, set_text

__all__ = ["NEWEST", "PREVIOUS", "Checkpoint", "Entry", "latest", "load", "save"]

NEWEST = "checkpoint.h5"
PREVIOUS = "checkpoint.previous.h5"
_FORMAT, _VERSION = "hfmpi checkpoint", 1
_PLAIN_LAYOUTS = (h5py.h5d.COMPACT, h5py.h5d.CONTIGUOUS)

Entry = int | float | str | np.ndarray


@dataclass(frozen=True)
class Checkpoint:
    """What a checkpoint holds.

    Attributes
    ----------
    theta : ndarray
        The parameters, (D,).
    state : dict
        The optimizer's state by name: bool, int, float, str or ndarray.
    meta : dict
        Whatever else describes the run, as JSON has it.
    message : str or None
        What the user should know, if `latest` fell back on the previous checkpoint.
    """

    theta: np.ndarray
    state: dict[str, Entry]
    meta: dict[str, Any]
    message: str | None = None


def save(path: str | Path, theta: np.ndarray, state: Mapping[str, Entry], meta: Mapping[str, Any]) -> None:
    """Write a checkpoint as a whole or not at all; the one that was there becomes the previous one.

    Parameters
    ----------
    path : path
        Usually the run's folder / `NEWEST`; the previous one goes to `PREVIOUS` beside it.
    theta : ndarray
        The parameters, (D,).
    state : mapping
        Names to bool, int, float, str or ndarray of numbers of any shape.
    meta : mapping
        A small nested dict that JSON can hold.

    Raises
    ------
    UserError
        If the folder or the disk does not take the file; the files there are then as before.
    TypeError
        If an entry is of another type.
    """
    path = Path(path)
    # The file is made in memory, so that a full disk meets one plain write and not the HDF5 library.
    # From v110 on, HDF5's own structures carry checksums.
    image = io.BytesIO()
    with h5py.File(image, "w", libver=("v110", "v110")) as file:
        arrays = file.create_group("state")
        _write(file, "theta", theta)
        file["theta"].dims[0].label = "parameter"
        for name, entry in state.items():
            _write(arrays, name, entry)
        text = json.dumps(meta, sort_keys=True)
        file.attrs["version"] = _VERSION
        for name, value in ("format", _FORMAT), ("meta", text), ("digest", _digest(theta, state, text)):
            set_text(file, name, value)
    replace(path, image.getbuffer(), keep=path.with_name(PREVIOUS))


def load(path: str | Path) -> Checkpoint:
    """Read a checkpoint and verify its digest.

    Raises
    ------
    UserError
        If the file is missing, damaged, or anything but a checkpoint of this version.
    """
    path = Path(path)
    try:
        size = path.stat().st_size
        with h5py.File(path, "r") as file:
            kind, version = _attribute(file, "format"), _attribute(file, "version")
            if kind != _FORMAT or version != _VERSION:
                raise UserError(f"{path} is not a checkpoint of version {_VERSION}: {kind} {version}")
            arrays = _member(file, "state", h5py.Group)
            datasets = {name: _dataset(arrays, name) for name in arrays}
            parameters = _dataset(file, "theta")
            if parameters.nbytes + sum(dataset.nbytes for dataset in datasets.values()) > size:
                raise ValueError("it declares more content than the file is long")
            theta = np.asarray(parameters[()])
            state: dict[str, Entry] = {name: np.asarray(dataset[()]) for name, dataset in datasets.items()}
            state |= {name: _attribute(arrays, name) for name in arrays.attrs}
            text, digest = _attribute(file, "meta"), _attribute(file, "digest")
        if digest != _digest(theta, state, str(text)):
            raise ValueError("its content does not match its digest")
        meta = json.loads(str(text))
        if not isinstance(meta, dict):
            raise ValueError("its meta is no object")
        return Checkpoint(theta, state, meta)
    except FileNotFoundError:
        raise UserError(f"there is no checkpoint {path}") from None
    except UserError:
        raise
    except Exception as error:  # whatever the HDF5 library makes of damaged bytes
        reason = " ".join(str(error).split())
        raise UserError(f"the checkpoint {path} is damaged or unreadable: {reason}") from error


def latest(folder: str | Path) -> Checkpoint:
    """Read a run's newest checkpoint, or the previous one with a message if the newest is damaged.

    Raises
    ------
    UserError
        If neither can be read.
    """
    newest, previous = Path(folder) / NEWEST, Path(folder) / PREVIOUS
    try:
        return load(newest)
    except UserError as error:
        if not previous.exists():
            raise
        try:
            found = load(previous)
        except UserError as second:
            raise UserError(f"{error}; {second}") from second
        message = f"{error}; going on from {previous}"
        return Checkpoint(found.theta, found.state, found.meta, message)


def _write(group: h5py.Group, name: str, entry: Entry) -> None:
    if isinstance(entry, np.ndarray) and entry.dtype.kind in "biuf":
        group.create_dataset(name, data=entry)
    elif isinstance(entry, str):
        set_text(group, name, entry)
    elif isinstance(entry, (bool, int, float)):
        group.attrs[name] = entry
    else:
        raise TypeError(f"a checkpoint cannot hold {name}: {type(entry).__name__}")


def _member(group: h5py.Group, name: str, kind: type) -> Any:
    """Open a member that is in this very file: no soft or external link."""
    if not isinstance(group.get(name, getlink=True), h5py.HardLink):
        raise ValueError(f"{name} is missing or a link")
    member = group[name]
    if not isinstance(member, kind):
        raise ValueError(f"{name} is not a {kind.__name__.lower()}")
    return member


def _dataset(group: h5py.Group, name: str) -> Any:
    """Open a dataset of numbers whose every byte is stored, as such, in this very file."""
    dataset = _member(group, name, h5py.Dataset)
    plain = dataset.id.get_create_plist().get_layout() in _PLAIN_LAYOUTS and dataset.external is None
    stored = dataset.nbytes in (0, dataset.id.get_storage_size())
    if not plain or not stored or dataset.dtype.kind not in "biuf":
        raise ValueError(f"{name} is not a plain array of numbers")
    return dataset


def _attribute(holder: h5py.Group, name: str) -> int | float | str:
    if name not in holder.attrs:
        raise ValueError(f"the attribute {name} is missing")
    about = holder.attrs.get_id(name)
    if about.shape != () or about.dtype.kind not in "bifS":  # texts of variable length are not read
        raise ValueError(f"the attribute {name} is not a number or a plain text")
    value = holder.attrs[name].item()
    return value.decode() if isinstance(value, bytes) else value


def _digest(theta: np.ndarray, state: Mapping[str, Entry], meta: str) -> str:
    """SHA-256 over name, type, shape and bytes of every entry in sorted order, theta and meta included."""
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
