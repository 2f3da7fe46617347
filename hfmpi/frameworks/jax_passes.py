"""The passes J v and J' u of a JAX function, and sums over per-example gradients."""

from __future__ import annotations

from collections.abc import Container, Iterator
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from hfmpi.errors import UserError
from hfmpi.frameworks.framework import first_line, split_examples
from hfmpi.models.batch import CheckedBatch
from hfmpi.models.factors import add_examples

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

    Attributes
    ----------
    outputs : (N, O)
    """

    def __init__(self, model: JaxModel, theta: np.ndarray, examples: CheckedBatch) -> None:
        self.model, self.theta, self.inputs, self.scored = model, theta, examples.inputs, examples.scored
        with model.memory_errors():
            outputs, self.transpose = model.linear(theta, self.inputs, scored=self.scored)
            self.outputs = np.asarray(outputs)
        self.nbytes = nbytes(self.transpose) + self.outputs.nbytes

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
        except (NotImplementedError, TypeError, ValueError) as error:  # J' u has no transpose
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

    def _gradients(self, u: np.ndarray) -> Iterator[np.ndarray]:
        """Yield the gradients (b, D) of parts of the examples."""
        model, theta, scored = self.model, self.theta, self.scored.example
        by_example = u.reshape(self.scored.shape[0], -1, u.shape[-1])

        def one(u: np.ndarray, *inputs: np.ndarray) -> Any:
            return model.gradient(theta, u, inputs, scored=scored)

        def gradients(part: slice) -> np.ndarray:
            cotangents, inputs = by_example[part], tuple(x[part] for x in self.inputs)
            return model.batched(
                "examples",
                lambda: np.asarray(model.gradients(theta, cotangents, inputs, scored=scored)),
                lambda: np.stack([*map(one, cotangents, *inputs)]),
            )

        return map(gradients, split_examples(len(by_example), model.size))


def nbytes(tree: Any) -> int:
    """Return the bytes of all arrays of a pytree, or of their shapes and types."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree_util.tree_leaves(tree))
