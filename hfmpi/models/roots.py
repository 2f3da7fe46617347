"""Square roots A of the Hessian H of a loss in its outputs, A A' = H, and residuals r with A r = gradient.

A loss may define both (`hfmpi.models.losses.HasRoot`). Otherwise H, which is small, is computed column by
column and decomposed for every output: A = V sqrt(w), r = w^(-1/2) V' gradient for the eigenvalues w that are
not zero up to rounding.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np

from hfmpi.backends.base import Array
from hfmpi.backends.numpy import NumpyBackend
from hfmpi.errors import UserError
from hfmpi.models.losses import HasRoot, Loss

__all__ = ["Root", "apply_root", "root_of", "unit_columns"]

WIDEST = 256
"""The maximum number of outputs O for which H is decomposed: a decomposition takes O^3 operations."""

NUMBERS = 1 << 22
"""The approximate number of elements of H that are decomposed at once if decompositions are not stored."""


class Root(Protocol):
    """The square roots A of the Hessians of N outputs."""

    def apply(self, u: Array) -> Array:
        """Return A u for u (N * C, O), which may be overwritten."""

    def residuals(self, targets: Array, gradient: Array) -> Array:
        """Return r (N, O), where A r is the gradient (N, O) of the loss with respect to the outputs.

        If a part of the gradient is in the null space of H, A r is the gradient without that part.
        """


def root_of(loss: Loss, backend: NumpyBackend, cache: Array) -> Root:
    """Return the root that a loss defines, or else compute one by decomposition.

    Parameters
    ----------
    loss : Loss
    backend : NumpyBackend
    cache : (N, O)
        As written by `Loss.value`.

    Raises
    ------
    UserError
        If there are too many outputs for a decomposition.
    """
    if isinstance(loss, HasRoot):
        return _Known(loss, backend, cache)
    return _decomposed(loss, backend, cache)


def apply_root(loss: Loss, backend: NumpyBackend, cache: Array, u: Array) -> None:
    """Overwrite u (N, O) with A u; decompositions are computed in parts, which limits their memory."""
    count, width = cache.shape
    many = count if isinstance(loss, HasRoot) else max(1, NUMBERS // width**2)
    for start in range(0, count, many):
        part = slice(start, start + many)
        u[part] = root_of(loss, backend, cache[part]).apply(u[part])


@dataclass(frozen=True)
class _Known:
    """The root that a loss defines."""

    loss: HasRoot
    backend: NumpyBackend
    cache: Array

    def apply(self, u: Array) -> Array:
        """Return A u by the method `root` of the loss."""
        self.loss.root(self.backend, self.cache, u)
        return u

    def residuals(self, targets: Array, gradient: Array) -> Array:
        """Return r by the method `residual` of the loss."""
        r = self.backend.xp.empty_like(self.cache)
        self.loss.residual(self.backend, self.cache, targets, r)
        return r


@dataclass(frozen=True)
class _Decomposed:
    """Eigenvectors V (N, O, O) of H and the square roots of the eigenvalues w (N, O), both float64."""

    backend: NumpyBackend
    vectors: Array
    roots: Array

    def apply(self, u: Array) -> Array:
        """Return V sqrt(w) u."""
        by_output = u.reshape(len(self.roots), -1, u.shape[1]) * self.roots[:, None]
        return self.backend.xp.matmul(by_output, self.vectors.swapaxes(1, 2)).reshape(u.shape).astype(u.dtype)

    def residuals(self, targets: Array, gradient: Array) -> Array:
        """Return w^(-1/2) V' gradient, with 0 where w is 0."""
        xp, wide = self.backend.xp, gradient.astype(np.float64)[:, :, None]
        along = xp.matmul(self.vectors.swapaxes(1, 2), wide)[:, :, 0]
        r = xp.where(self.roots == 0, 0, along / xp.where(self.roots == 0, 1, self.roots))
        return r.astype(gradient.dtype)


def _decomposed(loss: Loss, backend: NumpyBackend, cache: Array) -> _Decomposed:
    xp, (count, width) = backend.xp, cache.shape
    if width > WIDEST:
        raise UserError(
            f"the loss {type(loss).__name__} has no method root, and the Hessian of {width:,} outputs is too "
            f"large to decompose (at most {WIDEST} outputs): define root and residual "
            "(hfmpi.models.losses.HasRoot)"
        )
    columns = unit_columns(backend, count, width).reshape(-1, width)
    loss.hessian(backend, cache, columns, 1.0)
    h = columns.reshape(count, width, width).astype(np.float64)
    h = (h + h.swapaxes(1, 2)) / 2
    known = xp.isfinite(h)
    values, vectors = xp.linalg.eigh(xp.where(known, h, 0))
    floor = np.finfo(cache.dtype).eps * width * values[:, -1:]
    roots = xp.sqrt(xp.where(values > floor, values, 0))
    wrong = xp.any(~known, axis=(1, 2))[:, None]
    return _Decomposed(backend, vectors, xp.where(wrong, np.nan, roots))


def unit_columns(backend: NumpyBackend, count: int, width: int) -> Array:
    """Return a unit matrix for each of `count` outputs, (count, O, O)."""
    unit = backend.xp.zeros((count, width, width), backend.dtype)
    unit.reshape(count, -1)[:, :: width + 1] = 1
    return unit
