"""Rows over all ranks: each rank stores the rows of its shard, and one message makes each sum global.

The Gram matrix S S' needs every pair of rows. The ranks exchange rows for columns: each rank receives a part
of the columns of all rows and multiplies them, and the products are summed. So every rank does the same
amount of work, and a row is sent once. With slices there are as many parts of columns as slices, and their
products are added in the same binary tree for any number of ranks.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from math import prod
from typing import TYPE_CHECKING

import numpy as np

from hfmpi.backends.base import Array
from hfmpi.errors import UserError
from hfmpi.measure.spans import ROWS
from hfmpi.objective.local_rows import SliceRows
from hfmpi.objective.sums import Tree, pairwise_sum
from hfmpi.optim.layout import Vector
from hfmpi.optim.rows import Matrix, RowMatrix

if TYPE_CHECKING:
    from hfmpi.objective.data_parallel import DataParallel

__all__ = ["ShardedRows"]

EXCHANGED = 1 << 23
"""Number of entries of rows that a rank receives at a time."""


class ShardedRows(RowMatrix):
    """The rows of a global batch at one theta.

    Parameters
    ----------
    owner : DataParallel
    slices : list of SliceRows
        The slices of this rank, in order.
    counts : list of int
        The number of rows of every slice of all ranks, in order.
    stored : bool
        Whether the slices store their rows, not only S'S.
    loss, gradient, scored, cotangents, complete, factors
        As in `RowMatrix`.
    """

    def __init__(
        self,
        owner: DataParallel,
        slices: list[SliceRows],
        counts: list[int],
        *,
        loss: float,
        gradient: Vector,
        scored: float,
        cotangents: int,
        complete: bool,
        with_residuals: bool,
        stored: bool,
        factors: Vector | None = None,
    ) -> None:
        self.owner, self.slices, self.counts, self.stored = owner, slices, counts, stored
        self.loss, self.gradient, self.scored = loss, gradient, scored
        self.cotangents, self.complete, self.count = cotangents, complete, sum(counts)
        self.factors = factors
        comm, ends = owner.communicator, np.cumsum([0, *counts]).tolist()
        first = len(counts) * comm.rank // comm.size
        self._places = [slice(*ends[i : i + 2]) for i in range(first, first + len(slices))]
        self.residuals = None
        if with_residuals:
            to_host = owner.model.backend.to_host
            self.residuals = self._gathered(lambda part: to_host(part.residuals))

    def times(self, v: Vector) -> Matrix:
        """Compute S v (M,) with one message of M numbers; v must be the same on all ranks."""
        self._check_stored()
        _check_length("v", v, self.gradient.size)
        return self._gathered(lambda part: part.times(v))

    def transposed(self, a: Matrix) -> Vector:
        """Compute S' a (D,) or (k, D) with one message of D or k D numbers; `a` is the same on all ranks."""
        self._check_stored()
        _check_length("a", a, self.count)
        kind, xp = self.gradient.dtype, self.owner.model.backend.xp
        shape = *a.shape[:-1], self.gradient.size

        def local() -> Array:
            parts = zip(self.slices, self._places, strict=True)
            sums = [part.transposed(a[..., place]).astype(kind, copy=False) for part, place in parts]
            return xp.append(pairwise_sum(sums), kind.type(0))

        return self._summed(local, prod(shape) + 1, kind)[:-1].reshape(shape)

    def product(self, v: Vector) -> Vector:
        """Compute S'S v (D,), in the precision of theta, with one message of D numbers."""
        self._check_stored()
        _check_length("v", v, self.gradient.size)

        def local() -> Array:
            products = pairwise_sum([part.product(v) for part in self.slices])
            return self.owner.model.backend.xp.append(products, v.dtype.type(0))

        return self._summed(local, v.size + 1, v.dtype)[:-1]

    def normal(self) -> Matrix:
        """Compute S'S (D, D) with one message of D^2 numbers."""
        size, backend = self.gradient.size, self.owner.model.backend

        def local() -> np.ndarray:
            message = np.zeros(size * size + 1)
            sums = pairwise_sum([part.squared() for part in self.slices])
            message[:-1] = backend.to_host(sums).reshape(-1)
            return message

        message: Matrix = self._summed(local, size * size + 1, np.float64, host=True)
        return message[:-1].reshape(size, size)

    def gram(self) -> Matrix:
        """Compute S S' (M, M): exchange rows for columns, and sum one message of M^2 numbers."""
        self._check_stored()
        owner, comm, backend = self.owner, self.owner.communicator, self.owner.model.backend
        parts = owner.slices or comm.size
        edges = [self.gradient.size * j // parts for j in range(parts + 1)]
        width = max(1, EXCHANGED // max(1, self.count))
        rounds = -(-max(b - a for a, b in pairwise(edges)) // width)
        # If a rank lacks the memory, all ranks fail here, instead of waiting for it in an exchange.
        memory = list[Array]()
        owner.total(lambda: self._prepared(memory), 1, np.float64, host=True)
        message: Matrix = memory.pop()
        whole, sums = message[:-1].reshape(self.count, self.count), Tree()
        out = {"out": whole} if backend.xp is np else {}  # the first product then needs no copy
        for q in range(parts // comm.size):
            total: Array = None
            mine = [parts // comm.size * rank + q for rank in range(comm.size)]
            for i in range(rounds):
                block = self._exchanged([_part(edges[j], edges[j + 1], width, i) for j in mine])
                with owner.timer.span(ROWS):
                    product, out = backend.xp.matmul(block, block.T, **out), {}
                    if total is None:
                        total = product
                    else:
                        total += product
                    backend.synchronize()
            sums.add(total)
        if sums.total is not whole:
            whole[...] = backend.to_host(sums.total)
        owner.sum(message, owner.host)
        return whole

    def _prepared(self, memory: list[Array]) -> Array:
        """Allocate the message of the Gram matrix."""
        memory.append(np.zeros(self.count * self.count + 1))
        return np.zeros(1)

    def _exchanged(self, columns: list[slice]) -> Array:
        """Exchange rows for columns; return this rank's columns of all rows, (M, w) float64.

        `columns` has the columns of each rank.
        """
        comm, backend = self.owner.communicator, self.owner.model.backend
        rows = [part.stored for part in self.slices]
        if comm.size == 1 and len(rows) == 1:
            return rows[0][:, columns[0]].astype(np.float64, copy=False)
        if comm.size == 1:
            return backend.xp.concatenate([part[:, columns[0]].astype(np.float64) for part in rows])
        to_host, kind = backend.to_host, self.gradient.dtype
        sent = [
            np.concatenate([to_host(part[:, each]) for part in rows]).astype(kind, copy=False)
            for each in columns
        ]
        per_rank = [sum(part) for part in np.array_split(self.counts, comm.size)]
        mine = columns[comm.rank]
        block = np.empty((self.count, mine.stop - mine.start), kind)
        comm.exchange(sent, np.split(block, np.cumsum(per_rank)[:-1]))
        return backend.to_device(block.astype(np.float64, copy=False))

    def _gathered(self, values: Callable[[SliceRows], np.ndarray]) -> Matrix:
        """Return one number for every row (M,); each rank computes the numbers of its rows."""

        def local() -> np.ndarray:
            message = np.zeros(self.count + 1)
            for part, place in zip(self.slices, self._places, strict=True):
                message[place] = values(part)
            return message

        message: Matrix = self._summed(local, self.count + 1, np.float64, host=True)
        return message[:-1]

    def _summed(
        self, work: Callable[[], Array], size: int, dtype: np.dtype | type, host: bool = False
    ) -> Array:
        """Time the work of each rank, and return the sum of the results (`DataParallel.total`)."""

        def timed() -> Array:
            with self.owner.timer.span(ROWS):
                message = work()
                self.owner.model.backend.synchronize()
            return message

        return self.owner.total(timed, size, dtype, host)

    def _check_stored(self) -> None:
        """Raise a UserError if S'S replaces the rows."""
        if not self.stored:
            raise UserError("the rows are not stored: only S'S was computed (RowRequest.stored)")


def _check_length(name: str, vector: Array, length: int) -> None:
    """Raise a ValueError if a vector has a wrong shape, which would multiply rows of other examples."""
    if vector.shape[-1:] != (length,):
        raise ValueError(f"{name} must be a vector of shape ({length},), not of shape {vector.shape}")


def _part(start: int, stop: int, width: int, i: int) -> slice:
    """Return the i-th group of `width` columns between `start` and `stop`; it may be empty."""
    return slice(min(start + i * width, stop), min(start + (i + 1) * width, stop))
