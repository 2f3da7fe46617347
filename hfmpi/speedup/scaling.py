"""Model the time of a step on more ranks than were measured.

A step on P ranks executes n_k passes of kind k over batches of B_k sequences. After each pass the ranks sum a
message of m_k bytes. (The work on single matrices is a kind that has only a message; its time is w.)

    T(P) = s sum_k n_k t_k(ceil(B_k / P)) + sum_k n_k a(P, m_k) + w(P) + r

=========  ============================================================================================
t_k(b)     seconds of a pass over b sequences on one rank: piecewise linear through measured points. It does
           not vanish with b, because the T steps of a recurrent network are sequential: P_I counts this
           minimum as one pass
a(P, m)    seconds of the Allreduce, see `Link`
w(P)       seconds of work on matrices of the rank that has most of it; each matrix is assigned to one rank,
           and all work of a group ends before the next group begins
r          seconds of redundant work, which every rank does
s          slowdown of the passes of several ranks, compared with one rank alone: memory, caches, waiting
=========  ============================================================================================
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from hfmpi.objective.shares import shares

__all__ = ["Curve", "Job", "Link", "Pass", "best", "fit_link"]


@dataclass(frozen=True)
class Link:
    """The network between ranks: latency in seconds, bandwidth in bytes per second.

    MPI libraries have two algorithms; the model takes the faster one (Thakur, Rabenseifner and Gropp 2005,
    Optimization of collective communication operations in MPICH), with L = ceil(log2 P):

    - recursive doubling, for short messages: L (latency + m / bandwidth);
    - Rabenseifner's algorithm, for long messages: 2 L latency + 2 (P - 1) / P m / bandwidth.

    The time of additions is part of the bandwidth.
    """

    latency: float
    bandwidth: float

    def allreduce(self, ranks: np.ndarray, size: float) -> np.ndarray:
        """Return the seconds for each number of ranks and a message of `size` bytes."""
        rounds = np.ceil(np.log2(ranks))
        transfer = size / self.bandwidth
        doubling = rounds * (self.latency + transfer)
        return np.minimum(doubling, 2 * rounds * self.latency + 2 * (ranks - 1) / ranks * transfer)


def fit_link(ranks: int, short: tuple[float, float], long: tuple[float, float]) -> Link:
    """Return the link on which two messages, (bytes, seconds) each, take these times by recursive doubling.

    Libraries do not use recursive doubling for long messages on many ranks. Therefore measure on two ranks,
    where both algorithms send the same number of bytes.
    """
    (few, short_seconds), (many, long_seconds) = short, long
    rounds = np.ceil(np.log2(ranks))
    bandwidth = rounds * (many - few) / max(long_seconds - short_seconds, 1e-12)
    return Link(max(short_seconds / rounds - few / bandwidth, 0.0), float(bandwidth))


@dataclass(frozen=True)
class Curve:
    """Seconds of a pass over b sequences: linear between the points, proportional to b outside their range.

    Above the largest b this is accurate, because ranks process micro-batches. Below the smallest b it is a
    lower bound, because nothing was measured there.
    """

    batches: tuple[float, ...]
    seconds: tuple[float, ...]

    @classmethod
    def through(cls, points: dict[float, float]) -> Curve:
        """Return the curve through points b -> seconds."""
        return cls(tuple(sorted(points)), tuple(points[b] for b in sorted(points)))

    def __call__(self, batch: np.ndarray) -> np.ndarray:
        """Return the seconds for each batch."""
        batch = np.asarray(batch, np.float64)
        inside = np.interp(batch, (0.0, *self.batches), (0.0, *self.seconds))
        return np.where(batch > self.batches[-1], self.seconds[-1] * batch / self.batches[-1], inside)

    def scaled(self, batch: float, seconds: float) -> Curve:
        """Return the multiple of this curve that has this value at this batch."""
        factor = seconds / float(self(np.array(batch)))
        return Curve(self.batches, tuple(factor * value for value in self.seconds))


@dataclass(frozen=True)
class Pass:
    """One kind of pass: its count in a step, its sequences, its time, and the bytes of its message or 0."""

    count: float
    batch: int
    curve: Curve
    message: float


@dataclass(frozen=True)
class Job:
    """The work of a step of a job: passes, r, the link, s for more than one rank, and seconds of matrices."""

    passes: tuple[Pass, ...]
    redundant: float
    link: Link | None
    slowdown: float = 1.0
    matrices: tuple[tuple[float, ...], ...] = ()

    def compute(self, ranks: np.ndarray, even: bool = False) -> np.ndarray:
        """Return the seconds in passes, without s, of the rank with most sequences (`even`: with B / P)."""
        return np.sum(
            [p.count * p.curve(p.batch / ranks if even else np.ceil(p.batch / ranks)) for p in self.passes],
            axis=0,
        )

    def allreduce(self, ranks: np.ndarray) -> np.ndarray:
        """Return the seconds in collectives; 0 if there is no link."""
        if self.link is None:
            return np.zeros(len(ranks))
        return np.sum(
            [p.count * self.link.allreduce(ranks, p.message) for p in self.passes if p.message], axis=0
        )

    def alone(self, ranks: np.ndarray) -> np.ndarray:
        """Return w(P) + r: the maximum over ranks of the seconds outside passes and collectives."""
        matrices = [[_most(group, int(min(p, len(group)))) for group in self.matrices] for p in ranks]
        return self.redundant + np.array(matrices).sum(axis=1)

    def seconds(self, ranks: Sequence[int] | np.ndarray) -> np.ndarray:
        """Return T(P) for each number of ranks."""
        sizes = np.asarray(ranks, np.float64)
        slower = np.where(sizes > 1, self.slowdown, 1.0)
        return slower * self.compute(sizes) + self.allreduce(sizes) + self.alone(sizes)


def _most(works: Sequence[float], ranks: int) -> float:
    """Return the seconds of the rank that has most of this work."""
    return max(sum(works[i] for i in each) for each in shares(works, ranks))


def best(job: Job, most: int) -> tuple[int, int]:
    """Return the knee, and the fewest ranks within 1 % of the shortest step, among 1 to `most`.

    The knee is the number of ranks at which S^2 / P, speedup times efficiency, is largest (Eager, Zahorjan
    and Lazowska 1989, Speedup versus efficiency in parallel systems): above it, the cost of more ranks
    exceeds their gain.
    """
    ranks = np.arange(1, most + 1)
    seconds = job.seconds(ranks)
    fast = seconds <= 1.01 * seconds.min()
    return int(ranks[np.argmin(ranks * seconds**2)]), int(ranks[np.argmax(fast)])
