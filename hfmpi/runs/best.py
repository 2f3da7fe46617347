"""The best validation of a run: its parameters, and the number of validations since."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import NamedTuple

from hfmpi.backends.base import Array
from hfmpi.errors import UserError, shown
from hfmpi.runs.record import Validation

__all__ = ["LOSS", "Best", "Watch", "judged"]

OLD, WORSE = 10, 0.02
"""A run has stopped improving if its best validation is OLD validations old and better by the share WORSE.

A report says that a run overfits if its last validation is worse than its best one by that share.
"""


class Watch(NamedTuple):
    """The value by which validations are compared.

    Attributes
    ----------
    name : str
        "loss", or the name of a metric.
    highest : bool
        Whether the highest value is the best one, or the lowest.
    """

    name: str = "loss"
    highest: bool = False

    @classmethod
    def parse(cls, words: object, metrics: Collection[str]) -> Watch:
        """Parse "loss", "max NAME" or "min NAME", where NAME is the name of a metric.

        Raises
        ------
        UserError
            If `words` has a different form, or there is no such metric.
        """
        if words == LOSS.name:
            return LOSS
        which, _, name = words.partition(" ") if isinstance(words, str) else ("", "", "")
        if which not in ("max", "min") or name not in metrics:
            known = [f"'{which} {name}'" for name in metrics for which in ("max", "min")]
            raise UserError(f"watch must be {' or '.join([repr(LOSS.name), *known])}, not {shown(words)}")
        return cls(name, which == "max")

    def value(self, valid: Validation) -> float:
        """Return the watched value of a validation."""
        return valid.loss if self == LOSS else valid.metrics[self.name]

    def better(self, new: Validation, old: Validation) -> bool:
        """Return whether the new validation is better than the old one."""
        a, b = self.value(new), self.value(old)
        return a > b if self.highest else a < b

    def __str__(self) -> str:
        return self.name if self == LOSS else f"{'max' if self.highest else 'min'} {self.name}"

    @property
    def noun(self) -> str:
        """Return the name of the best value for messages."""
        return f"{'highest' if self.highest else 'lowest'} validation {self.name}"


LOSS = Watch()


@dataclass(frozen=True)
class Best:
    """The best validation so far.

    Attributes
    ----------
    theta : (D,)
        The parameters that were validated.
    valid : Validation
    step : int
        The step after which theta was validated.
    last : int
        The step of the newest validation.
    stale : int
        The number of validations since the best one.
    """

    theta: Array
    valid: Validation
    step: int
    last: int
    stale: int = 0

    def stopped(self, watch: Watch, newest: Validation) -> str:
        """Return a sentence if the validations have stopped improving, otherwise ""."""
        best, now = watch.value(self.valid), watch.value(newest)
        if self.stale < OLD or abs(now - best) < WORSE * abs(best):
            return ""
        return (
            f"the {watch.noun} was {best:.5g} at step {self.step:,}, {self.stale:,} validations ago, and it "
            f"is {now:.5g} now"
        )


def judged(best: Best | None, watch: Watch, theta: Array, valid: Validation, step: int) -> Best | None:
    """Return the best validation, updated with that of theta (D,) at a step.

    A second validation of the same step does not count.
    """
    if best is not None and best.last == step:
        return best
    finite = math.isfinite(valid.loss) and math.isfinite(watch.value(valid))
    if finite and (best is None or watch.better(valid, best.valid)):
        return Best(theta, valid, step, step)
    return None if best is None else replace(best, last=step, stale=best.stale + 1)
