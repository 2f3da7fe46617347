"""The HDF5 file of a corpus.

Version 1: the datasets `/train` and `/valid` hold symbol ids and `/symbols` the byte that each id stands for,
all uint8, one-dimensional, contiguous and uncompressed, so that what a file claims to hold can be checked
against its size before anything is read. The attributes of the root are `format`, `version`, `digest`,
`created`, `creator`, and one `provenance_...` for each thing known of the text's origin.
"""

from __future__ import annotations

import io
from datetime import UTC, datetime
from pathlib import Path

import h5py
import numpy as np

from hfmpi import __version__
from hfmpi.errors import UserError
from hfmpi.files.atomic import replace
from hfmpi.files.hdf5 import Damage, array, attribute, attributes, members, opened, set_text
from hfmpi.measure.machine import free_memory

__all__ = ["is_corpus", "read", "write"]

FORMAT = "hfmpi corpus"
VERSION = 1
PROVENANCE = "provenance_"


def write(
    path: Path, train: np.ndarray, valid: np.ndarray, symbols: bytes, digest: str, provenance: dict[str, str]
) -> None:
    """Write the parts of a corpus; UserError if that cannot be, with the file as before."""
    # HDF5 does its work in memory: a full disk is then met by plain Python, which can clean up.
    image = io.BytesIO()
    # From v110 on, HDF5's own structures carry checksums.
    with h5py.File(image, "w", libver=("v110", "v110")) as file:
        for name, content, dimension, meaning in (
            ("train", train, "position", "symbol ids of the training text"),
            ("valid", valid, "position", "symbol ids of the validation text"),
            ("symbols", np.frombuffer(symbols, np.uint8), "symbol id", "the byte that each id stands for"),
        ):
            dataset = file.create_dataset(name, data=content, dtype=np.uint8)
            dataset.dims[0].label = dimension
            set_text(dataset, "long_name", meaning)
        set_text(file, "format", FORMAT)
        file.attrs["version"] = VERSION
        set_text(file, "digest", digest)
        set_text(file, "created", datetime.now(UTC).isoformat(timespec="seconds"))
        set_text(file, "creator", f"hfmpi {__version__}")
        for key, value in provenance.items():
            set_text(file, PROVENANCE + key, value)
    replace(path, image.getbuffer(), check=read)


def read(path: Path) -> tuple[np.ndarray, np.ndarray, bytes, str, dict[str, str]]:
    """Return train, valid, symbols, the stored digest and provenance; UserError on any damage."""
    with opened(path) as (file, size):
        return _parts(file, min(size, free_memory()))


def is_corpus(path: Path) -> bool:
    """Whether the file calls itself a corpus, of any version and in any state."""
    try:
        with opened(path) as (file, _):
            return _claims(file)
    except UserError:
        return False


def _claims(file: h5py.File) -> bool:
    try:
        return attribute(file, "format", "S") == FORMAT
    except Damage:
        return False


def _parts(file: h5py.File, most: int) -> tuple[np.ndarray, np.ndarray, bytes, str, dict[str, str]]:
    if not _claims(file):
        raise Damage("is an HDF5 file but not an hfmpi corpus (make one with `hfmpi prepare`)")
    version = attribute(file, "version", "iu")
    if version != VERSION:
        raise Damage(f"is a corpus of version {version!s:.20}, and this hfmpi reads version {VERSION}")
    found = members(file)
    if set(found) != {"train", "valid", "symbols"}:
        raise Damage("is damaged: a corpus has the datasets train, valid and symbols and nothing else")
    symbols = _ids(file, "symbols", 256)
    if np.any(symbols[1:] <= symbols[:-1]):
        raise Damage("is damaged: its symbols are not sorted and different")
    train = _ids(file, "train", most)
    valid = _ids(file, "valid", most - len(train))
    for name, ids in (("train", train), ("valid", valid)):
        if int(ids.max()) >= len(symbols):
            raise Damage(f"is damaged: /{name} has ids outside the vocabulary of {len(symbols)} symbols")
    names = [name for name in attributes(file) if name.startswith(PROVENANCE)]
    provenance = {name.removeprefix(PROVENANCE): str(attribute(file, name, "S")) for name in names}
    return train, valid, symbols.tobytes(), str(attribute(file, "digest", "S")), provenance


def _ids(file: h5py.File, name: str, most: int) -> np.ndarray:
    ids = array(file, name, most)
    if ids.dtype != np.uint8 or ids.ndim != 1 or not ids.size:
        raise Damage(f"is damaged: /{name} is not a one-dimensional dataset of bytes, at least one")
    ids.setflags(write=False)
    return ids
