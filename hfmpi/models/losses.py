"""Losses of a model's outputs: value, gradient and Hessian, separately for each row of outputs.

A loss is a function of the outputs z (N, O) of N scored steps and of their targets. The Gauss-Newton matrix
is J' H J with the Hessian H of the loss, so H must be positive semidefinite: the loss is convex in z. These
are the losses that match an output function (softmax, identity, logistic), so that the gradient is the output
less the target (Schraudolph 2002, Fast curvature matrix-vector products for second-order gradient descent).
"""

from __future__ import annotations

from typing import ClassVar, Protocol, runtime_checkable

import numpy as np

from hfmpi.backends.base import Array
from hfmpi.backends.numpy import NumpyBackend, by_sequence
from hfmpi.errors import UserError, shown

__all__ = ["LOSSES", "Bernoulli", "Loss", "SoftmaxCrossEntropy", "SquaredError", "choose"]


@runtime_checkable
class Loss(Protocol):
    """A convex loss of each row of outputs z (N, O).

    Attributes
    ----------
    symbols : bool
        Targets are symbols (N,), int32; else rows of numbers (N, O).
    """

    symbols: ClassVar[bool]

    def value(self, backend: NumpyBackend, outputs: Array, targets: Array) -> Array:
        """Return the loss of each row in nats, (N,) float64; overwrite outputs with what the others need."""

    def gradient(self, backend: NumpyBackend, cache: Array, targets: Array, scale: float, out: Array) -> None:
        """Fill out (N, O) with scale times the gradient; `cache` is what `value` wrote to the outputs."""

    def hessian(self, backend: NumpyBackend, cache: Array, u: Array, scale: float) -> None:
        """Overwrite u (N C, O), C rows for each of the outputs, with scale * H u."""


class SoftmaxCrossEntropy:
    """-log softmax(z)[target]; H u = p * (u - <p, u>) with p = softmax(z), which is the cache."""

    symbols: ClassVar[bool] = True

    def value(self, backend: NumpyBackend, outputs: Array, targets: Array) -> Array:
        """Return the loss of each row; outputs become probabilities."""
        return backend.softmax_loss(outputs, targets)

    def gradient(self, backend: NumpyBackend, cache: Array, targets: Array, scale: float, out: Array) -> None:
        """Fill out with scale * (p - onehot(targets))."""
        backend.softmax_gradient(cache, targets, scale, out)

    def hessian(self, backend: NumpyBackend, cache: Array, u: Array, scale: float) -> None:
        """Overwrite u with scale * p * (u - <p, u>)."""
        backend.softmax_hessian(cache, u, scale)


class SquaredError:
    """Half the squared distance of z and target; H is the identity. The cache has the differences."""

    symbols: ClassVar[bool] = False

    def value(self, backend: NumpyBackend, outputs: Array, targets: Array) -> Array:
        """Return the loss of each row; outputs become differences."""
        outputs -= targets
        wide = outputs.astype(np.float64)
        return 0.5 * (wide * wide).sum(axis=1)

    def gradient(self, backend: NumpyBackend, cache: Array, targets: Array, scale: float, out: Array) -> None:
        """Fill out with scale * (z - target)."""
        backend.xp.multiply(cache, cache.dtype.type(scale), out=out)

    def hessian(self, backend: NumpyBackend, cache: Array, u: Array, scale: float) -> None:
        """Overwrite u with scale * u."""
        u *= u.dtype.type(scale)


class Bernoulli:
    """log(1 + exp(z)) - z * target, summed over outputs; targets in [0, 1]; H u = p (1 - p) u.

    p = 1 / (1 + exp(-z)), the cache, is the probability of a 1.
    """

    symbols: ClassVar[bool] = False

    def value(self, backend: NumpyBackend, outputs: Array, targets: Array) -> Array:
        """Return the loss of each row; outputs become probabilities."""
        xp, wide = backend.xp, outputs.astype(np.float64)
        least = xp.log1p(xp.exp(-abs(wide)))  # log(1 + exp(z)) = max(z, 0) + log(1 + exp(-|z|))
        losses = (xp.maximum(wide, 0) + least - wide * targets).sum(axis=1)
        outputs[...] = backend.sigmoid(outputs)
        return losses

    def gradient(self, backend: NumpyBackend, cache: Array, targets: Array, scale: float, out: Array) -> None:
        """Fill out with scale * (p - target)."""
        backend.xp.subtract(cache, targets, out=out)
        out *= out.dtype.type(scale)

    def hessian(self, backend: NumpyBackend, cache: Array, u: Array, scale: float) -> None:
        """Overwrite u with scale * p (1 - p) u."""
        by_output = by_sequence(u, len(cache))
        by_output *= (cache * (1 - cache) * u.dtype.type(scale))[:, None]


LOSSES: dict[str, Loss] = {
    "cross-entropy": SoftmaxCrossEntropy(),
    "squares": SquaredError(),
    "bernoulli": Bernoulli(),
}
"""The losses by name."""


def choose(loss: str | Loss) -> Loss:
    """Return the loss with this name, or a loss object as it is.

    Raises
    ------
    UserError
        If no loss has this name, or the object is not a loss.
    """
    if not isinstance(loss, str):
        if isinstance(loss, type) or not isinstance(loss, Loss):
            raise UserError(
                f"loss must be one of {', '.join(LOSSES)} or an object like them, not {shown(loss)}"
            )
        return loss
    if loss not in LOSSES:
        raise UserError(f"there is no loss {loss!r}; choose one of {', '.join(LOSSES)}")
    return LOSSES[loss]
