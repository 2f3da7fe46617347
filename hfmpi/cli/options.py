"""Options that commands share; those of a run are derived from the fields of `Config`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import click

from hfmpi.cli.values import PATH, SIZE, Number
from hfmpi.runs.config import FORMER_NAMES, OPTIONS, Config
from hfmpi.runs.merge import merge

__all__ = ["checked_keep", "chosen", "current_name", "option", "options", "runs_and_figure", "settings"]

CommandT = TypeVar("CommandT", bound=Callable[..., Any])


def option(
    name: str, *declarations: str, default: str | None = None, without: str = "", multiple: bool = False
) -> Callable[[CommandT], CommandT]:
    """Return the click option of a field of `Config`; `without` is the default that its help shows.

    Choices are checked where they are used, so that the command line, files and Python produce the same
    error message.
    """
    kind, field = OPTIONS[name]
    number = SIZE if field.unit == "SIZE" else Number(kind, field.least)
    without = without or field.without or getattr(Config, name)
    return click.option(
        f"--{name.replace('_', '-')}",
        *declarations,
        type=click.STRING if kind is str else number,
        metavar=f"[{'|'.join(field.choices)}]" if field.choices else field.unit or None,
        help=f"{field.help}  [default: {without}]",
        default=default,
        multiple=multiple,
        shell_complete=lambda ctx, param, prefix: [word for word in field.choices if word.startswith(prefix)],
    )


def options(*names: str) -> Callable[[CommandT], CommandT]:
    """Return a decorator that adds the options of these fields in this order."""

    def decorate(command: CommandT) -> CommandT:
        for name in reversed(names):
            command = option(name)(command)
        return command

    return decorate


settings = click.option(
    "--set",
    "settings",
    multiple=True,
    metavar="NAME=VALUE",
    help="A setting of the optimizer, such as cg_max_steps=20; repeatable. "
    "`hfmpi train --optimizer soap --set help` lists those of soap.",
)


def runs_and_figure(help: str) -> Callable[[CommandT], CommandT]:
    """Return a decorator that adds the argument RUN... and the option --out."""

    def decorate(command: CommandT) -> CommandT:
        command = click.option("--out", type=PATH, metavar="FIG.png", help=help)(command)
        return click.argument("runs", nargs=-1, required=True, type=PATH, metavar="RUN...")(command)

    return decorate


def chosen(values: Mapping[str, Any]) -> Config:
    """Return the configuration with these values; None stands for the default."""
    return merge({name: value for name, value in values.items() if value is not None})


def checked_keep(value: str | None) -> str:
    """Return the value of --keep, or "" if it is not set; raise a UserError if it is not a choice."""
    return chosen({"keep": value}).keep


def current_name(name: str) -> str:
    """Return the current name of an option of an earlier version, both without leading dashes."""
    return FORMER_NAMES[name].replace("_", "-") if name in FORMER_NAMES else name
