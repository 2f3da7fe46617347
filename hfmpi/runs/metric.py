"""Compute user-defined metrics: their means over the scored outputs of all examples, on all ranks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from hfmpi.backends.base import Array
from hfmpi.data.batches import Cases
from hfmpi.errors import UserError, shown
from hfmpi.models.base import Outputs
from hfmpi.objective.data_parallel import DataParallel
from hfmpi.objective.sums import pairwise_sum

__all__ = ["SINGLE", "Metric", "checked_metrics", "means", "single_or_all", "sums"]

Metric = Callable[[np.ndarray, np.ndarray], np.ndarray]
"""(outputs (N, O), targets (N,) or (N, O)) -> a number for each row (N,)."""

SINGLE = "metric"
"""The name of a metric that was passed alone."""

TAKEN = "loss", "bpc", SINGLE
"""Names that a metric of a dict cannot have, because the keys of a record are valid_NAME."""


def checked_metrics(metric: Any) -> dict[str, Metric]:
    """Return the metrics by name: none, a single one, or those of a dict.

    Raises
    ------
    UserError
        If a metric is not a function, or its name cannot be a key of the history.
    """
    if metric is None:
        return {}
    if callable(metric):
        return {SINGLE: metric}
    if not isinstance(metric, Mapping) or not metric:
        raise UserError(
            "metric must be a function (outputs, targets) -> values, or a dict of such functions by name, "
            f"not {shown(metric)}"
        )
    for name, function in metric.items():
        if not isinstance(name, str) or not name.isidentifier() or name in TAKEN:
            raise UserError(
                f"the name of a metric must be a word such as 'accuracy', other than {', '.join(TAKEN)}, "
                f"not {shown(name)}"
            )
        if not callable(function):
            raise UserError(
                f"metric {name} must be a function (outputs, targets) -> values, not {shown(function)}"
            )
    return dict(metric)


def single_or_all(values: Mapping[str, float]) -> float | dict[str, float] | None:
    """Return the values of metrics in the form in which the user passed the metrics."""
    return dict(values) if values.keys() - {SINGLE} else values.get(SINGLE)


def means(metrics: Mapping[str, Metric], owner: DataParallel, cases: Cases, theta: Array) -> dict[str, float]:
    """Return the mean of each metric over the scored rows of all examples; collective."""
    if not metrics:
        return {}
    shard, most = owner.shard(cases, np.arange(cases.count)), owner.local.micro_batch

    def share(part: np.ndarray) -> np.ndarray:
        total = np.zeros(len(metrics) + 1)
        for indices in np.array_split(part, -(-part.size // most)) if part.size else []:
            total += sums(metrics, owner.model, cases, indices, theta)
        return total

    def local() -> np.ndarray:
        return np.append(pairwise_sum([share(part) for part in shard.slices]), 0.0)

    message = owner.total(local, len(metrics) + 2, np.float64, host=True)
    *totals, count = message[:-1].tolist()
    return {name: total / count for name, total in zip(metrics, totals, strict=True)}


def sums(
    metrics: Mapping[str, Metric], model: object, cases: Cases, indices: np.ndarray, theta: Array
) -> np.ndarray:
    """Return the weighted sums of each metric and of 1 over the scored rows of some examples: (metrics + 1,).

    Raises
    ------
    UserError
        If the model cannot compute its outputs, or a metric fails or does not return a number for each row.
    """
    if not isinstance(model, Outputs):
        raise UserError(
            "a metric needs the outputs of the model: "
            f"{type(model).__name__} has no method outputs(theta, batch)"
        )
    outputs, targets, mask = model.outputs(theta, cases.take(indices))
    weights = np.ones(len(outputs)) if mask is None else mask.reshape(-1).astype(np.float64)
    scored = weights > 0  # the metric of other rows may not be finite
    several = len(metrics) > 1  # a metric may change its arguments
    totals = [
        (
            _values(name, metric, outputs.copy() if several else outputs, targets)[scored] * weights[scored]
        ).sum()
        for name, metric in metrics.items()
    ]
    return np.array([*totals, weights.sum()], np.float64)


def _values(name: str, metric: Metric, outputs: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """Return the metric of each row, (N,) float64."""
    call = f"{name}(outputs, targets)"
    try:
        values = np.asarray(metric(outputs, targets))
    except (UserError, MemoryError):
        raise
    except Exception as error:
        raise UserError(
            f"{call} raises {type(error).__name__}: {' '.join(str(error).split())}; its "
            f"arguments are arrays of outputs {outputs.shape} and targets {targets.shape}"
        ) from error
    if values.shape not in ((len(outputs),), (len(outputs), 1)) or values.dtype.kind not in "biuf":
        returned = f"an array of shape {values.shape}" if values.ndim else shown(values.item())
        raise UserError(
            f"{call} must return a number for each of the {len(outputs):,} rows, whose mean "
            f"is taken over all ranks, not {returned}"
        )
    return values.reshape(-1).astype(np.float64)
