"""Read the times of runs of one job on several numbers of ranks from their folders."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from hfmpi.errors import UserError
from hfmpi.files import checkpoint
from hfmpi.files.history import History, Record
from hfmpi.files.numbers import is_amount
from hfmpi.measure.cost import Counts
from hfmpi.measure.spans import EVALUATE, FILES
from hfmpi.optim.layout import Block
from hfmpi.runs.config import CHANGEABLE, Config
from hfmpi.runs.merge import merge
from hfmpi.runs.record import counted
from hfmpi.runs.restore import are_amounts, check_one_run
from hfmpi.runs.timing import read_times
from hfmpi.speedup.messages import messages
from hfmpi.speedup.steps import StepTimes, mean_spans

__all__ = ["TimedRun", "read_runs"]


@dataclass(frozen=True)
class TimedRun:
    """A run and the times of its steps.

    Attributes
    ----------
    folder : Path
    config : Config
    model : str
        The cell, or the name of a user-defined model.
    digests : mapping of str to str
        Digests of the data, and of a user-defined model.
    threads : int
        Threads per rank.
    device : str
    parameters, itemsize : int
        Number of parameters, and bytes of each.
    first, last : int
        Numbers of the first and last measured steps.
    steps : StepTimes
    blocks : tuple of Block
        The matrices of theta.
    """

    folder: Path
    config: Config
    model: str
    digests: Mapping[str, str]
    threads: int
    device: str
    parameters: int
    itemsize: int
    first: int
    last: int
    steps: StepTimes
    blocks: tuple[Block, ...]

    @property
    def messages(self) -> dict[str, float]:
        """Return the bytes of the messages that the ranks sum, by the kinds of pass that precede them."""
        optimizer = self.config.preset().optimizer
        return messages(optimizer, self.steps.counts, self.parameters, self.itemsize, self.blocks)


def read_runs(folders: Sequence[Path]) -> tuple[TimedRun, list[StepTimes]]:
    """Read runs of one job; return one of them, and the times in order of the number of ranks.

    Runs on the same number of ranks are repeats.

    Raises
    ------
    UserError
        If a run cannot be read, or belongs to a different job than the first.
    """
    runs = [_read(folder) for folder in folders]
    first = runs[0]
    for other in runs[1:]:
        _check_same(first, other)
    sizes = sorted({run.steps.ranks for run in runs})
    return first, [_merged([run.steps for run in runs if run.steps.ranks == size]) for size in sizes]


def _check_same(one: TimedRun, other: TimedRun) -> None:
    """Check that both runs executed the same steps on ranks of the same kind."""
    if one.digests != other.digests:
        what = "models" if one.digests.get("model") != other.digests.get("model") else "data"
        raise UserError(f"{one.folder} and {other.folder} are not the same job: they have different {what}")
    theirs = other.config.in_effect()
    for name, value in one.config.in_effect().items():
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


def _merged(repeats: list[StepTimes]) -> StepTimes:
    first = repeats[0]
    return StepTimes(
        first.ranks,
        np.concatenate([each.seconds for each in repeats]),
        tuple(mean_spans([each.spans[rank] for each in repeats]) for rank in range(first.ranks)),
        tuple(mean_spans([each.outside[rank] for each in repeats]) for rank in range(first.ranks)),
        sum((each.counts for each in repeats), Counts()),
        *first.batches,
    )


def _read(folder: Path) -> TimedRun:
    """Read a run; the times of a resumed run are those of the steps after it was resumed."""
    saved = checkpoint.latest(folder)
    check_one_run(folder, saved)
    try:
        config, digests = merge(saved.meta["config"]), checkpoint.identity(saved.meta)
        model = str(saved.meta["title"]) if "model" in digests else config.model
    except UserError:
        raise
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"the checkpoint in {folder} does not describe a run of this version: {error!r}"
        ) from None
    timing = read_times(folder)
    steps, ranks = timing["timed_steps"], timing["ranks"]
    if steps < 1:
        raise UserError(f"{folder} has too few steps: the first one after a start does not count")
    first, last = timing["last_step"] - steps + 1, timing["last_step"]
    records = [record for record in History.read(folder) if first <= record["step"] <= last]
    if len(records) != steps or not all(map(_is_complete, records)):
        raise UserError(f"the history of {folder} lacks times or counts of steps {first} to {last}")
    preset = config.preset()
    times = StepTimes(
        len(ranks),
        np.array([[record["step_seconds"] for record in records]]),
        tuple({name: value / steps for name, value in rank["step_spans"].items()} for rank in ranks),
        tuple({name: rank["spans"].get(name, 0.0) for name in (EVALUATE, FILES)} for rank in ranks),
        sum(map(counted, records), Counts()),
        preset.gradient_batch,
        preset.curvature_batch,
    )
    if not (times.counts.gradients and times.parts["compute"] > 0):
        raise UserError(f"the history or timing.json of {folder} is damaged: its steps have no gradients")
    threads, device = ranks[0]["threads"], ranks[0]["device"]
    size = saved.theta.size, saved.theta.itemsize
    blocks = _blocks(folder, saved.meta) if preset.optimizer.needs.blocks else ()
    return TimedRun(folder, config, model, digests, threads, device, *size, first, last, times, blocks)


def _blocks(folder: Path, meta: Mapping[str, Any]) -> tuple[Block, ...]:
    """Return the matrices of theta that a checkpoint lists."""
    if "blocks" not in meta:
        raise UserError(
            f"the checkpoint in {folder} was written by an earlier version and does not name the matrices of "
            "theta: repeat the run"
        )
    try:
        blocks = tuple(
            Block(str(name), start, rows, columns, tuple(cuts), groups)
            for name, start, rows, columns, cuts, groups in meta["blocks"]
        )
        sound = all(type(n) is int and 0 < n < 2**40 for b in blocks for n in (b.rows, b.columns, b.groups))
    except (TypeError, ValueError):
        sound = False
    if not sound:
        raise UserError(f"the checkpoint in {folder} is damaged: its blocks are not matrices")
    return blocks


def _is_complete(record: Record) -> bool:
    """Return whether a record has the time and the counts of its step."""
    try:
        return is_amount(record["step_seconds"]) and are_amounts(counted(record))
    except KeyError:
        return False
