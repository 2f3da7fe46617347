"""The layout of vectors: named arrays in one vector, the matrices of theta, the shapes of their factors.

A vector that holds several arrays (theta, the state of an optimizer, sums of Kronecker factors, a message) is
divided by a `Layout`, or by a `BlockLayout` where every matrix of theta has the same named arrays.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import pairwise
from math import prod
from typing import Any, Generic, NamedTuple, TypeAlias, TypeVar

import numpy as np

__all__ = [
    "LONGEST_SIDE",
    "WHOLE_SIDE",
    "Along",
    "Block",
    "BlockLayout",
    "Directions",
    "Layout",
    "Part",
    "Shape",
    "Vector",
    "factor_shape",
    "kronecker_layout",
    "parts_of",
    "split_factors",
    "whole",
]

Vector: TypeAlias = Any
"""A NumPy array (D,), or one of the same interface on a device: there is no type that both of them have."""

Shape = tuple[int, ...]

NameT = TypeVar("NameT")
PartT = TypeVar("PartT")

LONGEST_SIDE = 2_500
"""Sides (rows or columns) longer than this have a diagonal factor, which is exact for one-hot inputs.

A decomposition of this size takes 7 seconds on a slow core, and eight times as long with every doubling.
"""

WHOLE_SIDE = 512
"""Longer sides of several groups, such as the gates of a cell, have a factor for each group.

That of four gates together takes 16 times as long to decompose; on small networks it saves 4 to 7 % of the
passes (docs/results/fewest-passes.md).
"""


class Block(NamedTuple):
    """A matrix among the parameters, stored row by row from `start` on; a vector is a matrix of one row.

    Attributes
    ----------
    name : str
    start, rows, columns : int
    cuts : tuple of int
        Rows at which a different kind of input begins: the state after the symbols, the constant of a bias.
    groups : int
        Kinds of outputs, with equally many columns each: the gates of a cell.
    """

    name: str
    start: int
    rows: int
    columns: int
    cuts: tuple[int, ...] = ()
    groups: int = 1

    @property
    def size(self) -> int:
        """The number of parameters."""
        return self.rows * self.columns

    def of(self, vector: Vector) -> Vector:
        """Return the block of a vector (D,) as a view (rows, columns), or (n, rows, columns) of (n, D)."""
        part = vector[..., self.start : self.start + self.size]
        return part.reshape(*vector.shape[:-1], self.rows, self.columns)


class Part(NamedTuple):
    """The rows from top to bottom and columns from left to right of a block."""

    block: Block
    top: int
    bottom: int
    left: int
    right: int

    def of(self, vector: Vector) -> Vector:
        """Return the part of a vector (D,) as a view (rows, columns), or (n, rows, columns) of (n, D)."""
        return self.of_block(self.block.of(vector))

    def of_block(self, matrix: Vector) -> Vector:
        """Return the part of the block (..., rows, columns) as a view."""
        return matrix[..., self.top : self.bottom, self.left : self.right]

    @property
    def size(self) -> int:
        """The number of parameters."""
        return (self.bottom - self.top) * (self.right - self.left)

    @property
    def contiguous(self) -> bool:
        """Whether the rows of the part follow one another in a vector, because they have all columns."""
        return (self.left, self.right) == (0, self.block.columns)

    def divided(self, most: int) -> list[Part]:
        """Divide it into parts of some rows each, of at most `most` numbers or one row."""
        step = max(1, most // (self.right - self.left))
        tops = range(self.top, self.bottom, step)
        return [self._replace(top=top, bottom=min(top + step, self.bottom)) for top in tops]


def whole(size: int) -> Part:
    """Return the part that is all of a vector of this size."""
    return Part(Block("theta", 0, size, 1), 0, size, 0, 1)


def parts_of(blocks: Sequence[Block]) -> list[Part]:
    """Cut blocks into parts, each with one kind of inputs and one kind of outputs of a block."""
    parts = []
    for block in blocks:
        edges, width = (0, *block.cuts, block.rows), block.columns // block.groups
        for top, bottom in pairwise(edges):
            starts = range(0, block.groups * width, width)
            parts += [Part(block, top, bottom, left, left + width) for left in starts]
    return parts


class Along:
    """The function of rows S (n, D) that computes X S' (k, n), in the type of the rows, where V = diag(s) X.

    Parameters
    ----------
    stacks : list of (Part, (c, size))
        Parts of vectors, and what c consecutive rows of X have there; elsewhere they are zero.
    scales : (k,) float64
        s, on the host.
    """

    def __init__(self, stacks: list[tuple[Part, Vector]], scales: np.ndarray) -> None:
        self.stacks, self.scales = stacks, scales

    def __len__(self) -> int:
        return sum(len(stack) for _, stack in self.stacks)

    def by_block(self, blocks: Sequence[Block]) -> list[list[tuple[int, Part, Vector]]]:
        """Return for each block what X has there: the first row, the part of the block, and (c, size).

        A part that is larger than a block, such as all of theta, is divided.
        """
        pieces, start = [list[tuple[int, Part, Vector]]() for _ in blocks], 0
        for part, stack in self.stacks:
            first, last = part.block.start, part.block.start + part.block.size
            for block, of_block in zip(blocks, pieces, strict=True):
                if (block.start, block.rows, block.columns) == (first, part.block.rows, part.block.columns):
                    of_block.append((start, part, stack))
                elif first <= block.start and block.start + block.size <= last:
                    at = block.start - first
                    whole = Part(block, 0, block.rows, 0, block.columns)
                    of_block.append((start, whole, stack[:, at : at + block.size]))
            start += len(stack)
        return pieces

    def __call__(self, rows: Vector) -> Vector:
        """Compute X S'."""
        products, start = np.zeros_like(rows, shape=(len(self), len(rows))), 0
        for part, stack in self.stacks:
            stop = start + len(stack)
            products[start:stop] = np.matmul(stack, part.of(rows).reshape(len(rows), -1).T)
            start = stop
        return products


class Directions(ABC):
    """Vectors (k, D) that are not stored as such, and are made a few at a time.

    Iteration and `numpy.asarray` make all of them, as if it were an array.

    Attributes
    ----------
    shape : (int, int)
        k and D.
    dtype : dtype
    """

    shape: tuple[int, int]
    dtype: np.dtype
    ndim = 2

    @abstractmethod
    def fill(self, start: int, out: Vector) -> None:
        """Fill out (C, D) with C of the vectors, from `start` on."""

    @abstractmethod
    def dense(self) -> Vector:
        """Return all of them, a new array (k, D)."""

    def along(self) -> Along:
        """Return the function of rows S (n, D) that computes V S' (k, n) up to the scales of V."""
        return Along([(whole(self.shape[1]), self.dense())], np.ones(len(self)))

    def __len__(self) -> int:
        return self.shape[0]

    def __iter__(self) -> Iterator[Vector]:
        return iter(self.dense())

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.asarray(self.dense(), dtype)


class Layout(Generic[NameT]):
    """Names and shapes of arrays, in the order in which one vector holds them.

    Parameters
    ----------
    shapes : mapping of name to tuple of int
        In order; arrays are stored in C order.

    Attributes
    ----------
    offsets : dict of name to int
        The index of the first number of each array.
    size : int
        The length of the vector.

    Examples
    --------
    >>> import numpy as np
    >>> layout = Layout({"W": (2, 3), "b": (3,)})
    >>> layout.views(np.arange(9))["b"]
    array([6, 7, 8])
    """

    def __init__(self, shapes: Mapping[NameT, Shape]) -> None:
        self.shapes = dict(shapes)
        self.offsets: dict[NameT, int] = {}
        self.size = 0
        for name, shape in self.shapes.items():
            self.offsets[name] = self.size
            self.size += prod(shape)

    def views(self, vector: Vector) -> dict[NameT, Vector]:
        """Return each array as a view of the vector (size,), or of rows (N, size): writing writes there.

        Raises
        ------
        ValueError
            If the vector has a different length.
        """
        if vector.shape[-1:] != (self.size,):
            raise ValueError(f"expected a vector of {self.size} parameters, got shape {vector.shape}")
        return {
            name: vector[..., offset : offset + prod(shape)].reshape((*vector.shape[:-1], *shape))
            for (name, shape), offset in zip(self.shapes.items(), self.offsets.values(), strict=True)
        }


class BlockLayout:
    """A vector that holds, block after block, the same named arrays for each matrix of theta.

    Parameters
    ----------
    blocks : sequence
        Of blocks, or of parts of them.
    arrays : callable
        Returns the names and shapes of the arrays of a block, in order.

    Attributes
    ----------
    layouts : list of Layout
        The arrays of each block.
    size : int
        The length of the vector.
    """

    def __init__(self, blocks: Sequence[PartT], arrays: Callable[[PartT], Mapping[str, Shape]]) -> None:
        self.layouts = [Layout(arrays(block)) for block in blocks]
        self._parts = Layout({i: (layout.size,) for i, layout in enumerate(self.layouts)})
        self.size = self._parts.size

    def parts(self, vector: Vector) -> list[Vector]:
        """Return the part of a vector (size,) that belongs to each block, as views."""
        return list(self._parts.views(vector).values())

    def views(self, vector: Vector) -> list[dict[str, Vector]]:
        """Return the arrays of each block by name, as views of a vector (size,)."""
        return [layout.views(part) for layout, part in zip(self.layouts, self.parts(vector), strict=True)]


def factor_shape(side: int, groups: int = 1) -> Shape:
    """Return the shape of the Kronecker factor of a side: a square matrix, or less if it is too long.

    A long side of several groups has a matrix for each of them, (groups, n, n), as if they were independent.
    The diagonal alone, (side,), remains where that too is long.
    """
    width = side // groups
    if side <= (LONGEST_SIDE if groups == 1 else WHOLE_SIDE):
        return (side, side)
    return (groups, width, width) if groups > 1 and width <= LONGEST_SIDE else (side,)


def kronecker_layout(blocks: Sequence[Block]) -> BlockLayout:
    """Return the layout of the Kronecker factors A (of rows) and B (of columns) of all blocks."""

    def shapes(block: Block) -> dict[str, Shape]:
        return {"A": factor_shape(block.rows), "B": factor_shape(block.columns, block.groups)}

    return BlockLayout(blocks, shapes)


def split_factors(blocks: Sequence[Block], factors: Vector) -> list[tuple[Block, Vector, Vector]]:
    """Return each block with its Kronecker factors A and B, as views of the vector that holds them all."""
    views = kronecker_layout(blocks).views(factors)
    return [(block, arrays["A"], arrays["B"]) for block, arrays in zip(blocks, views, strict=True)]
