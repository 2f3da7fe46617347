"""Compiled kernels from one run to the next: one archive file, only ever replaced as a whole.

Numba's own cache folder is not made for ranks that start together on a shared home folder: two processes
that compile one function for different types number their files alike, and one may then load the other's
machine code. It also knows a function by its source file alone, not by what it calls, and a folder that
cannot be written is an error. Here every process works in a private folder, filled from the archive; what it
had to compile goes into a new archive at exit. A cache that is damaged or cannot be read or written costs a
few seconds of compiling, no more.
"""

from __future__ import annotations

import atexit
import contextlib
import hashlib
import io
import os
import shutil
import sys
import tempfile
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numba
from llvmlite import binding

from hfmpi.errors import UserError
from hfmpi.files.atomic import replace

__all__ = ["archive_path", "kernel_cache"]

_DAMAGED = (RuntimeError, ValueError, NotImplementedError, EOFError, zlib.error, zipfile.BadZipFile)
_UNUSABLE = (*_DAMAGED, OSError, UserError)


def archive_path(name: str, sources: tuple[str, ...]) -> Path:
    """Give the archive's place: $XDG_CACHE_HOME/hfmpi or ~/.cache/hfmpi, a file for each build and processor.

    Parameters
    ----------
    name : str
        Of the set of kernels.
    sources : tuple of str
        Paths of the files that the kernels are compiled from.

    Raises
    ------
    RuntimeError, OSError
        If there is no home folder, or a source cannot be read.
    """
    key = hashlib.blake2b(digest_size=8)
    for text in (numba.__version__, sys.implementation.cache_tag, binding.get_host_cpu_name()):
        key.update(f"{text}\0".encode())
    for source in sources:
        key.update(f"{source}\0{os.stat(source).st_mtime_ns}\0".encode() + Path(source).read_bytes())
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "hfmpi" / f"{name}-{key.hexdigest()}.zip"


@contextlib.contextmanager
def kernel_cache(name: str, sources: tuple[str, ...]) -> Iterator[bool]:
    """Lend Numba a cache folder: functions decorated inside the block with `cache=True` use it.

    Yields
    ------
    bool
        Whether there is a folder; if not, decorate with `cache=False`.
    """
    try:
        archive = archive_path(name, sources)
        folder = Path(tempfile.mkdtemp(prefix="hfmpi-kernels-"))
    except _UNUSABLE:
        yield False
        return
    atexit.register(_leave, folder, archive, *_fill(folder, archive))
    options: Any = numba.config
    before, options.CACHE_DIR = options.CACHE_DIR, str(folder)
    try:
        yield True
    finally:
        options.CACHE_DIR = before


def _fill(folder: Path, archive: Path) -> tuple[set[str], bool]:
    """Unpack the archive, if it is sound; give the names of the files, and whether it is damaged."""
    try:
        with zipfile.ZipFile(archive) as packed:
            packed.extractall(folder)
            return set(packed.namelist()), False
    except _UNUSABLE as error:
        shutil.rmtree(folder, ignore_errors=True)  # nothing half unpacked
        folder.mkdir(mode=0o700, exist_ok=True)
        return set(), isinstance(error, _DAMAGED)


def _leave(folder: Path, archive: Path, known: set[str], damaged: bool) -> None:
    """Put what was compiled into the archive, unless another rank has done so; remove the folder."""
    with contextlib.suppress(*_UNUSABLE):
        files = {str(p.relative_to(folder)): p for p in sorted(folder.rglob("*.nb[ci]"))}
        if files.keys() - known and (damaged or files.keys() - _names(archive)):
            packed = io.BytesIO()
            with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as out:
                for name, path in files.items():
                    out.write(path, name)
            archive.parent.mkdir(parents=True, exist_ok=True)
            replace(archive, packed.getvalue())
    shutil.rmtree(folder, ignore_errors=True)


def _names(archive: Path) -> set[str]:
    with contextlib.suppress(*_UNUSABLE), zipfile.ZipFile(archive) as packed:
        return set(packed.namelist())
    return set()
