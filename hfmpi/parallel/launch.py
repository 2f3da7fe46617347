"""The start of MPI, by which a program becomes one of several ranks.

MPI starts inside `connect`, never at import, and only if a launcher such as mpirun or srun is present.
"""

from __future__ import annotations

import time
import warnings
from functools import cache
from typing import Any, NoReturn

from hfmpi.errors import UserError
from hfmpi.parallel import library
from hfmpi.parallel.communicator import Communicator, MPICommunicator
from hfmpi.parallel.failure import abort_on_exception
from hfmpi.parallel.watchdog import joining, watch
from hfmpi.streams import reserve

__all__ = ["all_ranks", "connect"]

_HEAD_START = 1.0  # seconds for the first process to print the error; launchers kill all when one ends


@cache
def all_ranks() -> Communicator:
    """Return the same communicator of all ranks at every call, because MPI libraries limit their number."""
    return connect()


def connect(stall_timeout: float = 0.0) -> Communicator:
    """Start MPI if there is a launcher, and return the communicator of all ranks.

    Without a launcher MPI is not loaded, unless the program itself has started it. A single process continues
    without MPI if its launcher and the MPI library do not match. A program of several ranks starts a watchdog
    (hfmpi.parallel.watchdog): if a rank dies, is stopped or exits before the others, all ranks end.

    Parameters
    ----------
    stall_timeout : float
        All ranks also end if no collective of this communicator has finished for this time, in seconds; 0:
        never.

    Raises
    ------
    UserError
        If the launcher started several processes that MPI cannot connect.
    """
    reserve()
    rank_and_size = library.launched()
    if rank_and_size is None:
        world = library.world()
        return Communicator() if world is None else _watched(world, stall_timeout)
    rank, size = rank_and_size
    try:
        mpi = library.load()
    except (ImportError, RuntimeError, OSError) as error:
        if size > 1:
            reason = " ".join(str(error).split())
            _refuse(
                rank,
                f"the launcher started {size} processes, but MPI cannot be loaded ({reason}): "
                "install mpi4py and an MPI library such as mpich",
            )
        return Communicator()
    if not mpi.Is_initialized() and (obstacle := library.obstacle(mpi)):
        largest = max(size for _, size in library.announced())
        if largest > 1:
            _refuse(rank, f"the launcher started {largest} processes, but {obstacle}")
        return Communicator()
    with joining(rank, stall_timeout if size > 1 else 0), warnings.catch_warnings():
        # mpi4py only warns of a launcher that does not match; the check below raises an error.
        warnings.filterwarnings("ignore", "suspicious MPI execution environment", RuntimeWarning)
        if not mpi.Is_initialized():
            library.start(mpi)
    if size > 1 and mpi.COMM_WORLD.size == 1:
        _refuse(
            rank,
            f"the launcher started {size} processes, but they are not connected by {library.name(mpi)}: use "
            "the mpirun that belongs to this MPI library",
        )
    abort_on_exception()
    return _watched(mpi.COMM_WORLD, stall_timeout)


def _refuse(rank: int, sentence: str) -> NoReturn:
    if rank > 0:
        time.sleep(_HEAD_START)
    raise UserError(sentence)


def _watched(world: Any, stall_timeout: float) -> Communicator:
    with joining(world.rank, stall_timeout if world.size > 1 else 0):
        comm = MPICommunicator(world)
        if comm.size > 1:
            watch(comm, stall_timeout)
    return comm
