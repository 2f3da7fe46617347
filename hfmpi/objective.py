"""The hinge between a model on one device and an optimizer that knows none: the mean risk over all ranks.

Every rank holds theta and a shard of the global batch. It sums losses, gradients or products over its shard
in micro-batches, and one Allreduce per loss, gradient or product makes the sums global. Sums are divided by
the global number of characters, never averaged from averages, so shards may be uneven or empty.

Each of these messages has one number more: how many ranks want to stop. So the ranks agree to leave a long
step without a message of its own, and leave it at the same place.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import numpy as np

from hfmpi.backends.base import Array
from hfmpi.data.batches import Batch, Sequences, curvature_slice, global_indices, shard
from hfmpi.measure.timer import Timer
from hfmpi.models.network import Network, Tape
from hfmpi.optim.base import Gradient, Objectives
from hfmpi.parallel.communicator import Communicator

__all__ = ["MeanRisk", "Risk", "Stopped", "pack", "step_objectives", "unpack"]

GRIDS = 2.0**-10, 2.0**-24, 2.0**-38, 2.0**-52
"""Grids of the parts of a packed scalar; see `pack`."""


def pack(value: float) -> np.ndarray:
    """Split a float64 into float32 numbers (4,) whose sums over many ranks are exact.

    A loss travels in the message of its gradient, which may be float32, yet has to arrive in double
    precision. The parts are multiples of fixed grids, so that their sums over up to 2,048 ranks (below 2^14
    in all) fit the 24 bits of a float32 without rounding, in whatever order they are added.
    """
    if not math.isfinite(value):
        return np.array([value, 0, 0, 0], np.float32)
    parts = []
    for grid in GRIDS:
        parts.append(round(value / grid) * grid)
        value -= parts[-1]
    with np.errstate(over="ignore"):  # what no float32 holds arrives as infinity
        return np.array(parts, np.float32)


def unpack(parts: np.ndarray) -> float:
    """Give the float64 sum of what `pack` split, from the summed parts (4,)."""
    return float(np.sum(parts[::-1].astype(np.float64)))  # the smallest first


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
    micro_batch : int
        Most sequences that a rank works on at a time; bounds memory, and does not change the result
        beyond rounding.
    memory_budget : float
        Bytes that this rank may keep of a linearisation between products. What does not fit is computed
        anew for every product, which takes longer and gives the same numbers, bit for bit.

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
        micro_batch: int = 32,
        memory_budget: float = math.inf,
    ) -> None:
        self.network = network
        self.communicator = communicator
        self.timer = timer or Timer()
        self.micro_batch = micro_batch
        self.memory_budget = memory_budget
        self.stop: Callable[[], bool] = lambda: False
        self._passing_tape: Tape | None = None  # used up at once; its memory serves the next
        self._tapes: list[Tape] = []  # kept between products

    def passing_tape(self, theta: Array, batch: Batch, structural: bool = False) -> Tape:
        """Linearise on one micro-batch, in memory that the next call takes over."""
        self._passing_tape = self.network.forward(theta, batch, structural, self._passing_tape)
        return self._passing_tape

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

    Tapes are shared by all risks of one `MeanRisk`: an operator of `gauss_newton` is valid until the next
    call of `gauss_newton` on any of them.
    """

    def __init__(self, owner: MeanRisk, sequences: Sequences, indices: np.ndarray, span: str) -> None:
        self.owner = owner
        self.sequences = sequences
        self.span = span
        self.size = len(indices)
        self.characters = len(indices) * sequences.length
        self.local = shard(indices, owner.communicator.rank, owner.communicator.size)

    def agree(self, value: float) -> float:
        """Give rank 0's value of a scalar that every rank computed for itself."""
        return self.owner.communicator.agree(value)

    def loss(self, theta: Array) -> float:
        """Mean loss in nats per character, float64."""
        owner, message = self.owner, np.zeros(2)
        for batch in self._batches():
            with owner.timer.span(self.span):
                message[0] += owner.network.loss(theta, batch)
        self._sum(message)
        return float(message[0]) / self.characters

    def gradient(self, theta: Array, squares: bool = False) -> Gradient:
        """Mean loss and its gradient (D,); with `squares` the mean squared gradients of the sequences.

        A sequence's own loss is its mean per character, so that `squares` has the unit of the squared
        gradient whatever the batch. One message carries everything.
        """
        owner, size, kind = self.owner, theta.size, theta.dtype
        message = owner.network.backend.xp.zeros(size * (1 + squares) + len(GRIDS) + 1, kind)
        square_sum = message[size : 2 * size] if squares else None
        loss = 0.0
        for batch in self._batches():
            with owner.timer.span("forward"):
                tape = owner.passing_tape(theta, batch)
            with owner.timer.span("gradient"):
                owner.network.gradient(tape, 1 / self.characters, message[:size], square_sum)
            loss += tape.loss / self.characters
        parts = message[-len(GRIDS) - 1 : -1]
        parts[:] = owner.network.backend.to_device(pack(loss).astype(kind))
        self._sum(message)
        if square_sum is not None:  # sum_i (g_i / B)^2 -> mean_i g_i^2
            square_sum *= kind.type(self.size)
        mean = unpack(owner.network.backend.to_host(parts))
        return Gradient(mean, message[:size], square_sum)

    def gauss_newton(self, theta: Array, structural: float = 0.0) -> Callable[[Array], Array]:
        """Linearise at theta; give v (D,) -> (G + structural * S) v.

        S is the curvature of the structural-damping loss, likewise a mean per character: its products with
        the pre-activations' Jacobian are divided by the same number (docs/theory.md).
        """
        owner, left = self.owner, self.owner.memory_budget
        tapes: list[Tape] = []
        others: list[Batch] = []
        for batch in self._batches():
            left -= owner.network.tape_bytes(len(batch.inputs), batch.inputs.shape[1], structural > 0)
            if left < 0:
                others.append(batch)
                continue
            reuse = owner._tapes[len(tapes)] if len(tapes) < len(owner._tapes) else None
            with owner.timer.span("linearise"):
                tapes.append(owner.network.forward(theta, batch, structural > 0, reuse))
        owner._tapes = tapes

        def product(v: Array) -> Array:
            message = owner.network.backend.xp.zeros(v.size + 1, v.dtype)
            out = message[:-1]
            for tape in tapes:
                with owner.timer.span("products"):
                    owner.network.gauss_newton(tape, v, 1 / self.characters, structural, out)
            for batch in others:
                with owner.timer.span("linearise"):
                    tape = owner.passing_tape(theta, batch, structural > 0)
                with owner.timer.span("products"):
                    owner.network.gauss_newton(tape, v, 1 / self.characters, structural, out)
            self._sum(message)
            return out

        return product

    def _batches(self) -> Iterator[Batch]:
        """Cut this rank's shard into micro-batches of nearly one size."""
        if not self.local.size:
            return
        for part in np.array_split(self.local, -(-self.local.size // self.owner.micro_batch)):
            with self.owner.timer.span("input"):
                batch = self.sequences.take(part)
            yield batch

    def _sum(self, message: Array) -> None:
        """Sum over all ranks; the last number is that of the ranks that want to stop."""
        message[-1] = self.owner.stop()
        self.owner.network.backend.synchronize()
        with self.owner.timer.span("allreduce"):
            self.owner.communicator.sum(message)
        if message[-1] > 0:
            raise Stopped
