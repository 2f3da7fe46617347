"""How the rate of a first-order method changes over its updates."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated

from hfmpi.settings import NOT_NEGATIVE, Meaning, at_least, documented, one_of, within

__all__ = ["SCHEDULES", "Schedule"]

SCHEDULES = ("constant", "inverse-root", "cosine")


@documented
@dataclass(frozen=True, kw_only=True)
class Schedule:
    """The factor of the rate at each update: settings of a method with a schedule."""

    schedule: Annotated[
        str,
        one_of(*SCHEDULES),
        Meaning(
            "How the rate changes. inverse-root: by 1 / sqrt(1 + t / schedule_steps) after t updates. "
            "cosine: from 1 to schedule_end over schedule_steps updates, as half a period of a cosine "
            "(Loshchilov and Hutter 2017), and schedule_end from then on.",
            torch="lr_scheduler",
            optax="schedule",
        ),
    ] = "constant"
    schedule_steps: Annotated[
        int,
        at_least(1),
        Meaning(
            "The time scale of inverse-root, and the length of cosine.",
            unit="updates",
            torch="T_max",
            optax="decay_steps",
        ),
    ] = 50
    schedule_end: Annotated[
        float,
        within("[0, 1]"),
        Meaning("The last factor of cosine, as a fraction of the rate.", optax="alpha", others=("eta_min",)),
    ] = 0.1
    warm_up: Annotated[
        int,
        NOT_NEGATIVE,
        Meaning(
            "Number of first updates over which the rate also rises linearly; 0: none.",
            unit="updates",
            torch="LinearLR(total_iters)",
            optax="warmup_steps",
        ),
    ] = 0

    def factor(self, updates: int) -> float:
        """Return the factor of the next update, after this number of updates."""
        rising = min(1.0, (updates + 1) / self.warm_up) if self.warm_up else 1.0
        if self.schedule == "inverse-root":
            return rising / math.sqrt(1 + updates / self.schedule_steps)
        if self.schedule == "cosine":
            done, end = min(1.0, updates / self.schedule_steps), self.schedule_end
            return rising * (end + (1 - end) * (1 + math.cos(math.pi * done)) / 2)
        return rising
