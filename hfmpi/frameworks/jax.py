"""A function of JAX as a model: apply(params, x) -> outputs.

Each batch is linearised once, by `jax.vjp` under `jax.jit`: what comes back, J' u as a function with its
residuals, can be handed to another compiled function. J v is its transpose (`jax.linear_transpose`), so that
both need the same residuals and neither the function itself, and functions with a rule for the reverse alone
(`jax.custom_vjp`) have both. Everything is compiled once for each shape of a batch.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Container, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np

from hfmpi.errors import UserError, shown
from hfmpi.frameworks.framework import FrameworkModel
from hfmpi.models.batch import Examples, ScoredOutputs
from hfmpi.models.factors import add_examples
from hfmpi.models.losses import Loss

try:
    import jax

    from hfmpi.frameworks.jax_layers import Layers
except ImportError:
    jax = None

__all__ = ["JaxModel"]

EACH_NUMBERS = 1 << 24
"""Numbers of single cases' gradients that are computed at once."""


class JaxModel(FrameworkModel):
    """A function of JAX with a loss.

    Parameters
    ----------
    apply : callable
        (params, x) -> outputs (cases, ..., O), which `jax.jit` can compile; with several inputs,
        (params, x1, x2, ...). x has the cases of a batch along its first axis.
    params : pytree of arrays
        Those of real numbers make theta, in JAX's order; all others stay as they are.
    loss : {'cross-entropy', 'squares', 'bernoulli'} or Loss
        Of each row of outputs.

    Raises
    ------
    UserError
        If JAX is not installed, or there is nothing to train.
    """

    def __init__(self, apply: Any, params: Any, loss: str | Loss) -> None:
        if jax is None:
            raise UserError("JaxModel needs JAX: pip install jax")
        if not callable(apply):
            raise UserError(f"apply must be a function (params, x) -> outputs, not {shown(apply)}")
        paths, self._tree = jax.tree_util.tree_flatten_with_path(params)
        names = [jax.tree_util.keystr(path).strip(".") for path, _ in paths]
        leaves = [leaf if hasattr(leaf, "dtype") else np.asarray(leaf) for _, leaf in paths]
        real = jax.numpy.floating
        self._own = [i for i, a in enumerate(leaves) if jax.numpy.issubdtype(a.dtype, real) and a.size]
        if not self._own:
            raise UserError("params have no array of real numbers")
        kinds = {str(leaves[i].dtype) for i in self._own}
        if kinds not in ({"float32"}, {"float64"}):
            raise UserError(f"params must all be float32 or all be float64, not {', '.join(sorted(kinds))}")
        if kinds == {"float64"} and not jax.config.jax_enable_x64:
            raise UserError(
                "params are float64, and JAX computes in float32: jax.config.update('jax_enable_x64', True)"
            )
        self.apply, self._leaves = apply, leaves
        self._shapes = [tuple(leaves[i].shape) for i in self._own]
        self._ends = np.cumsum([leaves[i].size for i in self._own])[:-1]
        self._batches = True
        self._traced = dict[Any, "Layers | None"]()
        start = np.concatenate([np.asarray(leaves[i]).reshape(-1) for i in self._own])
        super().__init__([(names[i], tuple(leaves[i].shape)) for i in self._own], start, loss)
        self._compile()

    def params(self, theta: Any) -> Any:
        """Give theta (D,), an array of NumPy or JAX, as a pytree like the params."""
        if np.shape(theta) != (self.size,):
            raise UserError(
                f"theta must be a vector of {self.size:,} numbers, not of shape {np.shape(theta)}"
            )
        return self._unravel(jax.numpy.array(theta, self.backend.dtype))

    # The function of theta ---------------------------------------------------------------------

    def _unravel(self, theta: Any) -> Any:
        """Give theta (D,) as the pytree that `apply` takes."""
        parts = zip(jax.numpy.split(theta, self._ends), self._shapes, strict=True)
        return self._joined([part.reshape(shape) for part, shape in parts])

    def _joined(self, own: Sequence[Any]) -> Any:
        """Give these arrays likewise."""
        leaves = list(self._leaves)
        for i, leaf in zip(self._own, own, strict=True):
            leaves[i] = leaf
        return jax.tree_util.tree_unflatten(self._tree, leaves)

    def _function(self, theta: Any, inputs: tuple[Any, ...], scored: ScoredOutputs) -> Any:
        """Give outputs (N, O) of theta (D,), in the type of theta."""
        return scored.of(self.apply(self._unravel(theta), *inputs)).astype(theta.dtype)

    def _layers(self, inputs: tuple[Any, ...], scored: ScoredOutputs) -> Layers | None:
        """Give the function's layers on inputs like these, None where JAX does not tell them as expected."""
        key = scored, *((x.shape, x.dtype) for x in inputs)
        if key not in self._traced:

            def function(own: Sequence[Any], inputs: tuple[Any, ...]) -> Any:
                return scored.of(self.apply(self._joined(own), *inputs)).astype(self.backend.dtype)

            leaves = [jax.ShapeDtypeStruct(shape, self.backend.dtype) for shape in self._shapes]
            try:
                self._traced[key] = Layers(function, self.blocks, leaves, inputs)
            except (AttributeError, KeyError, TypeError, ValueError, NotImplementedError) as failure:
                self._traced[key] = None
                logging.getLogger(__name__).warning(
                    "Note: the layers of the function are not known (%s): Kronecker factors are those of the "
                    "gradients of single cases.",
                    str(failure).partition("\n")[0],
                )
        return self._traced[key]

    def _compile(self) -> None:
        """Make the compiled passes; each compiles itself when a shape is new."""

        def linearise(theta: Any, inputs: tuple[Any, ...], scored: ScoredOutputs) -> Any:
            return jax.vjp(lambda theta: self._function(theta, inputs, scored), theta)

        def back(pull: Any, u: Any) -> Any:
            return pull(u)[0]

        def along(pull: Any, v: Any, shape: tuple[int, int]) -> Any:
            like = jax.ShapeDtypeStruct(shape, v.dtype)
            return jax.linear_transpose(lambda u: pull(u)[0], like)(v)[0]

        def single(theta: Any, u: Any, inputs: tuple[Any, ...], scored: ScoredOutputs) -> Any:
            inputs = tuple(x[None] for x in inputs)
            return jax.grad(lambda theta: (self._function(theta, inputs, scored) * u).sum())(theta)

        def each(theta: Any, u: Any, inputs: tuple[Any, ...], scored: ScoredOutputs) -> Any:
            return jax.vmap(partial(single, scored=scored), (None, 0, 0))(theta, u, inputs)

        def backs(pull: Any, u: Any) -> Any:
            return jax.vmap(lambda one: back(pull, one))(u)

        def alongs(pull: Any, v: Any, shape: tuple[int, int]) -> Any:
            return jax.vmap(lambda one: along(pull, one, shape), out_axes=1)(v)

        self.run = jax.jit(self._function, static_argnames="scored")
        self.linear = jax.jit(linearise, static_argnames="scored")
        self.back, self.backs = jax.jit(back), jax.jit(backs)
        self.along = jax.jit(along, static_argnames="shape")
        self.alongs = jax.jit(alongs, static_argnames="shape")
        self.single = jax.jit(single, static_argnames="scored")
        self.each = jax.jit(each, static_argnames="scored")

    def _check(self, theta: np.ndarray, example: Examples) -> None:
        """Find out what a case keeps too."""
        super()._check(theta, example)

        def kept(own: Examples) -> int:
            _, pull = jax.eval_shape(partial(self.linear, scored=own.scored), theta, own.inputs)
            return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree_util.tree_leaves(pull))

        cases = example.scored.shape[0]
        self._fit_micro_batch((kept(example) - kept(example.first)) / max(1, cases - 1))

    def _outputs(
        self, theta: np.ndarray, inputs: tuple[np.ndarray, ...], scored: ScoredOutputs
    ) -> np.ndarray:
        with _memory():
            return np.asarray(self.run(theta, inputs, scored=scored))

    def _linearise(
        self, theta: np.ndarray, inputs: tuple[np.ndarray, ...], scored: ScoredOutputs
    ) -> JaxPasses:
        return JaxPasses(self, theta, inputs, scored)


class JaxPasses:
    """The outputs of a function linearised at theta; satisfies `hfmpi.models.linearisation.Passes`."""

    def __init__(
        self, model: JaxModel, theta: np.ndarray, inputs: tuple[np.ndarray, ...], scored: ScoredOutputs
    ) -> None:
        self.model, self.theta, self.inputs, self.scored = model, theta, inputs, scored
        with _memory():
            outputs, self.pull = model.linear(theta, inputs, scored=scored)
            self.outputs = np.asarray(outputs)
        self.nbytes = sum(leaf.nbytes for leaf in jax.tree_util.tree_leaves(self.pull)) + self.outputs.nbytes

    def jvp(self, v: np.ndarray) -> np.ndarray:
        """Return J v (N, O) of v (D,), or (N * C, O) of (C, D)."""
        one = partial(self.model.along, self.pull, shape=self.outputs.shape)
        several = partial(self.model.alongs, self.pull, shape=self.outputs.shape)
        v = v.astype(self.outputs.dtype, copy=False)
        with _memory():
            if v.ndim == 1:
                return np.array(one(v))
            tangents = np.array(self._several(several, one, v, 1))
        return tangents.reshape(-1, tangents.shape[-1])

    def vjp(self, u: np.ndarray, out: np.ndarray) -> None:
        """Add J' u of u (N * C, O) to out (D,) or (C, D)."""
        one, several = partial(self.model.back, self.pull), partial(self.model.backs, self.pull)
        u = u.astype(self.outputs.dtype, copy=False)
        with _memory():
            if out.ndim == 1:
                out += np.asarray(one(u))
            else:
                by_direction = u.reshape(-1, len(out), u.shape[-1]).swapaxes(0, 1)
                out += np.asarray(self._several(several, one, by_direction))

    def squares(self, u: np.ndarray, out: np.ndarray, squares: np.ndarray) -> None:
        """Add J' u of u (N, O) to out (D,), and its squares, summed over examples, to squares (D,)."""
        for each in self._each_case(u):
            out += each.sum(axis=0)
            squares += np.einsum("cd,cd->d", each, each)

    def factors(self, u: np.ndarray, out: np.ndarray, sums: np.ndarray) -> None:
        """Add J' u of u (N, O) to out (D,), and the sums of `hfmpi.models.factors` to sums."""
        blocks, layers = self.model.blocks, self.model._layers(self.inputs, self.scored)
        if layers is None:
            self.vjp(u, out)
            loose: Container[int] = range(len(blocks))
        else:
            with _memory():
                total, known = layers.sums(self.theta, self.inputs, u)
            out += np.asarray(total)
            sums += np.asarray(known)
            loose = layers.loose
        if loose:
            for each in self._each_case(u):
                add_examples(blocks, each, sums, loose)

    def _each_case(self, u: np.ndarray) -> Iterator[np.ndarray]:
        """Give the gradients (B, D) of some cases after the others."""
        model, cases, scored = self.model, self.scored.shape[0], self.scored.example
        apart, most = u.reshape(cases, -1, u.shape[-1]), max(1, EACH_NUMBERS // model.size)

        def several(cases: range) -> Any:
            part = slice(cases.start, cases.stop)
            return model.each(self.theta, apart[part], tuple(x[part] for x in self.inputs), scored=scored)

        def one(i: int) -> Any:
            return model.single(self.theta, apart[i], tuple(x[i] for x in self.inputs), scored=scored)

        for start in range(0, cases, most):
            with _memory():
                each = np.asarray(self._several(several, one, range(start, min(start + most, cases))))
            yield each

    def _several(
        self, several: Callable[[Any], Any], one: Callable[[Any], Any], given: Any, axis: int = 0
    ) -> Any:
        """Do several at once where JAX can, else sequentially, and stack the results along the axis."""
        if self.model._batches:
            try:
                return several(given)
            except NotImplementedError as failure:
                self.model._batches = False
                logging.getLogger(__name__).warning(
                    "Note: an operation of the function cannot be batched (%s): one is done after the other.",
                    str(failure).partition("\n")[0],
                )
        return np.stack([one(own) for own in given], axis)


@contextmanager
def _memory() -> Iterator[None]:
    """Raise a MemoryError where JAX raises an error of its own for it."""
    try:
        yield
    except RuntimeError as error:
        if "RESOURCE_EXHAUSTED" in str(error):
            raise MemoryError(str(error).partition("\n")[0]) from None
        raise
