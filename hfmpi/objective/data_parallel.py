"""The hinge between a model on one device and an optimizer that knows none: the mean risk over all ranks.

Every rank holds theta and a shard of the global batch. It sums losses, gradients or products over its shard
in micro-batches, and one Allreduce per loss, gradient or product makes the sums global. Sums are divided by
the global number of characters, never averaged from averages, so shards may be uneven or empty.

Each of these messages has one number more: how many ranks want to stop. So the ranks agree to leave a long
step without a message of its own, and leave it at the same place.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator
from typing import TypeVar

import numpy as np

from hfmpi.backends.base import Array, Backend
from hfmpi.data.batches import Batch, Sequences, curvature_slice, global_indices, shard
from hfmpi.errors import UserError
from hfmpi.measure.timer import Timer
from hfmpi.models.network import Network, Tape
from hfmpi.objective.messages import GRIDS, message_sizes, pack, unpack
from hfmpi.objective.transport import HostTransport, Transport
from hfmpi.optim.base import Gradient, Objectives
from hfmpi.parallel.communicator import Communicator

__all__ = ["MeanRisk", "Risk", "Stopped", "step_objectives"]

T = TypeVar("T")


def pairwise(parts: list[Array]) -> Array:
    """Add up arrays, as many as a power of two or one, in a binary tree of neighbours."""
    while len(parts) > 1:
        parts = [a + b for a, b in zip(parts[::2], parts[1::2], strict=True)]
    return parts[0]


class Stopped(Exception):
    """Raised on all ranks out of the same loss, gradient or product: at least one of them wants to stop.

    Optimizers let it pass. They change neither theta nor their state, so the step can be taken anew later.
    """


class MeanRisk:
    """Makes the objective of any global batch: the mean loss per scored character, in nats.

    Parameters
    ----------
    network : Network
        The model on this rank's device.
    communicator : Communicator
    timer : Timer
        Gets the spans input, forward, gradient, linearise, products, line search and allreduce.
    micro_batch : int, optional
        Most sequences that a rank works on at a time; bounds memory, and does not change the result
        beyond rounding. Without it, what suits the backend. Halved where the memory does not suffice.
    memory_budget : float
        Bytes that this rank may keep of a linearisation between products. What does not fit is computed
        anew for every product, which takes longer and gives the same numbers, bit for bit.
    transport : Transport, optional
        How vectors of the network's device are summed over the ranks. Without it, through the host.
    slices : int
        Cut every global batch into so many slices, a power of two that the number of ranks divides, and add
        up their sums in one fixed binary tree: the result is then the same bit for bit whatever the number
        of ranks, on processors of one kind. 0: one slice a rank, summed as MPI likes.

    Raises
    ------
    UserError
        If the slices do not fit the ranks.

    Attributes
    ----------
    stop : callable
        Says whether this rank wants to stop; asked once per loss, gradient and product. Never, by default.
    """

    def __init__(
        self,
        network: Network,
        communicator: Communicator,
        timer: Timer | None = None,
        micro_batch: int | None = None,
        memory_budget: float = math.inf,
        transport: Transport | None = None,
        slices: int = 0,
    ) -> None:
        if slices and (slices & (slices - 1) or slices % communicator.size):
            raise UserError(
                f"slices must be a power of two that the number of ranks divides, not {slices} "
                f"for {communicator.size} rank(s)"
            )
        self.network = network
        self.communicator = communicator
        self.timer = timer or Timer()
        self.micro_batch = micro_batch or network.backend.micro_batch
        self.memory_budget = memory_budget
        self.transport = transport or HostTransport(communicator, network.backend, slices > 0)
        self.host = HostTransport(communicator, Backend(), slices > 0)  # of messages that are on the host
        self.slices = slices
        self.stop: Callable[[], bool] = lambda: False
        self._passing_tape: Tape | None = None  # used up at once; its memory serves the next
        self._tapes: list[Tape] = []  # kept between products

    def passing_tape(self, theta: Array, batch: Batch, structural: bool = False) -> Tape:
        """Linearise on one micro-batch, in memory that the next call takes over."""
        self._passing_tape = self.network.forward(theta, batch, structural, self._passing_tape)
        return self._passing_tape

    def shrink(self, steps: int, sequences: int) -> None:
        """Give all memory back; keep less of a linearisation, and halve the micro-batches.

        Parameters
        ----------
        steps, sequences : int
            What this rank was to work on.

        Raises
        ------
        UserError
            If a micro-batch is a single sequence already.
        """
        most = min(self.micro_batch, sequences)
        if most <= 1:
            raise UserError(
                f"rank {self.communicator.rank} has not enough memory for a single sequence "
                f"({self.network.backend.device}): take shorter sequences or fewer units"
            )
        self.micro_batch = most // 2
        self.memory_budget = min(self.memory_budget, self.network.tape_bytes(steps, sequences)) / 2
        self._passing_tape, self._tapes = None, []
        self.network.release()

    def on(self, sequences: Sequences, indices: np.ndarray, span: str = "line search") -> Risk:
        """Give the risk on the sequences `indices` (B,) of a split, the same on every rank.

        `span` is the name under which the timer books its losses.
        """
        return Risk(self, sequences, indices, span)


def step_objectives(
    owner: MeanRisk, sequences: Sequences, seed: int, step: int, gradient_batch: int, curvature_batch: int
) -> Objectives:
    """Give the objectives of one step: global batches that depend on seed and step alone.

    Parameters
    ----------
    gradient_batch, curvature_batch : int
        Sequences; 0 for a method without curvature.
    """
    indices = global_indices(seed, step, gradient_batch, sequences.count)
    curvature = None
    if curvature_batch:
        curvature = owner.on(sequences, indices[curvature_slice(step, gradient_batch, curvature_batch)])
    epoch = step * gradient_batch / sequences.count
    return Objectives(owner.on(sequences, indices), curvature, epoch)


class Risk:
    """The mean risk on one global batch; satisfies `hfmpi.optim.base.Objective`.

    Tapes are shared by all risks of one `MeanRisk`: an operator of `gauss_newton` that is used after another
    one was made linearises anew.
    """

    def __init__(self, owner: MeanRisk, sequences: Sequences, indices: np.ndarray, span: str) -> None:
        self.owner = owner
        self.sequences = sequences
        self.span = span
        self.size = len(indices)
        self.characters = len(indices) * sequences.length
        rank, ranks = owner.communicator.rank, owner.communicator.size
        count = owner.slices or ranks
        own = range(count * rank // ranks, count * (rank + 1) // ranks)
        self.slices = [shard(indices, i, count) for i in own]

    def agree(self, value: float) -> float:
        """Give rank 0's value of a scalar that every rank computed for itself."""
        return self.owner.communicator.agree(value)

    def loss(self, theta: Array) -> float:
        """Mean loss in nats per character, float64."""
        owner = self.owner

        def share(part: np.ndarray) -> np.ndarray:
            message = np.zeros(2)
            for batch in self._batches(part):
                with owner.timer.span(self.span):
                    message[0] += owner.network.loss(theta, batch)
            return message

        message = self._shrinking(lambda: pairwise([share(part) for part in self.slices]))
        self._sum(message, owner.host)
        return float(message[0]) / self.characters

    def gradient(self, theta: Array, squares: bool = False) -> Gradient:
        """Mean loss and its gradient (D,); with `squares` the mean squared gradients of the sequences.

        A sequence's own loss is its mean per character, so that `squares` has the unit of the squared
        gradient whatever the batch. One message carries everything.
        """
        owner, size, kind = self.owner, theta.size, theta.dtype
        backend = owner.network.backend

        def share(part: np.ndarray) -> Array:
            message = backend.xp.zeros(message_sizes(size, squares)["gradient"], kind)
            loss = 0.0
            for batch in self._batches(part):
                with owner.timer.span("forward"):
                    tape = owner.passing_tape(theta, batch)
                with owner.timer.span("gradient"):
                    square_sum = message[size : 2 * size] if squares else None
                    owner.network.gradient(tape, 1 / self.characters, message[:size], square_sum)
                    backend.synchronize()
                loss += tape.loss / self.characters
            message[-len(GRIDS) - 1 : -1] = backend.to_device(pack(loss).astype(kind))
            return message

        message = self._shrinking(lambda: pairwise([share(part) for part in self.slices]))
        self._sum(message, owner.transport)
        square_sum = message[size : 2 * size] if squares else None
        if square_sum is not None:  # sum_i (g_i / B)^2 -> mean_i g_i^2
            square_sum *= kind.type(self.size)
        mean = unpack(backend.to_host(message[-len(GRIDS) - 1 : -1]))
        return Gradient(mean, message[:size], square_sum)

    def gauss_newton(self, theta: Array, structural: float = 0.0) -> Callable[[Array], Array]:
        """Linearise at theta; give v (D,) -> (G + structural * S) v.

        S is the curvature of the structural-damping loss, likewise a mean per character: its products with
        the pre-activations' Jacobian are divided by the same number (docs/theory.md).
        """
        owner, scale = self.owner, 1 / self.characters
        backend = owner.network.backend
        kept = self._shrinking(lambda: self._linearise(theta, structural))
        tapes = owner._tapes

        def share(tapes: list[Tape], others: list[Batch], v: Array) -> Array:
            message = backend.xp.zeros(v.size + 1, v.dtype)
            out = message[:-1]
            for tape in tapes:
                with owner.timer.span("products"):
                    owner.network.gauss_newton(tape, v, scale, structural, out)
                    backend.synchronize()
            for batch in others:
                with owner.timer.span("linearise"):
                    tape = owner.passing_tape(theta, batch, structural > 0)
                with owner.timer.span("products"):
                    owner.network.gauss_newton(tape, v, scale, structural, out)
                    backend.synchronize()
            return message

        def local(v: Array) -> Array:
            nonlocal kept, tapes
            if owner._tapes is not tapes:  # given up for lack of memory, or for another operator
                kept = self._linearise(theta, structural)
                tapes = owner._tapes
            return pairwise([share(*part, v) for part in kept])

        def product(v: Array) -> Array:
            message = self._shrinking(lambda: local(v))
            self._sum(message, owner.transport)
            return message[:-1]

        return product

    def _linearise(self, theta: Array, structural: float) -> list[tuple[list[Tape], list[Batch]]]:
        """Give, for every slice, the tapes that the memory budget admits and the batches that have none."""
        owner, left = self.owner, self.owner.memory_budget
        before, tapes = owner._tapes, list[Tape]()
        kept = []
        for part in self.slices:
            start, others = len(tapes), []
            for batch in self._batches(part):
                left -= owner.network.tape_bytes(len(batch.inputs), batch.inputs.shape[1], structural > 0)
                if left < 0:
                    others.append(batch)
                    continue
                reuse = before[len(tapes)] if len(tapes) < len(before) else None
                with owner.timer.span("linearise"):
                    tapes.append(owner.network.forward(theta, batch, structural > 0, reuse))
            kept.append((tapes[start:], others))
        owner._tapes = tapes
        return kept

    def _shrinking(self, work: Callable[[], T]) -> T:
        """Do this rank's share of the work, in smaller micro-batches where the memory does not suffice."""
        owner, before = self.owner, self.owner.micro_batch
        while True:
            try:
                result = work()
                break
            except MemoryError:
                pass  # leave the handler first: its traceback holds arrays
            sequences = sum(part.size for part in self.slices)
            owner.shrink(self.sequences.burn_in + self.sequences.length, sequences)
        if owner.micro_batch < before:
            logging.getLogger(__name__).warning(
                "Note: rank %d went out of memory (%s) and goes on with micro-batches of %d sequences.",
                owner.communicator.rank,
                owner.network.backend.device,
                owner.micro_batch,
            )
        return result

    def _batches(self, part: np.ndarray) -> Iterator[Batch]:
        """Cut a slice into micro-batches of nearly one size."""
        if not part.size:
            return
        for indices in np.array_split(part, -(-part.size // self.owner.micro_batch)):
            with self.owner.timer.span("input"):
                batch = self.sequences.take(indices)
            yield batch

    def _sum(self, message: Array, transport: Transport) -> None:
        """Sum over all ranks; the last number is that of the ranks that want to stop."""
        message[-1] = float(self.owner.stop())
        with self.owner.timer.span("allreduce"):
            transport.sum(message)
        if float(message[-1]) > 0:
            raise Stopped
