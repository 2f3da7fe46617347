"""Which rank does which work on a matrix."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["shares"]


def shares(sizes: Sequence[float], ranks: int) -> list[list[int]]:
    """Distribute works of these sizes over ranks: the largest first, to the rank with the least work."""
    assigned, work = [list[int]() for _ in range(ranks)], [0.0] * ranks
    for i in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        rank = work.index(min(work))
        assigned[rank].append(i)
        work[rank] += sizes[i]
    return assigned
