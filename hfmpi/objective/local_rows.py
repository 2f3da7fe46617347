"""Rows of a model (hfmpi.optim.rows) for one slice of a shard, which are stored, or summed to S'S."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from hfmpi.backends.base import Array, Backend
from hfmpi.errors import UserError
from hfmpi.measure.spans import FORWARD, GRADIENT
from hfmpi.models.base import RowsFirst
from hfmpi.objective.messages import ROW_NUMBERS, pack
from hfmpi.optim.rows import RowRequest, check_side

if TYPE_CHECKING:
    from hfmpi.objective.local import LocalSums, Shard

__all__ = ["SliceRows", "signs", "slice_rows"]

AT_ONCE = 1 << 24
"""Maximum number of entries of rows per pass: more would take much memory besides the model's arrays."""

CONVERTED = 1 << 22
"""Number of entries of rows that are converted to float64 at a time."""


@dataclass
class SliceRows:
    """The rows S (n, D) of the examples of one slice, or S'S.

    Attributes
    ----------
    backend : Backend
    stored : (n, D) or None
        S, on the device; None if S'S replaces the rows.
    normal : (D, D) float64 or None
        S'S, on the device; None if the rows are stored.
    residuals : (n,) or None
        The residuals r, on the device, for rows of residuals; zeros for other kinds.
    """

    backend: Backend
    stored: Array = None
    normal: Array = None
    residuals: Array = None

    def times(self, v: Array) -> np.ndarray:
        """Compute S v (n,), float64 on the host."""
        wide = self.backend.to_device(v).astype(np.float64, copy=False)
        parts = [self.backend.to_host(self.backend.xp.matmul(part, wide)) for part in self._wide()]
        return np.concatenate([np.zeros(0), *parts])

    def transposed(self, a: np.ndarray) -> Array:
        """Compute S' a (D,) for a (n,), or (k, D) for (k, n); float64 on the device."""
        xp, size, start = self.backend.xp, self.stored.shape[1], 0
        weights = self.backend.to_device(a.astype(np.float64).reshape(-1, a.shape[-1]))
        total = xp.zeros((len(weights), size), np.float64)
        for part in self._wide():
            # Sequentially, so that the result for one vector does not depend on the number of vectors.
            for sums, each in zip(total, weights, strict=True):
                sums += xp.matmul(each[start : start + len(part)], part)
            start += len(part)
        return total.reshape(*a.shape[:-1], size)

    def product(self, v: Array) -> Array:
        """Compute S'S v (D,), in the dtype of the rows, which are read from memory only once."""
        xp, total = self.backend.xp, self.backend.xp.zeros_like(v)
        many = max(1, self.backend.each_numbers // v.size)
        for start in range(0, len(self.stored), many):
            part = self.stored[start : start + many]
            total += xp.matmul(xp.matmul(part, v), part)
        return total

    def squared(self) -> Array:
        """Compute S'S (D, D), float64 on the device."""
        if self.normal is not None:
            return self.normal
        total = self.backend.xp.zeros((self.stored.shape[1],) * 2, np.float64)
        for part in self._wide():
            total += self.backend.xp.matmul(part.T, part)
        return total

    def _wide(self) -> Iterator[Array]:
        """Yield the rows in float64, in parts."""
        many = max(1, CONVERTED // self.stored.shape[1])
        if self.stored.dtype == np.float64:
            many = max(1, len(self.stored))
        for start in range(0, len(self.stored), many):
            yield self.stored[start : start + many].astype(np.float64, copy=False)


def slice_rows(
    local: LocalSums,
    theta: Array,
    shard: Shard,
    indices: np.ndarray,
    scored: float,
    request: RowRequest,
    examples: int,
    out: dict[str, Array],
    first: list[tuple[np.ndarray, Any]],
) -> SliceRows:
    """Compute the rows of one slice of a shard, for examples with and without a stored linearisation.

    Parameters
    ----------
    local : LocalSums
    indices : (n,) int64
        Indices of the examples without a linearisation.
    scored : float
        N of the full global batch.
    examples : int
        Number of examples in the full global batch, which decides whether there are fewer rows than
        parameters.
    out : dict
        The arrays of the message, to which loss and gradient, divided by `scored`, are added.
    first : list
        The indices and the linearisation of each micro-batch that has one.
    """
    backend, model, size = local.model.backend, local.model, theta.size
    xp, part, key = backend.xp, SliceRows(backend), (request.kind, request.segments)
    linearise = model.linearise
    if isinstance(model, RowsFirst) and not request.factors:
        linearise = model.linearise_rows
    pieces = [*first, *((some, None) for some in local.cut(indices, local.rows_at_once.get(key)))]
    number, done, loss = sum(len(some) for some, _ in first) + len(indices), 0, 0.0
    part.stored, part.residuals = xp.zeros((0, size), theta.dtype), xp.zeros(0, theta.dtype)
    while pieces:
        some, at = pieces.pop(0)
        linearised = at is not None
        if not linearised:
            batch = local.take(shard, some)
            with local.timer.span(FORWARD):
                at = local.linearised(linearise, theta, batch)
        if request.kind == "residuals":
            count = int(at.residual_count())
        else:
            count = at.segment_count(request.segments)
        most = max(1, AT_ONCE // max(1, count * size))
        if len(some) > most and not linearised:  # the number of rows per example was not known before
            local.rows_at_once[key] = most
            pieces = [(some, None) for some in local.cut(indices, most)]
            continue
        if not done:
            if request.kind == "residuals":
                check_side(examples * count, size, request.largest_side)
            stored = request.stored or request.kind != "residuals" or examples * count < size
            segments = request.segments if stored else 1
            _check_memory(local, number * count * size if stored else 0, 0 if stored else size, segments)
            part.residuals = xp.zeros(number * count, theta.dtype)
            part.stored = xp.zeros((number * count, size), theta.dtype) if stored else None
            part.normal = None if stored else xp.zeros((size, size), np.float64)
            out["extra"][0] = count
        place = slice(done * count, (done + len(some)) * count)
        rows = part.stored[place] if stored else xp.zeros((len(some) * count, size), theta.dtype)
        with local.timer.span(GRADIENT):
            _add(at, request, some, scored, rows, part.residuals[place], out)
            if not stored:
                wide = rows.astype(np.float64, copy=False)
                part.normal += xp.matmul(wide.T, wide)
            backend.synchronize()
        loss, done = loss + float(at.loss) / scored, done + len(some)
    out["loss"][...] = backend.to_device(pack(loss, theta.dtype))
    return part


def _add(
    at: Any,
    request: RowRequest,
    indices: np.ndarray,
    scored: float,
    rows: Array,
    residuals: Array,
    out: dict[str, Array],
) -> None:
    """Compute the rows (B * C, D) and residuals (B * C,) of a micro-batch; add its gradient to `out`."""
    backend, kind = at.backend, rows.dtype.type
    by_example, xp = rows.reshape(len(indices), -1, rows.shape[1]), backend.xp
    if request.factors:
        at.factored_gradient(1 / scored, out["gradient"], out["extra"][ROW_NUMBERS:])
    if request.kind == "scores":
        at.scores(by_example.shape[1], by_example)
        if request.factors:
            return
        out["gradient"] += xp.matmul(xp.zeros(len(rows), rows.dtype) + kind(1 / scored), rows)
    elif request.kind == "residuals":
        complete = at.residual_rows(by_example, residuals.reshape(len(indices), -1))
        if complete:
            out["gradient"] += xp.matmul(residuals * kind(1 / scored), rows)
        else:
            at.gradient(1 / scored, out["gradient"])
        out["extra"][1] += kind(not complete)
    else:
        e = signs(request.seed, indices, at.residual_count()).astype(rows.dtype)
        at.sketch(backend.to_device(e), by_example.shape[1], by_example)
        if not request.factors:
            at.gradient(1 / scored, out["gradient"])


def _check_memory(local: LocalSums, entries: int, side: int, segments: int) -> None:
    """Raise a UserError if the rows, or a matrix S'S of this side, exceed the memory budget."""
    nbytes = entries * local.model.backend.dtype.itemsize + 8 * side * side
    if nbytes > local.memory_budget:
        what = f"a matrix of {side:,} x {side:,} numbers" if side else "the rows of this rank's examples"
        remedy = "" if side else "fewer examples (gradient_batch), more ranks, "
        if segments > 1:
            remedy = "fewer segments, " + remedy
        raise UserError(
            f"{what} would take {nbytes / 1e9:.3g} GB, but the memory budget is "
            f"{local.memory_budget / 1e9:.3g} GB: use {remedy}a smaller model or a larger memory_budget"
        )


def signs(seed: int, indices: np.ndarray, count: int) -> np.ndarray:
    """Return random signs (B, count), int8, that depend only on the seed and the index of each example.

    A sign is one bit of the SplitMix64 hash (Steele, Lea and Flood 2014) of seed, example and position.
    """
    state = _mixed(np.uint64(seed) + _mixed(indices.astype(np.uint64))[:, None])
    bits = _mixed(state + np.arange(1, count + 1, dtype=np.uint64) * GAMMA) >> np.uint64(63)
    e: np.ndarray = 2 * bits.astype(np.int8) - 1
    return e


GAMMA = np.uint64(0x9E3779B97F4A7C15)
"""The increment of SplitMix64."""


def _mixed(z: Any) -> Any:
    """Compute the output function of SplitMix64 for 64-bit numbers."""
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))
