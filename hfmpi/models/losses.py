"""Losses of the outputs of a model: value, gradient and Hessian for each row of outputs separately.

A loss is a function of N scored outputs z (N, O) and their targets. The Gauss-Newton matrix is J' H J with
the Hessian H of the loss with respect to z. H must be positive semidefinite, so the loss must be convex in z.
Each loss here matches an output function (softmax, identity, logistic): its gradient is the value of that
function minus the target (Schraudolph 2002, Fast curvature matrix-vector products for second-order gradient
descent).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Protocol, runtime_checkable

import numpy as np

from hfmpi.backends.base import Array
from hfmpi.backends.numpy import NumpyBackend, by_sequence
from hfmpi.errors import UserError, did_you_mean, shown

__all__ = [
    "LOSSES",
    "Bernoulli",
    "HasRoot",
    "Loss",
    "OutputMean",
    "RootedLoss",
    "SoftmaxCrossEntropy",
    "SquaredError",
    "choose",
    "row_losses",
    "total_loss",
]

LEAST = 1e-14
"""The minimum of a probability, or of the variance of a bit, in roots of Hessians and in residuals.

It changes a Hessian by at most O * 1e-14. Without it the residual of an output whose target has probability 0
would be infinite. With it A r is still the gradient, and r is at most about 1e7, so that linear systems in
float64 do not lose the precision of the ordinary residuals in the same system.
"""


@runtime_checkable
class Loss(Protocol):
    """A convex loss of each row of outputs z (N, O), which have the backend's dtype.

    The methods are called with positional arguments. The caller applies a mask and weights.

    Attributes
    ----------
    symbols : bool
        Whether targets are symbols (N,), int32; otherwise they are numbers (N, O), of the backend's dtype.
    bounds : (float, float), optional
        The smallest and the largest target, if targets are numbers. Default: every finite number is accepted.
    form : str, optional
        A description of the loss's parameters, if it has any: a run can be continued only if it is unchanged.
    """

    symbols: ClassVar[bool]

    def value(self, backend: NumpyBackend, outputs: Array, targets: Array) -> Array:
        """Compute the loss of each row, and overwrite the outputs with a cache for the derivatives.

        Parameters
        ----------
        backend : NumpyBackend
        outputs : (N, O)
            On entry z; on return the cache, such as probabilities.
        targets : (N,) int32, or (N, O)

        Returns
        -------
        losses : (N,) float64
            In nats.
        """

    def gradient(self, backend: NumpyBackend, cache: Array, targets: Array, scale: float, out: Array) -> None:
        """Fill out with scale times the gradient with respect to z.

        Parameters
        ----------
        backend : NumpyBackend
        cache : (N, O)
            As written by `value`.
        targets : (N,) int32, or (N, O)
        scale : float
        out : (N, O)
        """

    def hessian(self, backend: NumpyBackend, cache: Array, u: Array, scale: float) -> None:
        """Overwrite u with scale * H u, for C directions at once.

        Parameters
        ----------
        backend : NumpyBackend
        cache : (N, O)
            As written by `value`, or some of its rows.
        u : (N * C, O)
            The C rows of an output are adjacent.
        scale : float
        """


@runtime_checkable
class HasRoot(Protocol):
    """A loss that also provides a square root A (O, O) of the Hessian H = A A' of each output.

    A loss may define both methods or neither. Without them, or if they are None, `hfmpi.models.roots`
    decomposes H, which takes longer.
    """

    def root(self, backend: NumpyBackend, cache: Array, u: Array) -> None:
        """Overwrite u (N * C, O) with A u, as `Loss.hessian` does with H u."""

    def residual(self, backend: NumpyBackend, cache: Array, targets: Array, out: Array) -> None:
        """Fill out (N, O) with r, where A r is the gradient of the loss with respect to z.

        If a part of the gradient is in the null space of H, as in Huber's loss, A r is the gradient without
        that part.
        """


class RootedLoss(Loss, HasRoot, Protocol):
    """A loss with the square root of its Hessian."""


class SoftmaxCrossEntropy:
    """The loss -log softmax(z)[target]; H u = p * (u - <p, u>). The cache is p = softmax(z)."""

    symbols: ClassVar[bool] = True

    def value(self, backend: NumpyBackend, outputs: Array, targets: Array) -> Array:
        """Return the loss of each row; overwrite the outputs with p."""
        return backend.softmax_loss(outputs, targets)

    def gradient(self, backend: NumpyBackend, cache: Array, targets: Array, scale: float, out: Array) -> None:
        """Fill out with scale * (p - onehot(targets))."""
        backend.softmax_gradient(cache, targets, scale, out)

    def hessian(self, backend: NumpyBackend, cache: Array, u: Array, scale: float) -> None:
        """Overwrite u with scale * p * (u - <p, u>)."""
        backend.softmax_hessian(cache, u, scale)

    def root(self, backend: NumpyBackend, cache: Array, u: Array) -> None:
        """Overwrite u with sqrt(p) * u - p <sqrt(p), u>; see `LEAST`."""
        by_output, root = by_sequence(u, len(cache)), _root(backend, cache)[:, None]
        by_output *= root
        by_output -= cache[:, None] * by_output.sum(axis=2)[:, :, None]

    def residual(self, backend: NumpyBackend, cache: Array, targets: Array, out: Array) -> None:
        """Fill out with sqrt(p) - onehot(targets) / sqrt(p); see `LEAST`."""
        rows = backend.xp.arange(len(cache))
        out[...] = _root(backend, cache)
        out[rows, targets] -= 1 / out[rows, targets]


class SquaredError:
    """Half the squared distance between z and target; H is the identity. The cache is z - target."""

    symbols: ClassVar[bool] = False

    def value(self, backend: NumpyBackend, outputs: Array, targets: Array) -> Array:
        """Return the loss of each row; overwrite the outputs with z - target."""
        outputs -= targets
        wide = outputs.astype(np.float64)
        return 0.5 * (wide * wide).sum(axis=1)

    def gradient(self, backend: NumpyBackend, cache: Array, targets: Array, scale: float, out: Array) -> None:
        """Fill out with scale * (z - target)."""
        backend.xp.multiply(cache, cache.dtype.type(scale), out=out)

    def hessian(self, backend: NumpyBackend, cache: Array, u: Array, scale: float) -> None:
        """Overwrite u with scale * u."""
        u *= u.dtype.type(scale)

    def root(self, backend: NumpyBackend, cache: Array, u: Array) -> None:
        """Leave u unchanged, because A is the identity."""

    def residual(self, backend: NumpyBackend, cache: Array, targets: Array, out: Array) -> None:
        """Fill out with z - target."""
        out[...] = cache


class Bernoulli:
    """The loss log(1 + exp(z)) - z * target, summed over O outputs; H u = p (1 - p) u.

    Targets are in [0, 1]. The cache is p = 1 / (1 + exp(-z)), the probability of a 1.
    """

    symbols: ClassVar[bool] = False
    bounds: ClassVar[tuple[float, float]] = 0.0, 1.0

    def value(self, backend: NumpyBackend, outputs: Array, targets: Array) -> Array:
        """Return the loss of each row; overwrite the outputs with p."""
        xp, wide = backend.xp, outputs.astype(np.float64)
        rest = xp.log1p(xp.exp(-abs(wide)))  # log(1 + exp(z)) = max(z, 0) + log(1 + exp(-|z|))
        losses = (xp.maximum(wide, 0) + rest - wide * targets).sum(axis=1)
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

    def root(self, backend: NumpyBackend, cache: Array, u: Array) -> None:
        """Overwrite u with sqrt(p (1 - p)) u; see `LEAST`."""
        by_output = by_sequence(u, len(cache))
        by_output *= _root(backend, cache * (1 - cache))[:, None]

    def residual(self, backend: NumpyBackend, cache: Array, targets: Array, out: Array) -> None:
        """Fill out with (p - target) / sqrt(p (1 - p)); see `LEAST`."""
        backend.xp.subtract(cache, targets, out=out)
        out /= _root(backend, cache * (1 - cache))


@dataclass(frozen=True)
class OutputMean:
    """A loss with numbers as targets, times `factor` / O, which turns its sum over O outputs into a mean.

    Attributes
    ----------
    loss : RootedLoss
    factor : float

    Examples
    --------
    >>> OutputMean(SquaredError(), 2.0)  # the mean squared error  # doctest: +SKIP
    """

    loss: RootedLoss
    factor: float = 1.0
    symbols: ClassVar[bool] = False

    @property
    def bounds(self) -> tuple[float, float]:
        """The smallest and the largest target."""
        return getattr(self.loss, "bounds", (-math.inf, math.inf))

    @property
    def form(self) -> str:
        """The factor and the loss."""
        return f"{self.factor} {type(self.loss).__name__} {getattr(self.loss, 'form', '')}"

    def value(self, backend: NumpyBackend, outputs: Array, targets: Array) -> Array:
        """Return the loss of each row; overwrite the outputs with the cache of `loss`."""
        return self.loss.value(backend, outputs, targets) * self._scale(outputs)

    def gradient(self, backend: NumpyBackend, cache: Array, targets: Array, scale: float, out: Array) -> None:
        """Fill out with scale times the gradient of the mean."""
        self.loss.gradient(backend, cache, targets, scale * self._scale(cache), out)

    def hessian(self, backend: NumpyBackend, cache: Array, u: Array, scale: float) -> None:
        """Overwrite u with scale * H u, where H is the Hessian of the mean."""
        self.loss.hessian(backend, cache, u, scale * self._scale(cache))

    def root(self, backend: NumpyBackend, cache: Array, u: Array) -> None:
        """Overwrite u with A u, where A is the root of `loss` times sqrt(factor / O)."""
        self.loss.root(backend, cache, u)
        u *= u.dtype.type(math.sqrt(self._scale(cache)))

    def residual(self, backend: NumpyBackend, cache: Array, targets: Array, out: Array) -> None:
        """Fill out with r, the residual of `loss` times sqrt(factor / O)."""
        self.loss.residual(backend, cache, targets, out)
        out *= out.dtype.type(math.sqrt(self._scale(cache)))

    def _scale(self, outputs: Array) -> float:
        return self.factor / int(outputs.shape[1])


def _root(backend: NumpyBackend, curvature: Array) -> Array:
    """Return the square root of probabilities or variances, of at least `LEAST`."""
    return backend.xp.sqrt(backend.xp.maximum(curvature, curvature.dtype.type(LEAST)))


LOSSES: dict[str, Loss] = {
    "cross-entropy": SoftmaxCrossEntropy(),
    "squares": SquaredError(),
    "bernoulli": Bernoulli(),
    "mse": OutputMean(SquaredError(), 2.0),
    "binary-cross-entropy": OutputMean(Bernoulli()),
}
"""The built-in losses by name; the last two are means over outputs, as in PyTorch and Keras."""

OTHER_NAMES = {
    "softmax": "cross-entropy",
    "categorical-cross-entropy": "cross-entropy",
    "sparse-categorical-crossentropy": "cross-entropy",
    "CrossEntropyLoss": "cross-entropy",
    "NLL": "cross-entropy",
    "NLLLoss": "cross-entropy",
    "mean-squared-error": "mse",
    "MSELoss": "mse",
    "squared-error": "squares",
    "least-squares": "squares",
    "L2": "squares",
    "BCE": "binary-cross-entropy",
    "BCELoss": "binary-cross-entropy",
    "BCEWithLogitsLoss": "binary-cross-entropy",
    "logistic": "binary-cross-entropy",
}
"""Names that other libraries use, and the names of the same losses here."""

METHODS = "value", "gradient", "hessian"
"""The required methods of a loss."""

ROOTS = "root", "residual"
"""The optional methods of a loss; a loss defines both or neither."""


def choose(loss: str | Loss) -> Loss:
    """Return the loss of this name; return a `Loss` unchanged.

    Raises
    ------
    UserError
        If no loss has this name, or the object is not a loss.
    """
    if isinstance(loss, str):
        if loss not in LOSSES:
            meant = did_you_mean(loss, LOSSES, OTHER_NAMES)
            raise UserError(f"there is no loss {loss!r}{meant}; choose one of {', '.join(LOSSES)}")
        return LOSSES[loss]
    if isinstance(loss, type) or not isinstance(loss, Loss):
        raise UserError(
            f"loss must be one of {', '.join(LOSSES)} or an object with the methods of "
            f"hfmpi.models.losses.Loss, not {shown(loss)}{_missing(loss)}"
        )
    name = type(loss).__name__
    if not isinstance(loss.symbols, bool):
        raise UserError(
            f"the attribute symbols of the loss {name} must be True (targets are whole numbers) or False, "
            f"not {shown(loss.symbols)}"
        )
    roots = [method for method in ROOTS if getattr(loss, method, None) is not None]
    for method in (*METHODS, *roots):
        if not callable(getattr(loss, method)):
            raise UserError(
                f"{method} of the loss {name} must be a method, not {shown(getattr(loss, method))}"
            )
    if len(roots) == 1:
        (lacks,) = set(ROOTS) - set(roots)
        raise UserError(
            f"the loss {name} has {roots[0]} without {lacks}: define both, or neither (its hessian is then "
            "decomposed)"
        )
    bounds = getattr(loss, "bounds", (-math.inf, math.inf))
    try:
        low, high = map(float, bounds)
    except (TypeError, ValueError):
        low, high = math.nan, math.nan
    if not low < high:
        raise UserError(
            f"bounds of the loss {name} must be (smallest target, largest target), not {shown(bounds)}"
        )
    return loss


def _missing(loss: object) -> str:
    """Return a clause with the missing attributes of an object that has some of those of a loss, or ""."""
    lacks = [name for name in ("symbols", *METHODS) if not hasattr(loss, name)]
    return f", which lacks {', '.join(lacks)}" if len(lacks) < 1 + len(METHODS) and lacks else ""


def row_losses(loss: Loss, backend: NumpyBackend, outputs: Array, targets: Array) -> Array:
    """Return the loss of each row of outputs (N, O), (N,) float64; the outputs become its cache.

    Raises
    ------
    UserError
        If the result of `value` does not have this form.
    """
    losses = loss.value(backend, outputs, targets)
    kind = backend.xp.ndarray
    if not isinstance(losses, kind) or losses.shape != (len(outputs),) or losses.dtype.kind not in "fiu":
        returned = shown(losses)
        if hasattr(losses, "shape"):
            returned = f"{type(losses).__name__} of {losses.dtype} and shape {tuple(losses.shape)}"
        raise UserError(
            f"the loss {type(loss).__name__} is wrong: value must return the loss of each of the "
            f"{len(outputs):,} rows of outputs, a {kind.__module__} array ({len(outputs)},) of float64, not "
            f"{returned}"
        )
    return losses if losses.dtype == np.float64 else losses.astype(np.float64)


def total_loss(
    loss: Loss, backend: NumpyBackend, outputs: Array, targets: Array, mask: Array | None
) -> float:
    """Return the loss summed over the rows, each times its weight in the mask (N, 1); see `row_losses`."""
    losses = row_losses(loss, backend, outputs, targets)
    if mask is not None:
        losses = losses * mask[:, 0]
    return float(losses.sum())
