"""What the folder of a run holds for its page; what cannot be read is told in its place."""

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
from hfmpi.files.checkpoint import NEWEST, PREVIOUS, latest, trained_on
from hfmpi.files.history import BITS, HISTORY, History, LossKeys, loss_keys
from hfmpi.files.numbers import is_drawable
from hfmpi.files.writer import CONFIG, DONE, TIMING
from hfmpi.networks import sampling
from hfmpi.report.steps import Steps
from hfmpi.runs.config import FORMER_NAMES, OPTIONS
from hfmpi.runs.merge import from_toml, merge
from hfmpi.runs.timing import Times, read_times
from hfmpi.runs.trained_model import Trained

__all__ = ["COSTS", "Contents", "Network", "read", "stamp"]

COSTS = ("P_I", "P_D", "P_I_full", "P_D_full", "step", "seconds")
"""Keys of a step against which its losses are drawn."""

SAMPLE = 400
"""Characters of a sample."""

Stamp = tuple[tuple[int, int] | None, ...]
FILES = (HISTORY, CONFIG, TIMING, NEWEST, DONE)


class Network(NamedTuple):
    """What the checkpoint of a run tells.

    Attributes
    ----------
    corpus : str or None
        Digest of its text.
    symbols : bytes
    parameters, step : int
    sample : bytes
        What it wrote.
    why : str
        Why it did not.
    """

    corpus: str | None
    symbols: bytes
    parameters: int = 0
    step: int = 0
    sample: bytes = b""
    why: str = ""


@dataclass(frozen=True)
class Contents:
    """What is known of a run.

    Attributes
    ----------
    name : str
        What the page calls it.
    folder : Path
    done : str or None
        Which limit it has reached.
    changed : datetime or None
        When the history was last written.
    steps : Steps
    loss : LossKeys
    unit : str
        Of its losses.
    settings : dict
        All options and settings in effect by name, or what config.toml has.
    times : Times or None
        Of each rank.
    network : Network
    missing : dict of str to str
        Why a part is missing, by the attribute.
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
    network: Network
    missing: dict[str, str] = field(default_factory=dict)


def stamp(folder: Path, files: Sequence[str] = FILES) -> Stamp:
    """Give what changes when one of these files of a run is written anew."""
    found: list[tuple[int, int] | None] = []
    for name in files:
        try:
            about = os.stat(folder / name)
            found.append((about.st_mtime_ns, about.st_size))
        except OSError:
            found.append(None)
    return tuple(found)


def read(folders: Sequence[Path]) -> list[Contents]:
    """Read what the folders of runs hold.

    Raises
    ------
    UserError
        If one is no folder of a run, or its history is damaged.
    """
    runs = [_read(folder, name) for folder, name in zip(folders, _names(folders), strict=True)]
    # Their losses are drawn together: of a text beyond ASCII, or beside one, they are bits a byte.
    unit = loss_unit(b"".join(run.network.symbols for run in runs))
    return [replace(run, unit=unit) if run.loss == BITS else run for run in runs]


def _names(folders: Sequence[Path]) -> list[str]:
    """Give the runs names: those of their folders, or their paths where two folders have the same."""
    short = [Path(os.path.abspath(folder)).name for folder in folders]
    chosen = short if len(set(short)) == len(short) else list(map(str, folders))
    return [os.fsencode(name).decode("utf-8", "backslashreplace") for name in chosen]


def _read(folder: Path, name: str) -> Contents:
    done = _done(folder)  # first: what is read after it is then complete
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
    network = _network(folder, stamp(folder, (NEWEST, PREVIOUS)))
    if network.why:
        missing["sample"] = network.why if loss == BITS else "what it was trained on is no text"
    changed = None
    with contextlib.suppress(OSError):  # without a history
        changed = datetime.fromtimestamp(os.stat(folder / HISTORY).st_mtime).astimezone()
    return Contents(name, folder, done, changed, steps, loss, "loss", settings, times, network, missing)


def _settings(folder: Path) -> dict[str, Any]:
    """Give the options that config.toml names, as they are in effect, and the settings of the optimizer."""
    given = from_toml(folder / CONFIG)
    try:
        effective = merge(given).in_effect()
    except UserError:  # of another version, perhaps: its own words
        return given
    named = {FORMER_NAMES.get(name, name) for name in given}
    return {name: value for name, value in effective.items() if name in named or name not in OPTIONS}


@lru_cache(maxsize=256)  # a page that follows a run asks again and again
def _network(folder: Path, state: Stamp) -> Network:
    """Let the network of the newest checkpoint, in this state of its files, write a sample."""
    try:
        trained = Trained.read(folder, backend="numpy")
        text = sampling.sample(trained.network, trained.theta, trained.symbols, SAMPLE, b"", 1.0, 0)
    except UserError as error:
        try:
            parameters = latest(folder).theta.size
        except UserError:
            parameters = 0
        return Network(*trained_on(folder), parameters, why=str(error))
    return Network(trained.corpus, trained.symbols, trained.theta.size, trained.step, text)


def _done(folder: Path) -> str | None:
    if not os.path.lexists(folder / DONE):
        return None
    try:
        with open_regular(folder / DONE) as file:
            return file.read(200).decode("utf-8", "backslashreplace").strip()
    except UserError:  # it is there: that is what counts
        return ""


def _history(folder: Path) -> tuple[Steps, LossKeys]:
    """Give the steps, none of a run that has only begun, and what their losses are called."""
    path = folder / HISTORY
    if not os.path.lexists(path):
        if not any(os.path.lexists(folder / name) for name in FILES):
            raise UserError(f"{folder} holds no run: there is neither {HISTORY} nor {CONFIG} in it")
        return Steps(), BITS
    records = History.read(folder, COSTS)
    loss = loss_keys(records[0]) if records else BITS
    for key in (loss.train, loss.valid):
        if not all(is_drawable(record.get(key, "")) for record in records):
            raise UserError(f"{path} is damaged: not every step has a number or null as its {key}")
    return Steps.of(records), loss
