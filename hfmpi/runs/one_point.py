"""A model at one theta on one data set, on all ranks: the start of `hfmpi.curvature` and `hfmpi.evaluate`."""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import numpy as np

from hfmpi.data.batches import Cases
from hfmpi.data.digest import digest_of
from hfmpi.data.examples import Examples
from hfmpi.data.user_data import as_cases
from hfmpi.models.base import DataChecks, Model, Scoring
from hfmpi.models.batch import check_finite
from hfmpi.models.micro_batches import check_theta
from hfmpi.objective.data_parallel import DataParallel
from hfmpi.parallel.communicator import Communicator, digest
from hfmpi.parallel.failure import together
from hfmpi.parallel.launch import connect
from hfmpi.runs.checks import same_start

__all__ = ["Point", "one_point"]


class Point(NamedTuple):
    """A model on all ranks, a data set, and parameters (D,) of the model's type on the host."""

    owner: DataParallel
    cases: Cases
    theta: np.ndarray


def one_point(
    model: Model, theta: np.ndarray, data: Any, communicator: Communicator | None, **options: Any
) -> Point:
    """Check the arguments on every rank, and that they are equal on all; collective.

    `options` are those of `DataParallel`; without a communicator it is that of all ranks.

    Raises
    ------
    UserError
        On all ranks, if the arguments do not fit one another, or differ between ranks.
    """
    comm = communicator or _all_ranks()

    def build() -> Point:
        owner = DataParallel(model, comm, **options)
        check_theta(theta, model.size)
        start = theta.astype(model.backend.dtype)
        cases = as_cases(data, getattr(model, "examples", Examples))
        if isinstance(cases, Examples):
            cases = model.scoring(cases) if isinstance(model, Scoring) else cases
            check_finite(cases.targets, cases.mask)
            if isinstance(model, DataChecks):
                model.loss(owner.model.backend.to_device(start), cases.take(np.arange(1)))  # checks the model
                model.check_data(cases.inputs, cases.targets, cases.mask)
        return Point(owner, cases, start)

    point = together(comm, build)
    same_start(
        comm,
        {
            "rank {} has other parameters than the other ranks": digest(point.theta),
            "rank {} has other data than the other ranks": digest_of(point.cases),
        },
    )
    return point


@cache
def _all_ranks() -> Communicator:
    """Return one communicator for all calls: MPI libraries have a limited number of them."""
    return connect()
