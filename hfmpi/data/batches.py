"""Fixed-length sequences of a split, and the sequences of the global batch of a step.

The global batch depends only on the seed and the step. Each rank processes its `shard`, so that the number of
ranks determines which rank processes a sequence, but does not change the result.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np

from hfmpi.errors import UserError

__all__ = [
    "SPLITS",
    "BadExample",
    "Batch",
    "Cases",
    "Sequences",
    "check_batch",
    "check_steps",
    "checked_indices",
    "curvature_slice",
    "global_indices",
    "scored_targets",
    "shard",
    "spread",
    "unread",
    "weight_of",
]

SPLITS = {"train": "training", "valid": "validation", "test": "test"}
"""The splits of a text, and the words for them in messages."""


class BadExample(UserError):
    """Raised when a model cannot be trained on an example.

    Parameters
    ----------
    before, after : str
        The parts of the message before and after "example 3".
    example : int
        The index of the example among those that were checked.
    """

    def __init__(self, before: str, example: int, after: str) -> None:
        super().__init__(f"{before} example {example:,}{after}")
        self.before, self.example, self.after = before, example, after

    def renamed(self, example: int, name: str) -> BadExample:
        """Return the error with the index of the example in the data set `name`."""
        return BadExample(f"{name}: {self.before}" if name else self.before, example, self.after)


class Batch(NamedTuple):
    """A batch of B examples: the first axis of every array counts the examples.

    Attributes
    ----------
    inputs : ndarray (B, ...), or a tuple of such arrays
        For sequences: symbols (B, L) int32, or real numbers (B, L, I), with L = burn-in + T.
    targets : ndarray (B, ...) of integers, or (B, ..., O) of real numbers
        For sequences: the targets of the last T inputs, (B, T) int32 or (B, T, O).
    mask : ndarray (B, ...) or None
        The weight of every target, 0 where it is not scored; None: all are 1.
    burn_in : int
        The number of outputs at the start of every example (axis 1) that have no target.
    weighted : bool
        Whether the mask contains weights. Sums that are not linear in the loss of an example, such as the sum
        of squared gradients, then weight the examples; otherwise every example counts once.
    unit_scales : ndarray (B, layers, n) or None
        Dropout of a recurrent network: the factor of each hidden unit of each layer at all steps, where the
        next layer or the output layer reads it. None: all factors are 1.
    """

    inputs: Any
    targets: np.ndarray
    mask: np.ndarray | None = None
    burn_in: int = 0
    weighted: bool = False
    unit_scales: np.ndarray | None = None


def spread(count: int, most: int) -> list[int]:
    """Return the indices of at most `most` of `count` examples, including the first and the last."""
    return [round(i) for i in np.linspace(0, count - 1, min(count, most))]


def scored_targets(targets: np.ndarray, mask: np.ndarray | None) -> np.ndarray:
    """Return the targets with zeros where they are not scored, so that their values there are never read."""
    if mask is None or mask.all():
        return targets
    mask = mask.reshape(mask.shape + (1,) * (targets.ndim - mask.ndim))
    return np.where(mask != 0, targets, targets.dtype.type(0))


def check_steps(inputs: tuple[int, ...], targets: tuple[int, ...], burn_in: int) -> None:
    """Raise a UserError unless sequences of these shapes (B, L, ...) and (B, T, ...) have L = burn_in + T."""
    rest = inputs[1] - targets[1]
    if rest == burn_in >= 0:
        return
    remedy = f"; pass burn_in={rest} if the first {rest:,} steps have no targets" if rest > 0 else ""
    before = f" after a burn-in of {burn_in:,}" if burn_in else ""
    raise UserError(
        f"inputs of shape {inputs} need a target for each step{before}, but the targets have shape "
        f"{targets}{remedy}"
    )


@runtime_checkable
class Cases(Protocol):
    """The data of a run: numbered examples, any of which can be combined to a batch.

    Reading the same examples twice must return the same values. Every rank calls `take` for the examples of
    its shard, and `scored` for those of the global batch. If an optional attribute `unread` is True, `scored`
    is called only for the shard, and the results are summed over ranks.
    """

    @property
    def count(self) -> int:
        """The number of examples."""

    def take(self, indices: np.ndarray) -> Any:
        """Return the examples `indices` (B,), B >= 1, as a batch that the model accepts."""

    def scored(self, indices: np.ndarray) -> float:
        """Return the divisor of the mean loss of the examples `indices` (B,).

        It is the number of their scored outputs, or the sum of the weights of these outputs.
        """


def unread(cases: Cases) -> bool:
    """Return whether `scored` must read the examples, so that each rank counts only those of its shard."""
    return bool(getattr(cases, "unread", False))


@runtime_checkable
class Weighted(Protocol):
    """Cases whose examples may have weights."""

    def weight(self, indices: np.ndarray) -> float:
        """Return the sum of the weights of the examples `indices` (B,).

        The weight of an example is the mean of those of its scored targets.
        """


def weight_of(cases: Cases, indices: np.ndarray) -> float:
    """Return the sum of the weights of some examples, or their number if they have no weights."""
    return cases.weight(indices) if isinstance(cases, Weighted) else len(indices)


class Sequences:
    """The sequences of a split, whose targets do not overlap.

    Sequence k predicts the symbols kT+1 ... kT+T of the split from the symbols one position earlier. The
    split is periodic: the last target may be its first symbol, and the burn-in of sequence 0 is its end. So
    2,800,000 characters yield exactly the 14,000 sequences of 200 characters of Krause (2015).

    Parameters
    ----------
    ids : ndarray (n,), integer
        Symbol ids of the split.
    length : int
        T, the number of targets of a sequence.
    burn_in : int
        The number of additional inputs before the first target, whose outputs are not scored.

    Raises
    ------
    UserError
        If the split is shorter than one sequence with its burn-in, or the lengths are out of range.
    """

    def __init__(self, ids: np.ndarray, length: int = 200, burn_in: int = 0) -> None:
        if length < 1 or burn_in < 0:
            raise UserError(
                f"the sequence length {length} and the burn-in {burn_in} are out of range: they must be at "
                "least 1 and 0"
            )
        if len(ids) < length + burn_in:
            raise UserError(
                f"a text of {len(ids):,} characters is too short for a sequence of {length:,}"
                + (f" with a burn-in of {burn_in:,}" if burn_in else "")
                + f": use a longer text, of at least {length + burn_in:,} characters"
            )
        self.ids, self.length, self.burn_in = ids, length, burn_in

    @property
    def count(self) -> int:
        """The number of complete sequences."""
        return len(self.ids) // self.length

    def take(self, indices: np.ndarray) -> Batch:
        """Return the sequences `indices` (B,), B >= 0, as a batch of C-contiguous int32 arrays.

        Raises
        ------
        IndexError
            If a sequence does not exist.
        """
        starts = checked_indices(indices, self.count, "sequence")
        positions = starts[:, np.newaxis] * self.length + np.arange(-self.burn_in, self.length + 1)
        symbols = self.ids[positions % len(self.ids)].astype(np.int32)
        inputs, targets = symbols[:, :-1], symbols[:, self.burn_in + 1 :]
        inputs, targets = np.ascontiguousarray(inputs), np.ascontiguousarray(targets)
        return Batch(inputs, targets, burn_in=self.burn_in)

    def scored(self, indices: np.ndarray) -> int:
        """Return the number of targets of the sequences `indices` (B,)."""
        return len(indices) * self.length


def checked_indices(indices: np.ndarray, count: int, noun: str) -> np.ndarray:
    """Check indices of examples and return them as int64 (B,).

    Raises
    ------
    TypeError
        If they are not one-dimensional integers.
    IndexError
        If an index is not in 0 ... count - 1.
    """
    array = np.asarray(indices)
    if array.ndim != 1 or (array.size and array.dtype.kind not in "iu"):
        raise TypeError(
            f"{noun} indices must be whole numbers (B,), not {array.dtype} of shape {array.shape}"
        )
    array = array.astype(np.int64, copy=False)
    if array.size and not (array.min() >= 0 and array.max() < count):
        raise IndexError(f"{noun} indices must lie in 0 ... {count - 1}")
    return array


def check_batch(batch: int, count: int) -> None:
    """Raise a UserError unless a batch of this size can be drawn from `count` sequences."""
    if not 1 <= batch <= count:
        raise UserError(
            f"batch size {batch:,} is out of range: use 1 to {count:,}, the number of sequences of the text"
        )


def global_indices(seed: int, step: int, batch: int, count: int) -> np.ndarray:
    """Return the indices (batch,) int64 of the sequences in the global batch of a step.

    Every epoch is a permutation of the `count` sequences. The concatenated epochs form an endless stream, and
    step s uses its positions s*batch ... (s+1)*batch - 1.

    Parameters
    ----------
    seed, step : int
        At least 0.
    batch, count : int
        The sizes of the batch and of the data, which `check_batch` has accepted.
    """
    epoch, start = divmod(step * batch, count)
    # A batch is not larger than the data, so that it contains parts of at most two epochs.
    stream = _permutation(seed, epoch, count)[start : start + batch]
    if len(stream) < batch:
        stream = np.concatenate([stream, _permutation(seed, epoch + 1, count)[: batch - len(stream)]])
    return stream


@lru_cache(maxsize=2)
def _permutation(seed: int, epoch: int, count: int) -> np.ndarray:
    # A resumed run must see the same batches as an uninterrupted run. NumPy guarantees that the raw output of
    # a bit generator is the same in every version (NEP 19), but `Generator.permutation` may change. So the
    # permutation is the order of sorted raw output.
    words = np.random.PCG64(np.random.SeedSequence([seed, epoch])).random_raw(count)
    order = np.argsort(words, kind="stable")
    order.setflags(write=False)
    return order


def curvature_slice(step: int, gradient_batch: int, curvature_batch: int) -> np.ndarray:
    """Return the positions (curvature_batch,) int64 of the curvature batch in the gradient batch.

    The slice advances by its size at each step and wraps around. So all members of a fixed gradient batch are
    used in turn, like the chunks of Martens (2010).

    Raises
    ------
    UserError
        If the curvature batch is empty or larger than the gradient batch.
    """
    if not 1 <= curvature_batch <= gradient_batch:
        raise UserError(
            f"curvature batch size {curvature_batch:,} is out of range: use 1 to {gradient_batch:,}, the "
            "gradient batch size"
        )
    return (step * curvature_batch + np.arange(curvature_batch, dtype=np.int64)) % gradient_batch


def shard(indices: np.ndarray, rank: int, size: int) -> np.ndarray:
    """Return the contiguous part of `indices` (B,) that this rank processes.

    The sizes of the shards differ by at most one; with more ranks than sequences some shards are empty. The
    concatenated shards of all ranks are `indices`.
    """
    return indices[len(indices) * rank // size : len(indices) * (rank + 1) // size]
