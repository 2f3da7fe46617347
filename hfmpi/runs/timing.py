"""timing.json: where the time of each rank went, since the run was last started."""

from __future__ import annotations

import json
import time
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
    """

    def __init__(
        self, timer: Timer, communicator: Communicator, placement: Placement, first_step: int
    ) -> None:
        self.timer = timer
        self.communicator = communicator
        self.placement = placement
        self.first_step = first_step
        self.start()
        self._split = np.zeros((communicator.size, 2))  # communication and waiting of each rank so far
        self._seen = 0

    def start(self) -> None:
        """Begin to count the seconds."""
        self._started = time.perf_counter()

    def collect(self, step: int) -> str:
        """Gather the spans of all ranks; give the content of the file on rank 0, elsewhere nothing."""
        durations = self.timer.series("allreduce")[self._seen :]
        self._seen += len(durations)
        rows = self.communicator.gather((durations, dict(self.timer.totals), asdict(self.placement)))
        if rows is None:
            return ""
        self._split += np.stack(split_waiting([row[0] for row in rows]), axis=1)
        ranks = [
            {**place, "spans": totals | {"allreduce": communication, "waiting": waiting}}
            for (_, totals, place), (communication, waiting) in zip(rows, self._split.tolist(), strict=True)
        ]
        steps = {"first_step": self.first_step, "last_step": step}
        return json.dumps({**steps, "seconds": time.perf_counter() - self._started, "ranks": ranks}, indent=1)
