"""Prepare the time of each rank by its spans, as bars and as numbers."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from hfmpi.measure.spans import (
    ALLREDUCE,
    EVALUATE,
    FILES,
    INPUT,
    MATRICES,
    OPTIMIZER,
    PASSES,
    ROWS,
    WAITING,
    together,
)
from hfmpi.report.escape import escaped
from hfmpi.runs.timing import Times

__all__ = ["MOST_RANKS", "Spans", "bars", "outside", "spans"]

MOST_RANKS = 32
"""Maximum number of ranks that have a bar."""

BETWEEN = (EVALUATE, FILES)
ORDER = (*PASSES, ROWS, INPUT, MATRICES, OPTIMIZER, ALLREDUCE, WAITING, *BETWEEN)


class Spans(NamedTuple):
    """Seconds by the name of a span, in drawing order.

    Attributes
    ----------
    unit : str
        "step" for seconds per step, "run" for the total seconds of the run.
    seconds : dict of str to (ranks,) float64
    """

    unit: str
    seconds: dict[str, np.ndarray]

    @property
    def total(self) -> np.ndarray:
        """Return the seconds of each rank, (ranks,)."""
        return np.sum(list(self.seconds.values()), axis=0)


def spans(times: Times) -> Spans:
    """Return the spans of a step, or of the complete run if it has only the first step, which compiles."""
    steps, ranks = times["timed_steps"], times["ranks"]
    rows = [together(rank["step_spans"] if steps > 0 else rank["spans"]) for rank in ranks]
    names = {name for row in rows for name in row}
    order = [name for name in ORDER if name in names] + sorted(names - set(ORDER))
    seconds = {name: np.array([row.get(name, 0.0) for row in rows]) / max(steps, 1) for name in order}
    seconds = {name: values for name, values in seconds.items() if values.any()}
    return Spans("step" if steps > 0 else "run", seconds)


def outside(times: Times) -> dict[str, float]:
    """Return the total seconds between the steps of the run by name, averaged over ranks."""
    ranks = times["ranks"]
    return {name: float(np.mean([rank["spans"].get(name, 0.0) for rank in ranks])) for name in BETWEEN}


def bars(spans: Spans) -> dict[str, Any]:
    """Return a bar for each rank in a form that JSON can represent; with many ranks, for a sample of them.

    A sample is in order of waiting time.
    """
    count = len(spans.total)
    order = np.arange(count)
    if count > MOST_RANKS:
        waiting = spans.seconds.get(WAITING, np.zeros(count))
        order = np.argsort(waiting, kind="stable")[np.linspace(0, count - 1, MOST_RANKS).astype(int)]
    return {
        "unit": spans.unit,
        "ranks": [f"rank {rank}" for rank in order.tolist()],
        "styles": [ORDER.index(name) if name in ORDER else len(ORDER) for name in spans.seconds],
        "names": [escaped(name) for name in spans.seconds],
        "seconds": [[float(f"{v:.4g}") for v in values[order]] for values in spans.seconds.values()],
    }
