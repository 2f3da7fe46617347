"""The passes J v and J' u of a JAX function, per-example gradients and sums over them."""

from __future__ import annotations

from collections.abc import Container, Iterator, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

import jax
import numpy as np

from hfmpi.errors import UserError
from hfmpi.frameworks.framework import PASSING_NUMBERS, first_line, split_examples
from hfmpi.models.batch import CheckedBatch
from hfmpi.models.factors import add_examples
from hfmpi.optim.layout import Along

if TYPE_CHECKING:
    from hfmpi.frameworks.jax import JaxModel

__all__ = ["JaxPasses", "nbytes"]


class JaxPasses:
    """The outputs of a function linearised at theta; satisfies `hfmpi.models.linearisation.Passes`.

    Parameters
    ----------
    model : JaxModel
    theta : (D,)
    examples : CheckedBatch
    first : {'', 'rows', 'gradient'}
        The first pass, if that computes its own residuals: others may never be needed. Rows: the single
        output of an example is computed together with its gradient. Gradient: that of the summed loss, which
        must be one of `hfmpi.frameworks.jax_losses`, is computed with the outputs.

    Attributes
    ----------
    outputs : (N, O)
    examples : int
        B.
    loss_gradient : (D,) or None
        Of the summed loss, if that is the first pass.
    """

    by_step = False

    def __init__(
        self,
        model: JaxModel,
        theta: np.ndarray,
        examples: CheckedBatch,
        first: Literal["", "rows", "gradient"] = "",
    ) -> None:
        self.model, self.theta, self.inputs, self.scored = model, theta, examples.inputs, examples.scored
        self.examples, self._slopes, self.loss_gradient = examples.size, None, None
        with model.memory_errors():
            if first == "gradient":
                outputs, gradient = model.whole(
                    theta, self.inputs, examples.targets, examples.mask, scored=self.scored
                )
                self.loss_gradient = np.asarray(gradient)
            elif not first:
                outputs, self.transpose = model.linear(theta, self.inputs, scored=self.scored)
            elif self.scored.rows == self.examples and model.plan.width == 1 and self._differentiate():
                return
            else:
                outputs = model.run(theta, self.inputs, scored=self.scored)
            self.outputs = np.asarray(outputs)

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
            self.outputs, self._slopes = np.asarray(both[0]), both[1]
        return both is not None

    @cached_property
    def transpose(self) -> Any:
        """J' u as a function of u, with its residuals."""
        with self.model.memory_errors():
            return self.model.linear(self.theta, self.inputs, scored=self.scored)[1]

    @property
    def nbytes(self) -> int:
        """The bytes of outputs, residuals and gradients."""
        return self.outputs.nbytes + nbytes(self.__dict__.get("transpose")) + nbytes(self._slopes)

    def jvp(self, v: np.ndarray) -> np.ndarray:
        """Return J v (N, O) of v (D,), or (N * C, O) of (C, D)."""
        model, transpose, shape = self.model, self.transpose, self.outputs.shape
        v = v.astype(self.outputs.dtype, copy=False)
        try:
            if v.ndim == 1:
                with model.memory_errors():
                    return np.array(model.jvp(transpose, v, shape=shape))
            tangents = model.batched(
                "directions",
                lambda: np.array(model.jvps(transpose, v, shape=shape)),
                lambda: np.stack([model.jvp(transpose, one, shape=shape) for one in v], axis=1),
            )
        except (NotImplementedError, TypeError, ValueError, RuntimeError) as error:  # J' u has no transpose
            raise UserError(
                f"JAX cannot compute J v of the function ({first_line(error)}): use an optimizer of first "
                "order, such as adam"
            ) from error
        return tangents.reshape(-1, tangents.shape[-1])

    def vjp(self, u: np.ndarray, out: np.ndarray) -> None:
        """Add J' u of u (N * C, O) to out (D,) or (C, D)."""
        model, transpose = self.model, self.transpose
        u = u.astype(self.outputs.dtype, copy=False)
        if out.ndim == 1:
            with model.memory_errors():
                out += np.asarray(model.vjp(transpose, u))
            return
        u = u.reshape(-1, len(out), u.shape[-1]).swapaxes(0, 1)
        out += model.batched(
            "directions",
            lambda: np.asarray(model.vjps(transpose, u)),
            lambda: np.stack([model.vjp(transpose, one) for one in u]),
        )

    def squares(self, u: np.ndarray, out: np.ndarray, squares: np.ndarray) -> None:
        """Add J' u of u (N, O) to out (D,), and its squares, summed over examples, to squares (D,)."""
        total, squared = np.zeros((2, self.model.size), u.dtype)
        for gradients in self._gradients(u):
            total += gradients.sum(axis=0)
            squared += np.einsum("cd,cd->d", gradients, gradients)
        out += total
        squares += squared

    def factors(self, u: np.ndarray, out: np.ndarray, sums: np.ndarray) -> None:
        """Add J' u of u (N, O) to out (D,), and the sums of `hfmpi.models.factors` to sums."""
        blocks, layers = self.model.blocks, self.model.layers(self.inputs, self.scored)
        if layers is None:
            self.vjp(u, out)
            known = np.zeros(sums.size, u.dtype)
            unassigned: Container[int] = range(len(blocks))
        else:
            with self.model.memory_errors():
                total, known = map(np.array, layers.sums(self.theta, self.inputs, u))
            out += total
            unassigned = layers.unassigned
        if unassigned:
            for gradients in self._gradients(u):
                add_examples(blocks, gradients, known, unassigned)
        sums += known

    def rows(self, u: np.ndarray, out: np.ndarray) -> None:
        """Fill out (B, C, D) with J' u of each example, for each of C cotangents u (N * C, O)."""
        u = u.astype(self.outputs.dtype, copy=False)
        if self._slopes is not None and out.shape[1] == 1:
            for into, slopes in self._arrays(out[:, 0], self._slopes):
                np.multiply(slopes, u, out=into)
            return
        u = u.reshape(self.examples, -1, out.shape[1], u.shape[-1])
        for part in split_examples(self.examples, out.shape[1] * self.model.size):
            self._fill(part, u[part], out[part])

    def rows_along(self, u: np.ndarray, several: int, along: Along) -> np.ndarray:
        """Return V S' (k, B, C) of the rows S that `rows` computes for C cotangents, in parts."""
        u = u.astype(self.outputs.dtype, copy=False).reshape(self.examples, -1, several, u.shape[-1])
        products = np.zeros((len(along), self.examples, several), u.dtype)
        for part in split_examples(self.examples, several * self.model.size, PASSING_NUMBERS):
            rows = np.empty((len(u[part]), several, self.model.size), u.dtype)
            self._fill(part, u[part], rows)
            products[:, part] = along(rows.reshape(-1, self.model.size)).reshape(-1, *rows.shape[:2])
        return products

    def _gradients(self, u: np.ndarray) -> Iterator[np.ndarray]:
        """Yield the gradients (b, D) of parts of the examples."""
        u = u.reshape(self.examples, -1, 1, u.shape[-1])
        for part in split_examples(self.examples, self.model.size):
            out = np.empty((len(u[part]), 1, self.model.size), u.dtype)
            self._fill(part, u[part], out)
            yield out[:, 0]

    def _fill(self, part: slice, u: np.ndarray, out: np.ndarray) -> None:
        """Fill out (b, C, D) with the gradients of some of the examples and their u (b, n, C, O)."""
        model, theta, scored = self.model, self.theta, self.scored.example
        inputs = tuple(x[part] for x in self.inputs)

        def copy(gradients: Sequence[Any], out: np.ndarray) -> None:
            for into, array in self._arrays(out, gradients):
                into[...] = array

        def one_by_one() -> None:
            for i, c in np.ndindex(out.shape[:2]):
                one = tuple(x[i] for x in inputs)
                copy(model.gradient(theta, u[i, :, c], one, scored=scored), out[i, c])

        model.batched(
            "examples", lambda: copy(model.gradients(theta, u, inputs, scored=scored), out), one_by_one
        )

    def _arrays(self, out: np.ndarray, gradients: Sequence[Any]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yield the part of out (..., D) for each trained array, and the gradients (..., d) in that array."""
        offsets = self.model.layout.offsets.values()
        for array, start in zip(gradients, offsets, strict=True):
            part = np.asarray(array).reshape(*out.shape[:-1], -1)
            yield out[..., start : start + part.shape[-1]], part


def nbytes(tree: Any) -> int:
    """Return the bytes of all arrays of a pytree, or of their shapes and types."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree_util.tree_leaves(tree))
