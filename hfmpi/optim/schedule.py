"""Schedules of the learning rate of first-order methods."""

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
    """Settings of a method whose learning rate follows a schedule."""

    schedule: Annotated[
        str,
        one_of(*SCHEDULES),
        Meaning(
            "The factor that multiplies the rate. inverse-root: 1 / sqrt(1 + t / schedule_steps) after t "
            "updates. cosine: it decreases from 1 to schedule_end over schedule_steps updates, as half a "
            "period of a cosine (Loshchilov and Hutter 2017), and then remains schedule_end.",
            torch="lr_scheduler",
            optax="schedule",
        ),
    ] = "constant"
    schedule_steps: Annotated[
        int,
        at_least(1),
        Meaning(
            "The time scale of inverse-root, or the length of cosine.",
            unit="updates",
            torch="T_max",
            optax="decay_steps",
        ),
    ] = 50
    schedule_end: Annotated[
        float,
        within("[0, 1]"),
        Meaning("The final factor of cosine, as a fraction of the rate.", optax="alpha", others=("eta_min",)),
    ] = 0.1
    warm_up: Annotated[
        int,
        NOT_NEGATIVE,
        Meaning(
            "Number of initial updates over which the rate rises linearly, in addition to the schedule. 0: "
            "no warm-up.",
            unit="updates",
            torch="LinearLR(total_iters)",
            optax="warmup_steps",
        ),
    ] = 0

    def factor(self, updates: int) -> float:
        """Return the factor of the rate for the update that follows this number of updates."""
        rising = min(1.0, (updates + 1) / self.warm_up) if self.warm_up else 1.0
        if self.schedule == "inverse-root":
            return rising / math.sqrt(1 + updates / self.schedule_steps)
        if self.schedule == "cosine":
            done, end = min(1.0, updates / self.schedule_steps), self.schedule_end
            return rising * (end + (1 - end) * (1 + math.cos(math.pi * done)) / 2)
        return rising
