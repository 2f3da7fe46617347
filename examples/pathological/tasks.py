"""The pathological tasks of Martens and Sutskever (2011), which require a memory over many steps.

A task is a set of examples that are generated on demand, each determined by seed and index. Steps are counted
from 1. For a length T:

addition, multiplication, xor
    A step has a number, uniform in [0, 1] (xor: a bit), and a mark. The mark is 1 at two steps, one in
    1 ... T'/10 and one in T'/10 + 1 ... T'/2, and 0 at all others. The length T' is uniform in T ... 1.1 T.
    The last step has a target: half the sum of the marked numbers, their product, or their exclusive or.
temporal-2, temporal-3
    T random symbols from 0 to 3. In temporal-2, a 4 or 5 replaces one in [0.1 T, 0.2 T] and one in
    [0.5 T, 0.6 T]; in temporal-3, one each in [0.1 T, 0.2 T], [0.3 T, 0.4 T] and [0.6 T, 0.7 T]. The target
    of the last step is the number whose binary digits these symbols determine, the first one first.
permutation
    0 or 1, then T - 1 random symbols from 2 to 99. The target of a step is the next symbol, and the target of
    the last step is the first symbol, the only one that can be predicted.
memory-5, memory-20
    5 bits, or 10 symbols of 5 values; T - 1 blanks and a trigger; then blanks, while the bits or symbols are
    to be repeated. Before that the target is a blank at all steps. There are T + 10 or T + 20 steps.

Sources: Martens and Sutskever, Learning recurrent neural networks with Hessian-free optimization (2011,
section 4), most tasks from Hochreiter and Schmidhuber, Long short-term memory (1997). In their released code
the sequences of the first five tasks also have begin and end symbols, and some ranges differ.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from hfmpi.data.batches import Batch, checked_indices
from hfmpi.errors import UserError

BLOCK = 100
"""Examples that are generated together: each block of them has a separate random generator."""


class Kind(NamedTuple):
    """The network's inputs and outputs, the loss, and the function that generates examples, time first."""

    inputs: int
    outputs: int
    loss: str
    make: Callable[[np.random.Generator, int], Batch]
    count: int = 2**40


def marked(rng: np.random.Generator, length: int, operation: Callable, bits: bool = False) -> Batch:
    """Generate examples of addition, multiplication or xor; steps before T have no outputs."""
    longest, cases = 11 * length // 10, np.arange(BLOCK)
    inputs = np.zeros((longest, BLOCK, 2))
    inputs[..., 0] = rng.integers(0, 2, (longest, BLOCK)) if bits else rng.random((longest, BLOCK))
    last = rng.integers(length, longest, BLOCK, endpoint=True)
    first, second = rng.integers(0, last // 10), rng.integers(last // 10, last // 2)
    inputs[first, cases, 1] = inputs[second, cases, 1] = 1
    targets, mask = np.zeros((longest - length + 1, BLOCK, 1)), np.zeros((longest - length + 1, BLOCK))
    targets[last - length, cases, 0] = operation(inputs[first, cases, 0], inputs[second, cases, 0])
    mask[last - length, cases] = 1
    return Batch(inputs, targets, mask)


def temporal(rng: np.random.Generator, length: int, tenths: tuple[int, ...]) -> Batch:
    """Generate examples of temporal order, with a special symbol in each of these tenths of T."""
    inputs = rng.integers(0, 4, (length, BLOCK), np.int32)
    target = np.zeros(BLOCK, np.int32)
    for tenth in tenths:
        at = rng.integers(-(-length * tenth // 10), length * (tenth + 1) // 10, BLOCK, endpoint=True) - 1
        special = rng.integers(0, 2, BLOCK, np.int32)
        inputs[at, np.arange(BLOCK)] = 4 + special
        target = 2 * target + special
    return Batch(inputs, target[np.newaxis])


def permutation(rng: np.random.Generator, length: int) -> Batch:
    """Generate examples of the random permutation."""
    inputs = rng.integers(2, 100, (length, BLOCK), np.int32)
    inputs[0] = rng.integers(0, 2, BLOCK)
    return Batch(inputs, np.roll(inputs, -1, axis=0))


def memory(rng: np.random.Generator, length: int, symbols: int, values: int) -> Batch:
    """Generate examples of memory; if there are fewer than a block, each occurs once."""
    cases, blank = min(BLOCK, values**symbols), values
    kept = rng.integers(0, values, (symbols, cases), np.int32)
    if cases < BLOCK:
        kept = (np.arange(cases) // values ** np.arange(symbols)[:, np.newaxis] % values).astype(np.int32)
    inputs = np.full((length + 2 * symbols, cases), blank, np.int32)
    targets = inputs.copy()
    inputs[:symbols] = targets[-symbols:] = kept
    inputs[-symbols - 1] = blank + 1
    return Batch(inputs, targets)


KINDS = {
    "addition": Kind(2, 1, "squares", lambda rng, t: marked(rng, t, lambda u, v: (u + v) / 2)),
    "multiplication": Kind(2, 1, "squares", lambda rng, t: marked(rng, t, np.multiply)),
    "xor": Kind(2, 1, "bernoulli", lambda rng, t: marked(rng, t, np.not_equal, bits=True)),
    "temporal-2": Kind(6, 4, "cross-entropy", lambda rng, t: temporal(rng, t, (1, 5))),
    "temporal-3": Kind(6, 8, "cross-entropy", lambda rng, t: temporal(rng, t, (1, 3, 6))),
    "permutation": Kind(100, 100, "cross-entropy", permutation),
    "memory-5": Kind(4, 3, "cross-entropy", lambda rng, t: memory(rng, t, 5, 2), 32),
    "memory-20": Kind(7, 6, "cross-entropy", lambda rng, t: memory(rng, t, 10, 5)),
}


@dataclass(frozen=True)
class Task:
    """The examples of a task at one length; satisfies `hfmpi.data.batches.Cases`."""

    name: str
    length: int
    seed: int

    def __post_init__(self) -> None:
        if self.name not in KINDS:
            raise UserError(f"unknown task {self.name!r}: choose one of {', '.join(KINDS)}")
        if self.length < 10:
            raise UserError(f"the length {self.length} is too short for {self.name}: use at least 10")

    @property
    def kind(self) -> Kind:
        return KINDS[self.name]

    @property
    def count(self) -> int:
        """The number of examples: unlimited for most tasks, 32 for memory-5."""
        return self.kind.count

    def take(self, indices: np.ndarray) -> Batch:
        """Return the examples `indices` (B,) as a batch; outputs start where there may be targets."""
        blocks, places = np.divmod(checked_indices(indices, self.count, "case"), BLOCK)
        needed, which = np.unique(blocks, return_inverse=True)
        made = [self.kind.make(self._generator(block), self.length) for block in needed.tolist()]
        inputs, targets, mask = (
            None if parts[0] is None else _chosen(parts, which * BLOCK + places)
            for parts in zip(*(batch[:3] for batch in made), strict=True)
        )
        return Batch(inputs, targets, mask, inputs.shape[1] - targets.shape[1])

    def scored(self, indices: np.ndarray) -> int:
        """Return the number of scored outputs of the examples `indices` (B,)."""
        more = {"permutation": 0, "memory-5": 10, "memory-20": 20}
        return len(indices) * (self.length + more[self.name] if self.name in more else 1)

    def _generator(self, block: int) -> np.random.Generator:
        return np.random.Generator(np.random.PCG64(np.random.SeedSequence([self.seed, block])))


def _chosen(parts: tuple[np.ndarray, ...], at: np.ndarray) -> np.ndarray:
    """Return the examples `at` (B,) from blocks with time first, with the examples first."""
    return np.ascontiguousarray(np.concatenate(parts, 1).swapaxes(0, 1)[at])
