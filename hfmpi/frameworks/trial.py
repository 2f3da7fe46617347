"""Checks that the outputs of an example do not depend on its batch, and are the same each time.

The examples of a batch are divided into micro-batches and over ranks, and each step computes the outputs
several times. An example must therefore have the same outputs alone, in a different order, together with
different examples, and in repeated passes. This is tried on a few examples, in float64 if the function
supports it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from hfmpi.errors import UserError
from hfmpi.models.batch import CheckedBatch

__all__ = ["DEPENDS", "FEW", "Trial", "elsewhere"]

FEW = 8
"""The number of examples in a trial."""

FLOORS = {"float64": 1e-10, "float32": 1e-5}
"""Relative difference of outputs that is always allowed: above the rounding of matrix products."""

TF32 = 1e-2
"""The same for float32 on a GPU, which may round the factors of products to 11 bits."""

NEAR = 1e-2
"""Relative distance of the trial's parameters from the initial parameters."""

SAFETY = 10
"""Maximum ratio of a difference to the measured effect of rounding."""

DEPENDS = (
    "the outputs of an example depend on the other examples of its batch or on its position among them "
    "(batch statistics, or a missing batch_first=True?): they must be the same in any batch"
)


def elsewhere(theta: np.ndarray) -> np.ndarray:
    """Return parameters near theta (D,): initial values such as zero means may hide dependencies."""
    with np.errstate(invalid="ignore"):
        scale = NEAR * (np.abs(theta) + (np.abs(theta).mean() or 1.0))
        moved: np.ndarray = theta + scale * np.random.default_rng(0).standard_normal(theta.size)
    return moved.astype(theta.dtype)


@dataclass
class Trial:
    """The outputs of a function at one theta, and the effect of rounding on them.

    Parameters
    ----------
    outputs : callable
        (theta (D,), batch) -> outputs (N, O).
    theta : (D,) float32 or float64
        The dtype is that of the function's arithmetic.
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
                "the model returns different outputs for the same inputs (dropout, or a state that it "
                "keeps?): it must be a function of parameters and inputs only; in PyTorch, call "
                "module.eval()"
            )
        self.bound = max(self.bound, SAFETY * self._rounding())

    def of(self, indices: Sequence[int]) -> np.ndarray:
        """Return the outputs of these examples, computed as one batch, by example (B, N / B, O)."""
        return self._by_example(self.theta, self.examples.take(indices))

    def _by_example(self, theta: np.ndarray, batch: CheckedBatch) -> np.ndarray:
        return np.array(self.outputs(theta, batch)).reshape(batch.size, -1)

    def _rounding(self) -> float:
        """Return the largest change of the outputs if the parameters are rounded.

        The batch size determines the order in which a matrix product is summed, with an effect of this size.
        """
        eps = np.finfo(self.theta.dtype).eps
        signs = np.random.default_rng(0).choice([-1.0, 1.0], self.theta.size)
        moved = (self.theta * (1 + eps * signs)).astype(self.theta.dtype)
        with np.errstate(invalid="ignore"):
            difference = np.abs(self._by_example(moved, self.examples) - self.first)
        return float(difference[np.isfinite(difference)].max(initial=0))

    def same(self, indices: Sequence[int], outputs: np.ndarray) -> bool:
        """Return whether these outputs are those of the examples, within rounding."""
        return bool(np.allclose(outputs, self.first[list(indices)], 0, self.bound, equal_nan=True))

    def check_independence(self) -> None:
        """Raise a UserError unless every example has the same outputs in any batch.

        A single example is not compared, because a batch of several may not fit into memory.
        """
        count = self.examples.size
        last = count - 1
        neighbours = [i if i % 2 else last for i in range(count)]  # the last one replaces every second one
        batches = [range(last, -1, -1), neighbours, *([i] for i in sorted({0, last // 2, last}))]
        for indices in batches:
            try:
                outputs = self.of(indices)
            except UserError as error:
                if len(indices) > 1:
                    raise
                raise UserError(
                    "the model fails on a batch of one example, but not on a batch of several (does "
                    f"squeeze() remove the batch axis?): {error}"
                ) from error
            if not self.same(indices, outputs):
                raise UserError(DEPENDS)
