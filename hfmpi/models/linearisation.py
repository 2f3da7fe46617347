"""A loss over the passes J v and J' u of a model: gradient, squares, factors, G v and V G V'.

A model supplies `Passes`: its outputs z as a function of theta, linearised at one theta on one batch. This
module adds the loss, with its gradient and Hessian H with respect to the outputs, mask and weights, once for
all models. The Gauss-Newton product is

    v -> J v -> H (J v) -> J' (H (J v)).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np

from hfmpi.backends.base import Array
from hfmpi.backends.numpy import NumpyBackend, by_sequence
from hfmpi.models.losses import Loss
from hfmpi.models.roots import apply_root, root_of, unit_columns
from hfmpi.optim.layout import Along, Directions

__all__ = ["LossLinearisation", "Passes"]

COTANGENTS = 1 << 22
"""The maximum number of elements in the cotangents of residuals that one adjoint pass processes."""

COMPLETE = 1000
"""The largest rounding error of A r as a gradient, in units of the machine epsilon of its dtype."""


class Passes(Protocol):
    """The outputs z (N, O) of a model, linearised at one theta on one batch.

    A pass processes one direction v (D,) or C of them (C, D). With C directions the tangents and cotangents
    of the outputs are (N * C, O), where the C rows of an output are adjacent.

    Attributes
    ----------
    examples : int
        B, the number of examples.
    by_step : bool
        Whether outputs are sorted by step: the outputs of all examples at the first step, then at the next
        one. Otherwise they are sorted by example: all steps of the first example, then of the next one.
    """

    @property
    def examples(self) -> int:
        """B, the number of examples."""

    @property
    def by_step(self) -> bool:
        """Whether outputs are sorted by step."""

    @property
    def nbytes(self) -> int:
        """The number of bytes that the linearisation occupies in the device's memory."""

    def jvp(self, v: Array) -> Array:
        """Return J v (N * C, O), which callers may overwrite; the next pass of the model overwrites it."""

    def vjp(self, u: Array, out: Array) -> None:
        """Add J' u to out, (D,) or (C, D), for cotangents u (N * C, O)."""

    def squares(self, u: Array, out: Array, squares: Array) -> None:
        """Add J' u of u (N, O) to out (D,), and the sum of the squares of each example's part to squares."""

    def factors(self, u: Array, out: Array, sums: Array, weights: Array | None = None) -> None:
        """Add J' u of u (N, O) to out (D,), and the sums of `hfmpi.models.factors` to sums.

        With `weights` (B,) each example counts that many times in the sums. The caller has multiplied u by
        the square roots of the weights. So products of two gradients include the weights already, but
        products of inputs z must be multiplied by them.
        """

    def rows(self, u: Array, out: Array) -> None:
        """Fill out (B, C, D) with J' u of every example separately, for each of C cotangents u (N * C, O).

        The stride between examples of out may exceed C * D elements; the last axis is contiguous.
        """

    def rows_along(self, u: Array, several: int, along: Along) -> Array:
        """Return V S' (k, B, C) for the rows S that `rows` computes for C = `several` cotangents.

        S is computed in parts and not stored.
        """


@dataclass
class LossLinearisation:
    """A loss of the outputs of `Passes`, which satisfies `hfmpi.models.base.Linearisation` and capabilities.

    Attributes
    ----------
    passes : Passes
    output_loss : Loss
    backend : NumpyBackend
    cache : (N, O)
        The cache that the loss computed from the outputs for its derivatives, such as probabilities.
    targets : (N,) int32, or (N, O)
    mask : (N, 1) or None
        The weight of each output, 0 where it is not scored.
    loss : float
        The loss summed over the scored outputs, in nats.
    block_rows : int
        The number of rows (outputs times directions) that `project` processes at a time, few enough for the
        processor's cache.
    directions : int
        The maximum number of directions in one pass; more directions take several passes.
    weights : (B,) or None
        The weights of the examples in squared gradients and Kronecker factors, on the device; see
        `hfmpi.models.batch.example_weights`. None: all are 1.
    ready : (D,) or None
        The gradient of the summed loss, if the model has computed it together with the outputs.
    """

    passes: Passes
    output_loss: Loss
    backend: NumpyBackend
    cache: Array
    targets: Array
    mask: Array | None
    loss: float
    block_rows: int
    directions: int = 16
    weights: Array | None = None
    ready: Array | None = None

    @property
    def nbytes(self) -> int:
        """The number of bytes that the linearisation occupies in the device's memory."""
        return self.passes.nbytes

    def jvp(self, v: Array | Directions) -> Array:
        """Return J v: (N, O) for v (D,), or (N * C, O) for v (C, D).

        The result is valid until the next pass of the model. C directions are processed in parts whose
        tangents fit in the processor's cache.
        """
        if v.ndim == 1:
            return self.passes.jvp(v)
        many, (count, width) = len(v), self.cache.shape
        number = -(-many // self.directions)
        parts = [slice(many * i // number, many * (i + 1) // number) for i in range(number)]
        if len(parts) == 1:
            return self.passes.jvp(self._rows(v, parts[0]))
        outputs = self.backend.workspace("tangents", (count, many, width))
        for part in parts:
            outputs[:, part] = by_sequence(self.passes.jvp(self._rows(v, part)), count)
        return outputs.reshape(-1, width)

    def vjp(self, u: Array, out: Array) -> None:
        """Add J' u to out: (D,) for u (N, O), or (C, D) for u (N * C, O)."""
        self.passes.vjp(u, out)

    def gradient(self, scale: float, out: Array) -> None:
        """Add scale times the gradient of the summed loss to out (D,)."""
        if self.ready is not None:
            out += self.ready * out.dtype.type(scale)
            return
        self.passes.vjp(self._loss_gradient(scale), out)

    def squared_gradients(self, scale: float, out: Array, squares: Array) -> None:
        """Add the scaled gradient to out (D,), and the sum of the examples' squared gradients to squares."""
        if self.weights is None:
            self.passes.squares(self._loss_gradient(scale), out, squares)
            return
        self.gradient(scale, out)
        self.passes.squares(self._weighted_once(scale), self.backend.xp.zeros_like(out), squares)

    def factored_gradient(self, scale: float, out: Array, sums: Array) -> None:
        """Add the scaled gradient to out (D,), and the sums of the Kronecker factors to sums."""
        if self.weights is None:
            self.passes.factors(self._loss_gradient(scale), out, sums)
            return
        self.gradient(scale, out)
        unused = self.backend.xp.zeros_like(out)
        self.passes.factors(self._weighted_once(scale), unused, sums, self.weights)

    def gauss_newton(self, v: Array, scale: float, out: Array) -> None:
        """Add scale * J' H J v to out (D,)."""
        self.pulled_back(self.passes.jvp(v), scale, out)

    def pulled_back(self, u: Array, scale: float, out: Array) -> None:
        """Add scale * J' H u to out (D,); u (N, O) is overwritten."""
        self.hessian(u, slice(None), scale)
        self.passes.vjp(u, out)

    def project(self, v: Array | Directions, scale: float, out: np.ndarray) -> None:
        """Add scale * V J' H J V' for V (C, D) to out (C, C), float64 on the host; this takes J V but no J'.

        Outputs are processed in blocks of rows that fit in the processor's cache. They are multiplied in
        float64, because for nearly parallel directions the sums cancel down to their rounding errors.
        """
        tangents, count, directions = self.jvp(v), len(self.cache), len(v)
        step = max(1, self.block_rows // directions)
        for start in range(0, count, step):
            block = slice(start, min(start + step, count))
            u = tangents[start * directions : block.stop * directions]
            shape = (2, directions, u.size // directions)
            before, after = self.backend.workspace("projected", shape, np.float64)
            _by_direction(u, before)
            self.hessian(u, block, scale)
            _by_direction(u, after)
            out += self.backend.to_host(self.backend.xp.matmul(before, after.T))

    def _rows(self, v: Array | Directions, part: slice) -> Array:
        """Return some of the directions, (C, D); `Directions` are overwritten by the next call."""
        if not isinstance(v, Directions):
            return v[part]
        rows = self.backend.workspace("directions", (part.stop - part.start, v.shape[1]))
        v.fill(part.start, rows)
        return rows

    def residual_count(self) -> int:
        """Return T * O, the number of rows of residuals per example."""
        return int(self.cache.size) // max(1, self.passes.examples)

    def segment_count(self, segments: int) -> int:
        """Return K, the number of segments per example: `segments`, but at most the number of its steps."""
        return max(1, min(segments, self.residual_count() // int(self.cache.shape[1])))

    def scores(self, segments: int, out: Array) -> None:
        """Fill out (B, K, D) with the gradient of the summed loss of each of K = `segments` segments."""
        self.passes.rows(self._by_segment(self._loss_gradient(1.0), segments), out)

    def sketch(self, signs: Array, segments: int, out: Array) -> None:
        """Fill out (B, K, D) with J' A e of each segment, for signs e (B, T * O) of 1 and -1; A A' = H."""
        self.passes.rows(self._by_segment(self._random(signs), segments), out)

    def sketch_along(self, signs: Array, segments: int, along: Along) -> Array:
        """Return V S' (k, B * K) for the rows S that `sketch` computes, without storing S."""
        u = self._by_segment(self._random(signs), segments)
        return self.passes.rows_along(u, segments, along).reshape(len(along), -1)

    def _random(self, signs: Array) -> Array:
        """Return A e (N, O) for signs e (B, T * O)."""
        u = self.backend.workspace("outputs", self.cache.shape)
        self._by_example(u)[...] = signs.reshape(self.passes.examples, -1, u.shape[1])
        apply_root(self.output_loss, self.backend, self.cache, u)
        if self.mask is not None:
            u *= self.backend.xp.sqrt(self.mask)
        return u

    def residual_rows(self, out: Array, residuals: Array) -> bool:
        """Fill out (B, T * O, D) with the rows of A' J, and residuals (B, T * O) with r; see `Rows`."""
        xp, (count, width), examples = self.backend.xp, self.cache.shape, self.passes.examples
        steps = self.residual_count() // width
        root = root_of(self.output_loss, self.backend, self.cache)
        gradient = self._output_gradient(1.0)
        r = root.residuals(self.targets, gradient)
        each = unit_columns(self.backend, count, width)  # becomes the cotangents A e_1, A e_2, ... per output
        each = root.apply(each.reshape(-1, width)).reshape(count, width, width)
        if self.mask is not None:
            weight = xp.sqrt(self.mask)
            r, each, gradient = r * weight, each * weight[:, :, None], gradient * weight
        residuals[...] = self._by_example(r).reshape(examples, -1)
        missing = float(abs(root.apply(r) - gradient).max())
        complete = missing <= COMPLETE * float(np.finfo(self.cache.dtype).eps * abs(gradient).max())
        many = steps if steps == 1 else max(1, COTANGENTS // max(1, each.size))
        for first in range(0, steps, many):
            last = min(first + many, steps)
            u = xp.zeros((count, last - first, width, width), self.backend.dtype)
            by_example, source = self._by_example(u), self._by_example(each)
            for t in range(first, last):
                by_example[:, t, t - first] = source[:, t]
            self.passes.rows(u.reshape(-1, width), out[:, first * width : last * width])
        return complete

    def _by_segment(self, u: Array, segments: int) -> Array:
        """Split u (N, O) into cotangents (N * K, O), each of which is zero outside the steps of a segment."""
        if segments == 1:
            return u
        split = self.backend.xp.zeros((len(u), segments, u.shape[1]), u.dtype)
        by_example, source = self._by_example(split), self._by_example(u)
        steps = source.shape[1]
        for k in range(segments):
            part = slice(steps * k // segments, steps * (k + 1) // segments)
            by_example[:, part, k] = source[:, part]
        return split.reshape(-1, u.shape[1])

    def _by_example(self, array: Array) -> Array:
        """Return an array (N, ...) of outputs as a view (B, T, ...)."""
        examples = self.passes.examples
        if self.passes.by_step:
            return array.reshape(-1, examples, *array.shape[1:]).swapaxes(0, 1)
        return array.reshape(examples, -1, *array.shape[1:])

    def hessian(self, u: Array, rows: slice, scale: float) -> None:
        """Overwrite u (N * C, O) with scale * H u, for the N outputs `rows`."""
        self.output_loss.hessian(self.backend, self.cache[rows], u, scale)
        if self.mask is not None:
            by_output = by_sequence(u, len(self.mask[rows]))
            by_output *= self.mask[rows][:, None]

    def _loss_gradient(self, scale: float) -> Array:
        """Return scale times the gradient (N, O) of the weighted loss with respect to the outputs."""
        u = self._output_gradient(scale)
        if self.mask is not None:
            u *= self.mask
        return u

    def _output_gradient(self, scale: float) -> Array:
        """Return scale times the gradient (N, O) of the unweighted loss with respect to the outputs."""
        u = self.backend.workspace("outputs", self.cache.shape)
        self.output_loss.gradient(self.backend, self.cache, self.targets, scale, u)
        return u

    def _weighted_once(self, scale: float) -> Array:
        """Return `_loss_gradient` divided by sqrt(weight), so that its squares contain each weight once."""
        u, xp, weights = self._loss_gradient(scale), self.backend.xp, self.weights
        by_example = self._by_example(u)
        roots = xp.sqrt(xp.where(weights == 0, 1, weights))
        by_example /= roots[:, None, None]
        return u


def _by_direction(rows: Array, out: Array) -> None:
    """Copy rows (N * C, O) to out (C, N * O)."""
    by_output = by_sequence(rows, len(rows) // len(out))
    out.reshape(len(out), -1, rows.shape[1])[...] = by_output.transpose(1, 0, 2)
