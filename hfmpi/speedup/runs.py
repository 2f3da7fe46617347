"""What runs of one job on several numbers of ranks measured, read from their folders."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from hfmpi.errors import UserError
from hfmpi.files import checkpoint
from hfmpi.files.atomic import open_regular
from hfmpi.files.history import History
from hfmpi.files.writer import TIMING
from hfmpi.measure.cost import Counts
from hfmpi.objective.messages import message_sizes
from hfmpi.runs.config import CHANGEABLE, Config, merge
from hfmpi.speedup.compare import Measured, mean_spans

__all__ = ["Measurement", "is_amount", "measurements"]

MOST_TIMING = 2**26  # bytes; a rank has about 1,000
PER_STEP = "step_seconds", "cg_steps", "gradients", "products", "losses", "linearisations"


@dataclass(frozen=True)
class Measurement:
    """One run.

    Attributes
    ----------
    folder : Path
    config : Config
    corpus : str
        Digest of its data.
    threads, device
        Of each rank.
    numbers, itemsize : int
        Parameters, and bytes of each.
    first, last : int
        Steps that were measured.
    measured : Measured
    """

    folder: Path
    config: Config
    corpus: str
    threads: int
    device: str
    numbers: int
    itemsize: int
    first: int
    last: int
    measured: Measured

    @property
    def messages(self) -> dict[str, float]:
        """Bytes that the ranks sum after a pass."""
        squares = getattr(self.config.preset().optimizer, "preconditioner", "none") == "diagonal"
        sizes = message_sizes(self.numbers, squares)
        return {
            "gradient": self.itemsize * sizes["gradient"],
            "product": self.itemsize * sizes["product"],
            "loss": 8 * sizes["loss"],  # float64 whatever the vectors
            "linearisation": 0,
        }


def measurements(folders: Sequence[Path]) -> tuple[Measurement, list[Measured]]:
    """Read runs of one job; give one of the runs, and what was measured from the fewest ranks to the most.

    Runs on the same number of ranks are repeats.

    Raises
    ------
    UserError
        If a run cannot be read or is of another job than the first.
    """
    found = [_read(folder) for folder in folders]
    first = found[0]
    for other in found[1:]:
        _check_same(first, other)
    sizes = sorted({one.measured.ranks for one in found})
    return first, [_merged([one.measured for one in found if one.measured.ranks == size]) for size in sizes]


def _check_same(one: Measurement, other: Measurement) -> None:
    """Raise a UserError unless both did the same on ranks of the same kind."""
    if one.corpus != other.corpus:
        raise UserError(f"{one.folder} and {other.folder} are not the same job: they have other data")
    theirs = asdict(other.config)
    for name, value in asdict(one.config).items():
        if name not in CHANGEABLE - {"matmul_precision"} and value != theirs[name]:
            raise UserError(
                f"{one.folder} and {other.folder} are not the same job: "
                f"{name} is {value!r} and {theirs[name]!r}"
            )
    for name, value, their in (
        ("threads of a rank", one.threads, other.threads),
        ("device", one.device, other.device),
        ("measured steps", f"{one.first} to {one.last}", f"{other.first} to {other.last}"),
    ):
        if value != their:
            raise UserError(
                f"{one.folder} and {other.folder} cannot be compared: the {name} are {value} and {their}"
            )


def _merged(repeats: list[Measured]) -> Measured:
    """Give the mean of repeats."""
    one = repeats[0]
    return Measured(
        one.ranks,
        np.concatenate([each.seconds for each in repeats]),
        tuple(mean_spans([each.spans[rank] for each in repeats]) for rank in range(one.ranks)),
        tuple(mean_spans([each.outside[rank] for each in repeats]) for rank in range(one.ranks)),
        sum((each.counts for each in repeats), Counts()),
        *one.batches,
    )


def _read(folder: Path) -> Measurement:
    """Read a run; a run that was resumed has measured what came after."""
    saved = checkpoint.latest(folder)
    try:
        config, corpus = merge(saved.meta["config"]), str(saved.meta["corpus"])
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"the checkpoint in {folder} describes no run of this version: {error!r}") from None
    timing = _timing(folder)
    steps, ranks = timing["timed_steps"], timing["ranks"]
    if steps < 1:
        raise UserError(f"{folder} has too few steps: the first one of a start does not count")
    first, last = timing["last_step"] - steps + 1, timing["last_step"]
    records = [record for record in History.read(folder) if first <= record["step"] <= last]
    complete = all(is_amount(record.get(key)) for record in records for key in PER_STEP)
    if len(records) != steps or not complete:
        raise UserError(f"the history of {folder} lacks times or counts of steps {first} to {last}")
    preset = config.preset()
    measured = Measured(
        len(ranks),
        np.array([[record["step_seconds"] for record in records]]),
        tuple({name: value / steps for name, value in rank["step_spans"].items()} for rank in ranks),
        tuple({name: rank["spans"].get(name, 0.0) for name in ("evaluate", "files")} for rank in ranks),
        Counts(steps, *(sum(int(record[key]) for record in records) for key in PER_STEP[1:])),
        preset.gradient_batch,
        preset.curvature_batch,
    )
    if not (measured.counts.gradients and measured.parts["compute"] > 0):
        raise UserError(f"the history or timing.json of {folder} is damaged: its steps have no gradients")
    threads, device = ranks[0]["threads"], ranks[0]["device"]
    theta = saved.theta
    return Measurement(
        folder, config, corpus, threads, device, theta.size, theta.itemsize, first, last, measured
    )


def _timing(folder: Path) -> dict[str, Any]:
    """Read timing.json and check what is used of it."""
    path = folder / TIMING
    with open_regular(path) as file:
        content = file.read(MOST_TIMING)
    try:
        timing = json.loads(content)
        sound = all(type(timing[name]) is int for name in ("timed_steps", "last_step")) and timing["ranks"]
        for rank in timing["ranks"]:
            amounts = [*rank["spans"].values(), *rank["step_spans"].values()]
            sound = sound and all(map(is_amount, amounts))
            sound = sound and type(rank["threads"]) is int and isinstance(rank["device"], str)
            sound = sound and (timing["timed_steps"] < 1 or sum(rank["step_spans"].values()) > 0)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        sound = False
    if not sound:
        raise UserError(f"{path} has no times of steps: it is damaged, or of an older version")
    return timing


def is_amount(value: Any) -> bool:
    """Whether it is a number that measures something: finite and not negative."""
    return type(value) in (int, float) and math.isfinite(value) and 0 <= value < 2**53
