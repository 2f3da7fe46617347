"""The pathological tasks of Martens and Sutskever (2011): what has to be remembered lies far back.

A task is a set of cases made on demand, of which each is a function of seed and index alone. With steps
counted from 1, for a length T:

addition, multiplication, xor
    A step has a number, uniform in [0, 1] (xor: a bit), and a mark, which is 1 at two steps: one of the first
    tenth, 1 ... T'/10, and one of T'/10 + 1 ... T'/2, 0 elsewhere. The length T' is uniform in T ... 1.1 T.
    The last step has a target: half the sum of the marked numbers, their product, or their exclusive or.
temporal-2, temporal-3
    T symbols, 0 to 3 at random, but for a 4 or 5 at a step of [0.1 T, 0.2 T] and one of [0.5 T, 0.6 T]; with
    three of them in [0.1 T, 0.2 T], [0.3 T, 0.4 T] and [0.6 T, 0.7 T]. The last step's target is the number
    that they make in binary digits, the first one first.
permutation
    0 or 1, then T - 1 of the symbols 2 to 99 at random. The target of a step is the next symbol, and that of
    the last step the first symbol: the only one that can be known.
memory-5, memory-20
    5 bits, or 10 symbols of 5 values; T - 1 blanks and a trigger; then blanks, while these are to be
    repeated. At all steps before the target is a blank. So there are T + 10 or T + 20 steps.

Sources: Martens and Sutskever, Learning recurrent neural networks with Hessian-free optimization (2011,
section 4), most of it from Hochreiter and Schmidhuber, Long short-term memory (1997). In their released code
the sequences of the first five tasks also have signs of their begin and end, and ranges differ.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from hfmpi.data.batches import Batch, checked_indices
from hfmpi.errors import UserError

BLOCK = 100
"""Cases that are made together: each block of them has a generator of its own."""


class Kind(NamedTuple):
    """What a network for a task reads and gives, its loss, and how cases are made: time first."""

    inputs: int
    outputs: int
    loss: str
    make: Callable[[np.random.Generator, int], Batch]
    count: int = 2**40


def marked(rng: np.random.Generator, length: int, operation: Callable, bits: bool = False) -> Batch:
    """Make cases of addition, multiplication or xor; steps before T have no outputs."""
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
    """Make cases of temporal order, with a special symbol from each of these tenths of T to the next."""
    inputs = rng.integers(0, 4, (length, BLOCK), np.int32)
    target = np.zeros(BLOCK, np.int32)
    for tenth in tenths:
        at = rng.integers(-(-length * tenth // 10), length * (tenth + 1) // 10, BLOCK, endpoint=True) - 1
        special = rng.integers(0, 2, BLOCK, np.int32)
        inputs[at, np.arange(BLOCK)] = 4 + special
        target = 2 * target + special
    return Batch(inputs, target[np.newaxis])


def permutation(rng: np.random.Generator, length: int) -> Batch:
    """Make cases of the random permutation."""
    inputs = rng.integers(2, 100, (length, BLOCK), np.int32)
    inputs[0] = rng.integers(0, 2, BLOCK)
    return Batch(inputs, np.roll(inputs, -1, axis=0))


def memory(rng: np.random.Generator, length: int, symbols: int, values: int) -> Batch:
    """Make cases of memory; a set of fewer than a block has each of them once."""
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
    """The cases of a task at one length, as `hfmpi.data.batches.Cases` wants them."""

    name: str
    length: int
    seed: int

    def __post_init__(self) -> None:
        if self.name not in KINDS:
            raise UserError(f"there is no task {self.name!r}; choose one of {', '.join(KINDS)}")
        if self.length < 10:
            raise UserError(f"a length of {self.length} is too short for {self.name}: the least is 10")

    @property
    def kind(self) -> Kind:
        return KINDS[self.name]

    @property
    def count(self) -> int:
        """The number of cases: as many as one likes but for memory-5, which has 32."""
        return self.kind.count

    def take(self, indices: np.ndarray) -> Batch:
        """Return the examples `indices` (B,) as a batch; outputs begin where there may be targets."""
        blocks, places = np.divmod(checked_indices(indices, self.count, "case"), BLOCK)
        needed, which = np.unique(blocks, return_inverse=True)
        made = [self.kind.make(self._generator(block), self.length) for block in needed.tolist()]
        inputs, targets, mask = (
            None if parts[0] is None else _chosen(parts, which * BLOCK + places)
            for parts in zip(*(batch[:3] for batch in made), strict=True)
        )
        return Batch(inputs, targets, mask, inputs.shape[1] - targets.shape[1])

    def scored(self, indices: np.ndarray) -> int:
        """Return how many outputs of the cases `indices` (B,) are scored."""
        more = {"permutation": 0, "memory-5": 10, "memory-20": 20}
        return len(indices) * (self.length + more[self.name] if self.name in more else 1)

    def _generator(self, block: int) -> np.random.Generator:
        return np.random.Generator(np.random.PCG64(np.random.SeedSequence([self.seed, block])))


def _chosen(parts: tuple[np.ndarray, ...], at: np.ndarray) -> np.ndarray:
    """Return the examples `at` (B,) of blocks that are made time first, examples first."""
    return np.ascontiguousarray(np.concatenate(parts, 1).swapaxes(0, 1)[at])
