"""A user-defined metric: its weighted mean over the scored outputs of all examples, on all ranks."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from hfmpi.backends.base import Array
from hfmpi.data.batches import Cases
from hfmpi.errors import UserError, shown
from hfmpi.models.base import Outputs
from hfmpi.objective.data_parallel import DataParallel
from hfmpi.objective.sums import pairwise_sum

__all__ = ["Metric", "mean", "sums"]

Metric = Callable[[np.ndarray, np.ndarray], np.ndarray]
"""(outputs (N, O), targets (N,) or (N, O)) -> a number for each row (N,)."""


def mean(metric: Metric, owner: DataParallel, cases: Cases, theta: Array) -> float:
    """Return the mean of the metric over the scored rows of all examples, by their weights; collective."""
    shard, most = owner.shard(cases, np.arange(cases.count)), owner.local.micro_batch

    def share(part: np.ndarray) -> np.ndarray:
        total = np.zeros(2)
        for indices in np.array_split(part, -(-part.size // most)) if part.size else []:
            total += sums(metric, owner.model, cases, indices, theta)
        return total

    def local() -> np.ndarray:
        return np.append(pairwise_sum([share(part) for part in shard.slices]), 0.0)

    message = owner.total(local, 3, np.float64, host=True)
    total, count = message[:2].tolist()
    return total / count


def sums(metric: Metric, model: object, cases: Cases, indices: np.ndarray, theta: Array) -> np.ndarray:
    """Sum the metric over the scored rows of some examples, times their weights, and these weights.

    Raises
    ------
    UserError
        If the model has no method for its outputs, or the metric fails or does not return a number for each
        row.
    """
    if not isinstance(model, Outputs):
        raise UserError(
            "a metric needs the outputs of the model: "
            f"{type(model).__name__} has no method outputs(theta, batch)"
        )
    outputs, targets, mask = model.outputs(theta, cases.take(indices))
    try:
        values = np.asarray(metric(outputs, targets))
    except (UserError, MemoryError):
        raise
    except Exception as error:
        raise UserError(
            f"metric(outputs, targets) raises {type(error).__name__}: {' '.join(str(error).split())}; it "
            f"gets arrays of outputs {outputs.shape} and targets {targets.shape}"
        ) from error
    if values.shape not in ((len(outputs),), (len(outputs), 1)) or values.dtype.kind not in "biuf":
        returned = f"an array of shape {values.shape}" if values.ndim else shown(values.item())
        raise UserError(
            f"metric(outputs, targets) must give a number for each of the {len(outputs):,} rows, whose mean "
            f"is taken over all ranks, not {returned}"
        )
    values = values.reshape(-1).astype(np.float64)
    if mask is None:
        return np.array([values.sum(), len(values)])
    weights = mask.reshape(-1).astype(np.float64)
    scored = weights > 0  # what the metric gives for others may not be finite
    return np.array([(values[scored] * weights[scored]).sum(), weights.sum()])
