"""Dropout of the hidden units of a recurrent network, drawn for each step, against overfitting.

A unit is dropped at all steps of a sequence, and only where the next layer or the output layer reads it: the
recurrence itself keeps all units (Zaremba, Sutskever and Vinyals 2014; one mask for all steps as in Gal and
Ghahramani 2016, called locked dropout by Merity, Keskar and Socher 2018). The remaining units are divided by
the probability to remain, so that networks are evaluated without a change.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from hfmpi.data.batches import Batch, Cases
from hfmpi.data.noise import random_words

__all__ = ["Dropout"]

STREAM = 3
"""Separates these random words from other streams of the same seed and step."""


@dataclass(frozen=True)
class Dropout:
    """The sequences of one step, as `Cases`; every rank and every call of `take` drops the same units.

    Attributes
    ----------
    sequences : Cases
        Their batches are `hfmpi.data.batches.Batch`.
    rate : float
        The probability, in [0, 1), that a unit is dropped.
    layers, units : int
        The sizes of the network.
    seed, step : int
        Not negative.
    """

    sequences: Cases
    rate: float
    layers: int
    units: int
    seed: int
    step: int

    @property
    def count(self) -> int:
        """The number of sequences."""
        return self.sequences.count

    def scored(self, indices: np.ndarray) -> float:
        """Return the number of targets of the sequences `indices` (B,)."""
        return self.sequences.scored(indices)

    def take(self, indices: np.ndarray) -> Batch:
        """Return the sequences `indices` (B,), B >= 0, with the factors of the hidden units.

        Raises
        ------
        IndexError
            If a sequence does not exist.
        """
        batch: Batch = self.sequences.take(indices)
        shape = self.layers, self.units
        words = random_words(self.seed, self.step, indices, STREAM, shape)
        remain = words >= np.uint64(self.rate * 2.0**64)
        return batch._replace(unit_scales=remain / (1 - self.rate))
