"""Whether the outputs of a user's function are those of its examples: the same in every batch, each time.

The examples of a batch are divided into micro-batches and over ranks, and every step computes the outputs
several times. So an example must have the same outputs alone, in a different order, beside other examples,
and again. A few examples are tried, in float64 where the function allows it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from hfmpi.errors import UserError
from hfmpi.models.batch import CheckedBatch

__all__ = ["DEPENDS", "FEW", "Trial", "elsewhere"]

FEW = 8
"""The number of examples that are tried."""

FLOORS = {"float64": 1e-10, "float32": 1e-5}
"""Relative difference of outputs that is always allowed: above the rounding of products of matrices."""

TF32 = 1e-2
"""The same for float32 on a GPU, which may round the factors of products to 11 bits."""

NEAR = 1e-2
"""Relative distance of the parameters beside those of the start."""

SAFETY = 10
"""How much more than the measured effect of rounding is allowed."""

DEPENDS = (
    "the outputs of an example depend on the other examples of its batch, or on its place among them, as "
    "with batch statistics or without batch_first=True: they must be the same in any batch"
)


def elsewhere(theta: np.ndarray) -> np.ndarray:
    """Return parameters near theta (D,), for what the special values of a start hide, such as zero means."""
    with np.errstate(invalid="ignore"):
        scale = NEAR * (np.abs(theta) + (np.abs(theta).mean() or 1.0))
        moved: np.ndarray = theta + scale * np.random.default_rng(0).standard_normal(theta.size)
    return moved.astype(theta.dtype)


@dataclass
class Trial:
    """The outputs of a function at one theta, with what rounding can change in them.

    Parameters
    ----------
    outputs : callable
        (theta (D,), batch) -> outputs (N, O).
    theta : (D,) float32 or float64
        Its type is that of the function's arithmetic.
    examples : CheckedBatch
    on_gpu : bool

    Raises
    ------
    UserError
        If the function returns different outputs each time.
    """

    outputs: Callable[[np.ndarray, CheckedBatch], np.ndarray]
    theta: np.ndarray
    examples: CheckedBatch
    on_gpu: bool = False

    def __post_init__(self) -> None:
        everything = range(self.examples.size)
        self.first = self.of(everything)
        size = np.abs(self.first[np.isfinite(self.first)]).max(initial=0)
        wide = self.theta.dtype == np.float64
        self.bound = (TF32 if self.on_gpu and not wide else FLOORS[self.theta.dtype.name]) * size
        if not self.same(everything, self.of(everything)):
            raise UserError(
                "the model returns different outputs for the same inputs, as with dropout or a state that it "
                "keeps: it must be a function of parameters and inputs (in PyTorch: module.eval())"
            )
        self.bound = max(self.bound, SAFETY * self._rounding())

    def of(self, indices: Sequence[int]) -> np.ndarray:
        """Return the outputs of these examples as a batch, by example (B, N / B, O)."""
        return self._by_example(self.theta, self.examples.take(indices))

    def _by_example(self, theta: np.ndarray, batch: CheckedBatch) -> np.ndarray:
        return np.array(self.outputs(theta, batch)).reshape(batch.size, -1)

    def _rounding(self) -> float:
        """Return the largest difference that a rounding of the parameters makes in the outputs.

        The size of a batch decides how a product of matrices is summed, which has an effect of this size.
        """
        eps = np.finfo(self.theta.dtype).eps
        signs = np.random.default_rng(0).choice([-1.0, 1.0], self.theta.size)
        moved = (self.theta * (1 + eps * signs)).astype(self.theta.dtype)
        with np.errstate(invalid="ignore"):
            difference = np.abs(self._by_example(moved, self.examples) - self.first)
        return float(difference[np.isfinite(difference)].max(initial=0))

    def same(self, indices: Sequence[int], outputs: np.ndarray) -> bool:
        """Return whether these are the outputs of these examples, within rounding."""
        return bool(np.allclose(outputs, self.first[list(indices)], 0, self.bound, equal_nan=True))

    def check_independence(self) -> None:
        """Raise a UserError unless every example has the same outputs in any batch.

        A single example is not compared: a batch of several may not fit the memory.
        """
        count = self.examples.size
        last = count - 1
        neighbours = [i if i % 2 else last for i in range(count)]  # the last one in place of every second one
        batches = [range(last, -1, -1), neighbours, *([i] for i in sorted({0, last // 2, last}))]
        for indices in batches:
            try:
                outputs = self.of(indices)
            except UserError as error:
                if len(indices) > 1:
                    raise
                raise UserError(
                    "a batch of one example fails, where one of several does not (does squeeze() remove its "
                    f"axis?): {error}"
                ) from error
            if not self.same(indices, outputs):
                raise UserError(DEPENDS)
