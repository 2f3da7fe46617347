"""How one rank's failure becomes everyone's, and how a program leaves when something goes wrong.

A rank that leaves alone would let the others wait for ever: `together` turns a user's mistake on one rank
into the same error on all, and `guard` ends all ranks when one of them fails. When one of them dies without
a word, the watchdog does.
"""

from __future__ import annotations

import contextlib
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NoReturn, TypeVar

import numpy as np

from hfmpi.errors import UserError
from hfmpi.parallel import library, watchdog
from hfmpi.parallel.communicator import Communicator

__all__ = ["abort_on_exception", "guard", "joint", "speaks", "together"]

T = TypeVar("T")

_PATIENCE = 2.0  # seconds in which ranks that leave with an error wait for the others to leave too
_BROKEN = OSError, ValueError, AttributeError  # a full disk or a pipe without reader; closed; None
_DRAIN = 0.2  # seconds for the launcher to pass on what was printed, before it is told to kill


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
        failure = None
        sentence = np.zeros(lengths[failed[0]] - 1, dtype=np.int64)
    comm.sum(sentence)
    raise failure or UserError("".join(map(chr, sentence.tolist())))


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
        world = library.world()
        if world is not None and not _all_leave(world):
            _say(error)
            _abort(2)
        if speaks() if world is None else world.rank == 0:
            _say(error)
        raise SystemExit(2) from None
    except SystemExit as leaving:
        world = library.world()
        code = leaving.code if isinstance(leaving.code, int) else int(leaving.code is not None)
        if code and world is not None and not _all_leave(world):
            if isinstance(leaving.code, str):
                _print(leaving.code)
            _name_rank(f"left alone with code {code}")
            _abort(code)
        raise
    except BaseException as error:
        if library.world() is not None:
            _print(traceback.format_exc().rstrip())
            _name_rank("failed with this exception")
            _abort(130 if isinstance(error, KeyboardInterrupt) else 1)
        raise


@contextmanager
def joint() -> Iterator[None]:
    """Let an exception pass that all ranks raise soon after one another; one of some ranks ends all ranks.

    For a part of a program whose caller may catch what it raises.
    """
    try:
        yield
    except BaseException as error:
        world = library.world()
        if world is not None and not _all_leave(world):
            if isinstance(error, (UserError, MemoryError)):
                _say(error)
                _abort(2)
            _print(traceback.format_exc().rstrip())
            _name_rank("failed with this exception")
            _abort(130 if isinstance(error, KeyboardInterrupt) else 1)
        raise


def speaks() -> bool:
    """Whether this process has to say what concerns all that a launcher started, while MPI does not run.

    That is the first of them, or one in which a user works: a shell that a launcher started as another one.
    """
    rank, _ = library.launched() or (0, 1)
    with contextlib.suppress(*_BROKEN):
        return rank == 0 or sys.stderr.isatty()
    return False


def abort_on_exception() -> None:
    """Let an exception that nobody catches end all ranks; for programs without `guard`."""
    if library.world() is not None and not isinstance(sys.excepthook, _AbortingHook):
        sys.excepthook = _AbortingHook(sys.excepthook)


class _AbortingHook:
    """Does what the hook before it did, and ends all ranks; of a UserError on all of them, rank 0 tells."""

    def __init__(self, previous: Callable[..., Any]) -> None:
        self.previous = previous

    def __call__(self, kind: Any, error: Any, trace: Any) -> None:
        world = library.world()
        if world is not None and isinstance(error, UserError) and _all_leave(world):
            if world.rank == 0:
                self.previous(kind, error, trace)
            return
        self.previous(kind, error, trace)
        if library.world() is not None:
            _name_rank("failed with this exception")
            _abort(1)


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
    _print(f"Error: {cause}{error}")


def _name_rank(what: str) -> None:
    _print(f"Error: rank {library.world().rank} {what}, so all ranks end.")


def _print(text: str) -> None:
    """Print on standard error, if that can be: who leaves must not fail over it."""
    with contextlib.suppress(*_BROKEN):
        print(text, file=sys.stderr, flush=True)


def _abort(code: int) -> NoReturn:
    for stream in sys.stdout, sys.stderr:
        with contextlib.suppress(*_BROKEN):
            stream.flush()
    time.sleep(_DRAIN)
    watchdog.quiet_end(code)
    sys.modules["mpi4py.MPI"].COMM_WORLD.Abort(code)
    os._exit(code)  # not reached: MPI_Abort does not return
