"""A global batch that is distributed over the ranks: each rank has the examples that its program read."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any, cast

import numpy as np

from hfmpi.data.batches import Cases
from hfmpi.objective.data_parallel import DataParallel
from hfmpi.objective.local import Shard

__all__ = ["GlobalBatch", "Shards", "curvature_part"]


@dataclass(frozen=True, eq=False)
class GlobalBatch:
    """The union of the examples of all ranks, in the order of the ranks; satisfies `Cases`.

    Attributes
    ----------
    examples : Cases
        The examples of this rank.
    edges : tuple of int
        The index of the first example of each rank, and the total number of examples.
    rank : int
    outputs : float
        The number of scored outputs, or the sum of their weights, over all ranks, for the examples whose risk
        is computed.
    weights : float
        The sum of the weights of these examples; without weights, the number of examples.
    """

    examples: Cases
    edges: tuple[int, ...]
    rank: int
    outputs: float
    weights: float

    @property
    def count(self) -> int:
        """The number of examples over all ranks."""
        return self.edges[-1]

    def take(self, indices: np.ndarray) -> Any:
        """Return examples of this rank, with these indices in the global batch, as a batch."""
        return self.examples.take(indices - self.edges[self.rank])

    def scored(self, indices: np.ndarray) -> Any:
        """Return the number of scored outputs over all ranks, which was summed before."""
        return self.outputs

    def weight(self, indices: np.ndarray) -> float:
        """Return the sum of the weights of the examples over all ranks, which was computed before."""
        return self.weights

    def parts(self, indices: np.ndarray) -> list[np.ndarray]:
        """Divide indices (B,) into those of the examples of each rank."""
        return [
            indices[(indices >= first) & (indices < following)] for first, following in pairwise(self.edges)
        ]


class Shards(DataParallel):
    """A factory of objectives on a `GlobalBatch`: the shard of a rank has the rank's examples."""

    def shard(self, cases: Cases, indices: np.ndarray) -> Shard:
        """Return this rank's part of a global batch."""
        return Shard(cases, [cast(GlobalBatch, cases).parts(indices)[self.communicator.rank]])

    def sizes(self, cases: Cases, indices: np.ndarray) -> list[int]:
        """Return the number of examples of each rank."""
        return [len(part) for part in cast(GlobalBatch, cases).parts(indices)]


def curvature_part(step: int, batch: int, count: int) -> np.ndarray:
    """Return the indices (count,) of the curvature batch in a global batch of `batch` examples.

    They are evenly spaced, so that every rank has its share. They shift by one with each step, so that all
    examples are used in turn if the batch stays the same.
    """
    return np.sort((np.arange(count) * batch // count + step) % batch)
