"""Compute the loss and metrics of a model at one point, on all ranks: `hfmpi.evaluate`."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from hfmpi.measure.spans import EVALUATE
from hfmpi.models.base import Model
from hfmpi.parallel.communicator import Communicator
from hfmpi.parallel.failure import together
from hfmpi.runs import checks
from hfmpi.runs.metric import Metric, checked_metrics, means, single_or_all
from hfmpi.runs.one_point import one_point

__all__ = ["Evaluation", "evaluate"]


class Evaluation(NamedTuple):
    """Means over all scored outputs of a data set, equal on all ranks.

    Attributes
    ----------
    loss : float
        In the unit of the model's loss, nats for cross-entropy.
    metric : float, dict of str to float, or None
        The metric, the metrics by name, or None if there is none.
    """

    loss: float
    metric: float | dict[str, float] | None = None


def evaluate(
    model: Model,
    theta: np.ndarray,
    data: Any,
    metric: Metric | dict[str, Metric] | None = None,
    *,
    micro_batch: int | None = None,
    communicator: Communicator | None = None,
) -> Evaluation:
    """Compute the loss and metrics of a model at theta on data.

    The examples are distributed over all ranks of a program under mpirun. Every rank calls the function with
    the same arguments. The callback of `hfmpi.train` may call it too.

    Parameters
    ----------
    model : Model
        Such as a TorchModel, JaxModel or Network.
    theta : (D,)
        Parameters, such as `result.theta` of `hfmpi.train`.
    data : tuple, data set or Cases
        As for `hfmpi.train`.
    metric : callable or dict of str to callable, optional
        As for `hfmpi.train`: metric(outputs (N, O), targets (N,) or (N, O)) returns a number for each row.
    micro_batch : int, optional
        The maximum number of examples that a rank processes at a time; by default the model's choice.
    communicator : Communicator, optional
        Returned by `hfmpi.connect()`; by default all ranks of the program.

    Returns
    -------
    Evaluation

    Raises
    ------
    UserError
        On all ranks, if the arguments do not match one another, or differ between ranks.

    Examples
    --------
    >>> loss, accuracy = hfmpi.evaluate(model, result.theta, (x, y), lambda z, y: z.argmax(axis=1) == y)
    >>> hfmpi.evaluate(model, result.theta, (x, y)).loss
    """
    point = one_point(model, theta, data, communicator, micro_batch=micro_batch)
    owner, cases = point.owner, point.cases
    metrics = together(owner.communicator, lambda: checked_metrics(metric))
    checks.same_start(owner.communicator, {"rank {} has different metrics than the other ranks": [*metrics]})
    device = model.backend.to_device(point.theta)
    with np.errstate(all="ignore"):  # an overflow shows in the loss
        loss = owner.on(cases, np.arange(cases.count), span=EVALUATE).loss(device)
        values = means(metrics, owner, cases, device)
    return Evaluation(*owner.communicator.agree((loss, single_or_all(values))))
