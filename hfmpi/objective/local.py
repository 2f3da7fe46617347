"""One rank's sums over its shard of a global batch: micro-batches, linearisations, and memory that runs out.

No communication. What a rank has to add up comes in slices, whose sums are added in a binary tree.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, Literal, NamedTuple, TypeVar, cast

import numpy as np

from hfmpi.backends.base import Array
from hfmpi.data.batches import Cases
from hfmpi.errors import UserError
from hfmpi.measure.spans import FORWARD, GRADIENT, INPUT, LINEARISE, PRODUCTS
from hfmpi.measure.timer import Timer
from hfmpi.models.base import (
    Columns,
    KroneckerFactors,
    Linearisation,
    Model,
    SquaredGradients,
    StructuralDamping,
)
from hfmpi.objective.messages import PARTS, message_sizes, pack
from hfmpi.optim.base import inner_product

__all__ = ["Beside", "LocalSums", "Shard", "pairwise"]

T = TypeVar("T")

Beside = Literal["", "squares", "factors"]
"""What a gradient's pass gives beside it: squares of single cases' gradients, or Kronecker factors."""

Linearise = Callable[[Array, Any, Any], Linearisation]
"""theta (D,), a batch, and a linearisation whose memory may be taken."""


@dataclass(frozen=True)
class Shard:
    """What one rank works on.

    Attributes
    ----------
    cases : Cases
    slices : list of (n,) int64
        Indices of the cases of each slice, perhaps none.
    """

    cases: Cases
    slices: list[np.ndarray]

    @property
    def count(self) -> int:
        """The number of cases."""
        return sum(part.size for part in self.slices)


class _Shared(NamedTuple):
    """What a gradient's pass keeps for products at the same point."""

    theta: Array
    shard: Shard
    slices: list[tuple[list[Linearisation], list[Any]]]
    kept: list[Linearisation]


def pairwise(parts: list[Array]) -> Array:
    """Add up arrays or numbers, as many as a power of two or one, in a binary tree of neighbours."""
    while len(parts) > 1:
        parts = [a + b for a, b in zip(parts[::2], parts[1::2], strict=True)]
    return parts[0]


class LocalSums:
    """Sums of a model over shards.

    Parameters
    ----------
    model : Model
    timer : Timer
        Gets the spans input, forward, gradient, linearise, products and those of losses.
    micro_batch : int, optional
        Most cases at a time; without it, what suits the backend. Halved where the memory does not suffice.
    memory_budget : float
        Bytes of linearisations that may be kept between products.
    rank : int
        For sentences.
    """

    def __init__(
        self, model: Model, timer: Timer, micro_batch: int | None, memory_budget: float, rank: int
    ) -> None:
        self.model = model
        self.timer = timer
        self.micro_batch = micro_batch or model.backend.micro_batch
        self.memory_budget = memory_budget
        self.rank = rank
        self._passing: Linearisation | None = None  # used up at once; its memory serves the next
        self._kept: list[Linearisation] = []  # between products
        self._shared: _Shared | None = None

    def losses(self, thetas: Sequence[Array], shard: Shard, span: str) -> np.ndarray:
        """Sum the losses of each theta, (C,) float64; the timer books them under `span`."""

        def share(part: np.ndarray) -> np.ndarray:
            losses = np.zeros(len(thetas))
            for indices in self._cut(part):
                batch = self._take(shard, indices)
                with self.timer.span(span):
                    losses += [self.model.loss(theta, batch) for theta in thetas]
            return losses

        return self._shrinking(shard.count, lambda: pairwise([share(part) for part in shard.slices]))

    def gradient(
        self, theta: Array, shard: Shard, scored: int, beside: Beside = "", part: Shard | None = None
    ) -> Array:
        """Give the message of loss and gradient over `scored`, and what is wanted beside it.

        The model must have it, then. `part` has the rest of the cases: those whose linearisations stay for
        the next products on it at this theta.
        """
        backend, size, model = self.model.backend, theta.size, self.model
        more, add = 0, cast("Callable[[Any, float, Array, Array], None] | None", None)
        if beside == "squares":
            more, add = size, cast(SquaredGradients, model).squared_gradients
        elif beside == "factors":
            having = cast(KroneckerFactors, model)
            more, add = having.factors_size, having.factored_gradient

        def pulled(at: Linearisation, message: Array) -> float:
            with self.timer.span(GRADIENT):
                if add is not None:
                    add(at, 1 / scored, message[:size], message[size : size + more])
                else:
                    at.gradient(1 / scored, message[:size])
                backend.synchronize()
            return at.loss / scored

        def share(own: np.ndarray, kept: list[Linearisation], others: list[Any]) -> Array:
            message = backend.xp.zeros(message_sizes(size, more)["gradient"], theta.dtype)
            loss = sum(pulled(at, message) for at in kept)
            for batch in chain(others, (self._take(shard, indices) for indices in self._cut(own))):
                with self.timer.span(FORWARD):
                    at = self._pass(model.linearise, theta, batch)
                loss += pulled(at, message)
            message[PARTS] = backend.to_device(pack(loss).astype(theta.dtype))
            return message

        def sums() -> Array:
            first: list[tuple[list[Linearisation], list[Any]]] = [([], []) for _ in shard.slices]
            if part is not None:
                first = self._linearise(model.linearise, theta, part, FORWARD)
                self._shared = _Shared(theta, part, first, self._kept)
            own = zip(shard.slices, first, strict=True)
            return pairwise([share(indices, *both) for indices, both in own])

        cases = shard.count + (part.count if part is not None else 0)
        return self._shrinking(cases, sums)

    def products(
        self, theta: Array, shard: Shard, scored: int, structural: float = 0.0, project: bool = False
    ) -> Callable[[Array], Array]:
        """Linearise at theta; give v -> the message of (G + structural * S) v over `scored`.

        v is (D,) or columns (C, D), which take one pass where the model has `Columns`. With `project`, the
        message is that of V G V' (C, C) for columns v.

        Linearisations are kept for the newest operator alone; an older one linearises anew. Those of the
        gradient just taken at this very theta serve, if it was told to keep them.

        Raises
        ------
        UserError
            On all ranks alike, if the model has no structural damping and this is asked for.
        """
        backend, model = self.model.backend, self.model
        linearise: Linearise = model.linearise
        if structural > 0:
            if not isinstance(model, StructuralDamping):
                raise UserError("the model has no structural damping: set structural_damping=0")
            linearise = model.linearise_structural
        at = self._shared
        if at and at.theta is theta and at.shard is shard and at.kept is self._kept and structural == 0:
            batches = at.slices
        else:
            batches = self._shrinking(shard.count, lambda: self._linearise(linearise, theta, shard))
        mine = self._kept

        def add(at: Any, v: Array, message: Array) -> None:
            with self.timer.span(PRODUCTS):
                if project:
                    _project(at, v, 1 / scored, message[:-1].reshape(len(v), len(v)))
                elif structural > 0:
                    at.structural_gauss_newton(v, 1 / scored, structural, message[:-1])
                else:
                    _multiply(at, v, 1 / scored, message[:-1].reshape(v.shape))
                backend.synchronize()

        def share(kept: list[Linearisation], others: list[Any], v: Array) -> Array:
            if project:
                message = np.zeros(message_sizes(len(v) ** 2)["product"])
            else:
                message = backend.xp.zeros(message_sizes(v.size)["product"], v.dtype)
            for at in kept:
                add(at, v, message)
            for batch in others:
                with self.timer.span(LINEARISE):
                    at = self._pass(linearise, theta, batch)
                add(at, v, message)
            return message

        def sums(v: Array) -> Array:
            nonlocal batches, mine
            if self._kept is not mine:  # given up for lack of memory, or for another operator
                batches, mine = [], []  # their memory serves the new ones
                batches = self._linearise(linearise, theta, shard)
                mine = self._kept
            return pairwise([share(kept, others, v) for kept, others in batches])

        return lambda v: self._shrinking(shard.count, lambda: sums(v))

    def _linearise(
        self, linearise: Linearise, theta: Array, shard: Shard, span: str = LINEARISE
    ) -> list[tuple[list[Linearisation], list[Any]]]:
        """Give, for every slice, the linearisations that fit the memory budget and the batches left over."""
        before, left, size, cases = self._kept, self.memory_budget, 0, 1
        self._kept = kept = list[Linearisation]()
        found = []
        for part in shard.slices:
            start, others = len(kept), []
            for indices in self._cut(part):
                batch = self._take(shard, indices)
                if size * len(indices) > left * cases:  # were it, for its cases, as large as the last one
                    others.append(batch)
                    continue
                reuse = before[len(kept)] if len(kept) < len(before) else self._passing
                with self.timer.span(span):
                    at = linearise(theta, batch, reuse)
                if reuse is self._passing:
                    self._passing = None
                size, cases = at.nbytes, len(indices)
                if size > left:
                    self._passing = at
                    others.append(batch)
                else:
                    left -= size
                    kept.append(at)
            found.append((kept[start:], others))
        return found

    def _pass(self, linearise: Linearise, theta: Array, batch: Any) -> Linearisation:
        """Linearise on one micro-batch, in memory that the next call takes over."""
        self._passing = linearise(theta, batch, self._passing)
        return self._passing

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
        """Give all memory back; keep half of what was kept, and halve the micro-batches of so many cases."""
        most = min(self.micro_batch, count)
        if most <= 1:
            raise UserError(
                f"rank {self.rank} has not enough memory for a single sequence "
                f"({self.model.backend.device}): take shorter sequences or fewer units"
            )
        self.micro_batch = most // 2
        if self._kept:
            self.memory_budget = min(self.memory_budget, sum(at.nbytes for at in self._kept)) / 2
        self._passing, self._kept, self._shared = None, [], None
        self.model.release()

    def _cut(self, part: np.ndarray) -> list[np.ndarray]:
        """Cut a slice into micro-batches of nearly one size."""
        return np.array_split(part, -(-part.size // self.micro_batch)) if part.size else []

    def _take(self, shard: Shard, indices: np.ndarray) -> Any:
        with self.timer.span(INPUT):
            return shard.cases.take(indices)


def _multiply(at: Linearisation, v: Array, scale: float, out: Array) -> None:
    """Add scale * G v to out, for v (D,) or columns (C, D)."""
    if v.ndim == 1:
        at.gauss_newton(v, scale, out)
    elif isinstance(at, Columns):
        at.columns(v, scale, out)
    else:
        for row, own in zip(v, out, strict=True):
            at.gauss_newton(row, scale, own)


def _project(at: Linearisation, v: Array, scale: float, out: np.ndarray) -> None:
    """Add scale * V G V' to out (C, C), for columns v (C, D)."""
    if isinstance(at, Columns):
        at.project(v, scale, out)
        return
    for row, own in zip(v, out, strict=True):
        product = v[0] * 0
        at.gauss_newton(row, scale, product)
        own += [inner_product(other, product) for other in v]
