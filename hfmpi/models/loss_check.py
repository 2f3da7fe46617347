"""Check a user-defined loss: its shapes, and its derivatives against finite differences of its value.

Without this check a mistake would remain unnoticed: with a wrong gradient or Hessian a run still trains, but
minimises a different function.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from hfmpi.backends.base import Array
from hfmpi.backends.numpy import NumpyBackend
from hfmpi.errors import UserError
from hfmpi.models.batch import check_symbols
from hfmpi.models.losses import LEAST, LOSSES, HasRoot, Loss, row_losses
from hfmpi.models.roots import NUMBERS

__all__ = ["check_loss"]

ROWS = 8
"""The number of rows of outputs, evenly spread from the first to the last, on which a loss is checked."""

SPANNED = 8
"""The maximum number of outputs for which derivatives are compared along directions that span all of them."""

DIRECTIONS = 3
"""The number of directions if there are more than `SPANNED` outputs."""

STEP = 1e-3
"""The longer step of the finite differences, relative to outputs that are smaller than 1."""

AGREE = 3e-3
"""The largest relative deviation between differences with two steps; it is larger only at a kink."""

TOLERANCE = 2e-2
"""The largest relative error of a correct derivative: rounding in float32 is smaller, mistakes are larger."""

SCALE = 0.37
"""A scale other than 1 whose inverse is not a factor that common mistakes cause."""

ARGUMENTS = {
    "value": "backend, outputs, targets",
    "gradient": "backend, cache, targets, scale, out",
    "hessian": "backend, cache, u, scale",
    "root": "backend, cache, u",
    "residual": "backend, cache, targets, out",
}
"""The positional arguments of each method of a loss."""

RESULTS = {
    "gradient": "scale times the gradient",
    "hessian": "scale * H u",
    "root": "A u",
    "residual": "r",
}
"""The result of each method that overwrites an argument."""

CACHE = "all that it needs from the outputs must be in the cache, with which value overwrites the outputs"
"""The remedy for a derivative that is wrong because it depends on something other than the cache."""

ROOTS = "define root and residual to match hessian and gradient, or set both to None (H is then decomposed)"
"""The remedy for a wrong root, which may be inherited."""


def check_loss(
    loss: Loss, backend: NumpyBackend, outputs: Array, targets: Array, mask: Array | None = None
) -> None:
    """Check a user-defined loss on a few rows, without changing the arguments; built-in losses pass.

    The shapes are checked in the type of the backend. The derivatives are checked in float64, or in the type
    of the backend if the loss fails in float64. Rows where the loss has a kink or is not finite are ignored.

    Parameters
    ----------
    loss : Loss
    backend : NumpyBackend
    outputs : (N, O)
    targets : (N,) integers, or (N, O)
    mask : (N, 1) or None
        The weight of each output, 0 where it is not scored.

    Raises
    ------
    UserError
        If a method is wrong, with the name of the method, or if a target is not one of O symbols.
    """
    if type(loss) in {type(known) for known in LOSSES.values()}:
        return
    scored = np.arange(len(outputs)) if mask is None else np.flatnonzero(backend.to_host(mask)[:, 0])
    if not scored.size:
        return
    rows = scored[np.unique(np.linspace(0, scored.size - 1, ROWS).round().astype(int))]
    z = np.nan_to_num(np.array(backend.to_host(outputs)[rows], np.float64), posinf=0.0, neginf=0.0)
    y = np.array(backend.to_host(targets)[rows])
    if loss.symbols:
        check_symbols("targets", y, z.shape[1])
    here = _Calls(loss, backend)
    _, cache = here.value(z, y)
    here.gradient(cache, y, SCALE)
    here.hessian(cache, z, SCALE)
    if isinstance(loss, HasRoot):
        here.root(cache, here.residual(cache, y))
    rng = np.random.default_rng(0)
    noise, further = rng.standard_normal((2, *z.shape))
    size = np.abs(z).max(axis=1, keepdims=True)
    zeros = 0.1 * np.where(size > 0, size, 1.0) * (z == 0)
    # Special outputs, such as zeros, hide mistakes and have kinks. So the check uses perturbed outputs: near
    # the actual ones, and at a distance that a run may reach.
    points = np.concatenate([z + (0.05 * z + zeros) * noise, z + 0.5 * further])
    y = np.concatenate([y, y])
    with np.errstate(all="ignore"):
        try:
            _check_derivatives(_Calls(loss, _wide(backend)), points, y)
        except _FailsError:
            _check_derivatives(here, points, y)


class _FailsError(UserError):
    """Raised when a method of the loss fails with an exception."""


class _Differences(NamedTuple):
    """Derivatives by finite differences, (K, M, .) along K directions at M rows.

    Attributes
    ----------
    values : (K, M, .)
    sound : (K, M, .) of bool
        Whether a value is reliable.
    bound : (K, M, .)
        The largest error of a correct derivative.
    """

    values: np.ndarray
    sound: np.ndarray
    bound: np.ndarray

    def match(self, derivatives: np.ndarray) -> bool:
        """Return whether the derivatives (K, M, .) are correct; NaN is wrong.

        One wrong row is tolerated, because it may be next to a kink that the differences do not detect.
        """
        by_row = 0, 2
        wrong = (self.sound & ~(np.abs(derivatives - self.values) <= self.bound)).any(axis=by_row)
        return int(wrong.sum()) < min(2, max(1, int(self.sound.any(axis=by_row).sum())))

    def mistake(self, scaled: np.ndarray) -> str:
        """Describe the mistake in derivatives times SCALE, (K, M, .); return "" if they are correct."""
        if self.match(scaled / SCALE):
            return ""
        if self.match(scaled):
            return "ignores scale"
        wrong = self.sound & ~(np.abs(scaled / SCALE - self.values) <= self.bound)
        at = np.unravel_index(int(np.argmax(np.where(wrong, np.abs(self.values), -1))), wrong.shape)
        ratio = scaled[at] / SCALE / self.values[at] if self.values[at] else np.nan
        if ratio and np.isfinite(ratio) and self.match(scaled / SCALE / ratio):
            return f"computes {ratio:.3g} times that"
        return f"computes {scaled[at] / SCALE:.3g} instead of {self.values[at]:.3g} for scale 1"


class _Calls:
    """Calls the methods of a loss with copies of arrays on the host, and checks the shapes of the results."""

    def __init__(self, loss: Loss, backend: NumpyBackend) -> None:
        self.loss, self.backend, self.name = loss, backend, type(loss).__name__

    def value(self, z: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, Array]:
        """Return the losses (N,) of outputs z (N, O), and the cache on the device."""
        cache, targets = self._device(z), self._targets(y)
        y = self._host(targets)
        losses = self._call("value", cache, targets)
        self._unchanged("value", "targets", targets, y)
        return self._host(losses), cache

    def gradient(self, cache: Array, y: np.ndarray, scale: float) -> np.ndarray:
        """Return scale times the gradient (N, O) at targets y."""
        return self._filled("gradient", cache, y, scale)

    def hessian(self, cache: Array, u: np.ndarray, scale: float) -> np.ndarray:
        """Return scale * H u of directions u (N * C, O)."""
        return self._overwritten("hessian", cache, u, scale)

    def residual(self, cache: Array, y: np.ndarray) -> np.ndarray:
        """Return the residuals r (N, O) at targets y."""
        return self._filled("residual", cache, y)

    def root(self, cache: Array, u: np.ndarray) -> np.ndarray:
        """Return A u of directions u (N * C, O)."""
        return self._overwritten("root", cache, u)

    def _filled(self, method: str, cache: Array, y: np.ndarray, *scale: float) -> np.ndarray:
        """Return the result (N, O) of a method that fills a buffer, whatever the buffer contains before."""
        before, targets = self._host(cache), self._targets(y)
        y = self._host(targets)

        def fill(content: float) -> tuple[np.ndarray, Any]:
            out = self._device(np.full(cache.shape, content))
            returned = self._call(method, cache, targets, *scale, out)
            self._unchanged(method, "the cache", cache, before)
            self._unchanged(method, "targets", targets, y)
            return self._host(out), returned

        (result, returned), (other, _) = fill(7.0), fill(-3.0)
        if not np.array_equal(result, other, equal_nan=True):
            wrong = "leaves elements of out unchanged or adds to them"
            if returned is not None:
                wrong = f"returns {type(returned).__name__} and does not fill out"
            raise self.error(f"{method} must overwrite out with {RESULTS[method]}, but it {wrong}")
        return result

    def _overwritten(self, method: str, cache: Array, u: np.ndarray, *scale: float) -> np.ndarray:
        """Return the result of a method that overwrites directions u (N * C, O)."""
        before, out = self._host(cache), self._device(u)
        returned = self._call(method, cache, out, *scale)
        self._unchanged(method, "the cache", cache, before)
        result = self._host(out)
        if returned is not None and u.any() and np.array_equal(result, self._host(self._device(u))):
            raise self.error(
                f"{method} must overwrite u with {RESULTS[method]}, but it returns {type(returned).__name__} "
                "and leaves u unchanged"
            )
        return result

    def _call(self, method: str, *arguments: Any) -> Any:
        try:
            with np.errstate(all="ignore"):
                if method == "value":
                    return row_losses(self.loss, self.backend, *arguments)
                return getattr(self.loss, method)(self.backend, *arguments)
        except (UserError, MemoryError):
            raise
        except Exception as error:
            raise _FailsError(
                f"the loss {self.name} fails: {method}({ARGUMENTS[method]}) raises {type(error).__name__}: "
                f"{' '.join(str(error).split())}"
            ) from error

    def _unchanged(self, method: str, what: str, now: Array, before: np.ndarray) -> None:
        if not np.array_equal(self._host(now), before, equal_nan=True):
            raise self.error(f"{method} must not change {what}, which later calls read again")

    def error(self, sentence: str) -> UserError:
        """Return an error that names the loss and describes what is wrong with it."""
        return UserError(f"the loss {self.name} is wrong: {sentence}")

    def _device(self, array: np.ndarray) -> Array:
        return self.backend.to_device(np.array(array, self.backend.dtype, order="C"))

    def _targets(self, y: np.ndarray) -> Array:
        return self.backend.to_device(np.array(y, y.dtype if y.dtype.kind in "iu" else self.backend.dtype))

    def _host(self, array: Array) -> np.ndarray:
        return np.array(self.backend.to_host(array), np.float64)


def _check_derivatives(calls: _Calls, z: np.ndarray, y: np.ndarray) -> None:
    """Check gradient and Hessian at outputs z (M, O), along directions that span O if O is small."""
    (rows, width), rng = z.shape, np.random.default_rng(1)
    count = width if width <= SPANNED else DIRECTIONS
    v = np.linalg.qr(rng.standard_normal((width, count)))[0].T
    size = np.abs(z).max(axis=1, keepdims=True)
    h = STEP * np.where(size > 0, np.minimum(size, 1.0), 1.0)
    losses, cache = calls.value(z, y)
    of_value, of_gradient = [], []
    for step in (h, h / 2):
        ends = [[_at(calls, z + sign * step * row, y) for sign in (1, -1)] for row in v]
        of_value.append(np.array([(a[0] - b[0])[:, None] / (2 * step) for a, b in ends]))
        of_gradient.append(np.array([(a[1] - b[1]) / (2 * step) for a, b in ends]))
    calls.value(z[::-1], y)  # reveals a loss that stores what it needs in attributes and not in the cache
    gradient = calls.gradient(cache, y, SCALE)
    differences = _differences(of_value, calls, losses[:, None], size, h)
    along = np.einsum("mo,ko->km", gradient, v)[:, :, None]
    if mistake := differences.mistake(along):
        raise calls.error(
            f"gradient must compute scale times the gradient of value, but it {mistake} (according to finite "
            f"differences of value); {CACHE}"
        )
    directions = np.repeat(v[None], rows, axis=0).reshape(-1, width)

    def hessian(part: slice, scale: float) -> np.ndarray:
        u = calls.hessian(cache[part], directions[: len(cache[part]) * count], scale)
        return u.reshape(-1, count, width).swapaxes(0, 1)

    scaled = hessian(slice(None), SCALE)
    curvature = _differences(of_gradient, calls, gradient / SCALE, size, h)
    if mistake := curvature.mistake(scaled):
        raise calls.error(
            f"hessian must compute scale * H u, but it {mistake} (according to finite differences of "
            f"gradient); {CACHE}"
        )
    products = scaled / SCALE
    largest = TOLERANCE * np.abs(products).max(initial=0, where=np.isfinite(products))
    largest += 16 * np.finfo(calls.backend.dtype).eps  # products of saturated outputs are only rounding
    for words, other in (
        ("scale * H u for every scale", hessian(slice(None), 1.0)),
        ("the same H u if the cache has only some of its rows", hessian(slice(rows // 2, None), 1.0)),
    ):
        if not np.allclose(other, products[:, rows - other.shape[1] :], 0, largest, equal_nan=True):
            raise calls.error(f"hessian must compute {words}, but it does not")
    matrices = np.einsum("jo,kmo->mjk", v, products)
    matrices = matrices[np.isfinite(matrices).all(axis=(1, 2))]
    if not np.allclose(matrices, matrices.swapaxes(1, 2), 0, largest):
        raise calls.error("hessian must be symmetric, but u' H w differs from w' H u")
    lowest = np.linalg.eigvalsh(matrices).min(initial=0) if len(matrices) else 0.0
    if lowest < -largest:
        raise calls.error(
            f"it must be convex in the outputs, but its hessian has negative curvature ({lowest:.3g}): "
            "Gauss-Newton products require a positive semidefinite Hessian"
        )
    if isinstance(calls.loss, HasRoot):
        _check_root(calls, y, cache, gradient / SCALE, v, products)


def _check_root(
    calls: _Calls, y: np.ndarray, cache: Array, gradient: np.ndarray, v: np.ndarray, products: np.ndarray
) -> None:
    """Compare A A' v with H v = `products` (K, M, O) for directions v (K, O), and H A r with H gradient.

    A r itself may lack a part of the gradient that is in the null space of H.
    """
    (rows, width), count = gradient.shape, len(v)
    floor = 10 * width * LEAST
    some = max(1, min(rows, NUMBERS // width**2))  # rows for which A is computed, some columns at a time
    squared, many = np.zeros((some, count, width)), max(1, NUMBERS // (some * width))
    for start in range(0, width, many):
        unit = np.eye(width)[start : start + many]
        a = calls.root(cache[:some], np.tile(unit, (some, 1))).reshape(some, len(unit), width)
        squared += np.einsum("mjo,mjk->mko", a, np.einsum("mjo,ko->mjk", a, v))
    expected = products[:, :some].swapaxes(0, 1)
    sound = np.isfinite(expected).all(axis=(1, 2))
    size = np.abs(expected[sound]).max(axis=(1, 2), initial=0, keepdims=True)
    if not (np.abs(squared - expected)[sound] <= TOLERANCE * size + floor).all():
        raise calls.error(f"root must compute A u with A A' = H, but its A A' is not H; {ROOTS}")
    through = calls.root(cache, calls.residual(cache, y))
    both = np.stack([gradient, through], axis=1)
    seen = calls.hessian(cache, both.reshape(-1, width), 1.0).reshape(both.shape)
    sound = np.isfinite(gradient).all(axis=1) & np.isfinite(products).all(axis=(0, 2))
    seen = seen[sound]
    curvature = np.abs(products[:, sound]).max(axis=(0, 2), initial=0)
    rounding = (1e-6 * curvature + floor) * np.abs(gradient[sound]).max(axis=1, initial=0)
    bound = TOLERANCE * np.abs(seen).max(axis=(1, 2), initial=0) + rounding
    if not (np.abs(seen[:, 0] - seen[:, 1]) <= bound[:, None]).all():
        raise calls.error(f"residual must compute r with A r = gradient, but it does not; {ROOTS}")


def _at(calls: _Calls, z: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    losses, cache = calls.value(z, y)
    return losses, calls.gradient(cache, y, 1.0)


def _differences(
    found: list[np.ndarray], calls: _Calls, at: np.ndarray, size: np.ndarray, h: np.ndarray
) -> _Differences:
    """Assess differences with two steps h and h / 2, (K, M, .), of a function with values `at` (M, .)."""
    wide, near = found
    finite = at[np.isfinite(at)]
    single = calls.backend.dtype == np.float32 or np.array_equal(finite, finite.astype(np.float32))
    eps = np.finfo(np.float32 if single else np.float64).eps
    largest = np.nan_to_num(np.abs(at).max(axis=1, keepdims=True), posinf=0.0)
    rounding = 32 * eps * np.maximum(np.maximum(largest, size), 1.0) / h
    scale = np.abs(np.where(np.isfinite(near), near, 0)).max(axis=(0, 2), keepdims=True)[0]
    sound = np.isfinite(near) & (np.abs(wide - near) <= AGREE * scale + rounding)
    bound = np.broadcast_to(TOLERANCE * scale + rounding, near.shape)
    return _Differences(near, sound, bound)


def _wide(backend: NumpyBackend) -> NumpyBackend:
    """Return a backend of float64 on the same device."""
    if backend.dtype == np.float64:
        return backend
    if backend.xp is np:
        return NumpyBackend("float64")
    kind, (_, *device), *_ = backend.__reduce__()
    wide: NumpyBackend = kind("float64", *device)
    return wide
