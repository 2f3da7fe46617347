"""Time contestants fairly on a noisy machine: they take turns within one run, and medians are compared."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from threadpoolctl import threadpool_limits

from hfmpi.parallel.communicator import Communicator

__all__ = ["Contestant", "contest"]


@dataclass(frozen=True)
class Contestant:
    """A function to be timed.

    Attributes
    ----------
    run : callable
        Called without arguments; returns when its work is finished.
    ranks : int
        1: only rank 0 runs it while the others sleep; otherwise all ranks run it.
    threads : int
        The number of threads of each rank's BLAS.
    """

    run: Callable[[], object]
    ranks: int
    threads: int


def contest(comm: Communicator, contestants: Sequence[Contestant], repeats: int) -> np.ndarray:
    """Run the contestants in turn, once without timing and then `repeats` times; collective.

    Returns
    -------
    (contestants, repeats) float64
        Seconds of the slowest rank that took part, the same array on every rank.
    """
    seconds = np.zeros((comm.size, len(contestants), 1 + repeats))
    for repeat in range(1 + repeats):
        for i, contestant in enumerate(contestants):
            comm.rest()
            if contestant.ranks == 1 and comm.rank > 0:
                continue
            with threadpool_limits(limits=contestant.threads, user_api="blas"):
                if contestant.ranks > 1:
                    comm.any(False)  # all start at once
                start = time.perf_counter()
                contestant.run()
                seconds[comm.rank, i, repeat] = time.perf_counter() - start
    comm.rest()
    comm.sum(seconds)  # each entry is nonzero on one rank
    return seconds.max(axis=0)[:, 1:]
