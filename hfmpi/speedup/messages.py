"""What the ranks of a job sum: the bytes after each kind of pass, and those of the work on its matrices."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hfmpi.measure.cost import Counts
from hfmpi.objective.messages import message_sizes
from hfmpi.optim.base import Optimizer
from hfmpi.optim.hessian_free import HessianFree
from hfmpi.optim.muon import Muon
from hfmpi.optim.soap import SOAP
from hfmpi.optim.subspace import Subspace

__all__ = ["messages"]


def messages(
    optimizer: Optimizer[Any], counts: Counts, parameters: int, itemsize: int, state: Mapping[str, int]
) -> dict[str, float]:
    """Give the bytes of each message by what it comes after, 0 for none.

    Parameters
    ----------
    optimizer : Optimizer
    counts : Counts
        Of some steps; how many vectors a pass had is the mean over them.
    parameters, itemsize : int
        D, and bytes of each number of a vector.
    state : mapping of str to int
        How many numbers each vector of the optimizer's state has: the matrices' sizes are in it.
    """
    beside, matrices = 0, 0
    factors, decomposition = state.get("factors", 0), state.get("decomposition", 0)
    if isinstance(optimizer, HessianFree) and optimizer.preconditioner != "none":
        beside = parameters
    elif isinstance(optimizer, Subspace):
        if factors:
            beside = factors + 1
            matrices = decomposition + optimizer.kfac_dampings * parameters
        matrices += state.get("soap", 0)  # a message of its own, taken for one with the other
    elif isinstance(optimizer, SOAP):
        matrices = 2 * (parameters + factors)
    elif isinstance(optimizer, Muon):
        matrices = parameters  # less its vectors, which are few
    directions = 1 + counts.directions // max(1, counts.projections)
    candidates = 1 + counts.candidates // max(1, counts.losses)
    sizes = message_sizes(parameters, beside)
    return {
        "gradient": itemsize * sizes["gradient"],
        "product": itemsize * sizes["product"],
        "projection": 8 * _with_stop(directions**2),  # float64 whatever the vectors, as losses
        "loss": 8 * _with_stop(candidates),
        "linearisation": 0,
        "matrices": itemsize * _with_stop(matrices) if matrices else 0,
    }


def _with_stop(numbers: int) -> int:
    return message_sizes(numbers)["product"]
