"""The steps of a run, as a column for each quantity."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from hfmpi.measure.cost import COUNTS

__all__ = ["COUNTS", "Steps"]


@dataclass(frozen=True)
class Steps:
    """The numbers in a history, for any optimizer.

    Attributes
    ----------
    columns : dict of str to (steps,) float64
        Values by key; NaN if a step has no number.
    stops : Counter
        The number of times that conjugate gradients stopped for each reason.
    rejected : int
        Number of rejected steps.
    last_rejection : str
        Number of the last rejected step, and the reason.
    """

    columns: dict[str, np.ndarray] = field(default_factory=dict)
    stops: Counter[str] = field(default_factory=Counter)
    rejected: int = 0
    last_rejection: str = ""

    @classmethod
    def of(cls, records: Sequence[Mapping[str, Any]]) -> Steps:
        """Return the columns of step records."""
        columns = {}
        for key in sorted(set().union(*records)):
            column = np.array([_number(record.get(key)) for record in records], float)
            if not np.isnan(column).all():
                columns[key] = column
        stops = Counter(word for record in records if isinstance(word := record.get("cg_stop"), str))
        rejected = [record for record in records if record.get("accepted") is False]
        last = f"{rejected[-1]['step']:,}: {rejected[-1].get('message', '')}" if rejected else ""
        return cls(columns, stops, len(rejected), last)

    def __len__(self) -> int:
        return len(self.columns.get("step", ()))

    def column(self, key: str) -> np.ndarray:
        """Return the numbers under a key, all NaN if there are none."""
        return self.columns.get(key, np.full(len(self), np.nan))


def _number(value: object) -> float:
    # Repeats `is_drawable` for speed: a history may have millions of numbers.
    if (type(value) is float or type(value) is int) and abs(value) < 1e100:
        return value
    return np.nan
