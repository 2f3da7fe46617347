"""The gradients of hfmpi's losses in JAX, so that one compiled function returns outputs and gradient.

A user-defined loss is written for arrays of NumPy: its gradient is computed between two compiled functions.
"""

from __future__ import annotations

from typing import Any

import jax
from jax import numpy as jnp

from hfmpi.models.losses import Bernoulli, Loss, SoftmaxCrossEntropy, SquaredError

__all__ = ["has_gradient", "loss_gradient"]


def has_gradient(loss: Loss) -> bool:
    """Return whether `loss_gradient` computes the gradient of a loss: not of a class derived from hfmpi's."""
    return type(loss) in _GRADIENTS


def loss_gradient(loss: Loss, z: Any, targets: Any) -> Any:
    """Return the gradient of the loss of each row in the outputs z (N, O), as `Loss.gradient` does."""
    return _GRADIENTS[type(loss)](z, targets)


def _softmax(z: Any, targets: Any) -> Any:
    return jax.nn.softmax(z) - jax.nn.one_hot(targets, z.shape[1], dtype=z.dtype)


def _squares(z: Any, targets: Any) -> Any:
    return z - targets


def _bernoulli(z: Any, targets: Any) -> Any:
    return jax.nn.sigmoid(z) - jnp.asarray(targets, z.dtype)


_GRADIENTS: dict[type, Any] = {SoftmaxCrossEntropy: _softmax, SquaredError: _squares, Bernoulli: _bernoulli}
