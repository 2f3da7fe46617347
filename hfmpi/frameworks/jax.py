"""A JAX function as a model: apply(params, x) -> outputs.

Each batch is linearised once, by `jax.vjp` under `jax.jit`. The result, J' u as a function with its
residuals, can be passed to other compiled functions. J v is the transpose of J' u (`jax.linear_transpose`).
Both products therefore use the same residuals and do not evaluate the function again, and both also work for
functions that define a rule for the reverse pass only (`jax.custom_vjp`).
"""

from __future__ import annotations

import logging
import pickle
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal, cast

import numpy as np

from hfmpi.backends.base import Array
from hfmpi.data.batches import spread
from hfmpi.errors import UserError, shown
from hfmpi.frameworks.framework import SUMMED, FrameworkModel, check_gradient, first_line
from hfmpi.models.batch import CheckedBatch, ScoredOutputs
from hfmpi.models.linearisation import LossLinearisation
from hfmpi.models.losses import Loss

try:
    import jax

    from hfmpi.frameworks.jax_exchange import JaxExchange, choose_exchange
    from hfmpi.frameworks.jax_layers import Layers
    from hfmpi.frameworks.jax_losses import has_gradient, loss_gradient
    from hfmpi.frameworks.jax_params import Params
    from hfmpi.frameworks.jax_passes import JaxPasses, nbytes
    from hfmpi.frameworks.jax_trace import Draw, fingerprint, flow, has_reverse_rules
except ImportError:
    jax = None

__all__ = ["JaxModel"]


COMPILED = "run", "whole", "linear", "vjp", "vjps", "jvp", "jvps", "gradient", "gradients", "slopes", "double"
"""The attributes of a model that hold compiled functions."""


class JaxModel(FrameworkModel):
    """A JAX function with a loss.

    Theta (D,) consists of the trained arrays of `params`, in JAX's order. Everything else in `params` is
    constant: functions, strings, Python numbers, random keys, integers. A note lists the real numbers that
    are not trained.

    Parameters
    ----------
    apply : callable
        (params, x) -> outputs (B, ..., O), which `jax.jit` can compile, with B examples along the first axis
        of x; with several inputs, (params, x1, x2, ...). It must be a pure function.
    params : pytree of arrays, or a module of equinox or flax.nnx
        Its trained arrays are all float32 or all float64, which is also the dtype of theta.
    loss : {'cross-entropy', 'squares', 'mse', 'bernoulli', 'binary-cross-entropy'} or Loss
        The loss of each scored output (O,).
    trained : callable or pytree of bool, optional
        Selects the arrays of real numbers to train: a function (path, array) -> bool, where the path is a
        string such as "['hidden']['bias']" or "layers[0].weight", or a tree of bools with the structure of
        params or of their upper levels. Default: all except running statistics. Of the variables of a flax
        module these are the collection "params", of a flax.nnx module its `nnx.Param`, of any other tree
        everything that is not below a name such as "batch_stats".

    Raises
    ------
    UserError
        If JAX is not installed, or the function cannot be trained: `params` contain no real numbers, or
        dtypes, the choice of arrays or a batch do not fit.

    Examples
    --------
    >>> model = hfmpi.JaxModel(lambda params, x: x @ params["w"], {"w": numpy.zeros((2, 1))}, "squares")
    >>> result = hfmpi.train(model, (x, y), optimizer="bhf-short", max_steps=10)
    >>> params = model.params(result.theta)
    """

    memory_words = ("RESOURCE_EXHAUSTED",)
    exchange: JaxExchange

    def __init__(self, apply: Any, params: Any, loss: str | Loss, trained: Any = None) -> None:
        if jax is None:
            raise UserError("JaxModel needs JAX: pip install jax")
        if not callable(apply):
            raise UserError(f"apply must be a function (params, x) -> outputs, not {shown(apply)}")
        self.apply, self._params = apply, Params(params, trained)
        self._digests = dict[Any, bytes]()
        exchange = choose_exchange(params, self._params.start.dtype.name)
        super().__init__(self._params.shapes, self._params.start, loss, exchange=exchange)
        self.on_gpu = jax.default_backend() != "cpu"
        self._compile()

    def __getstate__(self) -> dict[str, Any]:
        """Return the state without the compiled functions."""
        return {
            name: value
            for name, value in super().__getstate__().items()
            if name not in (*COMPILED, "_layers")
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._compile()

    def params(self, theta: Any) -> Any:
        """Return theta (D,), a NumPy, JAX or CuPy array, as a pytree or module with the structure of params.

        Raises
        ------
        UserError
            If theta has a different shape.
        """
        shape = theta.shape if hasattr(theta, "shape") else np.shape(theta)
        if shape != (self.size,):
            raise UserError(f"theta must be a vector of {self.size:,} numbers, not of shape {shape}")
        with self.exchange.working():
            if isinstance(theta, self.backend.xp.ndarray):
                theta = self.exchange.tensor(theta)
            return self._params.joined(self._params.split(jax.numpy.array(theta, self.backend.dtype)))

    def theta(self, params: Any) -> np.ndarray:
        """Return theta (D,) for a pytree with the structure of params; the inverse of `params`."""
        return self._params.theta(params)

    def updates(self, params: Any, theta: np.ndarray) -> Any:
        """Return the update that turns a pytree with the structure of params into that of theta (D,)."""
        return self._params.updates(params, theta)

    def in_float64(self, theta: np.ndarray, examples: CheckedBatch) -> np.ndarray | None:
        """Return the scored outputs of the function, computed in float64 for params of any dtype.

        Parameters
        ----------
        theta : (D,) float64
        examples : CheckedBatch

        Returns
        -------
        outputs : (N, O) float64, or None
            None if the function rounds to a lower precision, or does not work in float64.
        """
        inputs = tuple(x.astype(float) if x.dtype.kind == "f" else x for x in examples.inputs)
        try:
            with _enable_x64():
                traced = self.double.trace(theta, inputs, scored=examples.scored)
                labels = [frozenset("x")] * (1 + len(inputs))
                if flow(traced.jaxpr, labels).low:
                    return None
                return np.asarray(self.double(theta, inputs, scored=examples.scored))
        except Exception:  # any error: the function may not support float64
            return None

    # The function of theta, compiled -----------------------------------------------------------

    def _compile(self) -> None:
        """Create the compiled functions; each is compiled again for new shapes.

        The `transpose` that `linear` returns contains the residuals of one batch and computes J' u.
        Per-example gradients are returned for each trained array, not as theta, so that XLA writes them once.
        `slopes` returns them with the outputs, for examples with a single output. `whole` returns the outputs
        and the gradient of the summed loss: XLA fuses both passes, and the residuals are not returned.
        """

        def outputs(theta: Any, inputs: tuple[Any, ...], scored: ScoredOutputs) -> Any:
            return self._called(self._params.split(theta), inputs, scored)

        def double(theta: Any, inputs: tuple[Any, ...], scored: ScoredOutputs) -> Any:
            return self._called(self._params.split(theta), inputs, scored, double=True)

        def linear(theta: Any, inputs: tuple[Any, ...], scored: ScoredOutputs) -> Any:
            return jax.vjp(lambda theta: outputs(theta, inputs, scored), theta)

        def vjp(transpose: Any, u: Any) -> Any:
            return transpose(u)[0]

        def jvp(transpose: Any, v: Any, shape: tuple[int, int]) -> Any:
            like = jax.ShapeDtypeStruct(shape, v.dtype)
            return jax.linear_transpose(lambda u: transpose(u)[0], like)(v)[0]

        def of_example(theta: Any, inputs: tuple[Any, ...], scored: ScoredOutputs) -> Any:
            inputs, arrays = tuple(x[None] for x in inputs), self._params.split(theta)
            return jax.vjp(lambda arrays: self._called(arrays, inputs, scored), arrays)

        def gradient(theta: Any, u: Any, inputs: tuple[Any, ...], scored: ScoredOutputs) -> Any:
            return of_example(theta, inputs, scored)[1](u)[0]

        def slopes(theta: Any, inputs: tuple[Any, ...], scored: ScoredOutputs) -> Any:
            def one(inputs: tuple[Any, ...]) -> Any:
                output, transpose = of_example(theta, inputs, scored)
                return output[0], transpose(jax.numpy.ones_like(output))[0]

            return jax.vmap(one)(inputs)

        def vjps(transpose: Any, u: Any) -> Any:
            return jax.vmap(lambda one: vjp(transpose, one))(u)

        def jvps(transpose: Any, v: Any, shape: tuple[int, int]) -> Any:
            return jax.vmap(lambda one: jvp(transpose, one, shape), out_axes=1)(v)

        def gradients(theta: Any, u: Any, inputs: tuple[Any, ...], scored: ScoredOutputs) -> Any:
            def one(u: Any, inputs: tuple[Any, ...]) -> Any:
                transpose = of_example(theta, inputs, scored)[1]
                if u.shape[1] == 1:
                    return [g[None] for g in transpose(u[:, 0])[0]]
                return jax.vmap(lambda u: transpose(u)[0], in_axes=1)(u)

            return jax.vmap(one)(u, inputs)

        def whole(theta: Any, inputs: Any, targets: Any, mask: Any, scored: ScoredOutputs) -> Any:
            z, transpose = linear(theta, inputs, scored)
            u = loss_gradient(self.output_loss, z, targets)
            return z, transpose(u if mask is None else u * mask)[0]

        self.run = jax.jit(outputs, static_argnames="scored")
        self.whole = jax.jit(whole, static_argnames="scored")
        self.linear = jax.jit(linear, static_argnames="scored")
        self.vjp, self.vjps = jax.jit(vjp), jax.jit(vjps)
        self.jvp = jax.jit(jvp, static_argnames="shape")
        self.jvps = jax.jit(jvps, static_argnames="shape")
        self.gradient = jax.jit(gradient, static_argnames="scored")
        self.gradients = jax.jit(gradients, static_argnames="scored")
        self.slopes = jax.jit(slopes, static_argnames="scored")
        self.double = jax.jit(double, static_argnames="scored")
        self._layers = dict[Any, "Layers | None"]()

    def _called(
        self,
        arrays: Sequence[Any],
        inputs: Sequence[Any],
        scored: ScoredOutputs,
        state: Sequence[Any] = (),
        double: bool = False,
        changes: dict[int, Any] | None = None,
    ) -> Any:
        """Return the scored outputs (N, O) of the function, in the dtype of its params; see `Params.call`."""
        with self._tracing(inputs):
            z = self._params.call(self.apply, arrays, inputs, state, double, changes)
            if isinstance(z, jax.Array | np.ndarray) and z.dtype not in (np.float32, np.float64):
                real = jax.numpy.issubdtype(z.dtype, jax.numpy.floating)
                advice = ": use .astype(jax.numpy.float32)" if real else ""
                raise UserError(f"outputs must be float32 or float64, not {z.dtype}{advice}")
            return scored.of(z).astype(arrays[0].dtype)

    @contextmanager
    def _tracing(self, inputs: Sequence[Any]) -> Iterator[None]:
        """Raise a UserError for errors of the user's function, except operations that cannot be batched."""
        unbatched = None
        with self.running(inputs):
            try:
                yield
            except NotImplementedError as error:
                unbatched = error
        if unbatched is not None:
            raise unbatched

    def layers(self, inputs: tuple[Any, ...], scored: ScoredOutputs) -> Layers | None:
        """Return the layers of the function for inputs of these shapes, or None if they are unknown."""
        key = scored, *((x.shape, x.dtype) for x in inputs)
        if key not in self._layers:

            def outputs(leaves: Sequence[Any], inputs: tuple[Any, ...]) -> Any:
                return self._called(leaves, inputs, scored)

            leaves = [
                jax.ShapeDtypeStruct(shape, self.backend.dtype) for shape in self.layout.shapes.values()
            ]
            try:
                self._layers[key] = Layers(outputs, self.blocks, leaves, inputs)
            except UserError:
                raise
            except (AttributeError, KeyError, TypeError, ValueError, NotImplementedError) as failure:
                self._layers[key] = None
                logging.getLogger(__name__).warning(
                    "Note: the layers of the function cannot be determined (%s): Kronecker factors are "
                    "computed "
                    "from per-example gradients.",
                    first_line(failure),
                )
        return self._layers[key]

    def _outputs(self, theta: Array, examples: CheckedBatch) -> Array:
        self._check_width(examples)
        exchange, inputs = self.exchange, self.inputs(examples)
        with self.memory_errors():
            return exchange.array(self.run(exchange.tensor(theta), inputs, scored=examples.scored))

    def inputs(self, examples: CheckedBatch) -> tuple[Any, ...]:
        """Return the inputs of a batch in the form that compiled functions take."""
        return tuple(self.exchange.moved(x) for x in examples.inputs)

    def _linearise(self, theta: Array, examples: CheckedBatch) -> JaxPasses:
        self._check_width(examples)
        return JaxPasses(self, theta, examples)

    def linearise_gradient(
        self,
        theta: Array,
        batch: Any,
        reuse: LossLinearisation | None = None,
        *,
        extra: Literal["", "squares", "factors"] = "",
    ) -> LossLinearisation:
        """Linearise as `linearise` does; for built-in losses, compute the gradient with the outputs."""
        if extra or not has_gradient(self.output_loss):
            return self.linearise(theta, batch, reuse)
        at = self._linearised(theta, batch, reuse, self._linearise_gradient)
        at.ready = cast("JaxPasses", at.passes).loss_gradient
        return at

    def _linearise_gradient(self, theta: Array, examples: CheckedBatch) -> JaxPasses:
        self._check_width(examples)
        return JaxPasses(self, theta, examples, first="gradient")

    def _linearise_rows(self, theta: Array, examples: CheckedBatch) -> JaxPasses:
        self._check_width(examples)
        return JaxPasses(self, theta, examples, first="rows")

    def _check_width(self, examples: CheckedBatch) -> None:
        """Raise a UserError if JAX would truncate 64-bit numbers to 32 bits without a warning."""
        if jax.config.jax_enable_x64:
            return
        if self.backend.dtype == np.float64:
            raise UserError(
                "params are float64, but JAX computes in float32: call jax.config.update('jax_enable_x64', "
                "True)"
            )
        for x in examples.inputs:
            if x.dtype.kind in "iu" and x.dtype.itemsize == 8 and x.size:
                limits = np.iinfo(x.dtype.kind + "4")
                if x.min() < limits.min or x.max() > limits.max:
                    raise UserError(
                        f"inputs are integers from {x.min()} to {x.max()}, but JAX computes with 32 bits: "
                        "call jax.config.update('jax_enable_x64', True)"
                    )

    def _check(self, theta: np.ndarray, examples: CheckedBatch) -> None:
        """Check the first batch, and set the micro-batch size from the residuals per example."""
        self._check_width(examples)
        try:
            self._check_trace(examples)
            self._check_state(theta, examples)
            super()._check(theta, examples)
        except (jax.errors.JAXTypeError, jax.errors.JaxRuntimeError, FloatingPointError) as error:
            with self.running(examples.inputs):
                raise type(error)(_reason(error)) from error

        def residuals(some: CheckedBatch) -> int:
            linear = partial(self.linear, scored=some.scored)
            return nbytes(jax.eval_shape(linear, theta, some.inputs)[1])

        def gradient(theta: Any, inputs: tuple[Any, ...]) -> Any:
            outputs, transpose = self.linear(theta, inputs, scored=examples.scored)
            return transpose(outputs)

        try:
            jax.eval_shape(gradient, theta, examples.inputs)
            kept = residuals(examples) - residuals(examples.take([0]))
        except UserError:
            raise
        except Exception as error:
            raise UserError(
                f"JAX cannot differentiate the function: {type(error).__name__}: {first_line(error)}"
            ) from error
        self._check_rules(theta, examples)
        self._check_derivatives(theta, examples)
        self._fit_micro_batch(kept / max(1, examples.size - 1))
        for note in self._params.notes:
            logging.getLogger(__name__).warning(note)

    def _check_gradients(self, theta: np.ndarray, few: CheckedBatch) -> None:
        """Do nothing: `_check_derivatives` checks them once JAX is known to differentiate the function."""

    def _check_derivatives(self, theta: np.ndarray, examples: CheckedBatch) -> None:
        """Check that derivatives are finite, and if they have user-defined rules, also per example."""
        if has_reverse_rules(self._traced(examples)):
            super()._check_gradients(theta, examples.take(spread(examples.size, SUMMED)))
            return
        backend = self.backend
        passes = JaxPasses(self, backend.to_device(theta), examples)
        gradient = backend.xp.zeros(theta.size, theta.dtype)
        passes.vjp(backend.xp.zeros_like(passes.outputs) + 1, gradient)
        check_gradient(backend.to_host(gradient))

    def _check_rules(self, theta: np.ndarray, examples: CheckedBatch) -> None:
        """Raise a UserError if a derivative rule computes outputs that differ from the function's."""
        with self.memory_errors():
            outputs = self.host_outputs(theta, examples)
            differentiated = np.asarray(self.linear(theta, examples.inputs, scored=examples.scored)[0])
        eps = np.finfo(outputs.dtype).eps
        if eps > 1e-10 and jax.default_backend() != "cpu":
            eps = 1e-4  # GPUs round factors of float32 products to 10 bits (TF32)
        bound = np.sqrt(eps) * np.abs(outputs[np.isfinite(outputs)]).max(initial=0)
        if not np.allclose(differentiated, outputs, 0, bound, equal_nan=True):
            raise UserError(
                "the outputs of the function change when JAX differentiates it: the rule of a "
                "jax.custom_vjp or jax.custom_jvp must compute the same outputs as the function"
            )

    def _traced(self, examples: CheckedBatch) -> Any:
        """Trace the function again, even if it has been traced before; return the ClosedJaxpr."""

        def outputs(arrays: Sequence[Any], state: Sequence[Any], inputs: Sequence[Any]) -> Any:
            return self._called(arrays, inputs, examples.scored, state)

        arrays = [jax.ShapeDtypeStruct(shape, self.backend.dtype) for shape in self.layout.shapes.values()]
        return jax.make_jaxpr(outputs)(arrays, self._params.state, examples.inputs)

    def _used(self, traced: Any) -> frozenset[Any]:
        """Return what the outputs depend on: indices of trained arrays, "state", "input" and random draws."""
        several = len(traced.jaxpr.invars), len(self.layout.shapes), len(self._params.random)
        names = [*range(several[1]), *["state"] * several[2], *["input"] * (several[0] - sum(several[1:]))]
        (used,) = flow(traced, [frozenset([name]) for name in names]).outputs
        return used

    def _check_state(self, theta: np.ndarray, examples: CheckedBatch) -> None:
        """Raise a UserError if the function changes the state of a module."""

        def changes(theta: Any, inputs: tuple[Any, ...]) -> dict[int, Any]:
            found = dict[int, Any]()
            self._called(self._params.split(theta), inputs, examples.scored, changes=found)
            return found

        if jax.eval_shape(changes, theta, examples.inputs):  # most modules assign nothing
            found = jax.jit(changes)(theta, examples.inputs)
            self._params.check_changes(self._params.split(theta), found)

    def _check_trace(self, examples: CheckedBatch) -> None:
        """Raise a UserError if the trace shows that the function is random, or does not use the params."""
        states, traced = [_random_states()], self._traced(examples)
        states.append(_random_states())
        digest = fingerprint(self._traced(examples))
        states.append(_random_states())
        draws = states[0] != states[1] != states[2]  # a single change may come from another thread
        if digest != fingerprint(traced) or draws:
            raise UserError(
                "JAX obtains a different trace each time (random numbers of NumPy or Python, or a variable "
                "that the function changes?): it must be a pure function of params and inputs"
            )
        key = examples.scored, *((x.shape, x.dtype) for x in examples.inputs)
        if self._digests.setdefault(key, digest) != digest:  # a closed-over variable has changed
            self._compile()
            self._digests = {key: digest}
        used, log = self._used(traced), logging.getLogger(__name__)
        if "state" in used:
            raise UserError(
                "the outputs depend on the random numbers of the module (dropout?): call its method eval() "
                "before you create the model"
            )
        arrays = {label for label in used if isinstance(label, int)}
        if not arrays:
            raise UserError("the outputs do not depend on params: the function must use its first argument")
        draws = {label for label in used if isinstance(label, Draw)}
        if draws:
            other = self._used(self._traced(examples.take([0] * (1 + (examples.size == 1)))))
            if draws != {label for label in other if isinstance(label, Draw)}:
                raise UserError(
                    "the function draws random numbers for each example of a batch, as dropout does, so "
                    "that the outputs of an example depend on its position in the batch: train without "
                    "random numbers"
                )
            log.warning("Note: the function draws random numbers from a fixed key: they never change.")
        if unused := self._params.unused(arrays):
            log.warning("Note: the outputs do not depend on %s.", unused)


def _enable_x64() -> Any:
    """Return a context in which JAX has float64, for this thread."""
    if hasattr(jax, "enable_x64"):
        return jax.enable_x64(True)
    from jax.experimental import enable_x64  # before JAX 0.8

    return enable_x64()


def _random_states() -> Any:
    """Return the states of the global random generators of Python and NumPy."""
    return random.getstate(), pickle.dumps(np.random.get_state())  # noqa: NPY002


def _reason(error: Exception) -> str:
    """Return the message of an exception, or its last line if it reports another exception."""
    message = str(error)
    return message.strip().splitlines()[-1] if "Traceback" in message else message
