"""Square roots A of the Hessian H of a loss on the outputs, A A' = H, and residuals r with A r = gradient.

A loss may bring both (`hfmpi.models.losses.HasRoot`); otherwise H, which is small, is built column by column
and decomposed for every output: A = V sqrt(w), r = w^(-1/2) V' gradient for the eigenvalues w that are not
zero up to rounding.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np

from hfmpi.backends.base import Array
from hfmpi.backends.numpy import NumpyBackend
from hfmpi.models.losses import HasRoot, Loss

__all__ = ["Root", "root_of"]

COMPLETE = 1e-10
"""Relative part of a gradient that may be missing from A r by rounding, in float64."""


class Root(Protocol):
    """A for N outputs."""

    def apply(self, u: Array) -> Array:
        """Return A u of u (N * C, O), which may be overwritten."""

    def residuals(self, targets: Array, gradient: Array) -> tuple[Array, bool]:
        """Return r (N, O), and whether A r is all of the gradient (N, O) of the loss in the outputs."""


def root_of(loss: Loss, backend: NumpyBackend, cache: Array) -> Root:
    """Return the root that a loss brings, or one by decomposition; the cache (N, O) is as `value` left it."""
    if isinstance(loss, HasRoot):
        return _Known(loss, backend, cache)
    return _decomposed(loss, backend, cache)


@dataclass(frozen=True)
class _Known:
    """The root of a loss that brings it."""

    loss: HasRoot
    backend: NumpyBackend
    cache: Array

    def apply(self, u: Array) -> Array:
        """Return A u."""
        self.loss.root(self.backend, self.cache, u)
        return u

    def residuals(self, targets: Array, gradient: Array) -> tuple[Array, bool]:
        """Return r, of which A r is always the full gradient."""
        r = self.backend.xp.empty_like(self.cache)
        self.loss.residual(self.backend, self.cache, targets, r)
        return r, True


@dataclass(frozen=True)
class _Decomposed:
    """Eigenvectors V (N, O, O) and the roots of eigenvalues w (N, O), both float64."""

    backend: NumpyBackend
    vectors: Array
    roots: Array

    def apply(self, u: Array) -> Array:
        """Return V sqrt(w) u."""
        by_output = u.reshape(len(self.roots), -1, u.shape[-1]) * self.roots[:, None]
        return self.backend.xp.matmul(by_output, self.vectors.swapaxes(1, 2)).reshape(u.shape).astype(u.dtype)

    def residuals(self, targets: Array, gradient: Array) -> tuple[Array, bool]:
        """Return w^(-1/2) V' gradient, and whether it has all of the gradient."""
        xp, wide = self.backend.xp, gradient.astype(np.float64)[:, :, None]
        along = xp.matmul(self.vectors.swapaxes(1, 2), wide)[:, :, 0]
        r = xp.where(self.roots > 0, along / xp.where(self.roots > 0, self.roots, 1), 0)
        missing = xp.where(self.roots > 0, 0, along)
        bound = COMPLETE if gradient.dtype == np.float64 else np.finfo(np.float32).eps * 10
        complete = bool(float(abs(missing).max(initial=0)) <= bound * float(abs(along).max(initial=0)))
        return r.astype(gradient.dtype), complete


def _decomposed(loss: Loss, backend: NumpyBackend, cache: Array) -> _Decomposed:
    xp, (count, width) = backend.xp, cache.shape
    unit = xp.zeros((count, width, width), cache.dtype)
    unit.reshape(count, -1)[:, :: width + 1] = 1
    columns = unit.reshape(-1, width)
    loss.hessian(backend, cache, columns, 1.0)
    h = columns.reshape(count, width, width).astype(np.float64)
    values, vectors = xp.linalg.eigh((h + h.swapaxes(1, 2)) / 2)
    largest = values[:, -1:] if width else values
    floor = np.finfo(cache.dtype).eps * width * largest
    roots = xp.sqrt(xp.where(values > floor, values, 0))
    return _Decomposed(backend, vectors, roots)
