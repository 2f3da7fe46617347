"""Fixed-length sequences of a split, and which of them make the global batch of a step.

The batch is a function of seed and step alone. A rank takes its `shard` of it, so that the number of ranks
decides who computes what, never what is computed.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np

from hfmpi.errors import UserError

__all__ = [
    "SPLITS",
    "Batch",
    "Cases",
    "Sequences",
    "check_batch",
    "checked_indices",
    "curvature_slice",
    "global_indices",
    "shard",
]

SPLITS = {"train": "training", "valid": "validation", "test": "test"}
"""The splits of a text, and what they are called in sentences."""


class Batch(NamedTuple):
    """B examples: the first axis of every array counts them.

    Attributes
    ----------
    inputs : ndarray (B, ...), or a tuple of such
        Of sequences (B, L) int32 symbols or (B, L, I) real numbers, L = burn-in + T.
    targets : ndarray (B, ...) of integers, or (B, ..., O) of real numbers
        Of sequences (B, T) int32 or (B, T, O): what is to be predicted after each of the last T inputs.
    mask : ndarray (B, ...) or None
        1 where a target is scored, else 0; None: all are.
    """

    inputs: Any
    targets: np.ndarray
    mask: np.ndarray | None = None


@runtime_checkable
class Cases(Protocol):
    """What a run trains on: numbered cases, of which any can be taken together."""

    @property
    def count(self) -> int:
        """The number of cases."""

    def take(self, indices: np.ndarray) -> Any:
        """Return the cases `indices` (B,), B >= 1, as a batch of the kind that the model reads."""

    def scored(self, indices: np.ndarray) -> int:
        """Return how many outputs of these cases are scored: what the mean over a batch divides by."""


class Sequences:
    """A split cut into sequences that do not overlap in their targets.

    Sequence k predicts the symbols kT+1 ... kT+T of the split from those one position earlier. The split is
    read as a ring: the last target may be its first symbol, and the burn-in of sequence 0 is the split's end,
    so 2,800,000 characters make exactly the 14,000 sequences of 200 of Krause (2015).

    Parameters
    ----------
    ids : ndarray (n,), integer
        Symbol ids of the split.
    length : int
        T, the targets of a sequence.
    burn_in : int
        Further inputs before the first target, left out of the loss.

    Raises
    ------
    UserError
        If the split is shorter than one sequence with its burn-in, or the lengths are out of range.
    """

    def __init__(self, ids: np.ndarray, length: int = 200, burn_in: int = 0) -> None:
        if length < 1 or burn_in < 0:
            raise UserError(
                f"a sequence length of {length} with a burn-in of {burn_in} cannot be: the least are 1 and 0"
            )
        if len(ids) < length + burn_in:
            raise UserError(
                f"a text of {len(ids):,} characters is too short for a sequence of {length:,}"
                + (f" with a burn-in of {burn_in:,}" if burn_in else "")
                + f": it takes at least {length + burn_in:,}"
            )
        self.ids, self.length, self.burn_in = ids, length, burn_in

    @property
    def count(self) -> int:
        """The number of sequences; a rest shorter than one is left out."""
        return len(self.ids) // self.length

    def take(self, indices: np.ndarray) -> Batch:
        """Return the sequences `indices` (B,), B >= 0, as a batch of C-contiguous arrays.

        Raises
        ------
        IndexError
            If there is no such sequence.
        """
        starts = checked_indices(indices, self.count, "sequence")
        positions = starts[:, np.newaxis] * self.length + np.arange(-self.burn_in, self.length + 1)
        symbols = self.ids[positions % len(self.ids)].astype(np.int32)
        inputs, targets = symbols[:, :-1], symbols[:, self.burn_in + 1 :]
        return Batch(np.ascontiguousarray(inputs), np.ascontiguousarray(targets))

    def scored(self, indices: np.ndarray) -> int:
        """Return the number of targets of the sequences `indices` (B,)."""
        return len(indices) * self.length


def checked_indices(indices: np.ndarray, count: int, noun: str) -> np.ndarray:
    """Give the indices as int64 (B,); raise a TypeError or IndexError unless there are as many things."""
    given = np.asarray(indices)
    if given.ndim != 1 or (given.size and given.dtype.kind not in "iu"):
        raise TypeError(
            f"{noun} indices must be whole numbers (B,), not {given.dtype} of shape {given.shape}"
        )
    found = given.astype(np.int64, copy=False)
    if found.size and not (found.min() >= 0 and found.max() < count):
        raise IndexError(f"{noun} indices must lie in 0 ... {count - 1}")
    return found


def check_batch(batch: int, count: int) -> None:
    """Raise a UserError unless a batch of this size can be drawn from `count` sequences."""
    if not 1 <= batch <= count:
        raise UserError(f"a batch of {batch:,} sequences cannot be drawn: the text makes {count:,} of them")


def global_indices(seed: int, step: int, batch: int, count: int) -> np.ndarray:
    """Return the sequences (batch,) int64 of one step's global batch.

    Every epoch is a permutation of the `count` sequences. The epochs follow one another in an endless stream,
    of which step s takes the positions s*batch ... (s+1)*batch - 1.

    Parameters
    ----------
    seed, step : int
        Not negative; the batch depends on nothing else.
    batch, count : int
        As `check_batch` allows.
    """
    epoch, start = divmod(step * batch, count)
    # A batch no larger than the data touches this epoch and at most the next.
    stream = _permutation(seed, epoch, count)[start : start + batch]
    if len(stream) < batch:
        stream = np.concatenate([stream, _permutation(seed, epoch + 1, count)[: batch - len(stream)]])
    return stream


@lru_cache(maxsize=2)
def _permutation(seed: int, epoch: int, count: int) -> np.ndarray:
    # Sorting raw words, because numpy promises the same words from a bit generator in every version (NEP 19)
    # but not the same `Generator.permutation`: a run must resume into the batches it would have had.
    words = np.random.PCG64(np.random.SeedSequence([seed, epoch])).random_raw(count)
    order = np.argsort(words, kind="stable")
    order.setflags(write=False)
    return order


def curvature_slice(step: int, gradient_batch: int, curvature_batch: int) -> np.ndarray:
    """Return which members (curvature_batch,) int64 of a gradient batch make its curvature batch.

    The slice advances by its own size each step and wraps around, so that all members of a gradient
    batch that stays the same take their turn, as the chunks of Martens (2010) do.

    Raises
    ------
    UserError
        If the curvature batch is empty or larger than the gradient batch.
    """
    if not 1 <= curvature_batch <= gradient_batch:
        raise UserError(
            f"a curvature batch of {curvature_batch:,} sequences cannot be drawn "
            f"from a gradient batch of {gradient_batch:,}"
        )
    return (step * curvature_batch + np.arange(curvature_batch, dtype=np.int64)) % gradient_batch


def shard(indices: np.ndarray, rank: int, size: int) -> np.ndarray:
    """Return the contiguous part of `indices` (B,) that is this rank's; sizes differ by at most one.

    With more ranks than sequences some shards are empty. The shards of all ranks, in order, are `indices`.
    """
    return indices[len(indices) * rank // size : len(indices) * (rank + 1) // size]
