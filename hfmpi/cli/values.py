"""Values on a command line: paths, numbers, quantities with units, and settings."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import click

from hfmpi.errors import UserError
from hfmpi.files.working_folder import check_working_folder

__all__ = [
    "BANDWIDTH",
    "HELP",
    "LATENCY",
    "MOST",
    "PATH",
    "SIZE",
    "Number",
    "PathName",
    "Quantity",
    "parse_settings",
]

HELP = "help"
"""The word that `hfmpi train --set` accepts instead of a setting, to list all settings."""

MOST = 10**9
"""Maximum of numbers to which memory or time is proportional.

For larger numbers, the required memory or time cannot be computed.
"""


class PathName(click.Path):
    """The name of a file or folder; the parser does not open it."""

    def __init__(self, path_type: type[Path] | type[str] = Path) -> None:
        super().__init__(readable=False, path_type=path_type)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Return the path; refuse an empty one, which would be the working folder."""
        if not str(value):
            self.fail("the name is empty", param, ctx)
        if not Path(value).is_absolute():
            check_working_folder()
        return super().convert(value, param, ctx)


PATH = PathName()


class Number(click.ParamType):
    """An integer or a finite number, optionally from `least` to `most`, or optionally the word `word`."""

    def __init__(
        self,
        kind: type[int] | type[float],
        least: float | None = None,
        most: float | None = None,
        word: str | None = None,
    ) -> None:
        self.name = "integer" if kind is int else "float"
        self.kind, self.least, self.word = kind, least, word
        self.most = 2**63 - 1 if most is None and kind is int else most

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Return the number, or the word."""
        if self.word is not None and value == self.word:
            return value
        try:
            number = self.kind(value)
        except ValueError:
            number = math.nan
        if isinstance(number, float) and not math.isfinite(number):  # isfinite fails for huge integers
            kind = "a whole number" if self.kind is int else "a finite number"
            wrong = f"neither {kind} nor the word {self.word}" if self.word else f"not {kind}"
            self.fail(f"{value!r} is {wrong}", param, ctx)
        if self.least is not None and number < self.least:
            self.fail(f"{value} is less than {self.least:,}", param, ctx)
        if self.most is not None and number > self.most:
            self.fail(f"{value} is more than {self.most:,}", param, ctx)
        return number


class Quantity(click.ParamType):
    """A positive number with a unit; a number without a unit is in the basic unit.

    Parameters
    ----------
    name : str
        Name of the quantity, such as "latency".
    example : str
        A valid value, for the error message.
    units : mapping of str to float
        The size of each unit in basic units.
    whole : bool
        Whether to round down to an integer number of basic units.
    any_case : bool
        Whether units may also be written in capital letters.
    """

    def __init__(
        self, name: str, example: str, units: Mapping[str, float], whole: bool = False, any_case: bool = False
    ) -> None:
        self.name, self.example, self.units, self.whole, self.any_case = name, example, units, whole, any_case

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """Return the number in the basic unit."""
        text = str(value).strip()
        text = text.lower() if self.any_case else text
        unit = max(filter(text.endswith, self.units), key=len, default="")
        number = 0.0
        with contextlib.suppress(ValueError, OverflowError):  # not a number, or not finite
            number = float(text.removesuffix(unit)) * self.units.get(unit, 1)
            number = int(number) if self.whole else number
        if not 0 < number < math.inf:
            self.fail(f"{value!r} is not a {self.name} such as {self.example}", param, ctx)
        return number


SIZE = Quantity(
    "memory size",
    "1500MB or 2GiB",
    {"b": 1}
    | {
        f"{letter}{ending}": base**power
        for power, letter in enumerate("kmgt", start=1)
        for ending, base in (("", 1024), ("ib", 1024), ("b", 1000))
    },
    whole=True,
    any_case=True,
)
LATENCY = Quantity("latency", "2us", {"s": 1, "ms": 1e-3, "us": 1e-6, "ns": 1e-9})
BANDWIDTH = Quantity(
    "bandwidth",
    "10GB/s",
    {
        f"{letter}{unit}/s": 10.0**power / parts
        for letter, power in (("M", 6), ("G", 9), ("T", 12))
        for unit, parts in (("B", 1), ("bit", 8))
    },
)


def parse_settings(pairs: Iterable[str]) -> dict[str, bool | int | float | str]:
    """Parse NAME=VALUE pairs, whose values are true or false, integers, other numbers or words.

    Raises
    ------
    UserError
        If a pair has no equals sign.
    """
    settings: dict[str, bool | int | float | str] = {}
    for pair in pairs:
        name, equals, text = pair.partition("=")
        if not equals or not name:
            raise UserError(
                f"--set needs NAME=VALUE, not {pair!r}: `hfmpi train --optimizer NAME --set {HELP}` lists "
                "the settings of an optimizer"
            )
        settings[name] = _value(text)
    return settings


def _value(text: str) -> bool | int | float | str:
    """Convert a value to the type of its notation."""
    if text in ("true", "false"):
        return text == "true"
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text
