"""A cache of compiled kernels that runs share: a single archive file, which is replaced atomically.

Numba's cache folder is not safe for ranks that start at the same time with a shared home folder: two
processes that compile one function for different types choose the same file names, so that one may load the
machine code of the other. Numba also identifies a function only by its source file, and not by the functions
that it calls, and raises an error if the folder is not writable. So each process uses a private folder, into
which the archive is unpacked. At exit, a process that has compiled kernels writes a new archive. If the cache
is damaged, or cannot be read or written, the only consequence is that compiling takes a few seconds.

A process locks its folder, and the operating system releases the lock when the process ends in any way. So a
later process recognises the folders of processes that were killed, and removes them.
"""

from __future__ import annotations

import atexit
import contextlib
import fcntl
import functools
import hashlib
import io
import os
import shutil
import sys
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numba
from llvmlite import binding

from hfmpi.errors import UserError
from hfmpi.files.atomic import replace

__all__ = ["archive_path", "kernel_cache"]

_DAMAGED = (RuntimeError, ValueError, NotImplementedError, EOFError, zlib.error, zipfile.BadZipFile)
_UNUSABLE = (*_DAMAGED, OSError, UserError)
_PREFIX = "hfmpi-cache-"


def archive_path(name: str, sources: tuple[str, ...]) -> Path:
    """Return the path of the archive in the user's cache folder; there is one per build and processor.

    The folder is `$XDG_CACHE_HOME/hfmpi` or `~/.cache/hfmpi`.

    Parameters
    ----------
    name : str
        The name of the set of kernels.
    sources : tuple of str
        Paths of the source files of the kernels.

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
def kernel_cache(name: str, sources: tuple[str, ...]) -> Iterator[Callable[[Any], Any]]:
    """Provide a cache folder for Numba functions inside the `with` block.

    Yields
    ------
    callable
        A function that makes a Numba function, decorated without `cache=True`, use the folder, and returns
        it. Without a usable folder, functions are compiled in memory.
    """
    try:
        archive = archive_path(name, sources)
        folder = _private_folder()
    except _UNUSABLE:
        yield lambda function: function
        return
    _remove_abandoned(folder.parent)
    atexit.register(_leave, folder, archive, *_fill(folder, archive))
    options: Any = numba.config
    before, options.CACHE_DIR = options.CACHE_DIR, str(folder)
    try:
        yield _cached
    finally:
        options.CACHE_DIR = before


def _cached(function: Any) -> Any:
    """Enable the cache folder for a Numba function, and ignore errors when it is read or written."""
    with contextlib.suppress(*_UNUSABLE):
        function.enable_caching()
        cache = function._cache
        cache.load_overload = _or_none(cache.load_overload)
        cache.save_overload = _or_none(cache.save_overload)
    return function


def _or_none(method: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(method)
    def trying(*arguments: Any) -> Any:
        with contextlib.suppress(OSError):
            return method(*arguments)
        return None

    return trying


def _private_folder() -> Path:
    """Create a folder that stays locked until this process ends."""
    while True:
        folder = Path(tempfile.mkdtemp(prefix=_PREFIX))
        with contextlib.suppress(FileNotFoundError):
            lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
            with contextlib.suppress(OSError):  # some file systems have no locks
                fcntl.flock(lock, fcntl.LOCK_EX)
            if folder.exists():
                return folder
            os.close(lock)
        # Another process removed the folder as abandoned before it was locked, so try again.


def _remove_abandoned(parent: Path) -> None:
    """Remove the folders of this user that are not locked, because their processes were killed.

    A folder is locked while it is removed, so that processes that start at the same time skip it.
    """
    for folder in parent.glob(f"{_PREFIX}*"):
        with contextlib.suppress(OSError):
            descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
            try:
                if os.fstat(descriptor).st_uid == os.geteuid():
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    shutil.rmtree(folder, ignore_errors=True)
            finally:
                os.close(descriptor)


def _fill(folder: Path, archive: Path) -> tuple[set[str], bool]:
    """Unpack the archive if it is valid; return the names of its files, and whether it is damaged."""
    try:
        with zipfile.ZipFile(archive) as packed:
            packed.extractall(folder)
            return set(packed.namelist()), False
    except _UNUSABLE as error:
        for incomplete in folder.iterdir():  # the folder itself is not removed, because it is locked
            shutil.rmtree(incomplete, ignore_errors=True)
        return set(), isinstance(error, _DAMAGED)


def _leave(folder: Path, archive: Path, known: set[str], damaged: bool) -> None:
    """Add newly compiled kernels to the archive, unless another rank has done so, and remove the folder."""
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
