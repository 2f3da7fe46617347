"""Replace a file as a whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path

from hfmpi.errors import UserError

__all__ = ["replace"]


def replace(path: Path, content: bytes, keep: Path | None = None) -> None:
    """Write a file so that a crash at any moment leaves the old content or the new.

    The content goes to a hidden temporary file in the same folder, reaches the disk, and only then takes
    the name. If the disk is full, the temporary file is removed and everything is as before.

    Parameters
    ----------
    path : Path
        The file to create or replace.
    content : bytes
        Its whole new content.
    keep : Path, optional
        The name under which the old file, if there is one, stays.

    Raises
    ------
    UserError
        If the folder or the disk does not take the file.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        try:
            with temporary.open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            if keep is not None and path.exists():
                os.replace(path, keep)
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)  # the new names reach the disk too
        finally:
            os.close(folder)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error
