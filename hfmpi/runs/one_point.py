"""Prepare a model at one theta on one data set, on all ranks, for `hfmpi.curvature` and `hfmpi.evaluate`."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from hfmpi.data.batches import Cases
from hfmpi.data.by_index import Dataset
from hfmpi.data.digest import digest_of
from hfmpi.data.examples import Examples
from hfmpi.data.user_data import as_cases
from hfmpi.measure.machine import free_memory
from hfmpi.models.base import DataChecks, Model, with_scoring
from hfmpi.models.batch import check_finite
from hfmpi.models.micro_batches import check_theta
from hfmpi.objective.data_parallel import DataParallel
from hfmpi.parallel.communicator import Communicator, digest
from hfmpi.parallel.failure import together
from hfmpi.parallel.launch import all_ranks
from hfmpi.runs import checks

__all__ = ["Point", "one_point"]


class Point(NamedTuple):
    """A model on all ranks, a data set, and parameters (D,) of the model's type on the host."""

    owner: DataParallel
    cases: Cases
    theta: np.ndarray


def one_point(
    model: Model, theta: np.ndarray, data: Any, communicator: Communicator | None, **options: Any
) -> Point:
    """Check the arguments on every rank, and that they are equal on all ranks; collective.

    `options` are those of `DataParallel`; the default communicator connects all ranks.

    Raises
    ------
    UserError
        On all ranks, if the arguments do not match one another, or differ between ranks.
    """
    comm = communicator or all_ranks()
    memory = checks.least(comm, free_memory(comm.local_size))

    def build() -> tuple[Point, str]:
        owner = DataParallel(model, comm, **options)
        check_theta(theta, model.size)
        start = theta.astype(model.backend.dtype)
        plain = checks.unaugmented(data, "pass its data, or hfmpi.Augmented(cases, function).at(seed, step)")
        cases = with_scoring(model, as_cases(plain, getattr(model, "examples", Examples), memory))
        checks.examples(cases, lambda some: check_finite(some.targets, some.mask))
        if isinstance(model, DataChecks):
            if isinstance(cases, (Examples, Dataset)):
                model.loss(owner.model.backend.to_device(start), cases.take(np.arange(1)))  # checks the model
            checks.examples(cases, lambda some: model.check_data(some.inputs, some.targets, some.mask))
        return Point(owner, cases, start), digest_of(cases)

    point, identity = together(comm, build)
    checks.same_start(
        comm,
        {
            "rank {} has different parameters than the other ranks": digest(point.theta),
            "rank {} has different data than the other ranks": identity,
        },
    )
    return point
