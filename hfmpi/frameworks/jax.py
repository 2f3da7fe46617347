"""A JAX function as a model: apply(params, x) -> outputs.

Each batch is linearised once, by `jax.vjp` under `jax.jit`: the result, J' u as a function with its
residuals, can be passed to another compiled function. J v is its transpose (`jax.linear_transpose`), so that
both need the same residuals and neither needs the function itself, and functions that only have a rule for
the reverse pass (`jax.custom_vjp`) have both.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np

from hfmpi.errors import UserError, shown
from hfmpi.frameworks.framework import FrameworkModel, first_line
from hfmpi.models.batch import CheckedBatch, ScoredOutputs
from hfmpi.models.losses import Loss

try:
    import jax

    from hfmpi.frameworks.jax_layers import Layers
    from hfmpi.frameworks.jax_passes import JaxPasses, nbytes
except ImportError:
    jax = None

__all__ = ["JaxModel"]


class JaxModel(FrameworkModel):
    """A JAX function with a loss.

    Theta (D,) consists of the arrays of real numbers in `params`, in JAX's order. All other arrays remain as
    they are.

    Parameters
    ----------
    apply : callable
        (params, x) -> outputs (B, ..., O), which `jax.jit` can compile, with B examples along the first axis
        of x; with several inputs, (params, x1, x2, ...).
    params : pytree of arrays
        Its arrays of real numbers are all float32 or all float64, which is the type of theta too.
    loss : {'cross-entropy', 'squares', 'bernoulli'} or Loss
        The loss of each scored output (O,).

    Raises
    ------
    UserError
        If JAX is not installed, or the function cannot be trained: there are no real numbers, or types or a
        batch that do not fit.

    Examples
    --------
    >>> model = hfmpi.JaxModel(lambda params, x: x @ params["w"], {"w": numpy.zeros((2, 1))}, "squares")
    >>> result = hfmpi.train(model, (x, y), optimizer="bhf-short", max_steps=10)
    >>> params = model.params(result.theta)
    """

    memory_words = ("RESOURCE_EXHAUSTED",)

    def __init__(self, apply: Any, params: Any, loss: str | Loss) -> None:
        if jax is None:
            raise UserError("JaxModel needs JAX: pip install jax")
        if not callable(apply):
            raise UserError(f"apply must be a function (params, x) -> outputs, not {shown(apply)}")
        paths, tree = jax.tree_util.tree_flatten_with_path(params)
        leaves = [leaf if hasattr(leaf, "dtype") else np.asarray(leaf) for _, leaf in paths]
        real = jax.numpy.floating
        trained = [i for i, a in enumerate(leaves) if jax.numpy.issubdtype(a.dtype, real) and a.size]
        if not trained:
            raise UserError("params have no array of real numbers")
        types = {str(leaves[i].dtype) for i in trained}
        if types not in ({"float32"}, {"float64"}):
            raise UserError(f"params must all be float32 or all be float64, not {', '.join(sorted(types))}")
        if types == {"float64"} and not jax.config.jax_enable_x64:
            raise UserError(
                "params are float64, and JAX computes in float32: jax.config.update('jax_enable_x64', True)"
            )
        self.apply, self._leaves, self._tree, self._trained = apply, leaves, tree, trained
        self._ends = np.cumsum([leaves[i].size for i in trained])[:-1]
        self._layers = dict[Any, "Layers | None"]()
        start = np.concatenate([np.asarray(leaves[i]).reshape(-1) for i in trained])
        names = [jax.tree_util.keystr(path).strip(".") for path, _ in paths]
        super().__init__([(names[i], tuple(leaves[i].shape)) for i in trained], start, loss)
        self._compile()

    def params(self, theta: Any) -> Any:
        """Return theta (D,), an array of NumPy or JAX, as a pytree like the params.

        Raises
        ------
        UserError
            If theta has a different shape.
        """
        if np.shape(theta) != (self.size,):
            raise UserError(
                f"theta must be a vector of {self.size:,} numbers, not of shape {np.shape(theta)}"
            )
        return self._unravel(jax.numpy.array(theta, self.backend.dtype))

    # The function of theta, compiled -----------------------------------------------------------

    def _unravel(self, theta: Any) -> Any:
        """Return theta (D,) as the pytree that `apply` takes."""
        parts = zip(jax.numpy.split(theta, self._ends), self.layout.shapes.values(), strict=True)
        return self._joined([part.reshape(shape) for part, shape in parts])

    def _joined(self, arrays: Sequence[Any]) -> Any:
        """Return the arrays of theta, together with the other leaves, as the pytree that `apply` takes."""
        leaves = list(self._leaves)
        for i, array in zip(self._trained, arrays, strict=True):
            leaves[i] = array
        return jax.tree_util.tree_unflatten(self._tree, leaves)

    def _compile(self) -> None:
        """Make the compiled functions; each compiles itself again when a shape is new.

        The `transpose` that `linear` returns has the residuals of one batch, and computes J' u.
        """

        def outputs(theta: Any, inputs: tuple[Any, ...], scored: ScoredOutputs) -> Any:
            return scored.of(self.apply(self._unravel(theta), *inputs)).astype(theta.dtype)

        def linear(theta: Any, inputs: tuple[Any, ...], scored: ScoredOutputs) -> Any:
            return jax.vjp(lambda theta: outputs(theta, inputs, scored), theta)

        def vjp(transpose: Any, u: Any) -> Any:
            return transpose(u)[0]

        def jvp(transpose: Any, v: Any, shape: tuple[int, int]) -> Any:
            like = jax.ShapeDtypeStruct(shape, v.dtype)
            return jax.linear_transpose(lambda u: transpose(u)[0], like)(v)[0]

        def gradient(theta: Any, u: Any, inputs: tuple[Any, ...], scored: ScoredOutputs) -> Any:
            inputs = tuple(x[None] for x in inputs)
            return jax.grad(lambda theta: (outputs(theta, inputs, scored) * u).sum())(theta)

        def vjps(transpose: Any, u: Any) -> Any:
            return jax.vmap(lambda one: vjp(transpose, one))(u)

        def jvps(transpose: Any, v: Any, shape: tuple[int, int]) -> Any:
            return jax.vmap(lambda one: jvp(transpose, one, shape), out_axes=1)(v)

        def gradients(theta: Any, u: Any, inputs: tuple[Any, ...], scored: ScoredOutputs) -> Any:
            return jax.vmap(partial(gradient, scored=scored), (None, 0, 0))(theta, u, inputs)

        self.run = jax.jit(outputs, static_argnames="scored")
        self.linear = jax.jit(linear, static_argnames="scored")
        self.vjp, self.vjps = jax.jit(vjp), jax.jit(vjps)
        self.jvp = jax.jit(jvp, static_argnames="shape")
        self.jvps = jax.jit(jvps, static_argnames="shape")
        self.gradient = jax.jit(gradient, static_argnames="scored")
        self.gradients = jax.jit(gradients, static_argnames="scored")

    def layers(self, inputs: tuple[Any, ...], scored: ScoredOutputs) -> Layers | None:
        """Return the layers of the function on inputs like these, or None if they cannot be determined."""
        key = scored, *((x.shape, x.dtype) for x in inputs)
        if key not in self._layers:

            def outputs(leaves: Sequence[Any], inputs: tuple[Any, ...]) -> Any:
                params = self._joined(leaves)
                return scored.of(self.apply(params, *inputs)).astype(self.backend.dtype)

            leaves = [
                jax.ShapeDtypeStruct(shape, self.backend.dtype) for shape in self.layout.shapes.values()
            ]
            try:
                self._layers[key] = Layers(outputs, self.blocks, leaves, inputs)
            except (AttributeError, KeyError, TypeError, ValueError, NotImplementedError) as failure:
                self._layers[key] = None
                logging.getLogger(__name__).warning(
                    "Note: the layers of the function are not known (%s): Kronecker factors are computed "
                    "from per-example gradients.",
                    first_line(failure),
                )
        return self._layers[key]

    def _outputs(self, theta: np.ndarray, examples: CheckedBatch) -> np.ndarray:
        with self.memory_errors():
            return np.asarray(self.run(theta, examples.inputs, scored=examples.scored))

    def _linearise(self, theta: np.ndarray, examples: CheckedBatch) -> JaxPasses:
        return JaxPasses(self, theta, examples)

    def _check(self, theta: np.ndarray, examples: CheckedBatch) -> None:
        """Check the first batch, and fit micro-batches to the residuals that each example keeps."""
        super()._check(theta, examples)

        def residuals(some: CheckedBatch) -> int:
            linear = partial(self.linear, scored=some.scored)
            return nbytes(jax.eval_shape(linear, theta, some.inputs)[1])

        more = examples.scored.shape[0] - 1
        self._fit_micro_batch((residuals(examples) - residuals(examples.take([0]))) / max(1, more))
