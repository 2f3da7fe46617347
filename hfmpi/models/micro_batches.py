"""The loss of a data set of any size, and outputs of inputs without targets, on one rank in micro-batches."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from hfmpi.backends.base import Array
from hfmpi.data.examples import Examples, converted
from hfmpi.errors import UserError
from hfmpi.models.base import Model, Scoring
from hfmpi.models.batch import ScoredOutputs
from hfmpi.optim.checks import check_vector

__all__ = ["EveryOutput", "check_theta", "in_parts", "inputs_alone", "loss_of_examples"]


class EveryOutput(ScoredOutputs):
    """All outputs of a batch, in the shape in which the model returns them, instead of the scored ones."""

    @classmethod
    def of_batch(cls, count: int) -> EveryOutput:
        """Return the description of all outputs of a batch of `count` examples."""
        return cls((count,), -1)  # no scored outputs have the width -1, so that both are never equal

    def of(self, outputs: Any) -> Any:
        """Return outputs (B, ...) of any framework unchanged; raise a UserError if they have another form."""
        shape = getattr(outputs, "shape", None)
        if shape is None or not len(shape) or shape[0] != self.shape[0]:
            raise UserError(
                f"a model must return one array of outputs with the {self.shape[0]:,} examples of the batch "
                f"along its first axis, not {type(outputs).__name__} of shape {shape and tuple(shape)}"
            )
        return outputs


def check_theta(theta: object, size: int, kind: type | None = np.ndarray) -> None:
    """Raise a UserError unless theta is a float32 or float64 array (D,) of class `kind`; None: any class."""
    try:
        check_vector("theta", theta, size, kind)
    except (TypeError, ValueError) as error:
        raise UserError(f"{error}{_remedy(theta)}") from None


def _remedy(theta: object) -> str:
    """Return a clause that names what to pass instead, or "" if theta is a NumPy array or unknown."""
    if isinstance(theta, np.ndarray):
        return ""
    if hasattr(theta, "theta"):
        return "; pass result.theta"
    if isinstance(theta, dict):
        return "; for a JaxModel, pass model.theta(params)"
    return "; pass numpy.asarray(theta)" if isinstance(theta, list) or hasattr(theta, "__array__") else ""


def loss_of_examples(model: Model, theta: Array, data: Examples) -> float:
    """Return the loss summed over all scored outputs of a data set, computed in micro-batches."""
    data = model.scoring(data) if isinstance(model, Scoring) else data
    indices, most = np.arange(data.count), model.backend.micro_batch
    parts = np.array_split(indices, -(-data.count // most))
    return sum(model.loss(theta, data.take(part)) for part in parts)


def inputs_alone(x: Any) -> tuple[np.ndarray, ...]:
    """Convert inputs without targets, an array-like or a tuple of several, to arrays (B, ...).

    Raises
    ------
    UserError
        If they are not numbers, or have different numbers of examples.
    """
    arrays = tuple(converted(each, "x") for each in (x if isinstance(x, tuple) else (x,)))
    for array in arrays:
        if array.dtype.kind not in "iufb" or not array.ndim or 0 in array.shape:
            raise UserError(
                f"x must be whole or real numbers of at least one example, not {array.dtype} of shape "
                f"{array.shape}"
            )
    counts = sorted({len(array) for array in arrays})
    if len(counts) != 1:
        words = " and ".join(f"{count:,}" for count in counts)
        raise UserError(
            f"x must be an array, or a tuple of arrays with the same number of examples, not {words} examples"
        )
    return arrays


def in_parts(
    outputs: Callable[[tuple[np.ndarray, ...]], np.ndarray], inputs: tuple[np.ndarray, ...], most: int
) -> np.ndarray:
    """Compute the outputs (B, ...) of inputs (B, ...), for at most `most` examples at a time."""
    count = len(inputs[0])
    parts = np.array_split(np.arange(count), -(-count // most))
    return np.concatenate([outputs(tuple(x[part[0] : part[-1] + 1] for x in inputs)) for part in parts])
