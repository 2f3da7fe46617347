"""Random changes of training examples, drawn in each step as a function of (seed, step, example)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from hfmpi.data.batches import Batch, Cases, unread, weight_of
from hfmpi.errors import UserError, shown

__all__ = ["Augmented", "AugmentedStep"]

STREAM = 2
"""Distinguishes these random numbers from other streams with the same seed and step."""

Function = Callable[[Any, Any, np.random.Generator], tuple[Any, Any]]
"""A function that maps (x, y, rng) of one example to a changed (x, y)."""


class Augmented:
    """Training data whose examples a function changes at random in each step.

    The random numbers are a function of the run's seed, the step and the example. So a step that reads its
    batch several times sees the same examples, with any number of ranks, and a resumed run continues with the
    same examples as an uninterrupted run (with the same version of NumPy).

    Parameters
    ----------
    data : tuple, data set or Cases
        Training data in any form that `hfmpi.train` accepts.
    function : callable
        function(x, y, rng) -> (x, y): x and y are copies of the inputs and the target of one example, which
        the function may overwrite; rng is a `numpy.random.Generator`. The results must have the shapes of the
        arguments. x is a tuple if the model has several inputs.

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
            raise UserError("the data are already augmented: combine both functions in one function")
        self.data, self.function = data, function

    def of(self, cases: Cases) -> Augmented:
        """Return other data with the same augmentation."""
        return Augmented(cases, self.function)

    def at(self, seed: int, step: int) -> AugmentedStep:
        """Return the examples as they are changed in step `step`, counted from 0."""
        return AugmentedStep(self._cases, self.function, seed, step)

    @property
    def _cases(self) -> Cases:
        if not isinstance(self.data, Cases):
            raise UserError(
                "outside hfmpi.train, hfmpi.Augmented requires data of a class such as hfmpi.Examples, not "
                f"{shown(self.data)}"
            )
        return self.data

    @property
    def count(self) -> int:
        """The number of examples."""
        return self._cases.count

    @property
    def unread(self) -> bool:
        """Whether examples must be read to determine which of their targets are scored."""
        return unread(self._cases)

    def take(self, indices: np.ndarray) -> Any:
        """Return the examples `indices` (B,) without augmentation."""
        return self._cases.take(indices)

    def scored(self, indices: np.ndarray) -> float:
        """Return the number of scored targets of the examples `indices` (B,), or the sum of their weights."""
        return self._cases.scored(indices)

    def weight(self, indices: np.ndarray) -> float:
        """Return the sum of the weights of the examples `indices` (B,)."""
        return weight_of(self._cases, indices)

    def check(self, indices: np.ndarray) -> None:
        """Call the function twice for some examples, and compare the results.

        Raises
        ------
        UserError
            If it fails, or returns different values for the same arguments.
        """
        first, again = (self.at(0, 0).take(indices) for _ in range(2))
        for one, other in zip(_arrays(first), _arrays(again), strict=True):
            if not np.array_equal(one, other, equal_nan=one.dtype.kind == "f"):
                raise UserError(
                    "the augmentation returned different examples for the same arguments: draw random "
                    "numbers only from rng, because a step reads its batch several times"
                )


@dataclass(frozen=True)
class AugmentedStep:
    """The examples of one step, as `Cases`; every rank and every call of `take` returns the same values.

    Attributes
    ----------
    data : Cases
    function : callable
        As in `Augmented`.
    seed, step : int
        At least 0.
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
        """Whether examples must be read to determine which of their targets are scored."""
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
                f"hfmpi.Augmented requires data whose batches are hfmpi.data.batches.Batch, such as "
                f"hfmpi.Examples, not {shown(batch)}"
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
        """Return the result of the function for example k."""
        # NumPy guarantees that the raw output of a bit generator is the same in every version (NEP 19).
        bits = np.random.PCG64(np.random.SeedSequence([self.seed, self.step, k, STREAM]))
        try:
            pair = self.function(x, y, np.random.Generator(bits))
        except (UserError, MemoryError):
            raise
        except Exception as error:
            raise UserError(
                f"the augmentation of example {k:,} raises {type(error).__name__}: "
                f"{' '.join(str(error).split())}; it is called with (x, y, rng) of one example"
            ) from error
        if not isinstance(pair, (tuple, list)) or len(pair) != 2:
            raise UserError(f"the augmentation must return (x, y), not {shown(pair)}")
        return pair[0], pair[1]


def _fitting(name: str, value: Any, before: Any) -> np.ndarray:
    """Return a result of the function as an array; raise a UserError unless its form is unchanged."""
    array = np.asarray(value)
    if array.shape != before.shape or not np.can_cast(array.dtype, before.dtype, "same_kind"):
        raise UserError(
            f"the augmentation must return {name} with its dtype {before.dtype} and shape {before.shape}, "
            f"not {array.dtype} of shape {array.shape}"
        )
    return array


def _arrays(batch: Batch) -> list[np.ndarray]:
    return [*(batch.inputs if isinstance(batch.inputs, tuple) else (batch.inputs,)), batch.targets]
