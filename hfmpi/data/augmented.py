"""Random changes of training examples, drawn for each step as a function of (seed, step, example)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from hfmpi.data.batches import Batch, Cases, unread, weight_of
from hfmpi.errors import UserError, shown

__all__ = ["Augmented", "AugmentedStep"]

STREAM = 2
"""Separates these random words from other streams of the same seed and step."""

Function = Callable[[Any, Any, np.random.Generator], tuple[Any, Any]]
"""(x, y, rng) of one example -> (x, y)."""


class Augmented:
    """Training data whose examples a function changes at random in each step.

    The random numbers are a function of the run's seed, the step and the example: a step that reads its batch
    several times sees the same examples, whatever the number of ranks, and a resumed run goes on with the
    examples of the uninterrupted one (with the same version of NumPy).

    Parameters
    ----------
    data : tuple, data set or Cases
        The training data of `hfmpi.train`, as without augmentation.
    function : callable
        function(x, y, rng) -> (x, y): inputs and target of one example, copies that it may overwrite, and a
        `numpy.random.Generator`. The results must have the shapes of the arguments. x is a tuple where the
        model has several inputs.

    Raises
    ------
    UserError
        If the function is not callable.

    Examples
    --------
    >>> def noisy(x, y, rng):
    ...     return x + 0.1 * rng.standard_normal(x.shape), y
    >>> result = hfmpi.train(model, hfmpi.Augmented((x, y), noisy), valid=(x_valid, y_valid), max_steps=10)
    """

    def __init__(self, data: Any, function: Function) -> None:
        if not callable(function):
            raise UserError(
                f"the augmentation must be a function (x, y, rng) -> (x, y), not {shown(function)}"
            )
        if isinstance(data, (Augmented, AugmentedStep)):
            raise UserError("the data are augmented already: call both functions in one")
        self.data, self.function = data, function

    def of(self, cases: Cases) -> Augmented:
        """Return the augmentation of other data."""
        return Augmented(cases, self.function)

    def at(self, seed: int, step: int) -> AugmentedStep:
        """Return the examples as step `step`, counted from 0, sees them."""
        return AugmentedStep(self._cases, self.function, seed, step)

    @property
    def _cases(self) -> Cases:
        if not isinstance(self.data, Cases):
            raise UserError(
                "outside of hfmpi.train, hfmpi.Augmented takes cases such as hfmpi.Examples, not "
                f"{shown(self.data)}"
            )
        return self.data

    @property
    def count(self) -> int:
        """The number of examples."""
        return self._cases.count

    @property
    def unread(self) -> bool:
        """Whether only reading examples shows which of their targets are scored."""
        return unread(self._cases)

    def take(self, indices: np.ndarray) -> Any:
        """Return the examples `indices` (B,) as they are without augmentation."""
        return self._cases.take(indices)

    def scored(self, indices: np.ndarray) -> float:
        """Return the number of scored targets of the examples `indices` (B,), or the sum of their weights."""
        return self._cases.scored(indices)

    def weight(self, indices: np.ndarray) -> float:
        """Return the sum of the weights of the examples `indices` (B,)."""
        return weight_of(self._cases, indices)

    def check(self, indices: np.ndarray) -> None:
        """Try the function on some examples.

        Raises
        ------
        UserError
            If it fails, or returns something else at the second call with the same arguments.
        """
        first, again = (self.at(0, 0).take(indices) for _ in range(2))
        for one, other in zip(_arrays(first), _arrays(again), strict=True):
            if not np.array_equal(one, other, equal_nan=one.dtype.kind == "f"):
                raise UserError(
                    "the augmentation returned different examples for the same arguments: draw random "
                    "numbers from rng alone, because a step reads its batch several times"
                )


@dataclass(frozen=True)
class AugmentedStep:
    """The examples of one step, as `Cases`: the same on every rank and at every reading.

    Attributes
    ----------
    data : Cases
    function : callable
        As of `Augmented`.
    seed, step : int
        Not negative.
    """

    data: Cases
    function: Function
    seed: int
    step: int

    @property
    def count(self) -> int:
        """The number of examples."""
        return self.data.count

    @property
    def unread(self) -> bool:
        """Whether only reading examples shows which of their targets are scored."""
        return unread(self.data)

    def scored(self, indices: np.ndarray) -> float:
        """Return the number of scored targets of the examples `indices` (B,), or the sum of their weights."""
        return self.data.scored(indices)

    def weight(self, indices: np.ndarray) -> float:
        """Return the sum of the weights of the examples `indices` (B,)."""
        return weight_of(self.data, indices)

    def take(self, indices: np.ndarray) -> Batch:
        """Return the examples `indices` (B,), changed by the function.

        Raises
        ------
        UserError
            If the function fails, or changes the shape or the kind of numbers of an example.
        """
        batch = self.data.take(indices)
        if not isinstance(batch, Batch):
            raise UserError(
                f"hfmpi.Augmented changes batches of hfmpi.data.batches.Batch, as of hfmpi.Examples, not "
                f"{shown(batch)}"
            )
        several = isinstance(batch.inputs, tuple)
        inputs = tuple(np.array(x) for x in (batch.inputs if several else (batch.inputs,)))
        targets = np.array(batch.targets)
        for row, k in enumerate(indices):
            x = tuple(array[row].copy() for array in inputs)
            new_x, new_y = self._called(x if several else x[0], targets[row].copy(), int(k))
            new = new_x if several and isinstance(new_x, tuple) else (new_x,)
            if len(new) != len(inputs):
                raise UserError(f"the augmentation must return {len(inputs)} inputs, not {len(new)}")
            for array, value in zip((*inputs, targets), (*new, new_y), strict=True):
                array[row] = _fitting("y" if array is targets else "x", value, array[row])
        return batch._replace(inputs=inputs if several else inputs[0], targets=targets)

    def _called(self, x: Any, y: Any, k: int) -> tuple[Any, Any]:
        """Return what the function makes of example k."""
        # NumPy guarantees the same raw words in every version (NEP 19).
        bits = np.random.PCG64(np.random.SeedSequence([self.seed, self.step, k, STREAM]))
        try:
            pair = self.function(x, y, np.random.Generator(bits))
        except (UserError, MemoryError):
            raise
        except Exception as error:
            raise UserError(
                f"the augmentation of example {k:,} raises {type(error).__name__}: "
                f"{' '.join(str(error).split())}; it gets (x, y, rng) of one example"
            ) from error
        if not isinstance(pair, (tuple, list)) or len(pair) != 2:
            raise UserError(f"the augmentation must return (x, y), not {shown(pair)}")
        return pair[0], pair[1]


def _fitting(name: str, value: Any, before: Any) -> np.ndarray:
    """Return a result of the function as an array of the form that the argument had."""
    array = np.asarray(value)
    if array.shape != before.shape or not np.can_cast(array.dtype, before.dtype, "same_kind"):
        raise UserError(
            f"the augmentation must return {name} of {before.dtype} and shape {before.shape} as it gets it, "
            f"not {array.dtype} of shape {array.shape}"
        )
    return array


def _arrays(batch: Batch) -> list[np.ndarray]:
    return [*(batch.inputs if isinstance(batch.inputs, tuple) else (batch.inputs,)), batch.targets]
