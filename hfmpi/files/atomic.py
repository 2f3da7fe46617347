"""Files are read only if they are regular, and replaced as a whole or not at all."""

from __future__ import annotations

import contextlib
import os
import secrets
import stat
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

from hfmpi.errors import UserError

__all__ = ["open_regular", "remove_leftovers", "replace", "why"]


def open_regular(path: Path) -> BinaryIO:
    """Open a file for reading, unless it is a pipe or device, which could make us wait or read for ever.

    Raises
    ------
    UserError
        If it is not there, not readable or not a regular file.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
        if stat.S_ISREG(os.fstat(descriptor).st_mode):
            return os.fdopen(descriptor, "rb")
        os.close(descriptor)
        reason = "it is not a regular file"
    except (OSError, ValueError) as error:
        reason = why(error)
    raise UserError(f"cannot read {path}: {reason}")


def why(error: OSError | ValueError) -> str:
    """Give the reason for which a file cannot be opened; a null byte in its name is a ValueError."""
    return (error.strerror if isinstance(error, OSError) else None) or str(error)


def replace(
    path: Path,
    content: bytes | memoryview,
    keep: Path | None = None,
    check: Callable[[Path], object] | None = None,
) -> None:
    """Write a file so that a crash at any moment leaves the old content or the new.

    Whoever reads it meanwhile finds one of them too (without hard links and with `keep`: perhaps none).

    The content goes to a hidden temporary file in the same folder, reaches the disk, is read back from
    there, and only then takes the name. If any of it fails, the temporary file is removed and everything is
    as before.

    Parameters
    ----------
    path : Path
        The file to create or replace; where it is a symbolic link, the file that it names.
    content : bytes
        Its whole new content.
    keep : Path, optional
        The name under which the old file, if there is one, stays.
    check : callable, optional
        Reads the temporary file too, and raises a UserError if it is not good.

    Raises
    ------
    UserError
        If the folder or the disk does not take the file, or it is there and no regular file.
    """
    target = Path(os.path.realpath(path))
    temporary, old = (target.with_name(f".{target.name}.{secrets.token_hex(4)}.tmp") for _ in range(2))
    try:
        if target.exists() and not target.is_file():
            raise UserError(f"cannot write {path}: it is there and is not a regular file")
        with temporary.open("xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
            # What is on the disk by now may leave the memory, so that it is the disk that is read.
            with contextlib.suppress(OSError):
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        if not _holds(temporary, memoryview(content)):
            raise UserError(f"cannot write {path}: what was read back is not what was written")
        if check is not None:
            check(temporary)
        if keep is not None and target.exists():
            os.replace(_linked(target, old), keep)
        os.replace(temporary, target)
        with contextlib.suppress(OSError):  # not every file system can do it
            folder = os.open(target.parent, os.O_RDONLY)
            try:
                os.fsync(folder)  # the new names reach the disk too
            finally:
                os.close(folder)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from None
    finally:
        for leftover in temporary, old:
            with contextlib.suppress(OSError):  # gone after the rename; never there in a bad folder
                leftover.unlink()


def remove_leftovers(path: Path) -> None:
    """Remove the temporary files that `replace` left beside a file when it was killed."""
    with contextlib.suppress(OSError):
        for leftover in path.parent.glob(f".{path.name}.????????.tmp"):
            leftover.unlink()


def _linked(path: Path, second: Path) -> Path:
    """Give a file a second name, and that name; where the file system has no hard links, its own."""
    try:
        os.link(path, second)
    except OSError:
        return path
    return second


def _holds(path: Path, content: memoryview, part: int = 2**20) -> bool:
    with path.open("rb") as file:
        parts = range(0, len(content) + 1, part)  # one byte more than there is must not be there
        return all(file.read(part) == content[start : start + part] for start in parts)
