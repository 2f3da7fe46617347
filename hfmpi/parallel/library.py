"""The MPI library, the launcher that started this process, and whether the two match.

All of this is checked before MPI starts, because an MPI library that cannot start ends the process.
"""

from __future__ import annotations

import ctypes
import os
import re
import select
import stat
import subprocess
import sys
from typing import Any

__all__ = [
    "announced",
    "cuda_aware",
    "describe",
    "launched",
    "load",
    "name",
    "obstacle",
    "start",
    "started",
    "world",
]

# The variables for rank and size of the launchers Open MPI, MPICH and Intel MPI, MVAPICH, Flux, Slurm, PMIx.
# mpirun inside a Slurm job inherits the variables of the Slurm step, so these come after those of mpirun.
# PMIx has no variable for the size. SLURM_NTASKS is not used, because it is also set in a batch script that
# starts only one process.
_LAUNCHERS = (
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"),
    ("PMI_RANK", "PMI_SIZE"),
    ("MV2_COMM_WORLD_RANK", "MV2_COMM_WORLD_SIZE"),
    ("FLUX_TASK_RANK", "FLUX_JOB_SIZE"),
    ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS"),
    ("PMIX_RANK", None),
)


_OF_LAUNCHERS = (
    "PMI_",
    "PMI2_",
    "PMIX_",
    "OMPI_COMM_",
    "PRTE_",
    "HYDI_",
    "MV2_COMM_",
    "FLUX_",
    "PALS_",
    "SLURM_",
)
"""Prefixes of the names of environment variables that launchers set."""


def launched() -> tuple[int, int] | None:
    """Return the rank and size in a launcher's environment variables, or None without a launcher.

    A launcher that sets only the rank is assumed to have started rank + 1 processes.
    """
    return next(iter(announced()), None)


def announced() -> list[tuple[int, int]]:
    """Return the rank and size of each launcher, as in `launched`; a launcher may start another one."""
    pairs = []
    for rank_name, size_name in _LAUNCHERS:
        rank = os.environ.get(rank_name, "")
        size = os.environ.get(size_name, "") if size_name else "0"
        if rank.isdecimal() and size.isdecimal():
            pairs.append((int(rank), max(int(size), int(rank) + 1)))
    return pairs


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
    """Return the name and version of a loaded MPI library in one line."""
    first = mpi.Get_library_version().strip("\0\n").splitlines()[0].partition(", package:")[0]
    return " ".join(first.replace("Version:", "").split()).strip(" ,")


def obstacle(mpi: Any) -> str | None:
    """Return the reason why MPI cannot connect the processes of the launcher, or None if it can.

    Processes are connected by their launcher, through PMI over an inherited connection or through PMIx. MPICH
    ends the process if the launcher uses an interface for which MPICH was not built, or if the connection is
    closed.

    Parameters
    ----------
    mpi : module
        The result of `load`, before MPI starts.
    """
    library = name(mpi)
    pmix = "PMIX_RANK" in os.environ or "PMIX_NAMESPACE" in os.environ
    if library.startswith("Open MPI"):
        if pmix and not any(variable.startswith("PMIX_SERVER_URI") for variable in os.environ):
            return "PMIX_SERVER_URI does not name its PMIx server: start hfmpi directly with the launcher"
        if not pmix and not re.match(r"Open MPI v[1-4]\.", library) and announced():
            return (
                f"it does not offer PMIx, which {library} requires: use the mpirun that belongs to this MPI "
                "library, or srun --mpi=pmix"
            )
    elif _has_connection():
        if not _connected():
            return (
                "its connection (PMI_FD) is closed in this process, because another program has used it or a "
                "program in between did not pass it on: start hfmpi directly with the launcher, and only once"
            )
    elif pmix and library.startswith("MPICH") and not hasattr(ctypes.CDLL(mpi.__file__), "PMIx_Init"):
        return (
            f"it uses PMIx, which {library} was not built for: use the mpirun that belongs to this MPI "
            "library, or srun --mpi=pmi2"
        )
    return None


def start(mpi: Any) -> None:
    """Start MPI in this process, with thread level MPI_THREAD_FUNNELED."""
    if _has_connection() and name(mpi).startswith("MPICH"):
        # mpirun inside a Slurm step inherits the PMIx of the step, and MPICH does not start if it has both.
        os.environ.pop("PMIX_NAMESPACE", None)
    mpi.Init_thread(mpi.THREAD_FUNNELED)


def _has_connection() -> bool:
    return "PMI_FD" in os.environ or "PMI_PORT" in os.environ


def _connected() -> bool:
    """Return whether the connection in PMI_FD exists and is open at its other end."""
    number = os.environ.get("PMI_FD")
    if number is None:
        return True  # PMI_PORT is set: the connection is opened when MPI starts
    try:
        if not stat.S_ISSOCK(os.fstat(int(number)).st_mode):
            return False
        poll = select.poll()
        poll.register(int(number), 0)  # a hang-up is always reported
        return not poll.poll(0)
    except (OSError, ValueError, OverflowError):
        return False


def started() -> bool:
    """Return whether MPI runs in this process."""
    mpi = sys.modules.get("mpi4py.MPI")
    return mpi is not None and mpi.Is_initialized() and not mpi.Is_finalized()


def world() -> Any:
    """Return COMM_WORLD if MPI runs in this process with more than one rank, else None."""
    world = sys.modules["mpi4py.MPI"].COMM_WORLD if started() else None
    return None if world is None or world.size == 1 else world


def describe() -> tuple[str | None, bool | None]:
    """Return the MPI library's name and version, and whether it accepts GPU memory in messages.

    Returns
    -------
    name : str or None
        None if mpi4py is absent or finds no MPI library.
    cuda_aware : bool or None
        None if unknown.
    """
    try:
        mpi = load()
    except (ImportError, RuntimeError, OSError):
        return None, None
    library = name(mpi)
    if mpi.Is_initialized():
        return library, _cuda_support(mpi.__file__)
    # The query requires a running MPI, and an MPI that cannot start ends its process. So ask a child process.
    question = (
        f"from mpi4py import MPI; from {__name__} import _cuda_support as ask; print(ask(MPI.__file__))"
    )
    alone = {key: value for key, value in os.environ.items() if not key.startswith(_OF_LAUNCHERS)}
    try:
        child = subprocess.run(
            [sys.executable, "-c", question], capture_output=True, text=True, timeout=30, env=alone
        )
    except (OSError, subprocess.TimeoutExpired):
        return library, None
    return library, {"True": True, "False": False}.get(child.stdout.strip())


def cuda_aware() -> bool | None:
    """Return whether the MPI that runs in this process accepts GPU memory; None if unknown."""
    return _cuda_support(load().__file__)


def _cuda_support(module: str) -> bool | None:
    """Call MPIX_Query_cuda_support, an extension of MPICH, Open MPI and Intel MPI; None: it is missing."""
    try:
        return bool(ctypes.CDLL(module).MPIX_Query_cuda_support())
    except (AttributeError, OSError):
        return None
