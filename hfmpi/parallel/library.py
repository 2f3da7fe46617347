"""Which MPI library there is and whether a launcher started this process, without starting MPI."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from typing import Any

__all__ = ["cuda_aware", "describe", "launched", "load", "name", "world"]

# Rank and size as the launchers announce them: Open MPI, MPICH and Intel MPI, MVAPICH, Flux, Slurm, PMIx.
# mpirun inside a Slurm job inherits the variables of Slurm's own step, so Slurm is asked late; PMIx says
# no size. SLURM_NTASKS is of no use: a batch script that starts one process carries it too.
_LAUNCHERS = (
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"),
    ("PMI_RANK", "PMI_SIZE"),
    ("MV2_COMM_WORLD_RANK", "MV2_COMM_WORLD_SIZE"),
    ("FLUX_TASK_RANK", "FLUX_JOB_SIZE"),
    ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS"),
    ("PMIX_RANK", None),
)


def launched() -> tuple[int, int] | None:
    """Give the rank and size that a launcher's environment variables announce, or None without a launcher.

    A launcher that tells only the rank is taken to have started rank + 1 processes.
    """
    for rank_name, size_name in _LAUNCHERS:
        rank = os.environ.get(rank_name, "")
        size = os.environ.get(size_name, "") if size_name else "0"
        if rank.isdecimal() and size.isdecimal():
            return int(rank), max(int(size), int(rank) + 1)
    return None


def load() -> Any:
    """Import and return `mpi4py.MPI` without starting MPI.

    Raises
    ------
    ImportError, RuntimeError, OSError
        If mpi4py is absent or finds no MPI library.
    """
    import mpi4py

    mpi4py.rc.initialize = False
    mpi4py.rc.finalize = True
    from mpi4py import MPI

    return MPI


def name(mpi: Any) -> str:
    """Give the name and version of the MPI library that `load` found, in one line."""
    first = mpi.Get_library_version().strip("\0\n").splitlines()[0]
    return " ".join(first.replace("Version:", "").split()).strip(" ,")


def world() -> Any:
    """COMM_WORLD if MPI runs in this process with more than one rank, else None."""
    mpi = sys.modules.get("mpi4py.MPI")
    if mpi is None or not mpi.Is_initialized() or mpi.Is_finalized() or mpi.COMM_WORLD.size == 1:
        return None
    return mpi.COMM_WORLD


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
    found = name(mpi)
    if mpi.Is_initialized():
        return found, _cuda_support(mpi.__file__)
    # The query needs a started MPI, and one that cannot start ends its process: ask in a child.
    question = (
        f"from mpi4py import MPI; from {__name__} import _cuda_support as ask; print(ask(MPI.__file__))"
    )
    try:
        child = subprocess.run([sys.executable, "-c", question], capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return found, None
    return found, {"True": True, "False": False}.get(child.stdout.strip())


def cuda_aware() -> bool | None:
    """Say whether the MPI that runs in this process takes GPU memory; None if it cannot tell."""
    return _cuda_support(load().__file__)


def _cuda_support(module: str) -> bool | None:
    """Ask MPIX_Query_cuda_support, an extension that MPICH, Open MPI and Intel MPI share."""
    try:
        return bool(ctypes.CDLL(module).MPIX_Query_cuda_support())
    except (AttributeError, OSError):
        return None
