"""A JAX function apply(params, x) of theta, the vector of its real parameters, and its compiled derivatives.

Each batch is linearised once, by `jax.vjp` under `jax.jit`: the result, J' u as a function with its
residuals, can be passed to another compiled function. J v is its transpose (`jax.linear_transpose`), so that
both need the same residuals and neither needs the function itself, and functions that only have a rule for
the reverse pass (`jax.custom_vjp`) have both.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from hfmpi.models.batch import ScoredOutputs

__all__ = ["JaxFunction"]


class JaxFunction:
    """The scored outputs of a function as a function of theta (D,), with compiled derivatives.

    Each of them is compiled again when a batch has a new shape.

    Parameters
    ----------
    apply : callable
    leaves : list of arrays
        The leaves of the params.
    tree : PyTreeDef
        Of the params.
    trained : list of int
        The indices of the leaves that theta consists of, in order.

    Attributes
    ----------
    outputs : callable
        (theta, inputs, scored) -> (N, O)
    linearise : callable
        (theta, inputs, scored) -> (outputs, pull), with `pull` for the following.
    vjp, vjps : callable
        (pull, u) -> J' u, of u (N, O), or of many (C, N, O).
    jvp, jvps : callable
        (pull, v, shape) -> J v (N, O), or (N, C, O) of many v (C, D); `shape` is (N, O).
    gradient, gradients : callable
        (theta, u, inputs, scored) -> J' u of one example, or (B, D) of many; `scored` is that of one.
    """

    def __init__(
        self, apply: Callable[..., Any], leaves: Sequence[Any], tree: Any, trained: Sequence[int]
    ) -> None:
        self.apply, self._leaves, self._tree, self._trained = apply, leaves, tree, trained
        self._shapes = [tuple(leaves[i].shape) for i in trained]
        self._ends = np.cumsum([leaves[i].size for i in trained])[:-1]

        def outputs(theta: Any, inputs: tuple[Any, ...], scored: ScoredOutputs) -> Any:
            return scored.of(apply(self.params(theta), *inputs)).astype(theta.dtype)

        def linearise(theta: Any, inputs: tuple[Any, ...], scored: ScoredOutputs) -> Any:
            return jax.vjp(lambda theta: outputs(theta, inputs, scored), theta)

        def vjp(pull: Any, u: Any) -> Any:
            return pull(u)[0]

        def jvp(pull: Any, v: Any, shape: tuple[int, int]) -> Any:
            like = jax.ShapeDtypeStruct(shape, v.dtype)
            return jax.linear_transpose(lambda u: pull(u)[0], like)(v)[0]

        def gradient(theta: Any, u: Any, inputs: tuple[Any, ...], scored: ScoredOutputs) -> Any:
            inputs = tuple(x[None] for x in inputs)
            return jax.grad(lambda theta: (outputs(theta, inputs, scored) * u).sum())(theta)

        def vjps(pull: Any, u: Any) -> Any:
            return jax.vmap(lambda one: vjp(pull, one))(u)

        def jvps(pull: Any, v: Any, shape: tuple[int, int]) -> Any:
            return jax.vmap(lambda one: jvp(pull, one, shape), out_axes=1)(v)

        def gradients(theta: Any, u: Any, inputs: tuple[Any, ...], scored: ScoredOutputs) -> Any:
            return jax.vmap(lambda u, inputs: gradient(theta, u, inputs, scored))(u, inputs)

        self.outputs = jax.jit(outputs, static_argnames="scored")
        self.linearise = jax.jit(linearise, static_argnames="scored")
        self.vjp, self.vjps = jax.jit(vjp), jax.jit(vjps)
        self.jvp = jax.jit(jvp, static_argnames="shape")
        self.jvps = jax.jit(jvps, static_argnames="shape")
        self.gradient = jax.jit(gradient, static_argnames="scored")
        self.gradients = jax.jit(gradients, static_argnames="scored")

    def params(self, theta: Any) -> Any:
        """Return theta (D,), an array of JAX, as the pytree that `apply` takes."""
        parts = zip(jax.numpy.split(theta, self._ends), self._shapes, strict=True)
        return self.joined([part.reshape(shape) for part, shape in parts])

    def joined(self, arrays: Sequence[Any]) -> Any:
        """Return the arrays of theta, together with the other leaves, as the pytree that `apply` takes."""
        leaves = list(self._leaves)
        for i, array in zip(self._trained, arrays, strict=True):
            leaves[i] = array
        return jax.tree_util.tree_unflatten(self._tree, leaves)
