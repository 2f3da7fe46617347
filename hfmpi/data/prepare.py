"""Split a text into a corpus; the text is read once from start to end."""

from __future__ import annotations

import codecs
import hashlib
import itertools
import os
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Final, Literal, NamedTuple

import numpy as np

from hfmpi.data.batches import SPLITS
from hfmpi.data.corpus import Corpus
from hfmpi.data.vocabulary import Translation
from hfmpi.errors import UserError

__all__ = ["ALL", "TRAIN_CHARS", "VALID_CHARS", "Prepared", "prepare"]

TRAIN_CHARS, VALID_CHARS = 2_800_000, 200_000
"""The sizes of Krause (2015): 14,000 and 1,000 sequences of 200 characters."""

ALL: Final = "all"
"""The value of `train_chars` for all characters that are not used for validation and test."""

PART = 2**20  # number of bytes that are processed at a time


class Prepared(NamedTuple):
    """A corpus, and information about its text.

    Attributes
    ----------
    corpus : Corpus
    size : int
        The size of the complete text, in `unit`.
    unit : {'characters', 'bytes'}
        The unit of a symbol.
    notes : list of str
        Sentences for the user about unexpected properties of the text.
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
    test_chars: int = 0,
    translation: Translation | None = None,
) -> Prepared:
    """Split a text into its first `train_chars` bytes, the next `valid_chars`, and the next `test_chars`.

    A text that is shorter than their sum is split in proportion. If `train_chars` is `ALL`, the last bytes of
    the text are used for validation and test, and all bytes before them for training. The vocabulary is that
    of the complete text, including the bytes after the splits, which are not stored in memory.

    Parameters
    ----------
    text : bytes, or iterable of bytes
        The text, or its consecutive parts; every byte is a symbol.
    train_chars : int or 'all'
        At least 1.
    valid_chars : int
        At least 1.
    provenance : dict of str to str, optional
        Facts that are saved with the corpus, together with the size and SHA-256 of the complete text.
    test_chars : int
        0: no test split.
    translation : Translation, optional
        Translates the text to an existing vocabulary. Default: the vocabulary is that of the text.

    Returns
    -------
    Prepared

    Raises
    ------
    UserError
        If the text is empty, a split would be empty, a size is less than 1, or characters are not in the
        vocabulary.
    """
    if valid_chars < 1 or test_chars < 0 or (train_chars != ALL and train_chars < 1):
        raise UserError("the training and the validation text must each have at least one character")
    wanted = sys.maxsize if train_chars == ALL else train_chars + valid_chars + test_chars
    size, symbols, selected = 0, b"", bytearray()
    sha, characters = hashlib.sha256(), _Characters()
    for part in _cut(text) if isinstance(text, bytes) else text:
        sha.update(part)
        characters.add(part)
        size += len(part)
        if translation is None:
            symbols += bytes(set(part.translate(None, symbols)))  # the bytes that are not in it yet
            selected += part[: wanted - len(selected)]
            continue
        while part and len(selected) < wanted:  # text after the splits is not checked for unknown characters
            missing = wanted - len(selected)
            selected += translation.add(part[:missing])
            part = part[missing:]
    origin = {**(provenance or {}), "text_characters": str(size), "text_sha256": sha.hexdigest()}
    notes, unit = [], "characters"
    if translation is not None:
        selected += translation.finish()
        symbols = translation.symbols
        origin["vocabulary"] = os.fsencode(Path(translation.name).name).decode(errors="replace")
        if translation.unknown:
            origin["replaced_characters"] = str(translation.unknown.total())
            notes.append(translation.summary())
    if not size:
        raise UserError("the text is empty: name a file that contains text")
    if translation is not None and symbols.isascii():
        size = characters.count or size  # after the replacement every character is one byte
    elif characters.count not in (None, size):
        unit = "bytes"
        notes.append(
            f"the text has {size:,} bytes, which are {characters.count:,} characters in UTF-8: every byte is "
            "a symbol, the sizes of the splits are in bytes, and losses in bits/char are bits/byte"
        )
    sizes, note = _sizes(len(selected), train_chars, valid_chars, test_chars, unit)
    notes += [note] if note else []
    symbols = bytes(sorted(symbols))
    ids = _ids(selected, symbols)
    ends = list(itertools.accumulate(sizes))
    train, valid, test = (ids[end - size : end] for size, end in zip(sizes, ends, strict=True))
    corpus = Corpus(train, valid, symbols, origin, test if test_chars else None)
    return Prepared(corpus, size, unit, notes)


def _sizes(
    length: int, train: int | Literal["all"], valid: int, test: int, unit: str
) -> tuple[tuple[int, int, int], str]:
    """Return the sizes of the splits of a text of this length, and a note for the user or ""."""
    names = [*SPLITS.values()][: 2 + (test > 0)]
    options = [f"--{name}-chars" for name in SPLITS][: len(names)]
    if train == ALL:
        train = length - valid - test
        if train < 1:
            others = [f"{n:,} for {name}" for n, name in zip((valid, test), names[1:], strict=False)]
            raise UserError(
                f"a text of {length:,} {unit} has none left for training after {' and '.join(others)}: "
                f"use a longer text, or reduce {' and '.join(options[1:])}"
            )
        return (train, valid, test), ""
    wanted = train + valid + test
    if length >= wanted:
        return (train, valid, test), ""
    requested = train, valid, test
    train, test = length * train // wanted, length * test // wanted
    valid = length - train - test
    sizes = (train, valid, test)[: len(names)]
    if not all(sizes):
        raise UserError(
            f"a text of {length:,} {unit} is too short to split "
            f"{' to '.join(f'{n:,}' for n in requested[: len(names)])}: use a longer text, or change "
            f"{' and '.join(options)}"
        )
    *parts, last = (f"{n:,} for {name}" for n, name in zip(sizes, names, strict=True))
    return (train, valid, test), (
        f"the text has {length:,} {unit}, not {wanted:,}: it is split in proportion, {', '.join(parts)} "
        f"and {last}"
    )


def _ids(text: bytearray, symbols: bytes) -> np.ndarray:
    """Convert a text in place to the ids of its symbols, and return these as a read-only array."""
    table = bytes(max(symbols.find(byte), 0) for byte in range(256))
    for start in range(0, len(text), PART):
        text[start : start + PART] = text[start : start + PART].translate(table)
    ids = np.frombuffer(text, np.uint8)
    ids.setflags(write=False)
    return ids


class _Characters:
    """Counts the characters of a text in UTF-8; `count` becomes None if the text is not valid UTF-8."""

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
