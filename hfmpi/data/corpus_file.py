"""The HDF5 file of a corpus.

Version 1: the datasets `/train` and `/valid` hold symbol ids and `/symbols` the byte that each id stands for,
all uint8, one-dimensional, contiguous and uncompressed, so that what a file claims to hold can be checked
against its size before anything is read. The attributes of the root are `format`, `version`, `digest`,
`created`, `creator`, and one `provenance_...` for each thing known of the text's origin.
"""

from __future__ import annotations

import io
import stat
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from hfmpi import __version__
from hfmpi.errors import UserError
from hfmpi.files import replace, set_text

__all__ = ["is_corpus", "read", "write"]

FORMAT = "hfmpi corpus"
VERSION = 1
PROVENANCE = "provenance_"

# What HDF5 raises on damaged files is any of these, in words that only its authors understand.
HDF5_ERRORS = (OSError, RuntimeError, LookupError, ValueError, TypeError, ArithmeticError)


class _Damage(Exception):
    """What is wrong with a file, as the words that follow its name."""


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
    replace(path, image.getbuffer())


def read(path: Path) -> tuple[np.ndarray, np.ndarray, bytes, str, dict[str, str]]:
    """Return train, valid, symbols, the stored digest and provenance; UserError on any damage."""
    try:
        found = path.stat()
        if not stat.S_ISREG(found.st_mode):
            raise UserError(f"cannot read {path}: it is not a regular file")
        with path.open("rb"):  # to tell "you may not" from "it is damaged"
            pass
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from None
    if not h5py.is_hdf5(path):
        raise UserError(f"{path} is not an HDF5 file (make a corpus with `hfmpi prepare`)")
    try:
        with h5py.File(path, "r", locking="best-effort") as file:
            return _parts(file, found.st_size)
    except _Damage as damage:
        raise UserError(f"{path} {damage}") from None
    except MemoryError:
        raise UserError(f"{path} needs more memory than there is") from None
    except HDF5_ERRORS:
        raise UserError(f"{path} is damaged or truncated: HDF5 cannot read it as a corpus") from None


def is_corpus(path: Path) -> bool:
    """Whether the file calls itself a corpus, of any version and in any state."""
    if not path.is_file():
        return False
    try:
        with h5py.File(path, "r", locking="best-effort") as file:
            return _claims(file)
    except HDF5_ERRORS:
        return False


def _claims(file: h5py.File) -> bool:
    try:
        return _text(file, "format") == FORMAT
    except _Damage:
        return False


def _parts(file: h5py.File, size: int) -> tuple[np.ndarray, np.ndarray, bytes, str, dict[str, str]]:
    if not _claims(file):
        raise _Damage("is an HDF5 file but not an hfmpi corpus (make one with `hfmpi prepare`)")
    version = _scalar(file, "version")
    if not isinstance(version, np.integer) or version != VERSION:
        raise _Damage(f"is a corpus of version {version!s:.20}, and this hfmpi reads version {VERSION}")
    symbols = _ids(file, "symbols", min(size, 256))
    if np.any(symbols[1:] <= symbols[:-1]):
        raise _Damage("is damaged: its symbols are not sorted and different")
    train, valid = _ids(file, "train", size), _ids(file, "valid", size)
    for name, ids in (("train", train), ("valid", valid)):
        if int(ids.max()) >= len(symbols):
            raise _Damage(f"is damaged: /{name} has ids outside the vocabulary of {len(symbols)} symbols")
    names = [name for name in file.attrs if name.startswith(PROVENANCE)]
    provenance = {name.removeprefix(PROVENANCE): _text(file, name) for name in names}
    return train, valid, symbols.tobytes(), _text(file, "digest"), provenance


def _ids(file: h5py.File, name: str, limit: int) -> np.ndarray:
    """Read one dataset, after making sure that it lies in the file itself, plain, and no larger than it."""
    # Soft and external links, virtual datasets and external storage could all lead to other files.
    if not isinstance(file.get(name, getlink=True), h5py.HardLink):
        raise _Damage(f"is damaged: it has no dataset /{name} of its own")
    dataset = file[name]
    if not isinstance(dataset, h5py.Dataset) or dataset.dtype != np.uint8 or dataset.ndim != 1:
        raise _Damage(f"is damaged: /{name} is not a one-dimensional dataset of bytes")
    count = dataset.size
    if not count:
        raise _Damage(f"is damaged: /{name} is empty")
    if count > limit:
        raise _Damage(f"is damaged: /{name} claims {count:,} symbols, more than there can be")
    settings = dataset.id.get_create_plist()
    plain = settings.get_layout() == h5py.h5d.CONTIGUOUS and not settings.get_external_count()
    if not plain or dataset.id.get_storage_size() != count or dataset.id.get_offset() is None:
        raise _Damage(f"is damaged: /{name} is not stored as plain bytes in the file")
    ids = dataset[:]
    ids.setflags(write=False)
    return ids


def _text(file: h5py.File, name: str) -> str:
    value = _scalar(file, name)
    if not isinstance(value, bytes):
        raise _Damage(f"is damaged: its attribute {name} is not a text")
    return value.decode()


def _scalar(file: h5py.File, name: str) -> Any:
    if name not in file.attrs:
        raise _Damage(f"is damaged: it has no attribute {name}")
    found = file.attrs.get_id(name)
    if found.shape != () or found.dtype.kind not in "Siu":
        raise _Damage(f"is damaged: its attribute {name} is not a plain text or integer")
    return file.attrs[name]
