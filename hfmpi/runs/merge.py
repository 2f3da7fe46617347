"""Merge the options of a run: those of the user, of a configuration file, and of a checkpoint."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import tomli_w

from hfmpi.errors import UserError
from hfmpi.files.atomic import open_regular
from hfmpi.optim.presets import BASES, Preset, named
from hfmpi.runs.config import CHANGEABLE, FORMER_NAMES, NETWORK, Config
from hfmpi.settings import converted

__all__ = ["derive", "from_toml", "merge", "to_toml"]

MAX_TOML_BYTES = 2**20
"""Maximum size of a configuration file; that of a run has about 700 bytes."""


def merge(options: Mapping[str, Any], stored: Mapping[str, Any] | None = None, out: str = "--out") -> Config:
    """Return the configuration of a new run or, with the options stored in its checkpoint, of a resumed run.

    Parameters
    ----------
    options : mapping
        User-supplied options. The optimizer may be an object, whose settings are complete: they replace
        those of the stored optimizer, while single settings leave the others as they are.
    stored : mapping, optional
        Options of the run that is resumed.
    out : str
        Name of the option for the run's folder, for messages.

    Raises
    ------
    UserError
        If an option is unknown, has a wrong type or value, or would change what the resumed run computes.
    """
    if stored is None:
        return Config(**_checked(options))
    base = Config(**_checked(stored))
    values = _with_one_size(_checked(options, base.optimizer))
    changes = {name: value for name, value in values.items() if name in CHANGEABLE | {"hidden", "parameters"}}
    if values.get("optimizer", base.optimizer) != base.optimizer:
        raise _different("optimizer", base.optimizer, values["optimizer"], out)
    settings = _settings(base, options, values)
    before, after = base.in_effect(), replace(base, **values | {"settings": settings}).in_effect()
    for name, value in after.items():
        if name not in changes and value != before[name]:
            raise _different(name, before[name], value, out)
    return replace(base, **changes)


def derive(options: Mapping[str, Any], stored: Any) -> Config:
    """Return the configuration of a new run that starts from a different one.

    Options that the user does not set are taken from the checkpoint of that run. If the user chooses a
    different preset, its settings and batch sizes replace the stored ones. If the user sets a limit, no limit
    of that run remains: it may have been reached.

    Raises
    ------
    UserError
        If an option is unknown or has a wrong type or value, if the network is different, or if `stored` is
        not a mapping of options. The size of the network is not checked here; the parameters determine it.
    """
    values, base = _checked(options), Config(**_checked(stored))
    for name in NETWORK:
        before, after = getattr(base, name), values.get(name, getattr(base, name))
        if after != before:
            raise UserError(
                f"the run to start from has {name} = {before!r}, not {after!r}: its network cannot be changed"
            )
    values = _with_one_size(values)
    if values.get("optimizer", base.optimizer) != base.optimizer:
        base = replace(base, settings={}, gradient_batch=0, curvature_batch=0)
    if values.get("max_steps") or values.get("max_seconds"):
        base = replace(base, max_steps=0, max_seconds=0.0)
    return replace(base, **values | {"settings": _settings(base, options, values)})


def _settings(base: Config, options: Mapping[str, Any], values: dict[str, Any]) -> dict[str, Any]:
    """Return the settings of a run with the configuration `base`, updated by these values."""
    supplied: dict[str, Any] = values.get("settings", {})
    return supplied if _is_object(options.get("optimizer")) else base.settings | supplied


def _is_object(optimizer: Any) -> bool:
    return isinstance(optimizer, (Preset, *BASES))


def _with_one_size(values: dict[str, Any]) -> dict[str, Any]:
    """Return values in which `hidden` or `parameters` replaces both stored ones, as either sets the size."""
    return {"hidden": 0, "parameters": 0} | values if {"hidden", "parameters"} & values.keys() else values


def _different(name: str, before: Any, after: Any, out: str) -> UserError:
    return UserError(f"this run has {name} = {before!r}, not {after!r}: use a different {out} for a new run")


def _checked(options: Any, optimizer: str = "") -> dict[str, Any]:
    """Return options under their current names, with their declared types, or raise a UserError.

    An optimizer object gets the name `optimizer` if its class is that of the preset with this name.
    """
    if not isinstance(options, Mapping):
        raise UserError("invalid checkpoint: it does not contain the options of a run")
    if _is_object(options.get("optimizer")):
        options = _with_name(options, optimizer)
    former = {name: options[old] for old, name in FORMER_NAMES.items() if old in options}
    current = {name: value for name, value in options.items() if name not in FORMER_NAMES}
    return converted(Config, former | current, "option {}", "unknown option {}; the options are {}")


def _with_name(options: Mapping[str, Any], preferred: str) -> dict[str, Any]:
    """Return options with an optimizer object replaced by its name, which is `preferred` if possible."""
    optimizer = options["optimizer"]
    if options.get("settings"):
        maker = "preset" if isinstance(optimizer, Preset) else type(optimizer).__name__
        raise UserError(
            "settings needs the name of an optimizer, but optimizer is an object: pass the settings to "
            f"hfmpi.{maker}(...)"
        )
    name, settings, batches = named(optimizer, preferred)
    return batches | dict(options) | {"optimizer": name, "settings": settings}


def from_toml(path: Path) -> dict[str, Any]:
    """Read options from a TOML file: names with underscores, optimizer settings in the table `settings`.

    Raises
    ------
    UserError
        If the file cannot be read or is not TOML. `merge` rejects unknown names.
    """
    with open_regular(path) as file:
        content = file.read(MAX_TOML_BYTES + 1)
    try:
        if len(content) > MAX_TOML_BYTES:
            raise ValueError(f"it is longer than {MAX_TOML_BYTES:,} bytes")
        return tomllib.loads(content.decode())
    except (ValueError, RecursionError) as error:  # TOML and UTF-8 errors, and numbers of too many digits
        raise UserError(f"{path} is not a TOML file: {error}") from None


def to_toml(options: Mapping[str, Any]) -> str:
    """Return options as TOML that `from_toml` reads back."""
    return tomli_w.dumps(options)
