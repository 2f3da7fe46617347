"""Files are replaced as a whole or not at all, and HDF5 texts are stored so that damage is found."""

from __future__ import annotations

import contextlib
import os
import secrets
from pathlib import Path
from typing import Any

from hfmpi.errors import UserError

__all__ = ["replace", "set_text"]


def replace(path: Path, content: bytes | memoryview, keep: Path | None = None) -> None:
    """Write a file so that a crash at any moment leaves the old content or the new.

    The content goes to a hidden temporary file in the same folder, reaches the disk, and only then takes
    the name. If the disk is full, the temporary file is removed and everything is as before.

    Parameters
    ----------
    path : Path
        The file to create or replace; where it is a symbolic link, the file that it names.
    content : bytes
        Its whole new content.
    keep : Path, optional
        The name under which the old file, if there is one, stays.

    Raises
    ------
    UserError
        If the folder or the disk does not take the file, or it is there and no regular file.
    """
    target = Path(os.path.realpath(path))
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(4)}.tmp")
    try:
        if target.exists() and not target.is_file():
            raise UserError(f"cannot write {path}: it is there and is not a regular file")
        with temporary.open("xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        if keep is not None and target.exists():
            os.replace(target, keep)
        os.replace(temporary, target)
        folder = os.open(target.parent, os.O_RDONLY)
        try:
            os.fsync(folder)  # the new names reach the disk too
        finally:
            os.close(folder)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from None
    finally:
        with contextlib.suppress(OSError):  # gone after the rename; never there in a bad folder
            temporary.unlink()


def set_text(item: Any, name: str, value: str) -> None:
    """Give an HDF5 object a text attribute of fixed length, UTF-8.

    HDF5 keeps texts of variable length in a heap, and a damaged heap can make it loop for ever.
    """
    import h5py
    import numpy as np

    content = value.encode()
    item.attrs.create(name, np.bytes_(content), dtype=h5py.string_dtype("utf-8", max(1, len(content))))
