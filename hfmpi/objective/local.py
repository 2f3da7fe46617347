"""One rank's sums over its shard of a global batch: micro-batches, linearisations, and running out of memory.

This module does not communicate. A shard consists of slices, whose sums are added in a binary tree.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Any, Literal, NamedTuple, TypeVar, cast

import numpy as np

from hfmpi.backends.base import Array
from hfmpi.data.batches import Cases
from hfmpi.errors import UserError
from hfmpi.measure.spans import FORWARD, GRADIENT, INPUT, LINEARISE, PRODUCTS
from hfmpi.measure.timer import Timer
from hfmpi.models.base import (
    GradientFirst,
    KroneckerFactors,
    Linearisation,
    Model,
    Projection,
    StructuralDamping,
    Trials,
)
from hfmpi.objective.local_rows import SliceRows, signs, slice_rows
from hfmpi.objective.messages import ROW_NUMBERS, gradient_message, pack
from hfmpi.objective.sums import pairwise_sum
from hfmpi.optim.base import inner_product
from hfmpi.optim.layout import Along, Directions, Layout
from hfmpi.optim.rows import RowRequest

__all__ = ["Extra", "LocalSums", "Shard"]

T = TypeVar("T")

Extra = Literal["", "squares", "factors"]
"""What a gradient pass also computes: squared gradients of examples, Kronecker factors, or nothing."""

AHEAD = 0.1
"""Step fraction of the finite difference for the second derivative (Transtrum and Sethna 2012)."""

Linearise = Callable[[Array, Any, Any], Linearisation]
"""(theta (D,), a batch, a linearisation whose memory may be reused) -> linearisation."""


@dataclass(frozen=True)
class Shard:
    """The part of a global batch that one rank works on.

    Attributes
    ----------
    cases : Cases
    slices : list of (n,) int64
        Indices of the examples of each slice; a slice may be empty.
    """

    cases: Cases
    slices: list[np.ndarray]

    @property
    def count(self) -> int:
        """The number of examples."""
        return sum(part.size for part in self.slices)


class Piece(NamedTuple):
    """A micro-batch at one theta.

    Attributes
    ----------
    indices : (n,) int64
        The indices of its examples.
    batch : Any
        The examples.
    at : Linearisation or None
        None if there is not enough memory to store it.
    """

    indices: np.ndarray
    batch: Any
    at: Linearisation | None = None


class LocalSums:
    """Computes the sums of a model over shards.

    Parameters
    ----------
    model : Model
    timer : Timer
        Records the spans input, forward, gradient, linearise, products and those of losses.
    micro_batch : int, optional
        The maximum number of examples at a time. Default: the backend's value, which a model that checks
        itself sets after it has read its first examples. It is halved if the memory is not sufficient.
    memory_budget : float
        Bytes of linearisations that may be stored between products.
    rank : int
        The rank, for error messages.
    """

    def __init__(
        self, model: Model, timer: Timer, micro_batch: int | None, memory_budget: float, rank: int
    ) -> None:
        self.model = model
        self.timer = timer
        self.micro_batch = micro_batch or model.backend.micro_batch
        fitted = model.backend.micro_batch != type(model.backend).micro_batch
        self._fitted = bool(micro_batch) or fitted or not isinstance(model, Trials)
        self.memory_budget = memory_budget
        self.rank = rank
        self._passing: Linearisation | None = None  # a temporary one; the next one reuses its memory
        self._slices: list[list[Piece]] = []  # the linearisations that are stored between products
        self._theta: Array = None  # a copy of the theta at which they were computed
        self.rows_at_once = dict[tuple[str, int], int]()  # by request: number of examples per pass for rows
        self._version = 1  # of `_slices`; an operator created for an earlier version linearises again

    @property
    def linearisations(self) -> list[Linearisation]:
        """The linearisations that are stored between products."""
        return [piece.at for part in self._slices for piece in part if piece.at is not None]

    def losses(self, thetas: Sequence[Array], shard: Shard, span: str) -> np.ndarray:
        """Compute the summed loss of each theta, (C,) float64; the timer records them under `span`."""
        self._fit(thetas, shard)

        def share(part: np.ndarray) -> np.ndarray:
            losses = np.zeros(len(thetas))
            for piece in self._pieces(shard, part):
                with self.timer.span(span):
                    losses += [self.model.loss(theta, piece.batch) for theta in thetas]
            return losses

        return self._shrinking(shard.count, lambda: pairwise_sum([share(part) for part in shard.slices]))

    def gradient_layout(self, theta: Array, extra: Extra) -> Layout[str]:
        """Return the layout of the message of `gradient`."""
        sizes = {"": 0, "squares": theta.size}
        if extra == "factors":
            sizes["factors"] = cast(KroneckerFactors, self.model).factor_sums.size
        return gradient_message(theta.size, sizes[extra])

    def row_layout(self, theta: Array, request: RowRequest) -> Layout[str]:
        """Return the layout of the message of `rows`; the sums for factors are the last extra numbers."""
        factors = cast(KroneckerFactors, self.model).factor_sums.size if request.factors else 0
        return gradient_message(theta.size, ROW_NUMBERS + factors)

    def gradient(
        self, theta: Array, shard: Shard, scored: float, extra: Extra = "", part: Shard | None = None
    ) -> tuple[Array, int]:
        """Return the message of loss and gradient, divided by `scored`, and the requested squares or factors.

        The linearisations of the model must provide these. `part` has further examples, whose linearisations
        are stored for products at this theta. The returned version identifies them; it is 0 without `part`.
        """
        backend, model, layout = self.model.backend, self.model, self.gradient_layout(theta, extra)
        linearise = cast("Linearise", model.linearise)
        if isinstance(model, GradientFirst):
            linearise = partial(model.linearise_gradient, extra=extra)

        def add(at: Any, out: dict[str, Array]) -> float:
            with self.timer.span(GRADIENT):
                if extra == "squares":
                    at.squared_gradients(1 / scored, out["gradient"], out["extra"])
                elif extra == "factors":
                    at.factored_gradient(1 / scored, out["gradient"], out["extra"])
                else:
                    at.gradient(1 / scored, out["gradient"])
                backend.synchronize()
            return float(at.loss) / scored

        def share(indices: np.ndarray, first: list[Piece]) -> Array:
            message = backend.xp.zeros(layout.size, theta.dtype)
            out, pieces = layout.views(message), chain(first, self._pieces(shard, indices))
            loss = sum(add(at, out) for _, at in self.linearisations_of(pieces, linearise, theta))
            out["loss"][...] = backend.to_device(pack(loss, theta.dtype))
            return message

        return self._with_part(theta, shard, part, share)

    def _with_part(
        self,
        theta: Array,
        shard: Shard,
        part: Shard | None,
        share: Callable[[np.ndarray, list[Piece]], Array],
        start: Callable[[], None] = lambda: None,
    ) -> tuple[Array, int]:
        """Sum `share` over the slices; return the sum and the version of the linearisations of `part`, or 0.

        Parameters
        ----------
        share : callable
            (indices, pieces of `part`) of a slice -> a message.
        start : callable
            Called before the sum, and again whenever the sum is restarted with smaller micro-batches.
        """
        self._fit([theta], shard)

        def sums() -> tuple[Array, int]:
            start()
            if part is None:
                return pairwise_sum([share(indices, []) for indices in shard.slices]), 0
            self._linearise(self.model.linearise, theta, part, FORWARD)
            both = zip(shard.slices, self._slices, strict=True)
            return pairwise_sum([share(indices, first) for indices, first in both]), self._version

        return self._shrinking(shard.count + (part.count if part is not None else 0), sums)

    def rows(
        self,
        theta: Array,
        shard: Shard,
        scored: float,
        request: RowRequest,
        examples: int,
        part: Shard | None = None,
    ) -> tuple[Array, list[SliceRows], int]:
        """Return the message of loss, gradient and row counts, the rows of every slice, and a version.

        If the rows are not to be stored (`RowRequest.stored`), S'S of every slice replaces them. `examples`
        is the number of examples in the global batch; `part` and the version have the same meaning as in
        `gradient`.

        Raises
        ------
        UserError
            If the rows do not fit into the memory budget.
        """
        layout, parts = self.row_layout(theta, request), list[SliceRows]()

        def share(indices: np.ndarray, first: list[Piece]) -> Array:
            message = self.model.backend.xp.zeros(layout.size, theta.dtype)
            out = layout.views(message)
            kept = [(piece.indices, piece.at) for piece in first if piece.at is not None]
            rest = np.concatenate([*(piece.indices for piece in first if piece.at is None), indices])
            parts.append(slice_rows(self, theta, shard, rest, scored, request, examples, out, kept))
            return message

        def start() -> None:
            parts.clear()
            if part is None:
                self._passing, self._slices = None, []  # the rows need their memory
                self._version += 1

        message, version = self._with_part(theta, shard, part, share, start)
        return message, parts, version

    def products(
        self, theta: Array, shard: Shard, scored: float, structural: float = 0.0, version: int = 0
    ) -> Callable[[Array], Array]:
        """Linearise at theta; return v (D,) -> the message of (G + structural * S) v, divided by `scored`.

        Linearisations are stored only for the latest operator; an older operator linearises again. If a
        gradient on this shard stored linearisations of this version at this theta, they are reused.

        Raises
        ------
        UserError
            On all ranks, if structural damping is requested and the model does not provide it.
        """
        backend, linearise = self.model.backend, cast("Linearise", self.model.linearise)
        if structural > 0:
            if not isinstance(self.model, StructuralDamping):
                raise UserError("the model has no structural damping: set structural_damping=0")
            linearise, version = self.model.linearise_structural, 0

        def start(v: Array) -> Array:
            return backend.xp.zeros(v.size + 1, v.dtype)

        def add(_: np.ndarray, at: Any, v: Array, message: Array) -> None:
            if structural > 0:
                at.structural_gauss_newton(v, 1 / scored, structural, message[:-1])
            else:
                at.gauss_newton(v, 1 / scored, message[:-1])
            backend.synchronize()

        return self._operator(theta, shard, linearise, version, start, add)

    def projections(
        self, theta: Array, shard: Shard, scored: float, version: int = 0
    ) -> Callable[[Array | Directions], Array]:
        """Linearise at theta; return V (C, D) -> the message of V G V' (C, C); see `products`."""

        def start(v: Array | Directions) -> Array:
            return np.zeros(len(v) ** 2 + 1)

        def add(_: np.ndarray, at: Any, v: Array, message: Array) -> None:
            _project(at, v, 1 / scored, message[:-1].reshape(len(v), len(v)))
            self.model.backend.synchronize()

        return self._operator(theta, shard, self.model.linearise, version, start, add)

    def sketches(
        self, theta: Array, shard: Shard, scored: float, request: RowRequest, version: int = 0
    ) -> Callable[[Directions], Array]:
        """Linearise at theta; return V (C, D) -> the message of V S'S V' (C, C), divided by `scored`.

        S has the rows of a sketch, which are not stored. The message also has the number of rows.
        """
        backend = self.model.backend

        def start(along: Along) -> Array:
            return np.zeros(len(along) ** 2 + 2)

        def add(indices: np.ndarray, at: Any, along: Along, message: Array) -> None:
            segments = at.segment_count(request.segments)
            e = signs(request.seed, indices, at.residual_count()).astype(theta.dtype)
            found = at.sketch_along(backend.to_device(e), segments, along).astype(np.float64)
            products = backend.to_host(backend.xp.matmul(found, found.T))
            message[:-2] += (np.outer(along.scales, along.scales) * products).reshape(-1) / scored
            message[-2] += found.shape[1]

        operator = self._operator(theta, shard, self.model.linearise, version, start, add)
        return lambda v: operator(v.along())

    def bends(self, theta: Array, shard: Shard, scored: float) -> Callable[[Array], Array]:
        """Return p (D,) -> the message of J'H z'', divided by `scored`; z'' is the second derivative along p.

        z'' is the difference of the tangents at theta + AHEAD p and at theta, divided by AHEAD.
        """
        linearise, kind = self.model.linearise, theta.dtype.type

        def add(at: Any, batch: Any, p: Array, message: Array) -> None:
            with self.timer.span(LINEARISE):
                tangent = self.linearised(linearise, theta + kind(AHEAD) * p, batch).jvp(p).copy()
                if at is None:
                    at = self.linearised(linearise, theta, batch)
            with self.timer.span(PRODUCTS):
                tangent -= at.jvp(p)
                at.pulled_back(tangent, 1 / (AHEAD * scored), message[:-1])
                self.model.backend.synchronize()

        def share(part: list[Piece], p: Array) -> Array:
            message = self.model.backend.xp.zeros(p.size + 1, p.dtype)
            for piece in part:
                add(piece.at, piece.batch, p, message)
            return message

        return self._linearised_sums(theta, shard, linearise, 0, share)

    def _operator(
        self,
        theta: Array,
        shard: Shard,
        linearise: Linearise,
        version: int,
        start: Callable[[Array], Array],
        add: Callable[[np.ndarray, Any, Array, Array], None],
    ) -> Callable[[Array], Array]:
        """Linearise at theta; return the operator v -> the message summed over the shard.

        Parameters
        ----------
        version : int
            The version of linearisations that are reused if they are stored and belong to this theta.
        start : callable
            v -> a message of zeros.
        add : callable
            (indices, linearisation, v, message) -> None; adds the contribution of a micro-batch.
        """
        self._fit([theta], shard)
        same = self.model.backend.xp.array_equal
        if version != self._version or not same(self._theta, theta):
            self._shrinking(shard.count, lambda: self._linearise(linearise, theta, shard))

        def share(part: list[Piece], v: Array) -> Array:
            message = start(v)
            for indices, at in self.linearisations_of(part, linearise, theta, LINEARISE):
                with self.timer.span(PRODUCTS):
                    add(indices, at, v, message)
            return message

        return self._linearised_sums(theta, shard, linearise, self._version, share)

    def _linearised_sums(
        self,
        theta: Array,
        shard: Shard,
        linearise: Linearise,
        version: int,
        share: Callable[[list[Piece], Array], Array],
    ) -> Callable[[Array], Array]:
        """Return v -> the sum of `share` over the slices; it linearises again if `version` is not stored."""
        self._fit([theta], shard)
        mine = version

        def sums(v: Array) -> Array:
            nonlocal mine
            if mine != self._version:  # released for lack of memory, or replaced by another operator
                self._linearise(linearise, theta, shard)
                mine = self._version
            return pairwise_sum([share(part, v) for part in self._slices])

        return lambda v: self._shrinking(shard.count, lambda: sums(v))

    def _linearise(self, linearise: Linearise, theta: Array, shard: Shard, span: str = LINEARISE) -> None:
        """Linearise every slice and store the linearisations as far as the memory budget allows."""
        before, left, size, cases = self.linearisations, self.memory_budget, 0, 1
        self._slices, self._theta, count = [], theta.copy(), 0
        self._version += 1
        for part in shard.slices:
            current: list[Piece] = []
            self._slices.append(current)
            for indices in self.cut(part):
                batch = self.take(shard, indices)
                if size * len(indices) > left * cases:  # estimated from the last one's size per example
                    current.append(Piece(indices, batch))
                    continue
                reuse = before[count] if count < len(before) else self._passing
                with self.timer.span(span):
                    at = linearise(theta, batch, reuse)
                if reuse is self._passing:
                    self._passing = None
                size, cases = at.nbytes, len(indices)
                if size > left:
                    self._passing = at
                    current.append(Piece(indices, batch))
                else:
                    left -= size
                    current.append(Piece(indices, batch, at))
                    count += 1

    def linearised(self, linearise: Linearise, theta: Array, batch: Any) -> Linearisation:
        """Linearise on one micro-batch; the next call reuses the memory of the result."""
        self._passing = linearise(theta, batch, self._passing)
        return self._passing

    def _fit(self, thetas: Sequence[Array], shard: Shard) -> None:
        """Unless the user chose a micro-batch, adopt the one that the model finds when it checks itself."""
        if self._fitted or not thetas or not shard.count:
            return
        first, before = next(part for part in shard.slices if part.size), self.micro_batch
        self._shrinking(
            len(first), lambda: self.model.loss(thetas[0], self.take(shard, first[: self.micro_batch]))
        )
        if self.micro_batch == before:
            self.micro_batch = self.model.backend.micro_batch
        self._fitted = True

    def _shrinking(self, cases: int, work: Callable[[], T]) -> T:
        """Run this rank's work, and repeat it with smaller micro-batches if it runs out of memory."""
        before = self.micro_batch
        while True:
            try:
                result = work()
                break
            except MemoryError:
                pass  # leave the handler first, because its traceback refers to arrays
            self._shrink(cases)
        if self.micro_batch < before:
            logging.getLogger(__name__).warning(
                "Note: rank %d ran out of memory (%s) and continues with micro-batches of %d sequences.",
                self.rank,
                self.model.backend.device,
                self.micro_batch,
            )
        return result

    def _shrink(self, count: int) -> None:
        """Release all memory; halve the memory budget, and the micro-batches of `count` examples."""
        most = min(self.micro_batch, count)
        if most <= 1:
            raise UserError(
                f"rank {self.rank} does not have enough memory for a single sequence "
                f"({self.model.backend.device}): use shorter sequences or fewer units"
            )
        self.micro_batch = most // 2
        if self.linearisations:
            self.memory_budget = min(self.memory_budget, sum(at.nbytes for at in self.linearisations)) / 2
        self._passing, self._slices = None, []
        self._version += 1
        self.model.release()

    def cut(self, part: np.ndarray, most: int | None = None) -> list[np.ndarray]:
        """Divide a slice into micro-batches of nearly equal size, with at most `most` examples if passed."""
        most = min(self.micro_batch, most or self.micro_batch)
        return np.array_split(part, -(-part.size // most)) if part.size else []

    def take(self, shard: Shard, indices: np.ndarray) -> Any:
        """Read the examples with these indices as a batch."""
        with self.timer.span(INPUT):
            return shard.cases.take(indices)

    def _pieces(self, shard: Shard, part: np.ndarray) -> Iterator[Piece]:
        """Yield the micro-batches of a slice."""
        for indices in self.cut(part):
            yield Piece(indices, self.take(shard, indices))

    def linearisations_of(
        self, pieces: Iterable[Piece], linearise: Linearise, theta: Array, span: str = FORWARD
    ) -> Iterator[tuple[np.ndarray, Any]]:
        """Yield the indices and the linearisation of each micro-batch; the next one may reuse its memory."""
        for indices, batch, at in pieces:
            if at is None:
                with self.timer.span(span):
                    at = self.linearised(linearise, theta, batch)
            yield indices, at


def _project(at: Linearisation, v: Array | Directions, scale: float, out: np.ndarray) -> None:
    """Add scale * V G V' to out (C, C), for directions v (C, D)."""
    if isinstance(at, Projection):
        at.project(v, scale, out)
        return
    if isinstance(v, Directions):
        v = v.dense()
    for row, projected in zip(v, out, strict=True):
        product = v[0] * 0
        at.gauss_newton(row, scale, product)
        projected += [inner_product(other, product) for other in v]
