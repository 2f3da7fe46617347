"""A loss over the passes J v and J' u of a model: gradient, squares, factors, G v and V G V', written once.

What a model supplies are `Passes`: its outputs z as a function of theta, linearised at one theta on one
batch. Everything that the loss adds, its gradient and Hessian H on the outputs, mask and weights, is here. So
the Gauss-Newton product reads

    v -> J v -> H (J v) -> J' (H (J v)).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np

from hfmpi.backends.base import Array
from hfmpi.backends.numpy import NumpyBackend, by_sequence
from hfmpi.models.losses import Loss

__all__ = ["LossLinearisation", "Passes"]


class Passes(Protocol):
    """The outputs z (N, O) of a model, linearised at one theta on one batch.

    A pass takes one direction v (D,) or C of them (C, D). With C directions tangents and cotangents of the
    outputs are (N * C, O): the C rows of an output follow one another.
    """

    @property
    def nbytes(self) -> int:
        """The bytes that the linearisation occupies in the device's memory."""

    def jvp(self, v: Array) -> Array:
        """Return J v (N * C, O), which may be overwritten and lasts until the next pass of the model."""

    def vjp(self, u: Array, out: Array) -> None:
        """Add J' u of u (N * C, O) to out (D,) or (C, D)."""

    def squares(self, u: Array, out: Array, squares: Array) -> None:
        """Add J' u of u (N, O) to out (D,), and its squares, summed over examples, to squares (D,)."""

    def factors(self, u: Array, out: Array, sums: Array) -> None:
        """Add J' u of u (N, O) to out (D,), and the sums of `hfmpi.models.factors` to sums."""


@dataclass
class LossLinearisation:
    """A loss of the outputs of `Passes`; satisfies `hfmpi.models.base.Linearisation` and its capabilities.

    Attributes
    ----------
    passes : Passes
    output_loss : Loss
    backend : NumpyBackend
    cache : (N, O)
        What the loss computed from the outputs for its derivatives, such as probabilities.
    targets : (N,) int32, or (N, O)
    mask : (N, 1) or None
        1 where an output is scored, 0 where not.
    loss : float
        Summed over the scored outputs, nats.
    block_rows : int
        How many rows of outputs times directions `project` processes at a time: few enough for the cache.
    """

    passes: Passes
    output_loss: Loss
    backend: NumpyBackend
    cache: Array
    targets: Array
    mask: Array | None
    loss: float
    block_rows: int

    @property
    def nbytes(self) -> int:
        """The bytes that the linearisation occupies in the device's memory."""
        return self.passes.nbytes

    def jvp(self, v: Array) -> Array:
        """Return J v (N, O) of v (D,), or (N * C, O) of (C, D), which lasts until the model's next pass."""
        return self.passes.jvp(v)

    def vjp(self, u: Array, out: Array) -> None:
        """Add J' u to out: (D,) of u (N, O), or (C, D) of (N * C, O)."""
        self.passes.vjp(u, out)

    def gradient(self, scale: float, out: Array) -> None:
        """Add scale times the gradient of the summed loss to out (D,)."""
        self.passes.vjp(self._loss_gradient(scale), out)

    def squared_gradients(self, scale: float, out: Array, squares: Array) -> None:
        """Add what `gradient` adds to out (D,), and the sum over examples of its squares to squares (D,)."""
        self.passes.squares(self._loss_gradient(scale), out, squares)

    def factored_gradient(self, scale: float, out: Array, sums: Array) -> None:
        """Add what `gradient` adds to out (D,), and the sums of the Kronecker factors to sums."""
        self.passes.factors(self._loss_gradient(scale), out, sums)

    def gauss_newton(self, v: Array, scale: float, out: Array) -> None:
        """Add scale * J' H J v to out (D,)."""
        u = self.passes.jvp(v)
        self.hessian(u, slice(None), scale)
        self.passes.vjp(u, out)

    def project(self, v: Array, scale: float, out: np.ndarray) -> None:
        """Add scale * V J' H J V' of V (C, D) to out (C, C), float64 on the host; one pass J V.

        Outputs are processed in blocks of rows, which stay in the cache. They are multiplied in float64:
        along directions that are nearly parallel little is left of the sums but their rounding.
        """
        outputs, directions, count = self.passes.jvp(v), len(v), len(self.cache)
        rows = max(1, self.block_rows // directions)
        for start in range(0, count, rows):
            block = slice(start, min(start + rows, count))
            u = outputs[block.start * directions : block.stop * directions]
            shape = (2, directions, u.size // directions)
            before, after = self.backend.workspace("projected", shape, np.float64)
            _by_direction(u, before)
            self.hessian(u, block, scale)
            _by_direction(u, after)
            out += self.backend.to_host(self.backend.xp.matmul(before, after.T))

    def hessian(self, u: Array, rows: slice, scale: float) -> None:
        """Overwrite u (N * C, O) with scale * H u, for the N outputs `rows`."""
        self.output_loss.hessian(self.backend, self.cache[rows], u, scale)
        if self.mask is not None:
            by_output = by_sequence(u, len(self.mask[rows]))
            by_output *= self.mask[rows][:, None]

    def _loss_gradient(self, scale: float) -> Array:
        """Return scale times the gradient of the loss in the outputs, (N, O)."""
        u = self.backend.workspace("outputs", self.cache.shape)
        self.output_loss.gradient(self.backend, self.cache, self.targets, scale, u)
        if self.mask is not None:
            u *= self.mask
        return u


def _by_direction(rows: Array, out: Array) -> None:
    """Copy rows (N * C, O) to out (C, N * O)."""
    by_output = by_sequence(rows, len(rows) // len(out))
    out.reshape(len(out), -1, rows.shape[1])[...] = by_output.transpose(1, 0, 2)
