"""How long a step takes on more ranks than were measured.

A step on P ranks executes n_k passes of kind k over batches of B_k sequences, after each of which the ranks
sum a message of m_k bytes (the work on single matrices is a kind without sequences, in r):

    T(P) = s sum_k n_k t_k(ceil(B_k / P)) + sum_k n_k a(P, m_k) + r

=========  ============================================================================================
t_k(b)     seconds of a pass over b sequences on one rank: piecewise linear through what was measured. It
           does not fall to 0 with b: the T steps of a recurrent network follow one another, a floor that
           P_I counts as one pass
a(P, m)    seconds of the Allreduce, see `Link`
r          seconds of what a rank does beside passes: for itself, or with matrices, which are shared out whole
s          by how much ranks beside one another are slower than one alone: memory, caches, waiting
=========  ============================================================================================
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

__all__ = ["Curve", "Job", "Link", "Pass", "best", "fit_link"]


@dataclass(frozen=True)
class Link:
    """The network between ranks: latency in seconds, bandwidth in bytes a second.

    The two algorithms of MPI libraries, of which the faster counts (Thakur, Rabenseifner and Gropp 2005,
    Optimization of collective communication operations in MPICH), with L = ceil(log2 P):

    - recursive doubling, for short messages: L (latency + m / bandwidth);
    - Rabenseifner's, for long ones: 2 L latency + 2 (P - 1) / P m / bandwidth.

    The time to add numbers up counts as bandwidth.
    """

    latency: float
    bandwidth: float

    def allreduce(self, ranks: np.ndarray, size: float) -> np.ndarray:
        """Give seconds for each number of ranks and a message of `size` bytes."""
        rounds = np.ceil(np.log2(ranks))
        transfer = size / self.bandwidth
        doubling = rounds * (self.latency + transfer)
        return np.minimum(doubling, 2 * rounds * self.latency + 2 * (ranks - 1) / ranks * transfer)


def fit_link(ranks: int, short: tuple[float, float], long: tuple[float, float]) -> Link:
    """Give the link on which two messages, (bytes, seconds) each, take by recursive doubling what they did.

    Of a long message on many ranks recursive doubling is not what a library does; measure on two, where both
    algorithms send the same bytes.
    """
    (few, quick), (many, slow) = short, long
    rounds = np.ceil(np.log2(ranks))
    bandwidth = rounds * (many - few) / max(slow - quick, 1e-12)
    return Link(max(quick / rounds - few / bandwidth, 0.0), float(bandwidth))


@dataclass(frozen=True)
class Curve:
    """Seconds of a pass over b sequences: through the points, proportional to b beyond them on both sides.

    Above the largest this is what happens, since ranks work in micro-batches. Below the smallest it is a
    bound from below: nothing was measured there.
    """

    batches: tuple[float, ...]
    seconds: tuple[float, ...]

    @classmethod
    def through(cls, points: dict[float, float]) -> Curve:
        """Give the curve through points b -> seconds."""
        return cls(tuple(sorted(points)), tuple(points[b] for b in sorted(points)))

    def __call__(self, batch: np.ndarray) -> np.ndarray:
        """Give seconds for each batch."""
        batch = np.asarray(batch, np.float64)
        inside = np.interp(batch, (0.0, *self.batches), (0.0, *self.seconds))
        return np.where(batch > self.batches[-1], self.seconds[-1] * batch / self.batches[-1], inside)

    def scaled(self, batch: float, seconds: float) -> Curve:
        """Give the curve of this shape that has this value at this batch."""
        factor = seconds / float(self(np.array(batch)))
        return Curve(self.batches, tuple(factor * value for value in self.seconds))


@dataclass(frozen=True)
class Pass:
    """One kind of pass: how many a step has, over how many sequences, and the bytes then summed (0: none)."""

    count: float
    batch: int
    curve: Curve
    message: float


@dataclass(frozen=True)
class Job:
    """What the steps of a job consist of; `slowdown` is s, for more than one rank."""

    passes: tuple[Pass, ...]
    redundant: float
    link: Link | None
    slowdown: float = 1.0

    def compute(self, ranks: np.ndarray, even: bool = False) -> np.ndarray:
        """Give the seconds in passes of the rank with most sequences (`even`: with B / P), were it alone."""
        return np.sum(
            [p.count * p.curve(p.batch / ranks if even else np.ceil(p.batch / ranks)) for p in self.passes],
            axis=0,
        )

    def allreduce(self, ranks: np.ndarray) -> np.ndarray:
        """Give the seconds in collectives, 0 without a link."""
        if self.link is None:
            return np.zeros(len(ranks))
        return np.sum(
            [p.count * self.link.allreduce(ranks, p.message) for p in self.passes if p.message], axis=0
        )

    def seconds(self, ranks: Sequence[int] | np.ndarray) -> np.ndarray:
        """Give T(P) for each number of ranks."""
        sizes = np.asarray(ranks, np.float64)
        slower = np.where(sizes > 1, self.slowdown, 1.0)
        return slower * self.compute(sizes) + self.allreduce(sizes) + self.redundant


def best(job: Job, most: int) -> tuple[int, int]:
    """Give the knee and the fewest ranks within 1 % of the shortest step, among 1 to `most`.

    The knee is where S^2 / P, speedup times efficiency, is largest (Eager, Zahorjan and Lazowska 1989,
    Speedup versus efficiency in parallel systems): beyond it, more ranks cost more than they bring.
    """
    ranks = np.arange(1, most + 1)
    seconds = job.seconds(ranks)
    quick = seconds <= 1.01 * seconds.min()
    return int(ranks[np.argmin(ranks * seconds**2)]), int(ranks[np.argmax(quick)])
