"""Sums in a binary tree of neighbours, ((a + b) + (c + d)) + ..., the order in which `--slices` adds."""

from __future__ import annotations

from hfmpi.backends.base import Array

__all__ = ["Tree", "pairwise_sum"]


def pairwise_sum(parts: list[Array]) -> Array:
    """Sum arrays or numbers in a binary tree of neighbours; their number must be a power of two."""
    while len(parts) > 1:
        parts = [a + b for a, b in zip(parts[::2], parts[1::2], strict=True)]
    return parts[0]


class Tree:
    """A sum in the order of `pairwise_sum`, to which the parts are added sequentially."""

    def __init__(self) -> None:
        self._sums = list[tuple[int, Array]]()

    def add(self, part: Array) -> None:
        """Add the next part; its memory may be overwritten."""
        level = 0
        while self._sums and self._sums[-1][0] == level:
            before = self._sums.pop()[1]
            before += part
            part, level = before, level + 1
        self._sums.append((level, part))

    @property
    def total(self) -> Array:
        """The sum; the number of parts must be a power of two."""
        ((_, total),) = self._sums
        return total
