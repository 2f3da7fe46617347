"""Losses with parameters: label smoothing, and weights of positive targets."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from hfmpi.backends.base import Array
from hfmpi.backends.numpy import NumpyBackend, by_sequence
from hfmpi.errors import UserError
from hfmpi.models.losses import LEAST, SoftmaxCrossEntropy

__all__ = ["SmoothedCrossEntropy", "WeightedBernoulli"]


@dataclass(frozen=True)
class SmoothedCrossEntropy(SoftmaxCrossEntropy):
    """Cross-entropy with label smoothing (Szegedy et al. 2016, section 7).

    The loss is -sum_k q_k log softmax(z)_k with q = (1 - s) onehot(target) + s / O. Its gradient is p - q,
    and its Hessian is that of the cross-entropy. The cache is p = softmax(z).

    Attributes
    ----------
    smoothing : float
        s in [0, 1].

    Examples
    --------
    >>> loss = SmoothedCrossEntropy(0.1)  # doctest: +SKIP
    >>> model = hfmpi.TorchModel(module, loss)  # doctest: +SKIP
    """

    smoothing: float

    def __post_init__(self) -> None:
        if not 0 <= self.smoothing <= 1:
            raise UserError(f"label smoothing must be in [0, 1], not {self.smoothing}")

    @property
    def form(self) -> str:
        """The value of s, as text."""
        return f"smoothing {self.smoothing}"

    def value(self, backend: NumpyBackend, outputs: Array, targets: Array) -> Array:
        """Return the loss of each row; overwrite the outputs with p."""
        chosen = outputs[backend.xp.arange(len(targets)), targets].astype(np.float64)
        mean = outputs.astype(np.float64).sum(axis=1) / outputs.shape[1]
        # Both cross-entropies have the same log-sum-exp, so that the one with the uniform distribution 1 / O
        # is larger by z[target] - mean(z).
        return super().value(backend, outputs, targets) + self.smoothing * (chosen - mean)

    def gradient(self, backend: NumpyBackend, cache: Array, targets: Array, scale: float, out: Array) -> None:
        """Fill out with scale * (p - q)."""
        super().gradient(backend, cache, targets, scale, out)
        kind = out.dtype.type
        out -= kind(scale * self.smoothing / out.shape[1])
        out[backend.xp.arange(len(targets)), targets] += kind(scale * self.smoothing)

    def residual(self, backend: NumpyBackend, cache: Array, targets: Array, out: Array) -> None:
        """Fill out with sqrt(p) - q / sqrt(p); see `hfmpi.models.losses.LEAST`."""
        xp, kind = backend.xp, cache.dtype.type
        root = xp.sqrt(xp.maximum(cache, kind(LEAST)))
        out[...] = root - kind(self.smoothing / out.shape[1]) / root
        rows = xp.arange(len(cache))
        out[rows, targets] -= kind(1 - self.smoothing) / root[rows, targets]


@dataclass(frozen=True)
class WeightedBernoulli:
    """Binary cross-entropy with weights of the positive targets.

    The loss is w y log(1 + exp(-z)) + (1 - y) log(1 + exp(z)), summed over O outputs, with targets y of 0 or
    1. The cache is the gradient: its sign is that of 1 - 2 y, so that the Hessian needs no targets.

    Attributes
    ----------
    weights : tuple of float
        w, one positive number for each output, or one for all.

    Examples
    --------
    >>> loss = WeightedBernoulli((3.0,))  # positives count three times  # doctest: +SKIP
    >>> model = hfmpi.TorchModel(module, loss)  # doctest: +SKIP
    """

    weights: tuple[float, ...]
    symbols: ClassVar[bool] = False
    bounds: ClassVar[tuple[float, float]] = 0.0, 1.0

    def __post_init__(self) -> None:
        if not self.weights or not all(0 < weight < float("inf") for weight in self.weights):
            raise UserError(f"weights of positive targets must be positive numbers, not {self.weights}")

    @property
    def form(self) -> str:
        """The weights, as text."""
        return f"weights {self.weights}"

    def value(self, backend: NumpyBackend, outputs: Array, targets: Array) -> Array:
        """Return the loss of each row; overwrite the outputs with the gradient."""
        xp, width = backend.xp, outputs.shape[1]
        if len(self.weights) not in (1, width):
            raise UserError(
                f"the loss has weights for {len(self.weights)} outputs, but the model has {width} outputs: "
                "pass one weight for each output, or one for all"
            )
        positive = targets == 1
        if bool(xp.any(targets * (targets - 1) != 0)):
            raise UserError("the targets must be 0 or 1, because the loss has weights for positive targets")
        w = self._weights(backend, np.dtype(np.float64))
        wide = outputs.astype(np.float64)
        signed = xp.where(positive, -wide, wide)  # the loss is log(1 + exp(signed)), times w if positive
        losses = xp.maximum(signed, 0) + xp.log1p(xp.exp(-abs(signed)))
        losses = xp.where(positive, w * losses, losses).sum(axis=1)
        p = backend.sigmoid(xp.where(positive, -outputs, outputs))
        outputs[...] = xp.where(positive, -self._weights(backend, outputs.dtype) * p, p)
        return losses

    def gradient(self, backend: NumpyBackend, cache: Array, targets: Array, scale: float, out: Array) -> None:
        """Fill out with scale times the gradient, which is the cache."""
        backend.xp.multiply(cache, cache.dtype.type(scale), out=out)

    def hessian(self, backend: NumpyBackend, cache: Array, u: Array, scale: float) -> None:
        """Overwrite u with scale * H u; H is diagonal."""
        by_output = by_sequence(u, len(cache))
        by_output *= (self._curvature(backend, cache) * u.dtype.type(scale))[:, None]

    def root(self, backend: NumpyBackend, cache: Array, u: Array) -> None:
        """Overwrite u with sqrt(H) u; see `hfmpi.models.losses.LEAST`."""
        by_output = by_sequence(u, len(cache))
        by_output *= self._root(backend, cache)[:, None]

    def residual(self, backend: NumpyBackend, cache: Array, targets: Array, out: Array) -> None:
        """Fill out with the gradient divided by sqrt(H)."""
        out[...] = cache / self._root(backend, cache)

    def _curvature(self, backend: NumpyBackend, cache: Array) -> Array:
        """Return the diagonal of H, (N, O): p (1 - p), times w if the target is 1."""
        xp, w = backend.xp, self._weights(backend, cache.dtype)
        p = xp.where(cache > 0, cache, -cache / w)
        return p * xp.maximum(1 - p, 0) * xp.where(cache > 0, 1, w)  # rounding may leave p larger than 1

    def _root(self, backend: NumpyBackend, cache: Array) -> Array:
        curvature = self._curvature(backend, cache)
        return backend.xp.sqrt(backend.xp.maximum(curvature, curvature.dtype.type(LEAST)))

    def _weights(self, backend: NumpyBackend, dtype: np.dtype) -> Array:
        return backend.xp.asarray(np.array(self.weights, dtype))
