"""The exception for errors that the user can fix, and how its messages show a wrong value."""

from __future__ import annotations

import numbers
from typing import Any

__all__ = ["UserError", "shown"]


class UserError(Exception):
    """An error that the user can fix; the message is one sentence.

    The command line prints the message on one rank, without a traceback, and exits with code 2. Under MPI it
    is raised on all ranks (see `hfmpi.parallel.failure.together`), so that no rank waits for another one.

    Attributes
    ----------
    result : hfmpi.Result or None
        What a run of `hfmpi.train` had when this error ended it; None if it had not started.
    """

    result: Any = None


def shown(value: object) -> str:
    """Return a value for a message: the repr of numbers, short strings and None; otherwise the type."""
    if value is None or isinstance(value, numbers.Number) or (isinstance(value, str) and len(value) < 100):
        return repr(value)
    return f"the class {value.__name__}" if isinstance(value, type) else type(value).__name__
