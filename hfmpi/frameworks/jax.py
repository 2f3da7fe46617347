"""A JAX function as a model: apply(params, x) -> outputs."""

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

    from hfmpi.frameworks.jax_function import JaxFunction
    from hfmpi.frameworks.jax_layers import Layers
    from hfmpi.frameworks.jax_passes import JaxPasses
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
        self.function = JaxFunction(apply, leaves, tree, trained)
        self._layers = dict[Any, "Layers | None"]()
        start = np.concatenate([np.asarray(leaves[i]).reshape(-1) for i in trained])
        names = [jax.tree_util.keystr(paths[i][0]).strip(".") for i in trained]
        super().__init__(
            [(name, tuple(leaves[i].shape)) for name, i in zip(names, trained, strict=True)], start, loss
        )

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
        return self.function.params(jax.numpy.array(theta, self.backend.dtype))

    def layers(self, inputs: tuple[Any, ...], scored: ScoredOutputs) -> Layers | None:
        """Return the layers of the function on inputs like these, or None if they cannot be determined."""
        key = scored, *((x.shape, x.dtype) for x in inputs)
        if key not in self._layers:

            def outputs(leaves: Sequence[Any], inputs: tuple[Any, ...]) -> Any:
                params = self.function.joined(leaves)
                return scored.of(self.function.apply(params, *inputs)).astype(self.backend.dtype)

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

    def _check(self, theta: np.ndarray, examples: CheckedBatch) -> None:
        """Check the first batch, and fit micro-batches to the residuals that each example keeps."""
        super()._check(theta, examples)

        def residuals(some: CheckedBatch) -> int:
            _, pull = jax.eval_shape(partial(self.function.linearise, scored=some.scored), theta, some.inputs)
            return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree_util.tree_leaves(pull))

        others = examples.scored.shape[0] - 1
        self._fit_micro_batch((residuals(examples) - residuals(examples.first)) / max(1, others))

    def _outputs(
        self, theta: np.ndarray, inputs: tuple[np.ndarray, ...], scored: ScoredOutputs
    ) -> np.ndarray:
        with self.memory_errors():
            return np.asarray(self.function.outputs(theta, inputs, scored=scored))

    def _linearise(
        self, theta: np.ndarray, inputs: tuple[np.ndarray, ...], scored: ScoredOutputs
    ) -> JaxPasses:
        return JaxPasses(self, theta, inputs, scored)
