"""Where the time of each rank went, as bars and as numbers."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from hfmpi.measure.spans import ALLREDUCE, EVALUATE, FILES, INPUT, OPTIMIZER, PASSES, WAITING
from hfmpi.report.words import escaped
from hfmpi.runs.timing import Times

__all__ = ["MOST_RANKS", "Spans", "bars", "outside", "spans"]

MOST_RANKS = 32
"""Ranks that have a bar."""

BETWEEN = (EVALUATE, FILES)
ORDER = (*PASSES, INPUT, OPTIMIZER, ALLREDUCE, WAITING, *BETWEEN)


class Spans(NamedTuple):
    """Seconds by the name of a span, in the order in which they are drawn.

    Attributes
    ----------
    unit : str
        What the seconds are of: a step, or the whole run.
    seconds : dict of str to (ranks,) float64
    """

    unit: str
    seconds: dict[str, np.ndarray]

    @property
    def total(self) -> np.ndarray:
        """Of each rank, (ranks,)."""
        return np.sum(list(self.seconds.values()), axis=0)


def spans(times: Times) -> Spans:
    """Give the spans of a step; of the whole run where no step but the first, which compiles, was timed."""
    steps, ranks = times["timed_steps"], times["ranks"]
    rows = [rank["step_spans"] if steps > 0 else rank["spans"] for rank in ranks]
    found = dict.fromkeys(name for row in rows for name in row)
    order = [name for name in ORDER if name in found] + sorted(set(found) - set(ORDER))
    seconds = {name: np.array([row.get(name, 0.0) for row in rows]) / max(steps, 1) for name in order}
    seconds = {name: values for name, values in seconds.items() if values.any()}
    return Spans("step" if steps > 0 else "run", seconds)


def outside(times: Times) -> dict[str, float]:
    """Give the seconds between the steps, of the whole run, by name: the mean over the ranks."""
    ranks = times["ranks"]
    return {name: float(np.mean([rank["spans"].get(name, 0.0) for rank in ranks])) for name in BETWEEN}


def bars(found: Spans) -> dict[str, Any]:
    """Give a bar a rank as JSON can hold it; of many ranks those from the least to the most waiting."""
    count = len(found.total)
    order = np.arange(count)
    if count > MOST_RANKS:
        waiting = found.seconds.get(WAITING, np.zeros(count))
        order = np.argsort(waiting, kind="stable")[np.linspace(0, count - 1, MOST_RANKS).astype(int)]
    return {
        "unit": found.unit,
        "ranks": [f"rank {rank}" for rank in order.tolist()],
        "looks": [ORDER.index(name) if name in ORDER else len(ORDER) for name in found.seconds],
        "names": [escaped(name) for name in found.seconds],
        "seconds": [[float(f"{v:.4g}") for v in values[order]] for values in found.seconds.values()],
    }
