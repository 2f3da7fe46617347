"""timing.json: how each rank has spent its time since the last start of the run."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TypedDict, cast

import numpy as np

from hfmpi.errors import UserError
from hfmpi.files.atomic import open_regular
from hfmpi.files.numbers import is_amount
from hfmpi.files.writer import TIMING
from hfmpi.measure.spans import ALLREDUCE, OPTIMIZER, WAITING
from hfmpi.measure.timer import Timer, split_waiting
from hfmpi.parallel.communicator import Communicator
from hfmpi.parallel.placement import Placement

__all__ = ["RankTimes", "Times", "Timing", "read_times"]

MOST_BYTES = 2**26  # the file has about 1,000 bytes per rank


class RankTimes(TypedDict):
    """A rank: its `Placement` and device, and seconds by name, since this start and in the timed steps."""

    threads: int
    device: str
    spans: dict[str, float]
    step_spans: dict[str, float]


class Times(TypedDict):
    """Content of the file; all steps of this start except the first are timed."""

    first_step: int
    last_step: int
    timed_steps: int
    seconds: float
    ranks: list[RankTimes]


class Timing:
    """The combined timers of all ranks.

    Parameters
    ----------
    timer : Timer
        The rank's timer.
    communicator, placement
    first_step : int
        The step from which this start continues.
    device : str
        The rank's device.

    Attributes
    ----------
    step_seconds : float
        Duration of the newest step, without evaluation and files.
    """

    def __init__(
        self, timer: Timer, communicator: Communicator, placement: Placement, first_step: int, device: str
    ) -> None:
        self.timer = timer
        self.communicator = communicator
        self.placement = placement
        self.first_step = first_step
        self.device = device
        self.step_seconds = 0.0
        self.start()
        self._split_steps = np.zeros((communicator.size, 2))
        self._steps = 0  # complete steps so far; the next two attributes do not include the first one
        self._step_totals: dict[str, float] = {}
        self._in_step: list[tuple[int, int]] = []  # (first, end) of each step's collectives since `collect`
        self._split = np.zeros((communicator.size, 2))  # communication and waiting of each rank so far
        self._seen = 0

    def start(self) -> None:
        """Start the clock of `seconds`."""
        self._started = self.timer.clock()

    @property
    def seconds(self) -> float:
        """Return the seconds since `start`."""
        return self.timer.clock() - self._started

    @contextmanager
    def step(self) -> Iterator[None]:
        """Time a step; a step that ends with an exception does not count.

        The first step of a start does not count either, because it compiles kernels and allocates workspaces.
        """
        before, calls = dict(self.timer.totals), self.timer.calls(ALLREDUCE)
        started = self.timer.clock()
        with self.timer.span(OPTIMIZER):
            yield
        self.step_seconds = self.timer.clock() - started
        self._steps += 1
        if self._steps > 1:
            self._in_step.append((calls, self.timer.calls(ALLREDUCE)))
            for name, total in self.timer.totals.items():
                spent = total - before.get(name, 0.0)
                if spent:
                    self._step_totals[name] = self._step_totals.get(name, 0.0) + spent

    def collect(self, step: int) -> str:
        """Gather the spans of all ranks; return the content of the file on rank 0, on other ranks ""."""
        durations = self.timer.series(ALLREDUCE)
        stepping = np.zeros(len(durations), bool)
        for first, end in self._in_step:
            stepping[first:end] = True
        self._in_step.clear()
        new = slice(self._seen, None)
        self._seen = len(durations)
        totals, placement = dict(self.timer.totals), asdict(self.placement) | {"device": self.device}
        rows = self.communicator.gather((durations[new], stepping[new], totals, self._step_totals, placement))
        if rows is None:
            return ""
        self._split += np.stack(split_waiting([row[0] for row in rows]), axis=1)
        self._split_steps += np.stack(split_waiting([row[0][row[1]] for row in rows]), axis=1)
        ranks = [
            cast(
                RankTimes,
                {
                    **placement,
                    "spans": _with_waiting(spans, split),
                    "step_spans": _with_waiting(steps, split_steps),
                },
            )
            for (_, _, spans, steps, placement), split, split_steps in zip(
                rows, self._split.tolist(), self._split_steps.tolist(), strict=True
            )
        ]
        times: Times = {
            "first_step": self.first_step,
            "last_step": step,
            "timed_steps": max(0, self._steps - 1),
            "seconds": self.seconds,
            "ranks": ranks,
        }
        return json.dumps(times, indent=1)


def _with_waiting(totals: dict[str, float], split: list[float]) -> dict[str, float]:
    """Return the spans with the time in collectives divided into communication and waiting."""
    return totals | {ALLREDUCE: split[0], WAITING: split[1]}


def read_times(folder: Path) -> Times:
    """Read timing.json, and check the entries that hfmpi uses."""
    path = folder / TIMING
    with open_regular(path) as file:
        content = file.read(MOST_BYTES)
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
        raise UserError(f"{path} has no times of steps: it is damaged, or was written by an older version")
    return timing
