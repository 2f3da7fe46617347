"""The objective for an optimizer, from a model on one device: the mean risk over all ranks.

Every rank holds theta and a shard of the global batch, and sums over this shard (hfmpi.objective.local). One
Allreduce per loss, gradient or product makes the sums global. Sums are divided by the number of scored
outputs in the global batch, instead of averaging the means of the ranks, so that shards may be uneven or
empty.

Each of these messages has one additional number, which counts the ranks that want to stop and those that
failed. So the ranks agree to end a long step, all at the same point, without a separate message.
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
"""Limit of `slices`: more slices than examples only cost time and memory."""

FAILED = 2.0**12
"""A failed rank adds this to the last number of a message; a float32 counts 2^12 of them exactly."""


class Stopped(Exception):
    """Raised on all ranks by the same loss, gradient or product if at least one rank wants to stop.

    Optimizers do not catch it. They change neither theta nor their state, so the step can be repeated later.
    """


class Unscored(UserError):
    """Raised on all ranks if a global batch has no scored outputs."""


class DataParallel:
    """A factory of objectives: the mean loss per scored output, in nats, on any global batch.

    Parameters
    ----------
    model : Model
        On this rank's device.
    communicator : Communicator
    timer : Timer
        Records the spans of `LocalSums`, line search and allreduce.
    micro_batch : int, optional
        The maximum number of examples that a rank processes at a time. It bounds the memory and changes the
        result only by rounding. Default, or 0: the backend's value. It is halved if the memory is not
        sufficient.
    memory_budget : float
        Bytes of linearisations that this rank may store between products. Linearisations that do not fit are
        recomputed for every product, which takes longer and returns bit-identical numbers.
    transport : Transport, optional
        How vectors on the model's device are summed over the ranks. Default: through the host.
    slices : int
        Divide every global batch into this many slices, a power of two that the number of ranks divides, and
        add their sums in one fixed binary tree. The result is then bit-identical for any number of ranks, on
        processors of the same kind. 0: one slice per rank, summed in the order that MPI chooses.
    stop : callable, optional
        Returns whether this rank wants to stop. It is called once per loss, gradient and product, and before
        each task on a matrix. Default: never stop.
    overdue : callable, optional
        Returns whether the time limit of this rank has been reached. It is called before each task on a
        matrix, which may take minutes. Default: no limit.

    Raises
    ------
    UserError
        If an argument has the wrong type, or `slices` does not fit the number of ranks.
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
            ("communicator", communicator, isinstance(communicator, Communicator), "a result of connect()"),
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
        self.host = HostTransport(communicator, Backend(), slices > 0)  # for messages on the host
        self.slices = slices
        self.stop, self.overdue = stop, overdue

    def on(self, cases: Cases, indices: np.ndarray, span: str = LINE_SEARCH) -> Risk:
        """Return the risk on the examples `indices` (B,), which must be the same on every rank.

        `span` is the name under which the timer records the losses of this risk.

        Raises
        ------
        TypeError
            If `cases` is not a `Cases` object, or the indices are not whole numbers.
        IndexError
            If an index is out of range.
        """
        if not isinstance(cases, Cases):
            raise TypeError(f"cases must be an object such as hfmpi.Arrays, not {shown(cases)}")
        return Risk(self, cases, checked_indices(indices, cases.count, "case"), span)

    def shard(self, cases: Cases, indices: np.ndarray) -> Shard:
        """Return this rank's part of a global batch."""
        rank, ranks = self.communicator.rank, self.communicator.size
        count = self.slices or ranks
        slices = range(count * rank // ranks, count * (rank + 1) // ranks)
        return Shard(cases, [shard(indices, i, count) for i in slices])

    def weights(self, shard: Shard, indices: np.ndarray) -> tuple[float, float]:
        """Return the sums over a global batch of the weights of its scored outputs and of its examples.

        If the weights are known only after reading the examples, each rank counts those of its examples, and
        one message adds the counts.
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
        """Return the number of examples in every slice of a global batch, for all ranks."""
        count, batch = self.slices or self.communicator.size, len(indices)
        return [batch * (i + 1) // count - batch * i // count for i in range(count)]

    def total(
        self, work: Callable[[], Array], size: int, dtype: np.dtype | type, host: bool = False
    ) -> Array:
        """Sum over all ranks the messages (size,) that `work` returns on each; `work` must not communicate.

        The last number of a message is overwritten. The message is on the device, or with `host` a NumPy
        array.

        Raises
        ------
        Stopped
            On all ranks, if one of them wants to stop, or if its work was stopped.
        Exception
            On all ranks, if the work fails on one of them: the original exception there, a UserError
            elsewhere.
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
        """Sum a message over all ranks, in place, and raise the exceptions of `total`."""
        message[-1] = self._flag(failure)
        with self.timer.span(ALLREDUCE):
            transport.sum(message)
        self._check(float(message[-1]), failure)

    def joined(self, work: Callable[[], np.ndarray], counts: Sequence[int]) -> list[np.ndarray]:
        """Return the vectors that `work` returns on each rank, for all ranks; `work` must not communicate.

        They are float64 on the host. The vector of rank r has `counts[r]` numbers and one more, which is
        overwritten. Results that only one rank computes are sent in this way, so that no zeros are added.

        Raises
        ------
        Stopped, Exception
            Under the same conditions as in `total`.
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
        """Raise an exception on all ranks if one wants to stop or failed; `ended` is the sum of the flags."""
        if ended >= FAILED:
            self._fail(failure)
        if ended > 0:
            raise Stopped

    def _fail(self, failure: Exception | None) -> None:
        """Raise the failure of this rank, or the message of the lowest rank that failed; collective."""

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
    """Return the objectives of one step, on global batches that depend only on the seed and the step.

    Parameters
    ----------
    cases : Cases
        The examples as this step reads them.
    gradient_batch, curvature_batch : int
        Number of examples; `curvature_batch` is 0 for a method without curvature.
    redrawn : bool
        Whether the next step reads different examples under the same indices.
    """
    indices = global_indices(seed, step, gradient_batch, cases.count)
    whole, curvature, epoch = owner.on(cases, indices), None, step * gradient_batch / cases.count
    if curvature_batch:
        part = curvature_slice(step, gradient_batch, curvature_batch)
        curvature = owner.on(cases, indices[part])
        whole.keep(curvature, np.delete(indices, part))
    repeated = gradient_batch == cases.count and not redrawn
    return Objectives(whole, curvature, epoch, curvature is not None, repeated)


UNEQUAL = "the examples have different numbers of outputs: rows need the same number for every example"


class Risk(Objective):
    """The mean risk on one global batch, or the weighted mean sum(w l) / sum(w) of outputs with weights w.

    All risks of one `DataParallel` share the memory of linearisations: an operator of `gauss_newton` that is
    used after a newer one has been created linearises again.

    Raises
    ------
    Unscored
        If the batch has no scored outputs.
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
            raise Unscored("a batch has no scored outputs: check the mask and the weights")
        self._rest: Shard = self.shard
        self._part: Risk | None = None
        self._sizes = owner.sizes(cases, indices)
        self._version = 0  # of the linearisations that a gradient computed on this shard

    def keep(self, part: Risk, rest: np.ndarray) -> None:
        """Linearise `part`, the risk on some examples, with each gradient; `rest` are the other indices."""
        self._rest, self._part = self.owner.shard(self.cases, rest), part
        both = part._sizes, self.owner.sizes(self.cases, rest)
        self._sizes = [a + b for a, b in zip(*both, strict=True)]

    @property
    def blocks(self) -> tuple[Block, ...]:
        """The matrices of the model's parameters."""
        if isinstance(self.owner.model, Blocks):
            return self.owner.model.blocks
        return super().blocks

    def spread(
        self, works: Sequence[Callable[[], Array]], sizes: Sequence[int], wide: bool = False, name: str = ""
    ) -> list[Array]:
        """Run each task on one rank, and send the results to all ranks in one message."""
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
            found = [done(i) + 0 for i in range(len(works))]  # no -0.0, as with several ranks
            if owner.stop():  # there is no message that would ask for it
                raise Stopped
            return found

        size, ends = int(sum(sizes)) + 1, np.cumsum(sizes)

        def views(message: Array) -> list[Array]:
            return [message[end - size : end] for end, size in zip(ends, sizes, strict=True)]

        def local() -> Array:
            message = backend.xp.zeros(size, backend.dtype)
            each = views(message)
            for i in assigned[rank]:
                each[i] += done(i)  # the sum with zero is never -0.0, as on all other ranks
            return message

        return views(owner.total(local, size, backend.dtype))

    def agree(self, values: Scalars) -> Scalars:
        """Return rank 0's values of scalars that every rank computed."""
        return self.owner.communicator.agree(values)

    def loss(self, theta: Array) -> float:
        """Compute the mean loss in nats per scored output, float64."""
        return self.losses([theta])[0]

    def losses(self, thetas: Sequence[Array]) -> list[float]:
        """Compute the mean losses of several candidates with one message."""
        for theta in thetas:
            self._check("theta", theta)

        def local() -> np.ndarray:
            return np.append(self.owner.local.losses(thetas, self.shard, self.span), 0.0)

        message = self.owner.total(local, len(thetas) + 1, np.float64, host=True)
        return [float(loss) / self.scored for loss in message[:-1]]

    def gradient(self, theta: Array) -> Gradient:
        """Compute the mean loss and its gradient (D,) with one message."""
        return self._gradient(theta, "")[0]

    def squared_gradients(self, theta: Array) -> Gradient:
        """Compute the mean loss, its gradient, and the mean squared gradients of the examples if available.

        The loss of an example is divided by the mean number of scored outputs per example, so that `squares`
        has the unit of the squared gradient for any batch. An example with weight w counts w times.
        """
        if not has_squared_gradients(self.owner.model):
            return self.gradient(theta)
        gradient, square_sum = self._gradient(theta, "squares")
        square_sum *= theta.dtype.type(self.weight)  # sum_i (g_i / B)^2 -> mean_i g_i^2
        return gradient._replace(squares=square_sum)

    def factored_gradient(self, theta: Array) -> tuple[Gradient, Array]:
        """Compute the mean loss, its gradient, and the Kronecker factors of all blocks with one message."""
        model = self.owner.model
        if not isinstance(model, KroneckerFactors):
            return super().factored_gradient(theta)
        gradient, sums = self._gradient(theta, "factors")
        return gradient, model.factor_sums.normalise(sums, self.scored)

    def _gradient(self, theta: Array, extra: Extra) -> tuple[Gradient, Array]:
        """Compute loss and gradient, and the requested sums, as views of one message."""
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
        """Compute the mean loss and its gradient, with one message, and the rows of the examples."""
        self._check("theta", theta)
        owner, backend, model = self.owner, self.owner.model.backend, self.owner.model
        if not has_rows(model):
            return super().rows(theta, request)
        if request.factors and not isinstance(model, KroneckerFactors):
            super().factored_gradient(theta)
        # Rows of residuals need all of the memory, and the optimizer that uses them needs no products.
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

        S is the curvature of the structural-damping loss. It is also a mean per scored output: its products
        with the Jacobian of the pre-activations are divided by the same number (docs/theory.md).
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
        """Return p -> J'H z'' (D,), or None if the model has no bends; see `Objective.bends`."""
        self._check("theta", theta)
        owner = self.owner
        if not has_bends(owner.model):
            return None
        local = owner.local.bends(theta, self.shard, self.scored)
        return lambda p: owner.total(lambda: local(p), p.size + 1, p.dtype)[:-1]

    def project(self, theta: Array) -> Callable[[Array | Directions], np.ndarray]:
        """Linearise at theta; return V (C, D) -> V G V' (C, C), which takes one message of C^2 numbers."""
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
        """Estimate V G V' (C, C) for V (C, D) from a sketch of G, with one message of C^2 numbers."""
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
        """Raise a TypeError or ValueError unless this is one vector (or several) on the model's device."""
        model = self.owner.model
        check_vector(name, vector, model.size, model.backend.xp.ndarray, several)
