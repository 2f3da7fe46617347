"""A text as symbol ids of a byte vocabulary, and its HDF5 file.

In version 1 the datasets `/train` and `/valid` contain symbol ids, and `/symbols` the byte of each id. All
are uint8, one-dimensional, contiguous and uncompressed, so that their sizes can be checked against the size
of the file before they are read. Version 2 also has `/test`. A corpus without a test text is written as
version 1, which the first release of hfmpi can read. In addition to the header of every HDF5 file of hfmpi,
the root has the attributes `created`, `creator`, and `provenance_...` for each fact about the origin of the
text.
"""

from __future__ import annotations

import hashlib
import os
import shlex
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path

import h5py
import numpy as np

from hfmpi.data.batches import SPLITS
from hfmpi.errors import UserError
from hfmpi.files.hdf5 import (
    Damage,
    Format,
    InUse,
    NotHDF5,
    array,
    attribute,
    attributes,
    members,
    opened,
    set_text,
)
from hfmpi.measure.machine import free_memory
from hfmpi.version import __version__

__all__ = ["Corpus", "is_corpus", "loss_unit"]

_FORMATS = {version: Format("corpus", version) for version in (1, 2)}
_NEWEST = _FORMATS[2]
_PROVENANCE = "provenance_"
PART = 2**20  # number of ids that are read at a time to verify a file


@dataclass(frozen=True, eq=False)
class Corpus:
    """A text in two or three splits, as ids of a byte vocabulary.

    Attributes
    ----------
    train, valid : (n,) uint8
        Symbol ids of the splits; read-only if they come from a file or from `prepare`.
    symbols : bytes
        The vocabulary, sorted and distinct: id k is the byte ``symbols[k]``.
    provenance : dict of str to str
        The origin of the text.
    test : (n,) uint8, or None
        Like `train`.
    """

    train: np.ndarray
    valid: np.ndarray
    symbols: bytes
    provenance: dict[str, str] = field(default_factory=dict)
    test: np.ndarray | None = None

    @property
    def splits(self) -> dict[str, np.ndarray]:
        """The existing splits by name."""
        test = {} if self.test is None else {"test": self.test}
        return {"train": self.train, "valid": self.valid} | test

    @property
    def _version(self) -> int:
        return 1 if self.test is None else 2

    @property
    def _symbols(self) -> np.ndarray:
        return np.frombuffer(self.symbols, np.uint8)

    @property
    def vocabulary(self) -> int:
        """The number of symbols."""
        return len(self.symbols)

    @cached_property
    def digest(self) -> str:
        """The hexadecimal SHA-256 digest of the vocabulary and the splits, without provenance and dates."""
        sha = hashlib.sha256(f"hfmpi corpus {self._version}\n".encode())
        for part in (self._symbols, *self.splits.values()):
            sha.update(len(part).to_bytes(8, "little"))
            sha.update(np.ascontiguousarray(part, np.uint8).data)
        return sha.hexdigest()

    def write(self, path: str | os.PathLike[str]) -> None:
        """Write the corpus to an HDF5 file atomically.

        Raises
        ------
        UserError
            If the file cannot be written.
        """
        content = [
            (name, ids, "position", f"symbol ids of the {SPLITS[name]} text")
            for name, ids in self.splits.items()
        ]
        content.append(("symbols", self._symbols, "symbol id", "the byte that each id stands for"))
        with _FORMATS[self._version].written(Path(path), self.digest, check=self._check) as file:
            for name, ids, dimension, meaning in content:
                dataset = file.create_dataset(name, data=ids, dtype=np.uint8)
                dataset.dims[0].label = dimension
                set_text(dataset, "long_name", meaning)
            set_text(file, "created", datetime.now(UTC).isoformat(timespec="seconds"))
            set_text(file, "creator", f"hfmpi {__version__}")
            for key, value in self.provenance.items():
                set_text(file, _PROVENANCE + key, value)

    def _check(self, path: Path) -> None:
        """Raise a UserError unless the file contains this corpus; the file is read in parts."""
        with opened(path) as (file, _):
            same = _FORMATS[self._version].digest(file) == self.digest
            for name, ids in (*self.splits.items(), ("symbols", self._symbols)):
                parts = range(0, len(ids) + 1, PART)  # + 1 detects additional ids in the file
                same = same and all(
                    np.array_equal(file[name][start : start + PART], ids[start : start + PART])
                    for start in parts
                )
            if not same:
                raise Damage("is damaged: its content is not what was written")

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> Corpus:
        """Read a corpus, and check its complete content.

        Raises
        ------
        UserError
            If the file cannot be read, is not a corpus of a known version, or is damaged.
        """
        try:
            with opened(Path(path)) as (file, size):
                return cls._read(file, min(size, free_memory()))
        except NotHDF5 as error:
            out = Path(path).with_suffix(".h5")
            words = shlex.quote(str(path)), shlex.quote("OUT.h5" if out == Path(path) else str(out))
            raise UserError(
                f"{error}; if it is a text, first convert it to a corpus: hfmpi prepare {' '.join(words)}"
            ) from None

    @classmethod
    def _read(cls, file: h5py.File, limit: int) -> Corpus:
        """Read and check the corpus in a file, whose splits may have at most `limit` bytes in total."""
        if not _NEWEST.claimed(file):
            raise Damage("is an HDF5 file but not an hfmpi corpus: create a corpus with `hfmpi prepare`")
        version = attribute(file, "version", "iu")
        digest = _FORMATS.get(int(version), _NEWEST).digest(file)
        names = ["train", "valid", "test"][: 1 + int(version)]
        if set(members(file)) != {*names, "symbols"}:
            raise Damage(
                f"is damaged: a corpus of version {version} has the datasets {', '.join(names)} and symbols "
                "and nothing else"
            )
        symbols = _ids(file, "symbols", 256)
        if np.any(symbols[1:] <= symbols[:-1]):
            raise Damage("is damaged: its symbols are not sorted and distinct")
        splits = dict[str, np.ndarray]()
        for name in names:
            splits[name] = ids = _ids(file, name, limit)
            limit -= len(ids)
            if int(ids.max()) >= len(symbols):
                raise Damage(f"is damaged: /{name} has ids outside the vocabulary of {len(symbols)} symbols")
        names = [name for name in attributes(file) if name.startswith(_PROVENANCE)]
        provenance = {name.removeprefix(_PROVENANCE): str(attribute(file, name, "S")) for name in names}
        corpus = cls(symbols=symbols.tobytes(), provenance=provenance, **splits)
        if corpus.digest != digest:
            raise Damage("is damaged: its contents do not match its digest")
        return corpus


def loss_unit(symbols: bytes) -> str:
    """Return the unit of the loss on texts of these symbols, bits/char or bits/byte."""
    # A character outside ASCII may consist of several bytes, each of which is a symbol.
    return "bits/char" if symbols.isascii() else "bits/byte"


def is_corpus(path: Path) -> bool:
    """Return whether a file claims to be a corpus, valid or damaged; raise a UserError if it is in use."""
    try:
        with opened(path) as (file, _):
            return _NEWEST.claimed(file)
    except InUse:
        raise
    except UserError:
        return False


def _ids(file: h5py.File, name: str, limit: int) -> np.ndarray:
    ids = array(file, name, limit)
    if ids.dtype != np.uint8 or ids.ndim != 1 or not ids.size:
        raise Damage(f"is damaged: /{name} is not a one-dimensional dataset of at least one byte")
    ids.setflags(write=False)
    return ids
