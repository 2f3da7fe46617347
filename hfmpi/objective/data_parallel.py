"""The objective of an optimizer from a model on one device: the mean risk over all ranks.

Every rank holds theta and a shard of the global batch, over which it sums (hfmpi.objective.local). One
Allreduce per loss, gradient or product makes the sums global. Sums are divided by the number of scored
outputs in the global batch, never averaged from averages, so shards may be uneven or empty.

Each of these messages has one more number: how many ranks want to stop, and how many have failed. So the
ranks agree to leave a long step without a separate message, and leave it at the same point.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable, Sequence
from typing import cast

import numpy as np

from hfmpi.backends.base import Array, Backend
from hfmpi.data.batches import (
    Cases,
    checked_indices,
    curvature_slice,
    global_indices,
    shard,
    unread,
    weight_of,
)
from hfmpi.errors import UserError, shown
from hfmpi.measure.spans import ALLREDUCE, LINE_SEARCH, MATRIX
from hfmpi.measure.timer import Timer
from hfmpi.models.base import (
    Blocks,
    KroneckerFactors,
    Model,
    has_bends,
    has_rows,
    has_squared_gradients,
)
from hfmpi.objective.local import Extra, LocalSums, Shard
from hfmpi.objective.local_rows import SliceRows
from hfmpi.objective.messages import ROW_NUMBERS, gradient_message, unpack
from hfmpi.objective.rows import ShardedRows
from hfmpi.objective.shares import shares
from hfmpi.objective.sums import pairwise_sum
from hfmpi.objective.transport import HostTransport, Transport
from hfmpi.optim.base import Gradient, Objective, Objectives, Operator, Scalars, Sketch, symmetric
from hfmpi.optim.checks import check_vector
from hfmpi.optim.layout import Block, Directions
from hfmpi.optim.rows import RowMatrix, RowRequest
from hfmpi.parallel.communicator import Communicator
from hfmpi.parallel.failure import together

__all__ = ["DataParallel", "Risk", "Stopped", "Unscored", "step_objectives"]

MOST_SLICES = 2**16
"""More slices than examples only cost time, and without a limit also memory."""

FAILED = 2.0**12
"""What a rank that failed adds to the last number of a message; a float32 counts 2^12 of them exactly."""


class Stopped(Exception):
    """Raised on all ranks by the same loss, gradient or product: at least one of them wants to stop.

    Optimizers do not catch it. They change neither theta nor their state, so the step can be repeated later.
    """


class Unscored(UserError):
    """Nothing in a global batch is scored; raised on all ranks alike."""


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
        The maximum number of examples that a rank processes at a time; bounds memory, and does not change the
        result beyond rounding. Without it, or 0, what suits the backend. Halved where the memory does not
        suffice.
    memory_budget : float
        Bytes of linearisations that this rank may keep between products. What does not fit is recomputed for
        every product, which takes longer and gives the same numbers, bit for bit.
    transport : Transport, optional
        How vectors of the model's device are summed over the ranks. Without it, through the host.
    slices : int
        Divide every global batch into this many slices, a power of two that the number of ranks divides, and
        add their sums in one fixed binary tree: the result is then the same bit for bit for any number of
        ranks, on processors of one kind. 0: one slice per rank, summed in the order that MPI chooses.
    stop : callable, optional
        Returns whether this rank wants to stop; called once per loss, gradient and product, and before each
        work on a matrix. Without it, never.
    overdue : callable, optional
        Returns whether time is up for this rank; called before each work on a matrix, which may take minutes.
        Without it, never.

    Raises
    ------
    UserError
        If an argument is of the wrong type, or the slices do not fit the ranks.
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
        overdue: Callable[[], bool] = lambda: False,
    ) -> None:
        for name, value, right, words in (
            ("model", model, isinstance(model, Model), "a model such as hfmpi.Network"),
            ("communicator", communicator, isinstance(communicator, Communicator), "what connect() gives"),
            ("timer", timer, timer is None or isinstance(timer, Timer), "a Timer"),
            ("micro_batch", micro_batch, micro_batch is None or _whole(micro_batch), "0, 1, 2, ..."),
            ("memory_budget", memory_budget, _bytes(memory_budget), "a number of bytes"),
            ("transport", transport, transport is None or isinstance(transport, Transport), "a Transport"),
            ("slices", slices, _whole(slices), "0, 1, 2, ..."),
            ("stop", stop, callable(stop), "a function"),
            ("overdue", overdue, callable(overdue), "a function"),
        ):
            if not right or isinstance(value, type):
                raise UserError(f"{name} must be {words}, not {shown(value)}")
        if slices and (slices & (slices - 1) or slices % communicator.size or slices > MOST_SLICES):
            raise UserError(
                f"slices must be a power of two that the number of ranks divides, at most {MOST_SLICES:,}, "
                f"not {slices} for {communicator.size} rank(s)"
            )
        self.model = model
        self.communicator = communicator
        self.timer = timer or Timer()
        self.local = LocalSums(model, self.timer, micro_batch, memory_budget, communicator.rank)
        self.transport = transport or HostTransport(communicator, model.backend, slices > 0)
        self.host = HostTransport(communicator, Backend(), slices > 0)  # of messages that are on the host
        self.slices = slices
        self.stop, self.overdue = stop, overdue

    def on(self, cases: Cases, indices: np.ndarray, span: str = LINE_SEARCH) -> Risk:
        """Return the risk on the examples `indices` (B,), the same on every rank.

        `span` is the name under which the timer books its losses.

        Raises
        ------
        TypeError
            If `cases` are not cases, or the indices not whole numbers.
        IndexError
            If there are no such examples.
        """
        if not isinstance(cases, Cases):
            raise TypeError(f"cases must be such as hfmpi.Arrays makes, not {shown(cases)}")
        return Risk(self, cases, checked_indices(indices, cases.count, "case"), span)

    def shard(self, cases: Cases, indices: np.ndarray) -> Shard:
        """Return this rank's part of a global batch."""
        rank, ranks = self.communicator.rank, self.communicator.size
        count = self.slices or ranks
        slices = range(count * rank // ranks, count * (rank + 1) // ranks)
        return Shard(cases, [shard(indices, i, count) for i in slices])

    def weights(self, shard: Shard, indices: np.ndarray) -> tuple[float, float]:
        """Return the sums over a global batch of the weights of its scored outputs and of its examples.

        Examples that only reading them shows are counted by the ranks that have them, in one message.
        """
        cases = shard.cases
        if not unread(cases):
            return cases.scored(indices), weight_of(cases, indices)

        def local() -> np.ndarray:
            none = np.zeros(2)
            parts = [
                np.array([cases.scored(part), weight_of(cases, part)]) if part.size else none
                for part in shard.slices
            ]
            return np.append(pairwise_sum(parts), 0.0)

        message = self.total(local, 3, np.float64, host=True)
        return float(message[0]), float(message[1])

    def sizes(self, cases: Cases, indices: np.ndarray) -> list[int]:
        """Return the number of examples in every slice of a global batch, of all ranks."""
        count, batch = self.slices or self.communicator.size, len(indices)
        return [batch * (i + 1) // count - batch * i // count for i in range(count)]

    def total(
        self, work: Callable[[], Array], size: int, dtype: np.dtype | type, host: bool = False
    ) -> Array:
        """Sum over all ranks the message (size,) that `work`, which does not communicate, returns on each.

        Its last number is overwritten. The message is on the device, or with `host` in NumPy.

        Raises
        ------
        Stopped
            On all ranks, if one of them wants to stop, or if its work was stopped.
        Exception
            On all ranks, if the work of one fails: its exception there, and a UserError elsewhere.
        """
        transport, xp = (self.host, np) if host else (self.transport, self.model.backend.xp)
        failure: Exception | None = None
        try:
            message = work()
        except Exception as error:
            failure, message = error, xp.zeros(size, dtype)
        self.sum(message, transport, failure)
        return message

    def sum(self, message: Array, transport: Transport, failure: Exception | None = None) -> None:
        """Sum over all ranks; the last number counts the ranks that want to stop or failed; see `total`."""
        message[-1] = self._flag(failure)
        with self.timer.span(ALLREDUCE):
            transport.sum(message)
        self._check(float(message[-1]), failure)

    def joined(self, work: Callable[[], np.ndarray], counts: Sequence[int]) -> list[np.ndarray]:
        """Return the vectors of all ranks that `work`, which does not communicate, returns on each.

        They are float64 on the host, and that of rank r has `counts[r]` numbers and one more, which is
        overwritten. What results from one rank alone is sent in this way: it is not added to zeros.

        Raises
        ------
        Stopped, Exception
            As `total` does.
        """
        failure: Exception | None = None
        try:
            part = work()
        except Exception as error:
            failure, part = error, np.zeros(counts[self.communicator.rank] + 1)
        part[-1] = self._flag(failure)
        lengths = [count + 1 for count in counts]
        with self.timer.span(ALLREDUCE):
            message = self.communicator.join(part, lengths)
        parts = np.split(message, np.cumsum(lengths)[:-1])
        self._check(sum(float(each[-1]) for each in parts), failure)
        return [each[:-1] for each in parts]

    def _flag(self, failure: Exception | None) -> float:
        """Return the last number of this rank's message."""
        if failure is None:
            return float(self.stop())
        return 1.0 if isinstance(failure, Stopped) else FAILED

    def _check(self, ended: float, failure: Exception | None) -> None:
        """Raise an exception on all ranks if one of them wants to stop or failed; `ended` is their sum."""
        if ended >= FAILED:
            self._fail(failure)
        if ended > 0:
            raise Stopped

    def _fail(self, failure: Exception | None) -> None:
        """Raise the failure of this rank, or the sentence of the lowest rank that failed; collective."""

        def say() -> None:
            if isinstance(failure, UserError):
                raise failure
            if failure is not None and not isinstance(failure, Stopped):
                kind = type(failure).__name__
                raise UserError(f"rank {self.communicator.rank} failed with {kind}: {failure}")

        try:
            together(self.communicator, say)
        except UserError as sentence:
            error = sentence
        raise failure if failure is not None and not isinstance(failure, Stopped) else error


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
    """Return the objectives of one step: global batches that depend on seed and step alone.

    Parameters
    ----------
    cases : Cases
        As this step sees them.
    gradient_batch, curvature_batch : int
        Examples; 0 for a method without curvature.
    redrawn : bool
        The next step sees different examples under the same indices.
    """
    indices = global_indices(seed, step, gradient_batch, cases.count)
    whole, curvature, epoch = owner.on(cases, indices), None, step * gradient_batch / cases.count
    if curvature_batch:
        part = curvature_slice(step, gradient_batch, curvature_batch)
        curvature = owner.on(cases, indices[part])
        whole.keep(curvature, np.delete(indices, part))
    repeated = gradient_batch == cases.count and not redrawn
    return Objectives(whole, curvature, epoch, curvature is not None, repeated)


UNEQUAL = "the examples have different numbers of outputs: rows need the same number of every example"


class Risk(Objective):
    """The mean risk on one global batch, or the weighted mean sum(w l) / sum(w) of outputs with weights w.

    Linearisations are shared by all risks of one `DataParallel`: an operator of `gauss_newton` that is used
    after a newer one was made linearises again.

    Raises
    ------
    Unscored
        If nothing in the batch is scored.
    """

    def __init__(self, owner: DataParallel, cases: Cases, indices: np.ndarray, span: str) -> None:
        self.owner = owner
        self.ranks = owner.communicator.size
        self.span = span
        self.size = len(indices)
        self.cases, self.indices = cases, indices
        self.shard = owner.shard(cases, indices)
        self.scored, self.weight = owner.weights(self.shard, indices)
        if not self.scored > 0:
            raise Unscored("a batch has no output that is scored: check mask and weights")
        self._rest: Shard = self.shard
        self._part: Risk | None = None
        self._sizes = owner.sizes(cases, indices)
        self._version = 0  # of the linearisations that a gradient made on this shard

    def keep(self, part: Risk, rest: np.ndarray) -> None:
        """Linearise `part`, the risk on some of the examples, with each gradient; `rest` has the others."""
        self._rest, self._part = self.owner.shard(self.cases, rest), part
        both = part._sizes, self.owner.sizes(self.cases, rest)
        self._sizes = [a + b for a, b in zip(*both, strict=True)]

    @property
    def blocks(self) -> tuple[Block, ...]:
        """The blocks of the model."""
        if isinstance(self.owner.model, Blocks):
            return self.owner.model.blocks
        return super().blocks

    def spread(
        self, works: Sequence[Callable[[], Array]], sizes: Sequence[int], wide: bool = False, name: str = ""
    ) -> list[Array]:
        """Do each work on one rank, and send the results to all in one message."""
        owner, backend, rank = self.owner, self.owner.model.backend, self.owner.communicator.rank
        assigned = shares(sizes, owner.communicator.size)

        def done(i: int) -> Array:
            if owner.stop() or owner.overdue():
                raise Stopped
            with owner.timer.span(f"{MATRIX}{name}{i}"):
                return works[i]()

        if wide:
            counts = [sum(sizes[i] for i in each) for each in assigned]
            parts = owner.joined(
                lambda: np.concatenate([*(done(i) for i in assigned[rank]), np.zeros(1)]), counts
            )
            results = dict[int, Array]()
            for each, part in zip(assigned, parts, strict=True):
                start = 0
                for i in each:
                    results[i] = part[start : start + sizes[i]]
                    start += sizes[i]
            return [results[i] for i in range(len(works))]

        if owner.communicator.size == 1:
            found = [done(i) + 0 for i in range(len(works))]  # as of several ranks: no -0.0
            if owner.stop():  # which a message would ask
                raise Stopped
            return found

        size, ends = int(sum(sizes)) + 1, np.cumsum(sizes)

        def views(message: Array) -> list[Array]:
            return [message[end - size : end] for end, size in zip(ends, sizes, strict=True)]

        def local() -> Array:
            message = backend.xp.zeros(size, backend.dtype)
            each = views(message)
            for i in assigned[rank]:
                each[i] += done(i)  # added to zero, as on all other ranks: no -0.0 on one rank alone
            return message

        return views(owner.total(local, size, backend.dtype))

    def agree(self, values: Scalars) -> Scalars:
        """Return rank 0's values of scalars that every rank computed."""
        return self.owner.communicator.agree(values)

    def loss(self, theta: Array) -> float:
        """Return the mean loss in nats per scored output, float64."""
        return self.losses([theta])[0]

    def losses(self, thetas: Sequence[Array]) -> list[float]:
        """Return the mean losses of several candidates, in one message."""
        for theta in thetas:
            self._check("theta", theta)

        def local() -> np.ndarray:
            return np.append(self.owner.local.losses(thetas, self.shard, self.span), 0.0)

        message = self.owner.total(local, len(thetas) + 1, np.float64, host=True)
        return [float(loss) / self.scored for loss in message[:-1]]

    def gradient(self, theta: Array) -> Gradient:
        """Return the mean loss and its gradient (D,), in one message."""
        return self._gradient(theta, "")[0]

    def squared_gradients(self, theta: Array) -> Gradient:
        """Return the mean loss, its gradient, and the mean squared gradients of the examples if available.

        An example counts with its loss over the mean number of scored outputs of an example, so that
        `squares` has the unit of the squared gradient whatever the batch; of weight w it counts w times.
        """
        if not has_squared_gradients(self.owner.model):
            return self.gradient(theta)
        gradient, square_sum = self._gradient(theta, "squares")
        square_sum *= theta.dtype.type(self.weight)  # sum_i (g_i / B)^2 -> mean_i g_i^2
        return gradient._replace(squares=square_sum)

    def factored_gradient(self, theta: Array) -> tuple[Gradient, Array]:
        """Return the mean loss, its gradient, and the Kronecker factors of all blocks, in one message."""
        model = self.owner.model
        if not isinstance(model, KroneckerFactors):
            return super().factored_gradient(theta)
        gradient, sums = self._gradient(theta, "factors")
        return gradient, model.factor_sums.normalise(sums, self.scored)

    def _gradient(self, theta: Array, extra: Extra) -> tuple[Gradient, Array]:
        """Return loss and gradient, and the sums asked for, as views of one message."""
        self._check("theta", theta)
        owner, part = self.owner, self._part

        def local() -> Array:
            message, version = owner.local.gradient(
                theta, self._rest, self.scored, extra, None if part is None else part.shard
            )
            if part is not None:
                part._version = version
            return message

        message = owner.total(local, owner.local.gradient_layout(theta, extra).size, theta.dtype)
        layout = gradient_message(theta.size)
        out = gradient_message(theta.size, message.size - layout.size).views(message)
        loss = unpack(owner.model.backend.to_host(out["loss"]))
        return Gradient(loss, out["gradient"]), out["extra"]

    def rows(self, theta: Array, request: RowRequest) -> RowMatrix:
        """Return the mean loss, its gradient and rows of the examples; loss and gradient in one message."""
        self._check("theta", theta)
        owner, backend, model = self.owner, self.owner.model.backend, self.owner.model
        if not has_rows(model):
            return super().rows(theta, request)
        if request.factors and not isinstance(model, KroneckerFactors):
            super().factored_gradient(theta)
        # Rows of residuals need all of the memory, and their optimizer no products.
        part = None if request.kind == "residuals" else self._part
        rest, sizes = self._rest, self._sizes
        if part is None and self._part is not None:
            rest, sizes = self.shard, owner.sizes(self.cases, self.indices)
        kept = list[SliceRows]()

        def local() -> Array:
            message, slices, version = owner.local.rows(
                theta, rest, self.scored, request, self.size, None if part is None else part.shard
            )
            kept.extend(slices)
            if part is not None:
                part._version = version
            return message

        layout = owner.local.row_layout(theta, request)
        message = owner.total(local, layout.size, theta.dtype)
        out = layout.views(message)
        cotangents, incomplete = (float(number) for number in backend.to_host(out["extra"][:ROW_NUMBERS]))
        factors = None
        if request.factors:
            sums = out["extra"][ROW_NUMBERS:]
            factors = cast(KroneckerFactors, model).factor_sums.normalise(sums, self.scored)
        cotangents /= sum(size > 0 for size in sizes)
        if cotangents != int(cotangents):
            raise UserError(UNEQUAL)
        return ShardedRows(
            owner,
            kept,
            [size * int(cotangents) for size in sizes],
            loss=unpack(backend.to_host(out["loss"])),
            gradient=out["gradient"],
            scored=self.scored,
            cotangents=int(cotangents),
            complete=incomplete == 0,
            with_residuals=request.kind == "residuals",
            stored=request.stored or request.kind != "residuals" or cotangents * self.size < theta.size,
            factors=factors,
        )

    def gauss_newton(self, theta: Array) -> Operator:
        """Linearise at theta; return v (D,) -> G v."""
        return self._products(theta, 0.0)

    def structural_gauss_newton(self, theta: Array, structural: float) -> Operator:
        """Linearise at theta; return v (D,) -> (G + structural * S) v.

        S is the curvature of the structural-damping loss, likewise a mean per scored output: its products
        with the pre-activations' Jacobian are divided by the same number (docs/theory.md).
        """
        return self._products(theta, structural)

    def _products(self, theta: Array, structural: float) -> Operator:
        self._check("theta", theta)
        owner = self.owner
        local = owner.local.products(theta, self.shard, self.scored, structural, self._version)

        def product(v: Array) -> Array:
            self._check("v", v)
            return owner.total(lambda: local(v), v.size + 1, v.dtype)[:-1]

        return product

    def bends(self, theta: Array) -> Operator | None:
        """Return p -> J'H z'' (D,), z'' the second derivative of the outputs along p; None if not known."""
        self._check("theta", theta)
        owner = self.owner
        if not has_bends(owner.model):
            return None
        local = owner.local.bends(theta, self.shard, self.scored)
        return lambda p: owner.total(lambda: local(p), p.size + 1, p.dtype)[:-1]

    def project(self, theta: Array) -> Callable[[Array | Directions], np.ndarray]:
        """Linearise at theta; return V (C, D) -> V G V' (C, C), in one message of C^2 numbers."""
        self._check("theta", theta)
        owner = self.owner
        local = owner.local.projections(theta, self.shard, self.scored, self._version)

        def projection(v: Array | Directions) -> np.ndarray:
            if not isinstance(v, Directions):
                self._check("v", v, several=True)
            message = owner.total(lambda: local(v), len(v) ** 2 + 1, np.float64, host=True)
            return symmetric(message[:-1].reshape(len(v), len(v)))

        return projection

    def sketch(self, theta: Array, v: Directions, request: RowRequest) -> Sketch:
        """Estimate V G V' (C, C) of V (C, D) from a sketch of G, in one message of C^2 numbers."""
        if not has_rows(self.owner.model):
            return super().sketch(theta, v, request)
        self._check("theta", theta)
        owner, count = self.owner, len(v)
        local = owner.local.sketches(theta, self.shard, self.scored, request, self._version)
        message = owner.total(lambda: local(v), count**2 + 2, np.float64, host=True)
        rows = int(message[-2])
        if rows % self.size:
            raise UserError(UNEQUAL)
        return Sketch(symmetric(message[:-2].reshape(count, count)), rows, rows // self.size)

    def _check(self, name: str, vector: Array, several: bool = False) -> None:
        """Raise a TypeError or ValueError unless it is a vector of the model, or several, on its device."""
        model = self.owner.model
        check_vector(name, vector, model.size, model.backend.xp.ndarray, several)
