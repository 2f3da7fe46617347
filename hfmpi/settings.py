"""Settings: dataclasses whose annotations declare the type of each value, its rules and its meaning."""

from __future__ import annotations

import inspect
import numbers
import operator
import textwrap
from collections.abc import Callable, Mapping
from dataclasses import MISSING, fields
from functools import cache, wraps
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple, TypeVar, get_args, get_origin, get_type_hints

import numpy as np

from hfmpi.errors import UserError, did_you_mean, shown

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

__all__ = [
    "NOT_NEGATIVE",
    "POSITIVE",
    "Meaning",
    "Rule",
    "Setting",
    "at_least",
    "at_most",
    "check",
    "converted",
    "declared",
    "documented",
    "one_of",
    "table",
    "unknown_name",
    "within",
]

KindT = TypeVar("KindT")


class Rule(NamedTuple):
    """A condition on the value of a field, as a part of its annotation.

    Attributes
    ----------
    words : str
        The message for a wrong value, after the name of the field; {} stands for the value.
    holds : callable
        value -> bool
    choices : tuple of str
        The accepted words, if the rule is a list of words.
    """

    words: str
    holds: Callable[[Any], bool]
    choices: tuple[str, ...] = ()

    def __repr__(self) -> str:
        return self.words


class Meaning(NamedTuple):
    """The description of a setting, as a part of the annotation of its field.

    Documentation and messages are generated from it.

    Attributes
    ----------
    text : str
        Complete sentences.
    unit : str
        The unit of the value; empty for pure numbers and words.
    torch, optax : str
        The corresponding name in torch.optim and in optax, such as "betas[0]"; empty if there is none.
    others : tuple of str
        Further synonyms that messages recognise.
    """

    text: str
    unit: str = ""
    torch: str = ""
    optax: str = ""
    others: tuple[str, ...] = ()

    def __repr__(self) -> str:
        return self.text

    @property
    def sentences(self) -> str:
        """Return the text, followed by the unit if there is one."""
        return f"{self.text} Unit: {self.unit}." if self.unit else self.text

    @property
    def words(self) -> tuple[str, ...]:
        """Return the synonyms of the setting, without an index or parentheses."""
        foreign = (word.partition("[")[0].partition("(")[0] for word in (self.torch, self.optax))
        return tuple(dict.fromkeys([*filter(None, foreign), *self.others]))


class Setting(NamedTuple):
    """One row of the table of settings of a class; `default` is None if a value must be supplied."""

    name: str
    type: type
    default: Any
    meaning: Meaning


NOT_NEGATIVE = Rule("must not be negative", lambda x: x >= 0)
POSITIVE = Rule("must be positive", lambda x: x > 0)


def at_least(minimum: int) -> Rule:
    """Return a rule for numbers with a lower bound."""
    return Rule(f"must be at least {minimum}", lambda x: x >= minimum)


def at_most(maximum: int) -> Rule:
    """Return a rule for numbers with an upper bound."""
    return Rule(f"must be at most {maximum:,}", lambda x: x <= maximum)


def within(interval: str) -> Rule:
    """Return a rule for numbers in an interval such as (0, 1]."""
    low, high = map(float, interval[1:-1].split(","))
    above = operator.ge if interval[0] == "[" else operator.gt
    below = operator.le if interval[-1] == "]" else operator.lt
    return Rule(f"must lie in {interval}", lambda x: above(x, low) and below(x, high))


def one_of(*choices: str) -> Rule:
    """Return a rule for words from a list."""
    return Rule(f"must be one of {', '.join(choices)}", choices.__contains__, choices)


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
        If a value has a different type.
    UserError
        If a value breaks a rule of its annotation.
    """
    for name, (wanted, more) in declared(type(settings)).items():
        value = _typed(getattr(settings, name), wanted)
        if value is None:
            raise TypeError(_wrong(name, wanted, getattr(settings, name)))
        object.__setattr__(settings, name, value)  # the dataclass may be frozen
        for rule in more:
            if isinstance(rule, Rule) and not rule.holds(value):
                meant = did_you_mean(value, rule.choices)
                raise UserError(f"{name} {rule.words.format(value)}{meant}")


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
        The message for an unknown name; the first {} stands for it, the second for the existing names.

    Raises
    ------
    UserError
        If a name is unknown or a value has the wrong type.
    """
    types = {name: wanted for name, (wanted, _) in declared(kind).items()}
    typed = dict[str, Any]()
    for name, value in values.items():
        if name not in types:
            raise UserError(unknown_name(kind, name, unknown))
        typed[name] = _typed(value, types[name])
        if typed[name] is None:
            raise UserError(_wrong(noun.format(name), types[name], value))
    return typed


@cache
def table(kind: type[DataclassInstance]) -> tuple[Setting, ...]:
    """Return the settings of a class: first those that it declares, then those that it inherits."""
    types = declared(kind)
    defaults = {field.name: None if field.default is MISSING else field.default for field in fields(kind)}
    names = [name for base in kind.__mro__ for name in inspect.get_annotations(base)]
    return tuple(
        Setting(
            name,
            types[name][0],
            defaults[name],
            next((part for part in types[name][1] if isinstance(part, Meaning)), Meaning("")),
        )
        for name in dict.fromkeys(names)
        if name in types
    )


def unknown_name(kind: type[DataclassInstance], name: str, sentence: str) -> str:
    """Return the message for a name that a class of settings does not have.

    Parameters
    ----------
    kind : dataclass
    name : str
    sentence : str
        The message; the first {} stands for the name, the second for the existing names.
    """
    settings, words = table(kind), dict[str, str]()
    for setting in settings:
        for word in setting.meaning.words:
            words[word] = f"{words[word]} and {setting.name}" if word in words else setting.name
    names = [setting.name for setting in settings]
    return sentence.format(f"{name!r}{did_you_mean(name, names, words)}", ", ".join(names))


def documented(kind: type[KindT]) -> type[KindT]:
    """Add the settings of a class to its docstring, and suggest the closest name for an unknown setting.

    Use it as a decorator of dataclasses whose annotations have a `Meaning`.
    """
    of_settings: Any = kind
    head, examples, rest = inspect.cleandoc(kind.__doc__ or "").partition("\n\nExamples\n")
    kind.__doc__ = f"{head}\n\n{_attributes(of_settings)}{examples}{rest}"
    initialise = of_settings.__init__

    @wraps(initialise)
    def with_known_names(self: Any, *values: Any, **named: Any) -> None:
        for name in named:
            if name not in declared(of_settings):
                sentence = f"{kind.__name__} has no setting {{}}; it has {{}}"
                raise UserError(unknown_name(of_settings, name, sentence))
        initialise(self, *values, **named)

    of_settings.__init__ = with_known_names
    return kind


def _attributes(kind: type[DataclassInstance]) -> str:
    """Return the section "Attributes" of a docstring."""
    lines = ["Attributes", "----------"]
    for name, of_type, default, meaning in table(kind):
        lines += [
            f"{name} : {of_type.__name__}" + ("" if default is None else f", default {default!r}"),
            *textwrap.wrap(meaning.sentences, 106, initial_indent="    ", subsequent_indent="    "),
        ]
    return "\n".join(lines)
