"""Read the contents of a run's folder for its page, or the reasons why parts cannot be read."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from hfmpi.data.corpus import loss_unit
from hfmpi.errors import UserError
from hfmpi.files.atomic import open_regular
from hfmpi.files.checkpoint import BEST, NEWEST, PREVIOUS, latest, trained_on
from hfmpi.files.history import BITS, HISTORY, History, LossKeys, loss_keys
from hfmpi.files.numbers import is_drawable
from hfmpi.files.writer import CONFIG, DONE, TIMING
from hfmpi.networks import sampling
from hfmpi.report.quantities import COSTS
from hfmpi.report.steps import Steps
from hfmpi.runs.config import FORMER_NAMES, OPTIONS
from hfmpi.runs.merge import from_toml, merge
from hfmpi.runs.timing import Times, read_times
from hfmpi.runs.trained_model import Trained

__all__ = ["Contents", "NetworkInfo", "read", "stamp"]

SAMPLE = 400
"""Characters of a sample."""

FILES = (HISTORY, CONFIG, TIMING, NEWEST, BEST, DONE)

Stamp = tuple[tuple[int, int] | None, ...]
"""Modification time and size of files; None for a file that is missing."""


class NetworkInfo(NamedTuple):
    """The network of a run, with its best parameters or those of its newest checkpoint.

    Attributes
    ----------
    corpus : str or None
        Digest of the training data.
    symbols : bytes
    parameters, step : int
    sample : bytes
        Text that the network generated.
    error : str
        Why there is no sample.
    """

    corpus: str | None
    symbols: bytes
    parameters: int = 0
    step: int = 0
    sample: bytes = b""
    error: str = ""


@dataclass(frozen=True)
class Contents:
    """The contents of a run's folder.

    Attributes
    ----------
    name : str
        Name of the run on the page.
    folder : Path
    done : str or None
        The limit that the run has reached.
    changed : datetime or None
        The time when the history was last written.
    steps : Steps
    loss : LossKeys
    unit : str
        Unit of the losses.
    settings : dict
        All options and settings in effect by name, or the contents of config.toml.
    times : Times or None
        Times of each rank.
    network : NetworkInfo
    missing : dict of str to str
        The reason for each missing part, by its attribute.
    """

    name: str
    folder: Path
    done: str | None
    changed: datetime | None
    steps: Steps
    loss: LossKeys
    unit: str
    settings: dict[str, Any]
    times: Times | None
    network: NetworkInfo
    missing: dict[str, str] = field(default_factory=dict)


def stamp(folder: Path, files: Sequence[str] = FILES) -> Stamp:
    """Return a value that changes whenever one of these files of a run is rewritten."""
    stamps: list[tuple[int, int] | None] = []
    for name in files:
        try:
            status = os.stat(folder / name)
            stamps.append((status.st_mtime_ns, status.st_size))
        except OSError:
            stamps.append(None)
    return tuple(stamps)


def read(folders: Sequence[Path]) -> list[Contents]:
    """Read the folders of runs.

    Raises
    ------
    UserError
        If a folder does not contain a run, or its history is damaged.
    """
    runs = [_read(folder, name) for folder, name in zip(folders, _names(folders), strict=True)]
    # The losses share a figure: if the text of one run is not ASCII, all losses are in bits per byte.
    unit = loss_unit(b"".join(run.network.symbols for run in runs))
    return [replace(run, unit=unit) if run.loss == BITS else run for run in runs]


def _names(folders: Sequence[Path]) -> list[str]:
    """Return a name for each run: the name of its folder, or its path if two folders have the same name."""
    names = [Path(os.path.abspath(folder)).name for folder in folders]
    names = names if len(set(names)) == len(names) else list(map(str, folders))
    return [os.fsencode(name).decode("utf-8", "backslashreplace") for name in names]


def _read(folder: Path, name: str) -> Contents:
    done = _done(folder)  # first, so that everything read afterwards is complete
    missing: dict[str, str] = {}
    steps, loss = _history(folder)
    settings: dict[str, Any] = {}
    try:
        settings = _settings(folder)
    except UserError as error:
        missing["settings"] = str(error)
    times = None
    try:
        times = read_times(folder)
    except UserError as error:
        missing["times"] = str(error)
    network = _network(folder, stamp(folder, (NEWEST, PREVIOUS, BEST)))
    if network.error:
        missing["sample"] = network.error if loss == BITS else "the run was not trained on a text"
    changed = None
    with contextlib.suppress(OSError):  # there may be no history yet
        changed = datetime.fromtimestamp(os.stat(folder / HISTORY).st_mtime).astimezone()
    return Contents(name, folder, done, changed, steps, loss, "loss", settings, times, network, missing)


def _settings(folder: Path) -> dict[str, Any]:
    """Return the effective values of the options in config.toml, and all settings of the optimizer."""
    options = from_toml(folder / CONFIG)
    try:
        effective = merge(options).in_effect()
    except UserError:  # perhaps a different version wrote the file: show its options unchanged
        return options
    named = {FORMER_NAMES.get(name, name) for name in options}
    return {name: value for name, value in effective.items() if name in named or name not in OPTIONS}


@lru_cache(maxsize=256)  # --follow reads the same checkpoint repeatedly
def _network(folder: Path, state: Stamp) -> NetworkInfo:
    """Generate a sample with the newest checkpoint; `state` is the stamp of the checkpoints."""
    try:
        trained = Trained.read(folder, backend="numpy")
        text = sampling.sample(trained.network, trained.theta, trained.symbols, SAMPLE, b"", 1.0, 0)
    except UserError as error:
        try:
            parameters = latest(folder).theta.size
        except UserError:
            parameters = 0
        return NetworkInfo(*trained_on(folder), parameters, error=str(error))
    return NetworkInfo(trained.corpus, trained.symbols, trained.theta.size, trained.step, text)


def _done(folder: Path) -> str | None:
    if not os.path.lexists(folder / DONE):
        return None
    try:
        with open_regular(folder / DONE) as file:
            return file.read(200).decode("utf-8", "backslashreplace").strip()
    except UserError:  # the run is done, whatever the file contains
        return ""


def _history(folder: Path) -> tuple[Steps, LossKeys]:
    """Return the steps (none before the first one ends), and the keys of their losses."""
    path = folder / HISTORY
    if not os.path.lexists(path):
        if not any(os.path.lexists(folder / name) for name in FILES):
            raise UserError(f"{folder} does not contain a run: it has neither {HISTORY} nor {CONFIG}")
        return Steps(), BITS
    records = History.read(folder, COSTS)
    loss = loss_keys(records[0]) if records else BITS
    for key in (loss.train, loss.valid):
        if not all(is_drawable(record.get(key, "")) for record in records):
            raise UserError(f"{path} is damaged: not every step has a number or null as its {key}")
    return Steps.of(records), loss
