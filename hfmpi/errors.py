"""The exception for errors that the user can fix, and how its messages show wrong values and names."""

from __future__ import annotations

import difflib
import numbers
from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Any

__all__ = ["UserError", "did_you_mean", "shown"]

NO_WORDS: Mapping[str, str] = MappingProxyType({})


class UserError(ValueError):
    """An error that the user can fix; the message is one sentence.

    The command line prints the message on one rank, without a traceback, and exits with code 2. Under MPI it
    is raised on all ranks (see `hfmpi.parallel.failure.together`), so that no rank waits for another one.
    It is a ValueError, which Python programs expect for a wrong argument.

    Attributes
    ----------
    result : hfmpi.Result or None
        The partial result if this error ended a run of `hfmpi.train`; None if the run had not started.
    """

    result: Any = None


def shown(value: object) -> str:
    """Return a value for a message: the repr of numbers, short strings and None; otherwise the type."""
    if value is None or isinstance(value, numbers.Number) or (isinstance(value, str) and len(value) < 100):
        return repr(value)
    return f"the class {value.__name__}" if isinstance(value, type) else type(value).__name__


def did_you_mean(word: object, names: Iterable[str], words: Mapping[str, str] = NO_WORDS) -> str:
    """Return " (did you mean ...?)" for a wrong name, or "" if no name is similar.

    Parameters
    ----------
    word : object
        What the user wrote; if it is not a string, there is no suggestion.
    names : iterable of str
        The names that exist.
    words : mapping of str to str
        The names for synonyms, such as "lr": "rate". Case, hyphens and underscores do not matter.
    """
    if not isinstance(word, str):
        return ""
    meant = {_plain(other): name for other, name in words.items()} | {_plain(name): name for name in names}
    similar = difflib.get_close_matches(_plain(word), meant, n=1)  # an exact match is the most similar
    return f" (did you mean {meant[similar[0]]}?)" if similar else ""


def _plain(word: str) -> str:
    return word.lower().replace("-", "_").replace(" ", "_")
