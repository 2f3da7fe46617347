"""A text, read once from its start to its end, split into a corpus."""

from __future__ import annotations

import codecs
import hashlib
import sys
from collections.abc import Iterable, Iterator
from typing import Final, Literal, NamedTuple

import numpy as np

from hfmpi.data.corpus import Corpus
from hfmpi.errors import UserError

__all__ = ["ALL", "TRAIN_CHARS", "VALID_CHARS", "Prepared", "prepare"]

TRAIN_CHARS, VALID_CHARS = 2_800_000, 200_000
"""Sizes of Krause (2015): 14,000 and 1,000 sequences of 200 characters."""

ALL: Final = "all"
"""As a number of characters for training: those that validation leaves."""

PART = 2**20  # bytes that are worked on at a time


class Prepared(NamedTuple):
    """A corpus, and what there is to say of its text.

    Attributes
    ----------
    corpus : Corpus
    size : int
        Bytes of the whole text, each of them a symbol.
    unit : {'characters', 'bytes'}
        What a symbol is.
    notes : list of str
        Sentences on what the user may not expect.
    """

    corpus: Corpus
    size: int
    unit: str
    notes: list[str]


def prepare(
    text: bytes | Iterable[bytes],
    train_chars: int | Literal["all"] = TRAIN_CHARS,
    valid_chars: int = VALID_CHARS,
    provenance: dict[str, str] | None = None,
) -> Prepared:
    """Split a text into its first `train_chars` bytes and the `valid_chars` bytes that follow.

    A text shorter than both together is split in their proportion, all of it. Where `train_chars` is `ALL`,
    the last `valid_chars` bytes are for validation, and those before them for training. The vocabulary is
    that of the whole text, also where a longer one goes on after both splits; of that rest nothing is kept in
    memory.

    Parameters
    ----------
    text : bytes, or iterable of bytes
        The text, or its parts from the start; every byte is a symbol.
    train_chars : int or 'all'
    valid_chars : int
        At least 1 each.
    provenance : dict of str to str, optional
        Kept with the corpus, beside the size and SHA-256 of the whole text.

    Returns
    -------
    Prepared

    Raises
    ------
    UserError
        If the text is empty or too short to give each split a character, or a size is less than 1.
    """
    if valid_chars < 1 or (train_chars != ALL and train_chars < 1):
        raise UserError("the training and the validation text need at least one character each")
    wanted = sys.maxsize if train_chars == ALL else train_chars + valid_chars
    size, symbols, kept = 0, b"", bytearray()
    sha, characters = hashlib.sha256(), _Characters()
    for part in _cut(text) if isinstance(text, bytes) else text:
        sha.update(part)
        characters.add(part)
        size += len(part)
        symbols += bytes(set(part.translate(None, symbols)))  # those that are new
        kept += part[: wanted - len(kept)]
    if not size:
        raise UserError("the text is empty: name a file that has text in it")
    notes, unit = [], "characters"
    if characters.count not in (None, size):
        unit = "bytes"
        notes.append(
            f"the text has {size:,} bytes, which are {characters.count:,} characters of UTF-8: every byte is "
            "a symbol, the sizes of the splits are in bytes, and bits/char are bits/byte"
        )
    if train_chars == ALL:
        train_chars = size - valid_chars
        if train_chars < 1:
            raise UserError(
                f"a text of {size:,} {unit} leaves none for training beside {valid_chars:,} for validation: "
                "give a longer one, or fewer --valid-chars"
            )
    elif size < wanted:
        proportion = f"{train_chars:,} to {valid_chars:,}"
        train_chars = size * train_chars // wanted
        valid_chars = size - train_chars
        if not train_chars:
            raise UserError(
                f"a text of {size:,} {unit} is too short to split {proportion}: give a longer one, or other "
                "--train-chars and --valid-chars"
            )
        notes.append(
            f"the text has {size:,} {unit}, not {wanted:,}: "
            f"it is split in proportion, {train_chars:,} for training and {valid_chars:,} for validation"
        )
    symbols = bytes(sorted(symbols))
    ids = _ids(kept, symbols)
    origin = {**(provenance or {}), "text_characters": str(size), "text_sha256": sha.hexdigest()}
    train, valid = ids[:train_chars], ids[train_chars : train_chars + valid_chars]
    return Prepared(Corpus(train, valid, symbols, origin), size, unit, notes)


def _ids(kept: bytearray, symbols: bytes) -> np.ndarray:
    """Give the text as ids of its symbols, in its own memory."""
    table = bytes(max(symbols.find(byte), 0) for byte in range(256))
    for start in range(0, len(kept), PART):
        kept[start : start + PART] = kept[start : start + PART].translate(table)
    ids = np.frombuffer(kept, np.uint8)
    ids.setflags(write=False)
    return ids


class _Characters:
    """Counts the characters of a text in UTF-8; `count` is None once it is known to be in no UTF-8."""

    def __init__(self) -> None:
        self.count: int | None = 0
        self._decoder = codecs.getincrementaldecoder("utf-8")()

    def add(self, part: bytes) -> None:
        if self.count is not None:
            try:
                self.count += len(self._decoder.decode(part))
            except UnicodeDecodeError:
                self.count = None


def _cut(text: bytes) -> Iterator[bytes]:
    return (text[start : start + PART] for start in range(0, len(text), PART))
