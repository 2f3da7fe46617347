"""A text as symbol ids of its own byte vocabulary."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np

from hfmpi.errors import UserError

__all__ = ["Corpus"]


@dataclass(frozen=True, eq=False)
class Corpus:
    """A text in two parts, as ids of its byte vocabulary.

    Attributes
    ----------
    train, valid : ndarray of uint8, 1-D
        Symbol ids of the two splits, read-only when they come from a file or from `prepare`.
    symbols : bytes
        The vocabulary: id k stands for the byte ``symbols[k]``; sorted, no byte twice.
    provenance : dict of str to str
        Where the text came from.
    """

    train: np.ndarray
    valid: np.ndarray
    symbols: bytes
    provenance: dict[str, str] = field(default_factory=dict)

    @property
    def vocabulary(self) -> int:
        """The number of different symbols."""
        return len(self.symbols)

    @cached_property
    def digest(self) -> str:
        """SHA-256 (hexadecimal) of vocabulary and splits; provenance and dates do not enter."""
        sha = hashlib.sha256(b"hfmpi corpus 1\n")
        for part in (np.frombuffer(self.symbols, np.uint8), self.train, self.valid):
            sha.update(len(part).to_bytes(8, "little"))
            sha.update(np.ascontiguousarray(part, np.uint8).data)
        return sha.hexdigest()

    def encode(self, text: bytes) -> np.ndarray:
        """Return the ids (len(text),) uint8 of a text.

        Raises
        ------
        UserError
            If a byte of the text is not in the vocabulary.
        """
        table = np.full(256, -1, np.int16)
        table[np.frombuffer(self.symbols, np.uint8)] = np.arange(self.vocabulary)
        ids = table[np.frombuffer(text, np.uint8)]
        if ids.size and ids.min() < 0:
            unknown = text[int(ids.argmin())]
            raise UserError(
                f"the byte {bytes([unknown])!r} is not one of the {self.vocabulary} symbols of the corpus"
            )
        return ids.astype(np.uint8)

    def decode(self, ids: np.ndarray) -> bytes:
        """Return the text that ids (n,), any integer type, stand for."""
        return np.frombuffer(self.symbols, np.uint8)[ids].tobytes()

    def write(self, path: str | os.PathLike[str]) -> None:
        """Write the corpus to an HDF5 file, which is complete or as before whatever happens.

        Raises
        ------
        UserError
            If the file cannot be written there.
        """
        from hfmpi.data import corpus_file  # here, so that a corpus in memory needs no h5py

        corpus_file.write(Path(path), self.train, self.valid, self.symbols, self.digest, self.provenance)

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> Corpus:
        """Read a corpus and check all of it.

        Raises
        ------
        UserError
            If the file cannot be read, is no corpus of this version, or is damaged.
        """
        from hfmpi.data import corpus_file

        train, valid, symbols, digest, provenance = corpus_file.read(Path(path))
        corpus = cls(train, valid, symbols, provenance)
        if corpus.digest != digest:
            raise UserError(f"{path} is damaged: its contents do not match its digest")
        return corpus
