"""Settings: dataclasses whose annotations say of which type each value is, and what else it must be."""

from __future__ import annotations

import numbers
import operator
from collections.abc import Callable, Mapping
from dataclasses import fields
from functools import cache
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple, get_args, get_origin, get_type_hints

import numpy as np

from hfmpi.errors import UserError, shown

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

__all__ = [
    "NOT_NEGATIVE",
    "POSITIVE",
    "Rule",
    "at_least",
    "at_most",
    "check",
    "converted",
    "declared",
    "within",
]


class Rule(NamedTuple):
    """What a value must be; it stands in the annotation of its field.

    Attributes
    ----------
    words : str
        What follows the name of the field in a sentence on a wrong value; {} stands for the value.
    holds : callable
        value -> whether it is right.
    """

    words: str
    holds: Callable[[Any], bool]

    def __repr__(self) -> str:
        return self.words


NOT_NEGATIVE = Rule("must not be negative", lambda x: x >= 0)
POSITIVE = Rule("must be positive", lambda x: x > 0)


def at_least(least: int) -> Rule:
    """Give the rule for numbers with a lower bound."""
    return Rule(f"must be at least {least}", lambda x: x >= least)


def at_most(most: int) -> Rule:
    """Give the rule for numbers with an upper bound."""
    return Rule(f"must be at most {most:,}", lambda x: x <= most)


def within(interval: str) -> Rule:
    """Give the rule for numbers of an interval, such as (0, 1]."""
    low, high = map(float, interval[1:-1].split(","))
    above = operator.ge if interval[0] == "[" else operator.gt
    below = operator.le if interval[-1] == "]" else operator.lt
    return Rule(f"must lie in {interval}", lambda x: above(x, low) and below(x, high))


@cache
def declared(kind: type[DataclassInstance]) -> dict[str, tuple[type, tuple[object, ...]]]:
    """Give for each field its type, and what its annotation adds to that."""
    found = {}
    for name, hint in get_type_hints(kind, include_extras=True).items():
        base, *more = get_args(hint) if get_origin(hint) is Annotated else (hint,)
        found[name] = (get_origin(base) or base, tuple(more))
    return {field.name: found[field.name] for field in fields(kind)}


def check(settings: DataclassInstance) -> None:
    """Give all values the types of their annotations, as Python's own; to be called by `__post_init__`.

    Raises
    ------
    TypeError
        If a value is of another type; whole numbers will do for a float, and NumPy's numbers for Python's.
    ValueError
        If a value is not as its annotation says.
    """
    for name, (wanted, more) in declared(type(settings)).items():
        value = _typed(getattr(settings, name), wanted)
        if value is None:
            raise TypeError(_wrong(name, wanted, getattr(settings, name)))
        object.__setattr__(settings, name, value)  # frozen for everyone else
        for rule in more:
            if isinstance(rule, Rule) and not rule.holds(value):
                raise ValueError(f"{name} {rule.words.format(value)}")


def _typed(value: Any, wanted: type) -> Any:
    """Give a value in a type, or None if it is none of it."""
    if isinstance(value, (bool, np.bool_)):
        return bool(value) if wanted is bool else None
    if wanted is int and isinstance(value, numbers.Integral):
        return int(value)
    if wanted is float and isinstance(value, numbers.Real):
        try:
            return float(value)
        except OverflowError:
            return None
    return value if isinstance(value, wanted) else None


def _wrong(name: str, wanted: type, value: object) -> str:
    return f"{name} must be of type {wanted.__name__}, not {shown(value)}"


def converted(
    kind: type[DataclassInstance], given: Mapping[str, Any], noun: str, unknown: str
) -> dict[str, Any]:
    """Give values for fields in the types of the fields; whole numbers will do for a float.

    Parameters
    ----------
    kind : dataclass
    given : mapping
        From a file or the command line.
    noun : str
        What a field is called in sentences; {} stands for its name.
    unknown : str
        The sentence on a name that no field has; {} stand for it and for the names that there are.

    Raises
    ------
    UserError
        For an unknown name or a wrong type.
    """
    known = declared(kind)
    values = dict(given)
    for name, value in given.items():
        if name not in known:
            raise UserError(unknown.format(repr(name), ", ".join(known)))
        values[name] = _typed(value, known[name][0])
        if values[name] is None:
            raise UserError(_wrong(noun.format(name), known[name][0], value))
    return values
