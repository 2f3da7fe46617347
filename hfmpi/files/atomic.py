"""Safe access to files: only regular files are read, and files are replaced completely or not at all."""

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
    """Open a regular file for reading; pipes and devices are refused, because they could block forever.

    Raises
    ------
    UserError
        If the file does not exist, or is not readable or not regular.
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
    """Return the reason why a file cannot be opened; a ValueError is due to a null byte in its name."""
    return (error.strerror if isinstance(error, OSError) else None) or str(error)


def replace(
    path: Path,
    content: bytes | memoryview,
    keep: Path | None = None,
    check: Callable[[Path], object] | None = None,
) -> None:
    """Write a file so that a crash at any moment leaves either the old or the new content.

    A process that reads the file at the same time also reads either the old or the new content. (With `keep`,
    on a file system without hard links, there may be no file for a moment.)

    The content is written to a hidden temporary file in the same folder, flushed to the disk, and read back;
    then the file is renamed. If any of this fails, the temporary file is removed and no other file changes.

    Parameters
    ----------
    path : Path
        The file to create or replace; if it is a symbolic link, the target of the link.
    content : bytes
        The complete new content.
    keep : Path, optional
        The new name of the old file, if there is one.
    check : callable, optional
        Called with the path of the temporary file; raises a UserError if the file is not valid.

    Raises
    ------
    UserError
        If the file cannot be written, or exists and is not a regular file.
    """
    target = Path(os.path.realpath(path))
    temporary, old = (target.with_name(f".{target.name}.{secrets.token_hex(4)}.tmp") for _ in range(2))
    try:
        if target.exists() and not target.is_file():
            raise UserError(f"cannot write {path}: it exists and is not a regular file")
        with temporary.open("xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
            # Drop the pages from the page cache, so that the check reads the disk.
            with contextlib.suppress(OSError):
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        if not _holds(temporary, memoryview(content)):
            raise UserError(
                f"cannot write {path}: the content that was read back differs from what was written"
            )
        if check is not None:
            check(temporary)
        if keep is not None and target.exists():
            os.replace(_linked(target, old), keep)
        os.replace(temporary, target)
        with contextlib.suppress(OSError):  # some file systems do not support this
            folder = os.open(target.parent, os.O_RDONLY)
            try:
                os.fsync(folder)  # flushes the new names
            finally:
                os.close(folder)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from None
    finally:
        for leftover in temporary, old:
            with contextlib.suppress(OSError):  # the file was renamed or never created
                leftover.unlink()


def remove_leftovers(path: Path) -> None:
    """Remove the temporary files of calls of `replace` for this path that were killed."""
    with contextlib.suppress(OSError):
        for leftover in path.parent.glob(f".{path.name}.????????.tmp"):
            leftover.unlink()


def _linked(path: Path, second: Path) -> Path:
    """Create a second name for a file and return it; return the path if that is not possible."""
    try:
        os.link(path, second)
    except OSError:
        return path
    return second


def _holds(path: Path, content: memoryview, part: int = 2**20) -> bool:
    with path.open("rb") as file:
        parts = range(0, len(content) + 1, part)  # the last part detects additional bytes
        return all(file.read(part) == content[start : start + part] for start in parts)
