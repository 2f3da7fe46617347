"""The assignment of tasks on matrices to ranks."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["shares"]


def shares(sizes: Sequence[float], ranks: int) -> list[list[int]]:
    """Assign tasks of these sizes to ranks: the largest first, each to the rank with the least work.

    Returns the indices of the tasks of each rank.
    """
    assigned, work = [list[int]() for _ in range(ranks)], [0.0] * ranks
    for i in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        rank = work.index(min(work))
        assigned[rank].append(i)
        work[rank] += sizes[i]
    return assigned
