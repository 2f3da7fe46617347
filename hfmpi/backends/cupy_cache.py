"""Where CuPy keeps the kernels that it compiles: on the disk if that takes them, else in memory."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

__all__ = ["choose"]

_BLOCK = 2**20  # bytes, as many as a few modules of kernels


def choose() -> None:
    """Set CuPy's variables so that it can be imported and compiles, also where its folder takes no files.

    CuPy makes the folder when it is imported and writes into it whenever it compiles; that either fails is
    an error there. So this comes before its import.
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
        # In memory it writes nothing, but wants a folder that is there all the same.
        os.environ |= {"CUPY_CACHE_IN_MEMORY": "1", "CUPY_CACHE_DIR": os.sep}
