"""How a program becomes one of several ranks, and how it leaves when something goes wrong.

MPI starts inside `connect`, never at import, and only when a launcher such as mpirun or srun is
there. A rank that leaves alone would let the others wait for ever: `together` turns a user's mistake
on one rank into the same error on all, `guard` ends all ranks when one of them fails, and the watchdog that
`connect` starts does so when one of them dies without a word.
"""

from __future__ import annotations

import os
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NoReturn, TypeVar

import numpy as np

from hfmpi.errors import UserError
from hfmpi.parallel.communicator import Communicator, MPICommunicator
from hfmpi.parallel.watchdog import Watchdog, joining, watch

__all__ = ["connect", "guard", "launched", "library_name", "load", "together"]

T = TypeVar("T")

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
_PATIENCE = 2.0  # seconds in which ranks that leave with an error wait for the others to leave too
_DRAIN = 0.2  # seconds for the launcher to pass on what was printed, before it is told to kill

_watchdog: Watchdog | None = None  # of this process, from the first `connect` to several ranks on


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


def library_name(mpi: Any) -> str:
    """Give the name and version of the MPI library that `load` found, in one line."""
    first = mpi.Get_library_version().strip("\0\n").splitlines()[0]
    return " ".join(first.replace("Version:", "").split()).strip(" ,")


def connect(stall_timeout: float = 0.0) -> Communicator:
    """Start MPI if a launcher is there, and give the communicator of all ranks.

    Without a launcher MPI is not even loaded, unless the program itself has started it. A program of several
    ranks gets a watchdog (hfmpi.parallel.watchdog): if one dies, is stopped or leaves alone, all end.

    Parameters
    ----------
    stall_timeout : float
        All end, too, when no collective of this communicator has finished for so many seconds; 0: never.

    Raises
    ------
    UserError
        If the launcher started several processes that MPI cannot join to one run.
    """
    rank_and_size = launched()
    if rank_and_size is None:
        world = _world()
        return Communicator() if world is None else _watched(world, stall_timeout)
    size = rank_and_size[1]
    try:
        mpi = load()
    except (ImportError, RuntimeError, OSError) as error:
        if size > 1:
            raise UserError(
                f"the launcher started {size} processes, but MPI cannot be loaded "
                f"({' '.join(str(error).split())}): install mpi4py and an MPI library such as hfmpi[mpich]"
            ) from error
        return Communicator()
    with joining(rank_and_size[0], stall_timeout if size > 1 else 0), warnings.catch_warnings():
        # mpi4py warns of a launcher that does not fit; the check below makes it an error.
        warnings.filterwarnings("ignore", "suspicious MPI execution environment", RuntimeWarning)
        if not mpi.Is_initialized():
            mpi.Init_thread(mpi.THREAD_FUNNELED)
    if size > 1 and mpi.COMM_WORLD.size == 1:
        raise UserError(
            f"the launcher started {size} processes, but each of them is alone in {library_name(mpi)}: "
            "use the mpirun that belongs to this MPI library"
        )
    if _world() is not None and not isinstance(sys.excepthook, _AbortingHook):
        sys.excepthook = _AbortingHook(sys.excepthook)
    return _watched(mpi.COMM_WORLD, stall_timeout)


def _watched(world: Any, stall_timeout: float) -> Communicator:
    global _watchdog
    with joining(world.rank, stall_timeout if world.size > 1 else 0):
        comm = MPICommunicator(world)
        if comm.size > 1 and _watchdog is None:
            _watchdog = watch(comm, stall_timeout)
    return comm


def together(comm: Communicator, function: Callable[[], T]) -> T:
    """Run a function on every rank; a `UserError` on any rank becomes one on all.

    Parameters
    ----------
    comm : Communicator
        All its ranks call this. The function itself may use it, if it fails before or after the
        collectives of the other ranks and not between them.
    function : callable
        Called without arguments on every rank.

    Returns
    -------
    object
        What the function returned on this rank.

    Raises
    ------
    UserError
        With the sentence of the lowest rank that raised one, on every rank.
    """
    result: Any = None
    failure: UserError | None = None
    try:
        result = function()
    except UserError as error:
        failure = error
    # One sum tells who failed and how long each sentence is, a second one carries the sentence.
    sentence = np.array([ord(letter) for letter in str(failure)] if failure else [], dtype=np.int64)
    lengths = np.zeros(comm.size, dtype=np.int64)
    lengths[comm.rank] = 0 if failure is None else 1 + sentence.size
    comm.sum(lengths)
    failed = np.flatnonzero(lengths)
    if failed.size == 0:
        return result
    if comm.rank != failed[0]:
        sentence = np.zeros(lengths[failed[0]] - 1, dtype=np.int64)
    comm.sum(sentence)
    raise UserError("".join(map(chr, sentence.tolist()))) from failure


@contextmanager
def guard() -> Iterator[None]:
    """Let a whole program leave in good order; the console entry runs inside it.

    A `UserError`, or a lack of memory, is printed as one sentence on rank 0 and ends the program with code
    2. An unexpected exception, or a nonzero `sys.exit`, on some of the ranks aborts all of them. Ranks that
    leave alike (a `UserError` or a nonzero exit on all) wait for one another, so that MPI ends without noise.
    """
    try:
        yield
    except (UserError, MemoryError) as error:
        world = _world()
        if world is None:
            rank = (launched() or (0, 1))[0]
        else:
            rank = world.rank
            if not _all_leave(world):
                _say(error)
                _abort(2)
        if rank == 0:
            _say(error)
        raise SystemExit(2) from None
    except SystemExit as leaving:
        world = _world()
        code = leaving.code if isinstance(leaving.code, int) else int(leaving.code is not None)
        if code and world is not None and not _all_leave(world):
            if isinstance(leaving.code, str):
                print(leaving.code, file=sys.stderr)
            _name_rank(f"left alone with code {code}")
            _abort(code)
        raise
    except BaseException as error:
        if _world() is not None:
            traceback.print_exc()
            _name_rank("failed with this exception")
            _abort(130 if isinstance(error, KeyboardInterrupt) else 1)
        raise


class _AbortingHook:
    """An excepthook for programs that use `connect` without `guard`."""

    def __init__(self, previous: Callable[..., Any]) -> None:
        self.previous = previous

    def __call__(self, kind: Any, error: Any, trace: Any) -> None:
        self.previous(kind, error, trace)
        if _world() is not None:
            _name_rank("failed with this exception")
            _abort(1)


def _world() -> Any:
    """COMM_WORLD if MPI runs in this process with more than one rank, else None."""
    mpi = sys.modules.get("mpi4py.MPI")
    if mpi is None or not mpi.Is_initialized() or mpi.Is_finalized() or mpi.COMM_WORLD.size == 1:
        return None
    return mpi.COMM_WORLD


def _all_leave(world: Any) -> bool:
    """Whether all ranks come here soon; hfmpi uses COMM_WORLD itself for nothing else."""
    arrived = world.Ibarrier()
    deadline = time.monotonic() + _PATIENCE
    while not arrived.Test():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True


def _say(error: UserError | MemoryError) -> None:
    cause = "there is not enough memory: " if isinstance(error, MemoryError) else ""
    print(f"Error: {cause}{error}", file=sys.stderr, flush=True)


def _name_rank(what: str) -> None:
    print(f"Error: rank {_world().rank} {what}, so all ranks end.", file=sys.stderr)


def _abort(code: int) -> NoReturn:
    sys.stdout.flush()
    sys.stderr.flush()
    time.sleep(_DRAIN)
    if _watchdog is not None:
        _watchdog.quiet_end(code)
    sys.modules["mpi4py.MPI"].COMM_WORLD.Abort(code)
    os._exit(code)  # not reached: MPI_Abort does not return
