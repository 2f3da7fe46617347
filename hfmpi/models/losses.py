"""Losses of the outputs of a model: value, gradient and Hessian for each row of outputs separately.

A loss is a function of N scored outputs z (N, O) and their targets. The Gauss-Newton matrix is J' H J with
the Hessian H of the loss, so H must be positive semidefinite: the loss is convex in z. Each loss here matches
an output function (softmax, identity, logistic), so its gradient is the value of that function minus the
target (Schraudolph 2002, Fast curvature matrix-vector products for second-order gradient descent).
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
"""The least probability, or variance of a bit, in roots of Hessians and in residuals.

It changes a Hessian by at most O * 1e-14. Without it the residual of an output that excludes its target would
be infinite. With it A r is still the gradient, and r is at most about 1e7, so that systems of equations in
float64 keep the digits of ordinary residuals beside it.
"""


@runtime_checkable
class Loss(Protocol):
    """A convex loss of each row of outputs z (N, O), of the backend's dtype.

    All calls pass positional arguments. A mask and weights are applied by the caller.

    Attributes
    ----------
    symbols : bool
        Whether targets are symbols (N,), int32; otherwise they are numbers (N, O), of the backend's dtype.
    bounds : (float, float), optional
        The least and the largest target that is a number. Without them, every finite number is a target.
    form : str, optional
        The parameters of the loss, if it has any: a run is continued only with the same ones.
    """

    symbols: ClassVar[bool]

    def value(self, backend: NumpyBackend, outputs: Array, targets: Array) -> Array:
        """Compute the loss of each row.

        Parameters
        ----------
        backend : NumpyBackend
        outputs : (N, O)
            In: z. Out: a cache for the derivatives, such as probabilities.
        targets : (N,) int32, or (N, O)

        Returns
        -------
        losses : (N,) float64
            In nats.
        """

    def gradient(self, backend: NumpyBackend, cache: Array, targets: Array, scale: float, out: Array) -> None:
        """Fill out with scale times the gradient in z.

        Parameters
        ----------
        backend : NumpyBackend
        cache : (N, O)
            As `value` left it.
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
            As `value` left it, or a part of its rows.
        u : (N * C, O)
            The C rows of an output follow one another.
        scale : float
        """


@runtime_checkable
class HasRoot(Protocol):
    """A loss with a square root A (O, O) of its Hessian H = A A' of each output.

    Both methods are optional, but go together. Without them, or where they are None, `hfmpi.models.roots`
    decomposes H, which takes longer.
    """

    def root(self, backend: NumpyBackend, cache: Array, u: Array) -> None:
        """Overwrite u (N * C, O) with A u, as `Loss.hessian` does with H u."""

    def residual(self, backend: NumpyBackend, cache: Array, targets: Array, out: Array) -> None:
        """Fill out (N, O) with r, of which A r is the gradient of the loss in z.

        If the gradient has a part that H does not see, as that of Huber's loss has, A r is the remainder.
        """


class RootedLoss(Loss, HasRoot, Protocol):
    """A loss with the square root of its Hessian."""


class SoftmaxCrossEntropy:
    """-log softmax(z)[target]; H u = p * (u - <p, u>). The cache is p = softmax(z)."""

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
    """Half the squared distance of z and target; H is the identity. The cache is z - target."""

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
        """Leave u as it is."""

    def residual(self, backend: NumpyBackend, cache: Array, targets: Array, out: Array) -> None:
        """Fill out with z - target."""
        out[...] = cache


class Bernoulli:
    """log(1 + exp(z)) - z * target, summed over O outputs, with targets in [0, 1]; H u = p (1 - p) u.

    The cache is p = 1 / (1 + exp(-z)), the probability of a 1.
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
    """A loss of numbers times `factor` / O, which makes its sum over O outputs a mean.

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
        """The least and the largest target."""
        return getattr(self.loss, "bounds", (-math.inf, math.inf))

    @property
    def form(self) -> str:
        """The factor and the loss."""
        return f"{self.factor} {type(self.loss).__name__} {getattr(self.loss, 'form', '')}"

    def value(self, backend: NumpyBackend, outputs: Array, targets: Array) -> Array:
        """Return the loss of each row; overwrite the outputs as `loss` does."""
        return self.loss.value(backend, outputs, targets) * self._scale(outputs)

    def gradient(self, backend: NumpyBackend, cache: Array, targets: Array, scale: float, out: Array) -> None:
        """Fill out with scale times the gradient."""
        self.loss.gradient(backend, cache, targets, scale * self._scale(cache), out)

    def hessian(self, backend: NumpyBackend, cache: Array, u: Array, scale: float) -> None:
        """Overwrite u with scale * H u."""
        self.loss.hessian(backend, cache, u, scale * self._scale(cache))

    def root(self, backend: NumpyBackend, cache: Array, u: Array) -> None:
        """Overwrite u with A u, A times the square root of the scale."""
        self.loss.root(backend, cache, u)
        u *= u.dtype.type(math.sqrt(self._scale(cache)))

    def residual(self, backend: NumpyBackend, cache: Array, targets: Array, out: Array) -> None:
        """Fill out with r, times the square root of the scale."""
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
"""The losses by name; the last two are means over outputs, as in PyTorch and Keras."""

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
"""What other names of losses mean here."""

METHODS = "value", "gradient", "hessian"
"""The methods of a loss."""

ROOTS = "root", "residual"
"""The optional methods of a loss, both or none."""


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
            f"loss must be one of {', '.join(LOSSES)} or an object like them{_missing(loss)}, not "
            f"{shown(loss)}"
        )
    name = type(loss).__name__
    if not isinstance(loss.symbols, bool):
        raise UserError(
            f"symbols of the loss {name} must be True (targets are whole numbers) or False, not "
            f"{shown(loss.symbols)}"
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
            f"the loss {name} has {roots[0]} without {lacks}: define both, or neither (then its hessian is "
            "decomposed)"
        )
    bounds = getattr(loss, "bounds", (-math.inf, math.inf))
    try:
        low, high = map(float, bounds)
    except (TypeError, ValueError):
        low, high = math.nan, math.nan
    if not low < high:
        raise UserError(
            f"bounds of the loss {name} must be (least target, largest target), not {shown(bounds)}"
        )
    return loss


def _missing(loss: object) -> str:
    """Return what an object lacks that has some of the methods of a loss."""
    lacks = [name for name in ("symbols", *METHODS) if not hasattr(loss, name)]
    return f", which has {', '.join(lacks)} too" if len(lacks) < 1 + len(METHODS) and lacks else ""


def row_losses(loss: Loss, backend: NumpyBackend, outputs: Array, targets: Array) -> Array:
    """Return the loss of each row of outputs (N, O), (N,) float64; the outputs become its cache.

    Raises
    ------
    UserError
        If the loss returns anything else.
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
