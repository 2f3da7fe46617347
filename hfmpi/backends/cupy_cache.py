"""The location of CuPy's cache of compiled kernels: its folder if that is writable, else memory."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

__all__ = ["choose"]

_BLOCK = 2**20  # bytes, about the size of a few modules of kernels


def choose() -> None:
    """Set CuPy's environment variables so that it works also if its cache folder is not writable.

    CuPy creates the folder when it is imported and writes to it whenever it compiles, and raises an error if
    either fails. So this must be called before the import.
    """
    folder = os.environ.get("CUPY_CACHE_DIR", os.path.expanduser("~/.cupy/kernel_cache"))
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(os.urandom(_BLOCK))
            file.flush()
            os.fsync(file.fileno())
        tempfile.gettempdir()
    except OSError:
        # With the cache in memory CuPy writes nothing, but requires a folder that exists.
        os.environ |= {"CUPY_CACHE_IN_MEMORY": "1", "CUPY_CACHE_DIR": os.sep}
