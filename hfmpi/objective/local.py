"""One rank's sums over its shard of a global batch: micro-batches, linearisations, and memory that runs out.

No communication. The shard comes in slices, whose sums are added in a binary tree.
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
"""What the pass of a gradient computes besides: squares of gradients of examples, or Kronecker factors."""

AHEAD = 0.1
"""The part of a step after which the second derivative along it is taken (Transtrum and Sethna 2012)."""

Linearise = Callable[[Array, Any, Any], Linearisation]
"""theta (D,), a batch, and a linearisation whose memory may be taken."""


@dataclass(frozen=True)
class Shard:
    """The part of a global batch that one rank works on.

    Attributes
    ----------
    cases : Cases
    slices : list of (n,) int64
        Indices of the examples of each slice, perhaps none.
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
        Of its examples.
    batch : Any
        The examples.
    at : Linearisation or None
        None where the memory does not suffice.
    """

    indices: np.ndarray
    batch: Any
    at: Linearisation | None = None


class LocalSums:
    """Sums of a model over shards.

    Parameters
    ----------
    model : Model
    timer : Timer
        Gets the spans input, forward, gradient, linearise, products and those of losses.
    micro_batch : int, optional
        The maximum number of examples at a time; without it, what suits the backend, which for a model that
        checks itself is known once the first examples are. Halved where the memory does not suffice.
    memory_budget : float
        Bytes of linearisations that may be kept between products.
    rank : int
        For messages.
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
        self._passing: Linearisation | None = None  # used at once; the next one takes its memory
        self._slices: list[list[Piece]] = []  # linearised, between products
        self._theta: Array = None  # at which they are linearised: a copy
        self.rows_at_once = dict[tuple[str, int], int]()  # by request: examples whose rows one pass computes
        self._version = 1  # of these slices; an operator that knows an earlier one linearises again

    @property
    def linearisations(self) -> list[Linearisation]:
        """The linearisations that are in memory between products."""
        return [piece.at for part in self._slices for piece in part if piece.at is not None]

    def losses(self, thetas: Sequence[Array], shard: Shard, span: str) -> np.ndarray:
        """Sum the losses of each theta, (C,) float64; the timer books them under `span`."""
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
        """Return the layout of the message of `rows`, whose extra numbers end with those for factors."""
        factors = cast(KroneckerFactors, self.model).factor_sums.size if request.factors else 0
        return gradient_message(theta.size, ROW_NUMBERS + factors)

    def gradient(
        self, theta: Array, shard: Shard, scored: float, extra: Extra = "", part: Shard | None = None
    ) -> tuple[Array, int]:
        """Return the message of loss and gradient over `scored`, with the squares or factors asked for.

        The linearisations of the model must have these. `part` has further examples, whose linearisations
        stay in memory for products at this theta, as the version that is returned (without `part`: 0).
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
        """Return the sum of `share` over the slices, and the version of the linearisations of `part`, or 0.

        Parameters
        ----------
        share : callable
            (indices, pieces of `part`) of a slice -> a message.
        start : callable
            Called before the sum, also where it starts again for lack of memory.
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

        Where they are not to be stored (`RowRequest.stored`), S'S of every slice takes their place.
        `examples` counts those of the global batch; `part` and version are as for `gradient`.

        Raises
        ------
        UserError
            If the memory budget does not suffice.
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
                self._passing, self._slices = None, []  # their memory is needed
                self._version += 1

        message, version = self._with_part(theta, shard, part, share, start)
        return message, parts, version

    def products(
        self, theta: Array, shard: Shard, scored: float, structural: float = 0.0, version: int = 0
    ) -> Callable[[Array], Array]:
        """Linearise at theta; return v (D,) -> the message of (G + structural * S) v over `scored`.

        Linearisations are kept for the newest operator alone; an older one linearises again. Those that a
        gradient made on this shard, of this version, serve if they are in memory and at this theta.

        Raises
        ------
        UserError
            On all ranks alike, if the model has no structural damping and this is asked for.
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
        """Linearise at theta; return V (C, D) -> the message of V G V' (C, C), as `products` does for G v."""

        def start(v: Array | Directions) -> Array:
            return np.zeros(len(v) ** 2 + 1)

        def add(_: np.ndarray, at: Any, v: Array, message: Array) -> None:
            _project(at, v, 1 / scored, message[:-1].reshape(len(v), len(v)))
            self.model.backend.synchronize()

        return self._operator(theta, shard, self.model.linearise, version, start, add)

    def sketches(
        self, theta: Array, shard: Shard, scored: float, request: RowRequest, version: int = 0
    ) -> Callable[[Directions], Array]:
        """Linearise at theta; return V (C, D) -> the message of V S'S V' (C, C) over `scored` and a number.

        S has the rows of a sketch; none is kept. The number counts all rows.
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
        """Return p (D,) -> the message of J'H z'' over `scored`, z'' the second derivative along p.

        z'' is the difference of the tangents at theta and at theta + AHEAD p.
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
        """Linearise at theta; return the operator v -> the sum over the shard of what `add` adds.

        Parameters
        ----------
        version : int
            Of linearisations that serve if they are in memory and at this theta.
        start : callable
            Makes the empty message for v.
        add : callable
            (indices, linearisation, v, message): adds the part of a micro-batch.
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
        """Return v -> the sum of `share` over the slices, linearised where `version` is not in memory."""
        self._fit([theta], shard)
        mine = version

        def sums(v: Array) -> Array:
            nonlocal mine
            if mine != self._version:  # given up for lack of memory, or for another operator
                self._linearise(linearise, theta, shard)
                mine = self._version
            return pairwise_sum([share(part, v) for part in self._slices])

        return lambda v: self._shrinking(shard.count, lambda: sums(v))

    def _linearise(self, linearise: Linearise, theta: Array, shard: Shard, span: str = LINEARISE) -> None:
        """Linearise every slice as far as the memory budget allows."""
        before, left, size, cases = self.linearisations, self.memory_budget, 0, 1
        self._slices, self._theta, count = [], theta.copy(), 0
        self._version += 1
        for part in shard.slices:
            current: list[Piece] = []
            self._slices.append(current)
            for indices in self.cut(part):
                batch = self.take(shard, indices)
                if size * len(indices) > left * cases:  # if it is, per example, as large as the last one
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
        """Linearise on one micro-batch, in memory that the next call takes over."""
        self._passing = linearise(theta, batch, self._passing)
        return self._passing

    def _fit(self, thetas: Sequence[Array], shard: Shard) -> None:
        """Take the model's micro-batch where the user chose none: it checks its first examples before."""
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
        """Do this rank's share of the work, in smaller micro-batches where the memory does not suffice."""
        before = self.micro_batch
        while True:
            try:
                result = work()
                break
            except MemoryError:
                pass  # leave the handler first: its traceback holds arrays
            self._shrink(cases)
        if self.micro_batch < before:
            logging.getLogger(__name__).warning(
                "Note: rank %d went out of memory (%s) and goes on with micro-batches of %d sequences.",
                self.rank,
                self.model.backend.device,
                self.micro_batch,
            )
        return result

    def _shrink(self, count: int) -> None:
        """Release all memory; halve what may be kept, and the micro-batches of `count` examples."""
        most = min(self.micro_batch, count)
        if most <= 1:
            raise UserError(
                f"rank {self.rank} has not enough memory for a single sequence "
                f"({self.model.backend.device}): take shorter sequences or fewer units"
            )
        self.micro_batch = most // 2
        if self.linearisations:
            self.memory_budget = min(self.memory_budget, sum(at.nbytes for at in self.linearisations)) / 2
        self._passing, self._slices = None, []
        self._version += 1
        self.model.release()

    def cut(self, part: np.ndarray, most: int | None = None) -> list[np.ndarray]:
        """Divide a slice into micro-batches of nearly equal size, of `most` examples if this is smaller."""
        most = min(self.micro_batch, most or self.micro_batch)
        return np.array_split(part, -(-part.size // most)) if part.size else []

    def take(self, shard: Shard, indices: np.ndarray) -> Any:
        """Return the batch of some examples."""
        with self.timer.span(INPUT):
            return shard.cases.take(indices)

    def _pieces(self, shard: Shard, part: np.ndarray) -> Iterator[Piece]:
        """Yield the micro-batches of a slice."""
        for indices in self.cut(part):
            yield Piece(indices, self.take(shard, indices))

    def linearisations_of(
        self, pieces: Iterable[Piece], linearise: Linearise, theta: Array, span: str = FORWARD
    ) -> Iterator[tuple[np.ndarray, Any]]:
        """Yield the indices and the linearisation of each micro-batch, which lasts until the next one."""
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
