"""How the rate of a first-order method changes over its updates."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated

from hfmpi.settings import NOT_NEGATIVE, Rule, at_least, within

__all__ = ["SCHEDULES", "Schedule"]

SCHEDULES = ("constant", "inverse-root", "cosine")


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """The factor of the rate at each update: settings of a method with a schedule.

    Attributes
    ----------
    schedule : {'constant', 'inverse-root', 'cosine'}
        `inverse-root`: 1 / sqrt(1 + t / schedule_steps) after t updates.
        `cosine`: from 1 to `schedule_end` over `schedule_steps` updates, as half a period of a cosine
        (Loshchilov and Hutter 2017), and `schedule_end` from then on.
    schedule_steps : int
    schedule_end : float
    warm_up : int
        Number of first updates over which the factor also rises linearly; 0: none.
    """

    schedule: Annotated[str, Rule(f"must be one of {', '.join(SCHEDULES)}", SCHEDULES.__contains__)] = (
        "constant"
    )
    schedule_steps: Annotated[int, at_least(1)] = 50
    schedule_end: Annotated[float, within("[0, 1]")] = 0.1
    warm_up: Annotated[int, NOT_NEGATIVE] = 0

    def factor(self, updates: int) -> float:
        """Return the factor of the next update, after this number of updates."""
        rising = min(1.0, (updates + 1) / self.warm_up) if self.warm_up else 1.0
        if self.schedule == "inverse-root":
            return rising / math.sqrt(1 + updates / self.schedule_steps)
        if self.schedule == "cosine":
            done, end = min(1.0, updates / self.schedule_steps), self.schedule_end
            return rising * (end + (1 - end) * (1 + math.cos(math.pi * done)) / 2)
        return rising
