"""The one exception that means: the user can mend this."""

from __future__ import annotations

__all__ = ["UserError"]


class UserError(Exception):
    """Something a user did or gave cannot work; the message is one clear sentence.

    The command line prints the sentence on one rank, without a traceback, and exits with code 2.
    Under MPI it is raised on every rank alike (see `hfmpi.parallel.failure.together`), so that no
    rank waits for one that has left.
    """
