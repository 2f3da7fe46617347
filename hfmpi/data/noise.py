"""Random replacements of input symbols, drawn in each step, against overfitting; they cost no pass.

Unigram noise (Xie et al. 2017, Data noising as smoothing in neural network language models): an input symbol
is replaced, with a fixed probability, by a symbol drawn from the text. Targets do not change.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from hfmpi.data.batches import Batch, Sequences

__all__ = ["Noisy", "random_words"]

STREAM = 1
"""Distinguishes these random numbers from other streams with the same seed and step."""


def random_words(
    seed: int, step: int, indices: np.ndarray, stream: int, shape: tuple[int, ...]
) -> np.ndarray:
    """Draw uint64 words, an array of this shape for each of the sequences `indices` (B,).

    They are a function of seed, step, sequence and stream.

    NumPy guarantees the same raw words in every version (NEP 19).
    """
    words = np.empty((len(indices), *shape), np.uint64)
    for row, k in zip(words, indices, strict=True):
        bits = np.random.PCG64(np.random.SeedSequence([seed, step, int(k), stream]))
        row.reshape(-1)[:] = bits.random_raw(row.size)
    return words


@dataclass(frozen=True)
class Noisy:
    """The sequences of one step, as `Cases`; every rank and every call of `take` returns the same values.

    Attributes
    ----------
    sequences : Sequences
    share : float
        The probability, in [0, 1), with which each input symbol is replaced, including the burn-in.
    seed, step : int
        At least 0.
    """

    sequences: Sequences
    share: float
    seed: int
    step: int

    @property
    def count(self) -> int:
        """The number of sequences."""
        return self.sequences.count

    def scored(self, indices: np.ndarray) -> int:
        """Return the number of targets of the sequences `indices` (B,)."""
        return self.sequences.scored(indices)

    def take(self, indices: np.ndarray) -> Batch:
        """Return the sequences `indices` (B,), B >= 0, with noise.

        Raises
        ------
        IndexError
            If a sequence does not exist.
        """
        batch, ids = self.sequences.take(indices), self.sequences.ids
        shape = 2, batch.inputs.shape[1]
        words = random_words(self.seed, self.step, indices, STREAM, shape)
        drawn, chosen = words.swapaxes(0, 1)
        replaced = drawn < np.uint64(self.share * 2.0**64)
        others = ids[chosen % np.uint64(len(ids))].astype(batch.inputs.dtype)
        return batch._replace(inputs=np.where(replaced, others, batch.inputs))
