"""V G V' where there are more slices of the batch than examples, as with more ranks than sequences.

The slices of an example are a group: those from the slice after that of the example before up to its own.
Their ranks linearise the example, and share it twice: each pushes some of the directions, in the parts that
one pass takes, and multiplies the tangents of all directions at some of the outputs. Between the two they
exchange directions for outputs, so that every tangent is sent at most once, and every product V G V' of some
outputs is one term of the message that is summed anyway. A slice has the same outputs whatever the number of
ranks, and the slices are summed in the same binary tree.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from hfmpi.backends.base import Array
from hfmpi.data.batches import Cases
from hfmpi.measure.spans import ALLREDUCE, PRODUCTS
from hfmpi.models.base import SharedProjection
from hfmpi.objective.sums import pairwise_sum
from hfmpi.optim.layout import Directions

if TYPE_CHECKING:
    from hfmpi.objective.data_parallel import DataParallel

__all__ = ["Group", "groups", "shared_projection"]


class Group(NamedTuple):
    """The slices that share an example, and how many of them a rank has.

    Attributes
    ----------
    first, last : int
        Its slices are first, ..., last - 1.
    each : int
        Slices of every rank, in order.
    """

    first: int
    last: int
    each: int

    @property
    def ranks(self) -> range:
        """The ranks that have slices of the group."""
        return range(self.first // self.each, (self.last - 1) // self.each + 1)

    def slices(self, rank: int) -> range:
        """Return the slices of a rank that are in the group."""
        return range(max(self.first, rank * self.each), min(self.last, (rank + 1) * self.each))

    def outputs(self, slices: range, count: int) -> slice:
        """Return the outputs of consecutive slices, of `count`."""
        size, start, stop = self.last - self.first, slices.start - self.first, slices.stop - self.first
        return slice(count * start // size, count * stop // size)

    def parts(self, rank: int, every: list[slice]) -> list[slice]:
        """Return the parts of the directions that a rank pushes, perhaps none."""
        i, size = rank - self.ranks.start, len(self.ranks)
        return every[len(every) * i // size : len(every) * (i + 1) // size]


def groups(examples: int, slices: int, ranks: int) -> list[Group]:
    """Return the group of each example; there are at least as many slices as examples."""
    edges = [-(-slices * i // examples) for i in range(examples + 1)]
    return [Group(first, last, slices // ranks) for first, last in pairwise(edges)]


class Pushed(NamedTuple):
    """An example of which this rank has slices: its tangents (N, c, O) along some directions, on the host."""

    group: Group
    at: SharedProjection
    every: list[slice]
    tangents: np.ndarray

    @property
    def outputs(self) -> int:
        """N, the number of outputs."""
        return len(self.tangents)

    def columns(self, rank: int) -> slice:
        """Return the directions that a rank pushed."""
        parts = self.group.parts(rank, self.every)
        return slice(parts[0].start, parts[-1].stop) if parts else slice(0, 0)


def shared_projection(
    owner: DataParallel, theta: Array, cases: Cases, indices: np.ndarray, scored: int
) -> Callable[[Array | Directions], np.ndarray]:
    """Return V (C, D) -> the message of V G V' (C, C) over `scored`, summed over the ranks; collective."""
    comm, backend, timer = owner.communicator, owner.model.backend, owner.timer
    every = groups(len(indices), owner.slices or comm.size, comm.size)
    mine = [i for i, group in enumerate(every) if comm.rank in group.ranks]

    def push(v: Array | Directions) -> list[Pushed]:
        pushed = []
        for i, at in zip(mine, owner.local.of_examples(theta, cases, indices[mine]), strict=True):
            parts = at.direction_parts(len(v))
            with timer.span(PRODUCTS):
                tangents = np.array(backend.to_host(at.tangents(v, every[i].parts(comm.rank, parts))))
            pushed.append(Pushed(every[i], at, parts, tangents))
        return pushed

    def multiply(pushed: list[Pushed], tangents: list[np.ndarray], directions: int) -> np.ndarray:
        messages = []
        for each, u in zip(pushed, tangents, strict=True):
            own = each.group.slices(comm.rank)
            first = each.group.outputs(own, each.outputs).start
            for i in own:
                rows, message = each.group.outputs(range(i, i + 1), each.outputs), np.zeros(directions**2 + 1)
                of_slice = u[rows.start - first : rows.stop - first].reshape(-1, u.shape[2])
                with timer.span(PRODUCTS):
                    out = message[:-1].reshape(directions, directions)
                    each.at.add_products(backend.to_device(of_slice), rows, 1 / scored, out)
                    backend.synchronize()
                messages.append(message)
        summed: np.ndarray = pairwise_sum(messages)
        return summed

    def projection(v: Array | Directions) -> np.ndarray:
        pushed = list[Pushed]()

        def push_all() -> np.ndarray:
            pushed.extend(push(v))
            return np.zeros(1)

        # After this message no rank has failed, and none is left behind in the exchange.
        owner.total(push_all, 1, np.float64, host=True)
        with timer.span(ALLREDUCE):
            tangents = _exchanged(owner, pushed, len(v))
        size = len(v) ** 2 + 1
        message: np.ndarray = owner.total(
            lambda: multiply(pushed, tangents, len(v)), size, np.float64, host=True
        )
        return message

    return projection


def _exchanged(owner: DataParallel, pushed: list[Pushed], directions: int) -> list[np.ndarray]:
    """Return the tangents (n, C, O) of all directions at this rank's outputs of each example."""
    comm, dtype = owner.communicator, owner.model.backend.dtype
    sent, received = [np.empty(0, dtype)] * comm.size, [np.empty(0, dtype)] * comm.size
    whole = list[np.ndarray]()
    for each in pushed:
        rows = each.group.outputs(each.group.slices(comm.rank), each.outputs)
        whole.append(np.empty((rows.stop - rows.start, directions, each.tangents.shape[2]), dtype))
        for rank in each.group.ranks:
            theirs = each.group.outputs(each.group.slices(rank), each.outputs)
            sent[rank] = np.append(sent[rank], each.tangents[theirs])
            size = whole[-1][:, each.columns(rank)].size
            received[rank] = np.empty(received[rank].size + size, dtype)
    comm.exchange(sent, received)
    for each, u in zip(pushed, whole, strict=True):
        for rank in each.group.ranks:
            part = u[:, each.columns(rank)]
            part[...] = received[rank][: part.size].reshape(part.shape)
            received[rank] = received[rank][part.size :]
    return whole
