"""Errors on some of the ranks: they are raised on all ranks, or end all ranks.

If only one rank exited, the others would wait forever. `together` turns a user error on one rank into the
same error on all ranks, and `guard` ends all ranks if one of them fails. If a rank dies without a message,
the watchdog ends the others.
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

__all__ = ["abort_on_exception", "announce", "guard", "joint", "speaks", "together"]

T = TypeVar("T")

_PATIENCE = 2.0  # seconds that a failing rank waits for the others to fail as well
_BROKEN = OSError, ValueError, AttributeError  # raised by a full disk or broken pipe, a closed stream, None
_DRAIN = 0.2  # seconds for the launcher to forward the output before it kills the ranks


def together(comm: Communicator, function: Callable[[], T]) -> T:
    """Run a function on every rank; a `UserError` on any rank is raised on all ranks.

    Parameters
    ----------
    comm : Communicator
        All its ranks call this. The function may use the communicator, provided that it does not fail between
        collectives of the other ranks.
    function : callable
        Called without arguments on every rank.

    Returns
    -------
    object
        The result of the function on this rank.

    Raises
    ------
    UserError
        The error of the lowest rank that raised one, on every rank.
    """
    result: Any = None
    failure: UserError | None = None
    try:
        result = function()
    except UserError as error:
        failure = error
    # The first sum collects the lengths of the messages of the failed ranks, the second one the message.
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
    """End a program cleanly on all ranks; the console entry point runs inside this context.

    A `UserError` or a MemoryError is printed as one sentence on rank 0 and ends the program with code 2. An
    unexpected exception, or a nonzero `sys.exit`, on some of the ranks aborts all of them. If all ranks raise
    a `UserError` or exit with a nonzero code, they wait for one another, so that MPI prints no messages.
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
            _name_rank(f"exited with code {code} without the other ranks")
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
    """Re-raise an exception that all ranks raise within the timeout; if only some do, abort all ranks.

    It is for parts of a program whose caller may catch the exception.
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
    """Return whether this process prints messages for all processes of a launcher before MPI starts.

    That is true of the first process and of an interactive one, because a user may work in a shell that is
    one of several processes of a launcher.
    """
    rank, _ = library.launched() or (0, 1)
    with contextlib.suppress(*_BROKEN):
        return rank == 0 or sys.stderr.isatty()
    return False


def abort_on_exception() -> None:
    """Install a hook that ends all ranks at an uncaught exception, for programs without `guard`."""
    if library.world() is not None and not isinstance(sys.excepthook, _AbortingHook):
        sys.excepthook = _AbortingHook(sys.excepthook)


class _AbortingHook:
    """Calls the previous hook and ends all ranks; a UserError on all ranks is printed only by rank 0."""

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


def announce(sentence: str) -> None:
    """Print a note about this rank on standard error at once, without waiting for other ranks."""
    _print(f"Note: {sentence}")


def _all_leave(world: Any) -> bool:
    """Return whether all ranks call this within the timeout; hfmpi uses COMM_WORLD only for this."""
    barrier = world.Ibarrier()
    deadline = time.monotonic() + _PATIENCE
    while not barrier.Test():
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
    """Print on standard error, and ignore failures, because the program is about to end."""
    with contextlib.suppress(*_BROKEN):
        print(text, file=sys.stderr, flush=True)


def _abort(code: int) -> NoReturn:
    for stream in sys.stdout, sys.stderr:
        with contextlib.suppress(*_BROKEN):
            stream.flush()
    time.sleep(_DRAIN)
    watchdog.quiet_end(code)
    sys.modules["mpi4py.MPI"].COMM_WORLD.Abort(code)
    os._exit(code)  # not reached, because MPI_Abort does not return
