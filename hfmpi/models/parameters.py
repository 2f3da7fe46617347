"""One flat parameter vector, and named matrices that look into it."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod

from hfmpi.backends.base import Array

__all__ = ["Layout"]


class Layout:
    """Names and shapes of the parameters, in the order in which the flat vector holds them.

    Parameters
    ----------
    shapes : mapping of str to tuple of int
        In order; matrices lie row by row.
    """

    def __init__(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        self.shapes = dict(shapes)
        self.offsets: dict[str, int] = {}
        self.size = 0
        for name, shape in self.shapes.items():
            self.offsets[name] = self.size
            self.size += prod(shape)

    def views(self, vector: Array) -> dict[str, Array]:
        """Give each parameter as a view of the vector (size,), or of rows (N, size): writing writes there."""
        if vector.shape[-1:] != (self.size,):
            raise ValueError(f"expected a vector of {self.size} parameters, got shape {vector.shape}")
        return {
            name: vector[..., offset : offset + prod(shape)].reshape(*vector.shape[:-1], *shape)
            for (name, shape), offset in zip(self.shapes.items(), self.offsets.values(), strict=True)
        }
