"""The layout of vectors: named arrays in one vector, the matrices of theta, the shapes of their factors.

A `Layout` describes a vector that holds several arrays: theta, the state of an optimizer, sums of Kronecker
factors, or a message. A `BlockLayout` describes a vector with the same named arrays for every matrix of
theta.
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
"""A NumPy array (D,), or an array with the same interface on a device; the two have no common type."""

Shape = tuple[int, ...]

NameT = TypeVar("NameT")
PartT = TypeVar("PartT")

LONGEST_SIDE = 2_500
"""Sides (rows or columns) longer than this have a diagonal factor, which is exact for one-hot inputs.

A decomposition of this size takes 7 seconds on a slow core, and eight times as long for twice the size.
"""

WHOLE_SIDE = 512
"""Sides longer than this that have several groups, such as the gates of a cell, have one factor per group.

One factor for four gates together takes 16 times as long to decompose; on small networks it saves 4 to 7 % of
the passes (docs/results/fewest-passes.md).
"""


class Block(NamedTuple):
    """A matrix among the parameters, stored row by row from `start` on; a vector is a matrix with one row.

    Attributes
    ----------
    name : str
    start, rows, columns : int
    cuts : tuple of int
        Rows at which a different kind of input begins, such as the state after the symbols, or the constant
        input of a bias.
    groups : int
        Number of kinds of outputs with the same number of columns each, such as the gates of a cell.
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
    """A part of a block: the rows from `top` to `bottom` and the columns from `left` to `right`."""

    block: Block
    top: int
    bottom: int
    left: int
    right: int

    def of(self, vector: Vector) -> Vector:
        """Return the part of a vector (D,) as a view (rows, columns), or (n, rows, columns) of (n, D)."""
        return self.of_block(self.block.of(vector))

    def of_block(self, matrix: Vector) -> Vector:
        """Return the part of a block (..., rows, columns) as a view."""
        return matrix[..., self.top : self.bottom, self.left : self.right]

    @property
    def size(self) -> int:
        """The number of parameters."""
        return (self.bottom - self.top) * (self.right - self.left)

    @property
    def contiguous(self) -> bool:
        """Whether the part is contiguous in a vector, because it has all columns of the block."""
        return (self.left, self.right) == (0, self.block.columns)

    def divided(self, most: int) -> list[Part]:
        """Divide the part into groups of rows with at most `most` numbers, but at least one row."""
        step = max(1, most // (self.right - self.left))
        tops = range(self.top, self.bottom, step)
        return [self._replace(top=top, bottom=min(top + step, self.bottom)) for top in tops]


def whole(size: int) -> Part:
    """Return the part that covers a vector of this size."""
    return Part(Block("theta", 0, size, 1), 0, size, 0, 1)


def parts_of(blocks: Sequence[Block]) -> list[Part]:
    """Cut blocks into parts, each with one kind of inputs and one kind of outputs."""
    parts = []
    for block in blocks:
        edges, width = (0, *block.cuts, block.rows), block.columns // block.groups
        for top, bottom in pairwise(edges):
            starts = range(0, block.groups * width, width)
            parts += [Part(block, top, bottom, left, left + width) for left in starts]
    return parts


class Along:
    """The function S (n, D) -> X S' (k, n), in the dtype of S, for directions V = diag(s) X.

    Parameters
    ----------
    stacks : list of (Part, (c, size))
        A part of a vector, and the values of c consecutive rows of X there; these rows are zero elsewhere.
    scales : (k,) float64
        s, on the host.
    """

    def __init__(self, stacks: list[tuple[Part, Vector]], scales: np.ndarray) -> None:
        self.stacks, self.scales = stacks, scales

    def __len__(self) -> int:
        return sum(len(stack) for _, stack in self.stacks)

    def by_block(self, blocks: Sequence[Block]) -> list[list[tuple[int, Part, Vector]]]:
        """Return the entries of X for each block: (index of the first row, part of the block, (c, size)).

        A part that is larger than a block, such as all of theta, is divided into blocks.
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
    """Vectors (k, D) that are not stored, but computed a few at a time.

    Iteration and `numpy.asarray` compute all of them, as if this were an array.

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
        """Write C consecutive vectors, from index `start` on, to `out` (C, D)."""

    @abstractmethod
    def dense(self) -> Vector:
        """Return all vectors in a new array (k, D)."""

    def along(self) -> Along:
        """Return the function S (n, D) -> V S' (k, n), up to the scales of V."""
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
        The shapes in the order of storage; each array is stored in C order.

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
        """Return each array as a view of a vector (size,), or of several vectors (N, size).

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
    """The layout of a vector that holds, block by block, the same named arrays for each matrix of theta.

    Parameters
    ----------
    blocks : sequence
        Blocks, or parts of blocks.
    arrays : callable
        block -> the names and shapes of its arrays, in order.

    Attributes
    ----------
    layouts : list of Layout
        The layout of the arrays of each block.
    size : int
        The length of the vector.
    """

    def __init__(self, blocks: Sequence[PartT], arrays: Callable[[PartT], Mapping[str, Shape]]) -> None:
        self.layouts = [Layout(arrays(block)) for block in blocks]
        self._parts = Layout({i: (layout.size,) for i, layout in enumerate(self.layouts)})
        self.size = self._parts.size

    def parts(self, vector: Vector) -> list[Vector]:
        """Return views of the parts of a vector (size,) that belong to the blocks."""
        return list(self._parts.views(vector).values())

    def views(self, vector: Vector) -> list[dict[str, Vector]]:
        """Return the arrays of each block by name, as views of a vector (size,)."""
        return [layout.views(part) for layout, part in zip(self.layouts, self.parts(vector), strict=True)]


def factor_shape(side: int, groups: int = 1) -> Shape:
    """Return the shape of the Kronecker factor of a side: a square matrix, or fewer numbers if it is long.

    A long side with several groups has one matrix per group, (groups, n, n), as if the groups were
    independent. If these matrices would also be too large, only the diagonal is stored, (side,).
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
    """Return each block with its Kronecker factors A and B, as views of the vector of all factors."""
    views = kronecker_layout(blocks).views(factors)
    return [(block, arrays["A"], arrays["B"]) for block, arrays in zip(blocks, views, strict=True)]
