"""The options of a run on a command line, as their declarations in `Config` have them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import click

from hfmpi.cli.values import SIZE, Number
from hfmpi.runs.config import FORMER_NAMES, OPTIONS, Config
from hfmpi.runs.merge import merge

__all__ = ["chosen", "current_name", "option", "options", "settings"]

CommandT = TypeVar("CommandT", bound=Callable[..., Any])


def option(
    name: str, *declarations: str, default: str | None = None, without: str = "", multiple: bool = False
) -> Callable[[CommandT], CommandT]:
    """Give the click option of a field of `Config`; `without`: what help says is taken without it.

    A word that is not among the choices is refused where it is used, in one sentence for all ways to give it.
    """
    kind, told = OPTIONS[name]
    number = SIZE if told.unit == "SIZE" else Number(kind, told.least)
    without = without or told.without or getattr(Config, name)
    return click.option(
        f"--{name.replace('_', '-')}",
        *declarations,
        type=click.STRING if kind is str else number,
        metavar=f"[{'|'.join(told.choices)}]" if told.choices else told.unit or None,
        help=f"{told.help}  [default: {without}]",
        default=default,
        multiple=multiple,
        shell_complete=lambda ctx, param, begun: [word for word in told.choices if word.startswith(begun)],
    )


def options(*names: str) -> Callable[[CommandT], CommandT]:
    """Give a command several of them, in this order."""

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
    help="A setting of the optimizer, such as cg_max_steps=20; repeatable.",
)


def chosen(given: Mapping[str, Any]) -> Config:
    """Give the configuration in which all is as given, but for what is None."""
    return merge({name: value for name, value in given.items() if value is not None})


def current_name(name: str) -> str:
    """Give the name of today for an option of an earlier version, without its dashes in front."""
    return FORMER_NAMES[name].replace("_", "-") if name in FORMER_NAMES else name
