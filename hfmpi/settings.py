"""Settings: dataclasses whose annotations declare the type of each value and its rules."""

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
    """A condition on a value, in the annotation of its field.

    Attributes
    ----------
    words : str
        The message on a wrong value, after the name of the field; {} stands for the value.
    holds : callable
        value -> bool
    """

    words: str
    holds: Callable[[Any], bool]

    def __repr__(self) -> str:
        return self.words


NOT_NEGATIVE = Rule("must not be negative", lambda x: x >= 0)
POSITIVE = Rule("must be positive", lambda x: x > 0)


def at_least(minimum: int) -> Rule:
    """Return the rule of numbers with a lower bound."""
    return Rule(f"must be at least {minimum}", lambda x: x >= minimum)


def at_most(maximum: int) -> Rule:
    """Return the rule of numbers with an upper bound."""
    return Rule(f"must be at most {maximum:,}", lambda x: x <= maximum)


def within(interval: str) -> Rule:
    """Return the rule of numbers in an interval such as (0, 1]."""
    low, high = map(float, interval[1:-1].split(","))
    above = operator.ge if interval[0] == "[" else operator.gt
    below = operator.le if interval[-1] == "]" else operator.lt
    return Rule(f"must lie in {interval}", lambda x: above(x, low) and below(x, high))


@cache
def declared(kind: type[DataclassInstance]) -> dict[str, tuple[type, tuple[object, ...]]]:
    """Return the type of each field by name, and the other parts of its annotation."""
    hints = {}
    for name, hint in get_type_hints(kind, include_extras=True).items():
        base, *more = get_args(hint) if get_origin(hint) is Annotated else (hint,)
        hints[name] = (get_origin(base) or base, tuple(more))
    return {field.name: hints[field.name] for field in fields(kind)}


def check(settings: DataclassInstance) -> None:
    """Check all values and convert them to the types of their annotations; `__post_init__` calls it.

    Integers are converted to float where the annotation is float, and NumPy numbers to Python numbers.

    Raises
    ------
    TypeError
        If a value has another type.
    ValueError
        If a value breaks a rule of its annotation.
    """
    for name, (wanted, more) in declared(type(settings)).items():
        value = _typed(getattr(settings, name), wanted)
        if value is None:
            raise TypeError(_wrong(name, wanted, getattr(settings, name)))
        object.__setattr__(settings, name, value)  # the dataclass may be frozen
        for rule in more:
            if isinstance(rule, Rule) and not rule.holds(value):
                raise ValueError(f"{name} {rule.words.format(value)}")


def _typed(value: Any, wanted: type) -> Any:
    """Return a value converted to a type, or None if it does not have that type."""
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
    kind: type[DataclassInstance], values: Mapping[str, Any], noun: str, unknown: str
) -> dict[str, Any]:
    """Return values converted to the types of the fields; integers are accepted for a float.

    Parameters
    ----------
    kind : dataclass
    values : mapping
        The values by field, from a file or the command line.
    noun : str
        The designation of a field in messages; {} stands for its name.
    unknown : str
        The message on a name of no field; the first {} stands for it, the second for the existing names.

    Raises
    ------
    UserError
        If a name is unknown or a value has the wrong type.
    """
    types = {name: wanted for name, (wanted, _) in declared(kind).items()}
    typed = dict[str, Any]()
    for name, value in values.items():
        if name not in types:
            raise UserError(unknown.format(repr(name), ", ".join(types)))
        typed[name] = _typed(value, types[name])
        if typed[name] is None:
            raise UserError(_wrong(noun.format(name), types[name], value))
    return typed
