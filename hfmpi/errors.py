"""The one exception that means: the user can mend this; and what its sentences show of a wrong value."""

from __future__ import annotations

import numbers

__all__ = ["UserError", "shown"]


class UserError(Exception):
    """Something a user did or gave cannot work; the message is one clear sentence.

    The command line prints the sentence on one rank, without a traceback, and exits with code 2.
    Under MPI it is raised on every rank alike (see `hfmpi.parallel.failure.together`), so that no
    rank waits for one that has left.
    """


def shown(value: object) -> str:
    """Give a value as a sentence shows it: a number, a short word or None as it is, of all else the type."""
    if value is None or isinstance(value, numbers.Number) or (isinstance(value, str) and len(value) < 100):
        return repr(value)
    return f"the class {value.__name__}" if isinstance(value, type) else type(value).__name__
