"""How the rate of a first-order method goes with its updates."""

from __future__ import annotations

import math
from dataclasses import dataclass

from hfmpi.settings import Rule

__all__ = ["KNOWN", "SCHEDULES", "Schedule"]

SCHEDULES = ("constant", "inverse-root", "cosine")

KNOWN = Rule(f"must be one of {', '.join(SCHEDULES)}", SCHEDULES.__contains__)


@dataclass(frozen=True)
class Schedule:
    """The factor of the rate at each update.

    Attributes
    ----------
    name : {'constant', 'inverse-root', 'cosine'}
        `inverse-root`: 1 / sqrt(1 + t / steps) after t updates.
        `cosine`: from 1 to `end` over so many steps, as half a period of a cosine (Loshchilov and Hutter
        2017), and `end` from then on.
    steps : int
    end : float
    warm_up : int
        Over so many first updates the factor rises in proportion to their number as well; 0: at once.
    """

    name: str = "constant"
    steps: int = 50
    end: float = 0.1
    warm_up: int = 0

    def factor(self, updates: int) -> float:
        """Give the factor of the update after so many."""
        rising = min(1.0, (updates + 1) / self.warm_up) if self.warm_up else 1.0
        if self.name == "inverse-root":
            return rising / math.sqrt(1 + updates / self.steps)
        if self.name == "cosine":
            done = min(1.0, updates / self.steps)
            return rising * (self.end + (1 - self.end) * (1 + math.cos(math.pi * done)) / 2)
        return rising
