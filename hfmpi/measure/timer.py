"""Measure the time of a rank by named spans, and the waiting time inside collectives."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np

from hfmpi.measure.spans import ALLREDUCE

__all__ = ["Timer", "split_waiting"]


class Timer:
    """A clock that assigns the time to the innermost open span.

    Parameters
    ----------
    clock : callable
        Returns the time in seconds.
    recorded : sequence of str
        Names of the spans whose individual durations are stored for `series`.

    Attributes
    ----------
    totals : dict of str to float
        Seconds of each name, without the spans nested inside. Their sum is the time spent in any span. They
        are updated whenever a span opens or closes.

    Examples
    --------
    >>> timer = Timer()
    >>> with timer.span("gradient"), timer.span("allreduce"):
    ...     pass
    >>> sorted(timer.totals), timer.series("allreduce").shape
    (['allreduce', 'gradient'], (1,))
    """

    def __init__(
        self, clock: Callable[[], float] = time.perf_counter, recorded: Sequence[str] = (ALLREDUCE,)
    ) -> None:
        self.totals: dict[str, float] = {}
        self.clock = clock
        self._series: dict[str, list[float]] = {name: [] for name in recorded}
        self._open: list[tuple[str, float]] = []  # name and seconds so far, the innermost last
        self._mark = 0.0  # the time is counted up to here

    @contextmanager
    def span(self, name: str) -> Iterator[None]:
        """Count the time inside the `with` block for this name."""
        self._book()
        self._open.append((name, 0.0))
        try:
            yield
        finally:
            self._book()
            _, seconds = self._open.pop()
            if name in self._series:
                self._series[name].append(seconds)

    def clear(self) -> None:
        """Reset all times; no span may be open."""
        self.totals.clear()
        for durations in self._series.values():
            durations.clear()

    def series(self, name: str) -> np.ndarray:
        """Return the individual durations of a name in `recorded`, (calls,) float64, in order.

        Raises
        ------
        KeyError
            If the name is not in `recorded`.
        """
        return np.array(self._series[name], dtype=np.float64)

    def calls(self, name: str) -> int:
        """Return the number of individual durations of a name in `recorded`."""
        return len(self._series[name])

    def _book(self) -> None:
        now = self.clock()
        if self._open:
            name, seconds = self._open[-1]
            self.totals[name] = self.totals.get(name, 0.0) + now - self._mark
            self._open[-1] = (name, seconds + now - self._mark)
        self._mark = now


def split_waiting(durations: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Split the time in collectives into communication and waiting for slower ranks.

    The last rank to enter a collective does not wait, so its duration, the smallest, is the communication;
    the additional time of the other ranks is waiting. This needs neither barriers, which would change the
    measurement, nor synchronised clocks.

    Parameters
    ----------
    durations : sequence of ndarray
        The durations of the collectives of each of the P ranks, (calls,) float64, in the same order.

    Returns
    -------
    communication, waiting : ndarray
        Seconds of each rank, (P,) float64.

    Raises
    ------
    ValueError
        If the ranks do not have the same number of calls.
    """
    table = np.stack([np.asarray(calls, dtype=np.float64) for calls in durations])
    communication = table.min(axis=0).sum()
    return np.full(len(table), communication), table.sum(axis=1) - communication
