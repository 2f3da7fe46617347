"""Which MPI library there is, for `hfmpi info`."""

from __future__ import annotations

import ctypes
import subprocess
import sys

from hfmpi.parallel.launch import library_name, load

__all__ = ["cuda_aware", "describe"]


def describe() -> tuple[str | None, bool | None]:
    """Give the MPI library's name and version, and whether it takes GPU memory in its messages.

    Returns
    -------
    name : str or None
        None if mpi4py is absent or finds no MPI library.
    cuda_aware : bool or None
        None if the library cannot tell.
    """
    try:
        mpi = load()
    except (ImportError, RuntimeError, OSError):
        return None, None
    name = library_name(mpi)
    if mpi.Is_initialized():
        return name, _cuda_support(mpi.__file__)
    # The query needs a started MPI, and one that cannot start ends its process: ask in a child.
    question = (
        f"from mpi4py import MPI; from {__name__} import _cuda_support as ask; print(ask(MPI.__file__))"
    )
    try:
        child = subprocess.run([sys.executable, "-c", question], capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return name, None
    return name, {"True": True, "False": False}.get(child.stdout.strip())


def cuda_aware() -> bool | None:
    """Say whether the MPI that runs in this process takes GPU memory; None if it cannot tell."""
    return _cuda_support(load().__file__)


def _cuda_support(module: str) -> bool | None:
    """Ask MPIX_Query_cuda_support, an extension that MPICH, Open MPI and Intel MPI share."""
    try:
        return bool(ctypes.CDLL(module).MPIX_Query_cuda_support())
    except (AttributeError, OSError):
        return None
