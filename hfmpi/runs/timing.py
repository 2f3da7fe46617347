"""timing.json: where the time of each rank went, since the run was last started."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict

import numpy as np

from hfmpi.measure.timer import Timer, split_waiting
from hfmpi.parallel.communicator import Communicator
from hfmpi.parallel.placement import Placement

__all__ = ["Timing"]


class Timing:
    """Brings the timers of all ranks together.

    Parameters
    ----------
    timer : Timer
        This rank's.
    communicator, placement
    first_step : int
        The step from which this start goes on.
    device : str
        What this rank computes on.

    Attributes
    ----------
    step_seconds : float
        Of the newest step, without evaluation and files.
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
        self._steps = 0  # whole steps so far, of which all but the first are in the next two
        self._step_totals: dict[str, float] = {}
        self._in_step: list[tuple[int, int]] = []  # collectives from and up to, of each step since `collect`
        self._split = np.zeros((communicator.size, 2))  # communication and waiting of each rank so far
        self._seen = 0

    def start(self) -> None:
        """Begin to count the seconds."""
        self._started = time.perf_counter()

    @contextmanager
    def step(self) -> Iterator[None]:
        """Time a step; one that ends in an exception does not count.

        The first step of a start does not count either: it compiles, and makes the workspaces.
        """
        before, calls = dict(self.timer.totals), self.timer.calls("allreduce")
        started = time.perf_counter()
        with self.timer.span("optimizer"):
            yield
        self.step_seconds = time.perf_counter() - started
        self._steps += 1
        if self._steps > 1:
            self._in_step.append((calls, self.timer.calls("allreduce")))
            for name, total in self.timer.totals.items():
                spent = total - before.get(name, 0.0)
                if spent:
                    self._step_totals[name] = self._step_totals.get(name, 0.0) + spent

    def collect(self, step: int) -> str:
        """Gather the spans of all ranks; give the content of the file on rank 0, elsewhere nothing."""
        durations = self.timer.series("allreduce")
        stepping = np.zeros(len(durations), bool)
        for first, end in self._in_step:
            stepping[first:end] = True
        self._in_step.clear()
        new = slice(self._seen, None)
        self._seen = len(durations)
        own = (durations[new], stepping[new], dict(self.timer.totals), self._step_totals)
        rows = self.communicator.gather((*own, asdict(self.placement) | {"device": self.device}))
        if rows is None:
            return ""
        self._split += np.stack(split_waiting([row[0] for row in rows]), axis=1)
        self._split_steps += np.stack(split_waiting([row[0][row[1]] for row in rows]), axis=1)
        ranks = [
            {**place, "spans": _parted(totals, whole), "step_spans": _parted(step_totals, steps)}
            for (_, _, totals, step_totals, place), whole, steps in zip(
                rows, self._split.tolist(), self._split_steps.tolist(), strict=True
            )
        ]
        about = {
            "first_step": self.first_step,
            "last_step": step,
            "timed_steps": max(0, self._steps - 1),
            "seconds": time.perf_counter() - self._started,
        }
        return json.dumps({**about, "ranks": ranks}, indent=1)


def _parted(totals: dict[str, float], split: list[float]) -> dict[str, float]:
    """Give spans with the time in collectives parted into communication and waiting."""
    return totals | {"allreduce": split[0], "waiting": split[1]}
