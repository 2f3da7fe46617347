"""The passes J v and J' u of a JAX function, per-example gradients and sums over them."""

from __future__ import annotations

from collections.abc import Container, Iterator, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

import jax
import numpy as np

from hfmpi.backends.base import Array
from hfmpi.errors import UserError
from hfmpi.frameworks.framework import PASSING_NUMBERS, first_line, split_examples
from hfmpi.models.batch import CheckedBatch
from hfmpi.models.factors import add_examples
from hfmpi.optim.layout import Along

if TYPE_CHECKING:
    from hfmpi.frameworks.jax import JaxModel
    from hfmpi.frameworks.jax_layers import Layers

__all__ = ["JaxPasses", "nbytes"]


class JaxPasses:
    """The outputs of a function linearised at theta; satisfies `hfmpi.models.linearisation.Passes`.

    Parameters
    ----------
    model : JaxModel
    theta : (D,)
    examples : CheckedBatch
    first : {'', 'rows', 'gradient'}
        The first pass, if it computes separate residuals because other passes may never be needed. 'rows':
        the single output of each example is computed together with its gradient. 'gradient': the gradient of
        the summed loss, which must be one of `hfmpi.frameworks.jax_losses`, is computed with the outputs.

    Attributes
    ----------
    outputs : (N, O)
    examples : int
        B, the number of examples.
    loss_gradient : (D,) or None
        The gradient of the summed loss, if that is the first pass.
    """

    by_step = False

    def __init__(
        self,
        model: JaxModel,
        theta: Array,
        examples: CheckedBatch,
        first: Literal["", "rows", "gradient"] = "",
    ) -> None:
        self.model, self.exchange, self.scored = model, model.exchange, examples.scored
        self.theta, self.inputs = self.exchange.saved(theta), model.inputs(examples)
        self.examples, self._slopes, self.loss_gradient = examples.size, None, None
        with model.memory_errors():
            if first == "gradient":
                outputs, gradient = model.whole(
                    self.theta, self.inputs, examples.targets, examples.mask, scored=self.scored
                )
                self.loss_gradient = self.exchange.copied(gradient)
            elif not first:
                outputs, self.transpose = model.linear(self.theta, self.inputs, scored=self.scored)
            elif self.scored.rows == self.examples and model.plan.width == 1 and self._differentiate():
                return
            else:
                outputs = model.run(self.theta, self.inputs, scored=self.scored)
            self.outputs = self.exchange.array(outputs)

    def _differentiate(self) -> bool:
        """Compute the output of each example together with its gradient; return whether JAX can do so."""
        model = self.model
        if len(split_examples(self.examples, model.size)) > 1:
            return False
        both = model.batched(
            "examples",
            lambda: model.slopes(self.theta, self.inputs, scored=self.scored.example),
            lambda: None,
        )
        if both is not None:
            self.outputs, self._slopes = self.exchange.array(both[0]), both[1]
        return both is not None

    @cached_property
    def transpose(self) -> Any:
        """J' u as a function of u, with its residuals."""
        with self.model.memory_errors():
            return self.model.linear(self.theta, self.inputs, scored=self.scored)[1]

    @property
    def nbytes(self) -> int:
        """The bytes of outputs, residuals and gradients."""
        return int(self.outputs.nbytes) + nbytes(self.__dict__.get("transpose")) + nbytes(self._slopes)

    def jvp(self, v: Array) -> Array:
        """Return J v (N, O) of v (D,), or (N * C, O) of (C, D)."""
        model, transpose, shape = self.model, self.transpose, self.outputs.shape
        tensor = self.exchange.tensor(v.astype(self.outputs.dtype, copy=False))
        try:
            if v.ndim == 1:
                with model.memory_errors():
                    return self.exchange.copied(model.jvp(transpose, tensor, shape=shape))
            tangents = model.batched(
                "directions",
                lambda: self.exchange.copied(model.jvps(transpose, tensor, shape=shape)),
                lambda: self.exchange.copied(
                    jax.numpy.stack([model.jvp(transpose, one, shape=shape) for one in tensor], axis=1)
                ),
            )
        except UserError:
            raise
        except (NotImplementedError, TypeError, ValueError, RuntimeError) as error:  # not transposable
            raise UserError(
                f"JAX cannot compute J v of the function ({first_line(error)}): use a first-order optimizer, "
                "such as adam"
            ) from error
        return tangents.reshape(-1, tangents.shape[-1])

    def vjp(self, u: Array, out: Array) -> None:
        """Add J' u of u (N * C, O) to out (D,) or (C, D)."""
        model, transpose, array = self.model, self.transpose, self.exchange.array
        u = u.astype(self.outputs.dtype, copy=False)
        if out.ndim == 1:
            with model.memory_errors():
                out += array(model.vjp(transpose, self.exchange.tensor(u)))
            return
        tensor = self.exchange.tensor(u.reshape(-1, len(out), u.shape[-1]).swapaxes(0, 1))
        out += model.batched(
            "directions",
            lambda: array(model.vjps(transpose, tensor)),
            lambda: array(jax.numpy.stack([model.vjp(transpose, one) for one in tensor])),
        )

    def squares(self, u: Array, out: Array, squares: Array) -> None:
        """Add J' u of u (N, O) to out (D,), and the sum of squared per-example gradients to squares (D,)."""
        xp = self.exchange.backend.xp
        total, squared = xp.zeros((2, self.model.size), u.dtype)
        for gradients in self._gradients(u):
            total += gradients.sum(axis=0)
            squared += xp.einsum("cd,cd->d", gradients, gradients)
        out += total
        squares += squared

    def factors(self, u: Array, out: Array, sums: Array, weights: Array | None = None) -> None:
        """Add J' u of u (N, O) to out (D,), and the sums of `hfmpi.models.factors`; see `Passes.factors`."""
        blocks = self.model.blocks
        if weights is None:
            layers = self.model.layers(self.inputs, self.scored)
        else:
            layers = self.model.layers(tuple(x[:1] for x in self.inputs), self.scored.example)
        if layers is None:
            self.vjp(u, out)
            known = self.exchange.backend.xp.zeros(sums.size, u.dtype)
            unassigned: Container[int] = range(len(blocks))
        else:
            with self.model.memory_errors():
                if weights is None:
                    found = layers.sums(self.theta, self.inputs, self.exchange.tensor(u))
                    total, known = map(self.exchange.copied, found)
                else:
                    total, known = self._weighted_sums(layers, u, weights, sums.size)
            out += total
            unassigned = layers.unassigned
        if unassigned:
            for gradients in self._gradients(u):
                add_examples(blocks, gradients, known, unassigned)
        sums += known

    def _weighted_sums(self, layers: Layers, u: Array, weights: Array, size: int) -> tuple[Array, Array]:
        """Return J' u and the sums for factors, with weighted examples.

        Layers do not record which example an operand belongs to, so each example is processed as a batch.
        """
        xp = self.exchange.backend.xp
        u = u.reshape(self.examples, -1, u.shape[-1])
        roots = xp.sqrt(xp.where(weights > 0, weights, 1)).astype(u.dtype)
        total, sums = xp.zeros(self.model.size, u.dtype), xp.zeros(size, u.dtype)
        for part in split_examples(self.examples, size + self.model.size, PASSING_NUMBERS):
            inputs, root = tuple(x[part, None] for x in self.inputs), roots[part]
            cotangents = self.exchange.tensor(u[part] / root[:, None, None])
            each = layers.sums_of_each(self.theta, inputs, cotangents)
            gradients, of_factors = map(self.exchange.array, each)
            total += xp.matmul(root, gradients)
            sums += xp.matmul(weights[part], of_factors)
        return total, sums

    def rows(self, u: Array, out: Array) -> None:
        """Fill out (B, C, D) with J' u of each example, for each of C cotangents u (N * C, O)."""
        u = u.astype(self.outputs.dtype, copy=False)
        if self._slopes is not None and out.shape[1] == 1:
            for into, slopes in self._arrays(out[:, 0], self._slopes):
                np.multiply(slopes, u, out=into)
            return
        u = u.reshape(self.examples, -1, out.shape[1], u.shape[-1])
        for part in split_examples(self.examples, out.shape[1] * self.model.size):
            self._fill(part, u[part], out[part])

    def rows_along(self, u: Array, several: int, along: Along) -> Array:
        """Return V S' (k, B, C) for the rows S that `rows` computes for C cotangents, in parts."""
        xp = self.exchange.backend.xp
        u = u.astype(self.outputs.dtype, copy=False).reshape(self.examples, -1, several, u.shape[-1])
        products = xp.zeros((len(along), self.examples, several), u.dtype)
        for part in split_examples(self.examples, several * self.model.size, PASSING_NUMBERS):
            rows = xp.empty((len(u[part]), several, self.model.size), u.dtype)
            self._fill(part, u[part], rows)
            products[:, part] = along(rows.reshape(-1, self.model.size)).reshape(-1, *rows.shape[:2])
        return products

    def _gradients(self, u: Array) -> Iterator[Array]:
        """Yield the gradients (b, D) of parts of the examples."""
        u = u.reshape(self.examples, -1, 1, u.shape[-1])
        for part in split_examples(self.examples, self.model.size):
            out = self.exchange.backend.xp.empty((len(u[part]), 1, self.model.size), u.dtype)
            self._fill(part, u[part], out)
            yield out[:, 0]

    def _fill(self, part: slice, u: Array, out: Array) -> None:
        """Fill out (b, C, D) with the gradients of the examples in `part` for their u (b, n, C, O)."""
        model, theta, scored, tensor = self.model, self.theta, self.scored.example, self.exchange.tensor(u)
        inputs = tuple(x[part] for x in self.inputs)

        def copy(gradients: Sequence[Any], out: Array) -> None:
            for into, array in self._arrays(out, gradients):
                into[...] = array

        def one_by_one() -> None:
            for i, c in np.ndindex(out.shape[:2]):
                one = tuple(x[i] for x in inputs)
                copy(model.gradient(theta, tensor[i, :, c], one, scored=scored), out[i, c])

        model.batched(
            "examples", lambda: copy(model.gradients(theta, tensor, inputs, scored=scored), out), one_by_one
        )

    def _arrays(self, out: Array, gradients: Sequence[Any]) -> Iterator[tuple[Array, Array]]:
        """Yield for each trained array its part of out (..., D) and its gradients (..., d)."""
        offsets = self.model.layout.offsets.values()
        for array, start in zip(gradients, offsets, strict=True):
            part = self.exchange.array(array).reshape(*out.shape[:-1], -1)
            yield out[..., start : start + part.shape[-1]], part


def nbytes(tree: Any) -> int:
    """Return the size in bytes of all arrays of a pytree, or of arrays with these shapes and dtypes."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree_util.tree_leaves(tree))
