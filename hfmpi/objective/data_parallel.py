"""The hinge between a model on one device and an optimizer that knows none: the mean risk over all ranks.

Every rank holds theta and a shard of the global batch, over which it sums (hfmpi.objective.local). One
Allreduce per loss, gradient or product makes the sums global. Sums are divided by the number of scored
outputs in the global batch, never averaged from averages, so shards may be uneven or empty.

Each of these messages has one number more: how many ranks want to stop. So the ranks agree to leave a long
step without a message of its own, and leave it at the same place.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable, Sequence

import numpy as np

from hfmpi.backends.base import Array, Backend
from hfmpi.data.batches import Cases, checked_indices, curvature_slice, global_indices, shard
from hfmpi.errors import UserError, shown
from hfmpi.measure.spans import ALLREDUCE, LINE_SEARCH
from hfmpi.measure.timer import Timer
from hfmpi.models.base import Blocks, KroneckerFactors, Model, SquaredGradients
from hfmpi.objective.local import Beside, LocalSums, Shard
from hfmpi.objective.messages import PARTS, unpack
from hfmpi.objective.transport import HostTransport, Transport
from hfmpi.optim.base import Gradient, Objective, Objectives, Operator, Scalars
from hfmpi.optim.checks import check_vector
from hfmpi.optim.layout import Block
from hfmpi.parallel.communicator import Communicator

__all__ = ["DataParallel", "Risk", "Stopped", "step_objectives"]


class Stopped(Exception):
    """Raised on all ranks out of the same loss, gradient or product: at least one of them wants to stop.

    Optimizers let it pass. They change neither theta nor their state, so the step can be taken anew later.
    """


class DataParallel:
    """Makes the objective of any global batch: the mean loss per scored output, in nats.

    Parameters
    ----------
    model : Model
        On this rank's device.
    communicator : Communicator
    timer : Timer
        Gets the spans of `LocalSums`, line search and allreduce.
    micro_batch : int, optional
        Most cases that a rank works on at a time; bounds memory, and does not change the result
        beyond rounding. Without it, or 0, what suits the backend. Halved where the memory does not suffice.
    memory_budget : float
        Bytes that this rank may keep of a linearisation between products. What does not fit is computed
        anew for every product, which takes longer and gives the same numbers, bit for bit.
    transport : Transport, optional
        How vectors of the model's device are summed over the ranks. Without it, through the host.
    slices : int
        Cut every global batch into so many slices, a power of two that the number of ranks divides, and add
        up their sums in one fixed binary tree: the result is then the same bit for bit whatever the number
        of ranks, on processors of one kind. 0: one slice a rank, summed as MPI likes.
    stop : callable, optional
        Says whether this rank wants to stop; asked once per loss, gradient and product. Without it, never.

    Raises
    ------
    UserError
        If something is not what it must be, or the slices do not fit the ranks.
    """

    def __init__(
        self,
        model: Model,
        communicator: Communicator,
        timer: Timer | None = None,
        micro_batch: int | None = None,
        memory_budget: float = math.inf,
        transport: Transport | None = None,
        slices: int = 0,
        stop: Callable[[], bool] = lambda: False,
    ) -> None:
        for name, given, right, words in (
            ("model", model, isinstance(model, Model), "a model such as hfmpi.Network"),
            ("communicator", communicator, isinstance(communicator, Communicator), "what connect() gives"),
            ("timer", timer, timer is None or isinstance(timer, Timer), "a Timer"),
            ("micro_batch", micro_batch, micro_batch is None or _whole(micro_batch), "0, 1, 2, ..."),
            ("memory_budget", memory_budget, _bytes(memory_budget), "a number of bytes"),
            ("transport", transport, transport is None or isinstance(transport, Transport), "a Transport"),
            ("slices", slices, _whole(slices), "0, 1, 2, ..."),
            ("stop", stop, callable(stop), "a function"),
        ):
            if not right or isinstance(given, type):
                raise UserError(f"{name} must be {words}, not {shown(given)}")
        if slices and (slices & (slices - 1) or slices % communicator.size):
            raise UserError(
                f"slices must be a power of two that the number of ranks divides, not {slices} "
                f"for {communicator.size} rank(s)"
            )
        self.model = model
        self.communicator = communicator
        self.timer = timer or Timer()
        self.local = LocalSums(model, self.timer, micro_batch, memory_budget, communicator.rank)
        self.transport = transport or HostTransport(communicator, model.backend, slices > 0)
        self.host = HostTransport(communicator, Backend(), slices > 0)  # of messages that are on the host
        self.slices = slices
        self.stop = stop

    def on(self, cases: Cases, indices: np.ndarray, span: str = LINE_SEARCH) -> Risk:
        """Give the risk on the cases `indices` (B,), the same on every rank.

        `span` is the name under which the timer books its losses.

        Raises
        ------
        TypeError
            If they are no cases, or no whole numbers.
        IndexError
            If there are no such cases.
        """
        if not isinstance(cases, Cases):
            raise TypeError(f"cases must be such as hfmpi.Arrays makes, not {shown(cases)}")
        return Risk(self, cases, checked_indices(indices, cases.count, "case"), span)

    def shard(self, cases: Cases, indices: np.ndarray) -> Shard:
        """Give what this rank has of a global batch."""
        rank, ranks = self.communicator.rank, self.communicator.size
        count = self.slices or ranks
        own = range(count * rank // ranks, count * (rank + 1) // ranks)
        return Shard(cases, [shard(indices, i, count) for i in own])

    def sum(self, message: Array, transport: Transport) -> None:
        """Sum over all ranks; the last number is that of the ranks that want to stop."""
        message[-1] = float(self.stop())
        with self.timer.span(ALLREDUCE):
            transport.sum(message)
        if float(message[-1]) > 0:
            raise Stopped


def _whole(value: object) -> bool:
    return isinstance(value, numbers.Integral) and not isinstance(value, bool) and int(value) >= 0


def _bytes(value: object) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool) and float(value) >= 0


def step_objectives(
    owner: DataParallel,
    cases: Cases,
    seed: int,
    step: int,
    gradient_batch: int,
    curvature_batch: int,
    redrawn: bool = False,
) -> Objectives:
    """Give the objectives of one step: global batches that depend on seed and step alone.

    Parameters
    ----------
    cases : Cases
        As this step is to see them.
    gradient_batch, curvature_batch : int
        Cases; 0 for a method without curvature.
    redrawn : bool
        The next step sees other cases under the same indices.
    """
    indices = global_indices(seed, step, gradient_batch, cases.count)
    whole, curvature, epoch = owner.on(cases, indices), None, step * gradient_batch / cases.count
    if curvature_batch:
        own = curvature_slice(step, gradient_batch, curvature_batch)
        curvature = owner.on(cases, indices[own])
        whole.keep(curvature, np.delete(indices, own))
    repeated = gradient_batch == cases.count and not redrawn
    return Objectives(whole, curvature, epoch, curvature is not None, repeated)


def shares(sizes: Sequence[int], ranks: int) -> list[list[int]]:
    """Share out works of these sizes, the largest first to whoever has least to do."""
    found, work = [list[int]() for _ in range(ranks)], [0] * ranks
    for i in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        rank = work.index(min(work))
        found[rank].append(i)
        work[rank] += sizes[i]
    return found


class Risk(Objective):
    """The mean risk on one global batch.

    Linearisations are shared by all risks of one `DataParallel`: an operator of `gauss_newton` that is used
    after another one was made linearises anew.

    Raises
    ------
    UserError
        If nothing in the batch is scored.
    """

    def __init__(self, owner: DataParallel, cases: Cases, indices: np.ndarray, span: str) -> None:
        self.owner = owner
        self.span = span
        self.size = len(indices)
        self.scored = cases.scored(indices)
        if self.scored < 1:
            raise UserError("a batch has no output that is scored: check the mask")
        self.cases = cases
        self.shard = owner.shard(cases, indices)
        self._apart: tuple[Shard, Shard | None] = self.shard, None

    def keep(self, part: Risk, rest: np.ndarray) -> None:
        """Let gradients linearise `part`, the risk on some of the cases, for products; `rest` has others."""
        self._apart = self.owner.shard(self.cases, rest), part.shard

    @property
    def blocks(self) -> tuple[Block, ...]:
        """Those of the model."""
        if isinstance(self.owner.model, Blocks):
            return self.owner.model.blocks
        return super().blocks

    def spread(self, works: Sequence[Callable[[], Array]], sizes: Sequence[int]) -> list[Array]:
        """Do each work on one rank, and send the results to all in one message."""
        owner, backend, ends = self.owner, self.owner.model.backend, np.cumsum(sizes)
        message = backend.xp.zeros(int(sum(sizes)) + 1, backend.dtype)
        parts = [message[end - size : end] for end, size in zip(ends, sizes, strict=True)]
        for i in shares(sizes, owner.communicator.size)[owner.communicator.rank]:
            parts[i] += works[i]()  # added to zero, as on all other ranks: no -0.0 on one rank alone
        owner.sum(message, owner.transport)
        return parts

    def agree(self, values: Scalars) -> Scalars:
        """Give rank 0's values of scalars that every rank computed for itself."""
        return self.owner.communicator.agree(values)

    def loss(self, theta: Array) -> float:
        """Mean loss in nats per scored output, float64."""
        return self.losses([theta])[0]

    def losses(self, thetas: Sequence[Array]) -> list[float]:
        """Mean losses of several candidates, in one message."""
        for theta in thetas:
            self._check("theta", theta)
        message = np.append(self.owner.local.losses(thetas, self.shard, self.span), 0.0)
        self.owner.sum(message, self.owner.host)
        return [float(loss) / self.scored for loss in message[:-1]]

    def gradient(self, theta: Array) -> Gradient:
        """Mean loss and its gradient (D,), in one message."""
        message = self._gradient(theta, "")
        return Gradient(self._loss(message), message[: theta.size])

    def squared_gradients(self, theta: Array) -> Gradient:
        """Mean loss, its gradient, and the mean squared gradients of the cases if the model has them.

        A case counts with its loss over the mean number of scored outputs of a case, so that `squares` has
        the unit of the squared gradient whatever the batch.
        """
        if not isinstance(self.owner.model, SquaredGradients):
            return self.gradient(theta)
        message, size = self._gradient(theta, "squares"), theta.size
        square_sum = message[size : 2 * size]
        square_sum *= theta.dtype.type(self.size)  # sum_i (g_i / B)^2 -> mean_i g_i^2
        return Gradient(self._loss(message), message[:size], square_sum)

    def factored_gradient(self, theta: Array) -> tuple[Gradient, Array]:
        """Mean loss, its gradient, and the Kronecker factors of all blocks, in one message."""
        model = self.owner.model
        if not isinstance(model, KroneckerFactors):
            return super().factored_gradient(theta)
        message = self._gradient(theta, "factors")
        factors = model.normalise_factors(message[theta.size : PARTS.start], self.scored)
        return Gradient(self._loss(message), message[: theta.size]), factors

    def _gradient(self, theta: Array, beside: Beside) -> Array:
        self._check("theta", theta)
        rest, part = self._apart
        message = self.owner.local.gradient(theta, rest, self.scored, beside, part)
        self.owner.sum(message, self.owner.transport)
        return message

    def _loss(self, message: Array) -> float:
        return unpack(self.owner.model.backend.to_host(message[PARTS]))

    def gauss_newton(self, theta: Array) -> Operator:
        """Linearise at theta; give v (D,) -> G v."""
        return self._products(theta, 0.0)

    def structural_gauss_newton(self, theta: Array, structural: float) -> Operator:
        """Linearise at theta; give v (D,) -> (G + structural * S) v.

        S is the curvature of the structural-damping loss, likewise a mean per scored output: its products
        with the pre-activations' Jacobian are divided by the same number (docs/theory.md).
        """
        return self._products(theta, structural)

    def columns(self, theta: Array) -> Operator:
        """Linearise at theta; give V (C, D) -> G V (C, D), in one message."""
        return self._products(theta, 0.0, True)

    def _products(self, theta: Array, structural: float, columns: bool = False) -> Operator:
        self._check("theta", theta)
        owner = self.owner
        local = owner.local.products(theta, self.shard, self.scored, structural)

        def product(v: Array) -> Array:
            self._check("v", v, columns)
            message = local(v)
            owner.sum(message, owner.transport)
            return message[:-1].reshape(v.shape)

        return product

    def project(self, theta: Array) -> Callable[[Array], np.ndarray]:
        """Linearise at theta; give V (C, D) -> V G V' (C, C), in one message of C^2 numbers."""
        self._check("theta", theta)
        owner = self.owner
        local = owner.local.products(theta, self.shard, self.scored, project=True)

        def projected(v: Array) -> np.ndarray:
            self._check("v", v, True)
            message = local(v)
            owner.sum(message, owner.host)
            found = message[:-1].reshape(len(v), len(v))
            symmetric: np.ndarray = (found + found.T) / 2
            return symmetric

        return projected

    def _check(self, name: str, vector: Array, columns: bool = False) -> None:
        """Raise a TypeError or ValueError unless it is a vector of the model, or columns, on its device."""
        model = self.owner.model
        check_vector(name, vector, model.size, model.backend.xp.ndarray, columns)
