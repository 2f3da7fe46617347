"""The times of the steps of a job on one number of ranks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from hfmpi.measure import cost
from hfmpi.measure.cost import Counts
from hfmpi.measure.spans import ALLREDUCE, MATRIX, SHARED, WAITING

__all__ = ["StepTimes", "mean_spans"]


@dataclass(frozen=True)
class StepTimes:
    """The times of the steps of a job on one number of ranks.

    Attributes
    ----------
    ranks : int
    seconds : (repeats, steps) float64
        Duration of each step.
    spans : tuple of dict of str to float
        For each rank, seconds per step by name, `allreduce` without `waiting`; their sum is the duration of
        the step.
    outside : tuple of dict of str to float
        For each rank, total seconds between the steps of the run by name: evaluation, files.
    counts : Counts
        Counts of these steps in all repeats.
    gradient_batch, curvature_batch : int
        Sequences of all ranks together.
    """

    ranks: int
    seconds: np.ndarray
    spans: tuple[dict[str, float], ...]
    outside: tuple[dict[str, float], ...]
    counts: Counts
    gradient_batch: int
    curvature_batch: int

    @property
    def batches(self) -> tuple[int, int]:
        """Return B_g and B_c."""
        return self.gradient_batch, self.curvature_batch

    @property
    def step_seconds(self) -> float:
        """Return T_P, computed from the spans."""
        return sum(self.mean_spans.values())

    @property
    def mean_spans(self) -> dict[str, float]:
        """Return the seconds per step by name, averaged over ranks."""
        return mean_spans(self.spans)

    @property
    def parts(self) -> dict[str, float]:
        """Return mean seconds per step in four parts: passes, Allreduce, waiting, and redundant work."""
        return _parts(self.mean_spans)

    @property
    def matrices(self) -> tuple[tuple[float, ...], ...]:
        """Return the seconds of each work on a matrix, which one rank does, in groups.

        They belong to the redundant part. The ranks have all results of a group before they begin the next.
        """
        every: dict[str, float] = {}
        for spans in self.spans:
            every |= {name: seconds for name, seconds in spans.items() if name.startswith(MATRIX)}
        groups: dict[str, list[float]] = {}
        for name, seconds in every.items():
            groups.setdefault(name.rstrip("0123456789"), []).append(seconds)
        return tuple(map(tuple, groups.values()))

    @property
    def most_redundant(self) -> float:
        """Return the maximum over ranks of the redundant part without the work on matrices."""
        return max(
            _parts(spans)["redundant"] - sum(s for name, s in spans.items() if name.startswith(MATRIX))
            for spans in self.spans
        )

    @property
    def imbalance(self) -> float:
        """Return the seconds in passes of the slowest rank, divided by the mean."""
        compute = [sum(spans.get(name, 0.0) for name in SHARED) for spans in self.spans]
        return float(max(compute) / np.mean(compute)) if any(compute) else 1.0

    @property
    def work(self) -> float:
        """Return W_P, the forward passes that a step executes; their time does not include linear algebra."""
        return cost.executed(self.counts, *self.batches)[0] / self.counts.steps


def _parts(spans: dict[str, float]) -> dict[str, float]:
    compute = sum(spans.get(name, 0.0) for name in SHARED)
    allreduce, waiting = spans.get(ALLREDUCE, 0.0), spans.get(WAITING, 0.0)
    redundant = sum(spans.values()) - compute - allreduce - waiting
    return {"compute": compute, "allreduce": allreduce, "waiting": waiting, "redundant": redundant}


def mean_spans(all_spans: Sequence[dict[str, float]]) -> dict[str, float]:
    """Return the mean of seconds by name; a missing name counts as 0."""
    names = dict.fromkeys(name for spans in all_spans for name in spans)
    return {name: float(np.mean([spans.get(name, 0.0) for spans in all_spans])) for name in names}
