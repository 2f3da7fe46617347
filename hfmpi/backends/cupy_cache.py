"""The location of CuPy's cache of compiled kernels: a folder if it is writable, and otherwise memory."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

__all__ = ["choose"]

_BLOCK = 2**20  # bytes of a test file, about the size of a few compiled modules


def choose() -> None:
    """Set CuPy's environment variables so that CuPy works even if its cache folder is not writable.

    CuPy creates the folder when it is imported and writes to it whenever it compiles, and raises an error if
    either fails. So this function must be called before the import.
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
        # With the cache in memory CuPy writes no files, but still requires a folder that exists.
        os.environ |= {"CUPY_CACHE_IN_MEMORY": "1", "CUPY_CACHE_DIR": os.sep}
