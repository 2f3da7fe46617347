"""What all first-order steps have in common: one gradient, and no update from numbers that are not finite."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Generic, NamedTuple, TypeVar

from hfmpi.optim.base import Objective, StepReport, Vector, Work, inner_product

__all__ = ["Update", "agreed_norm", "first_order_step"]

StateT = TypeVar("StateT")


class Update(NamedTuple, Generic[StateT]):
    """Theta and state after an update, the length of its step, and what is to be said of it."""

    theta: Vector
    state: StateT
    length: float
    message: str = ""


def agreed_norm(objective: Objective, vector: Vector) -> float:
    """Give the length of a vector, the same number on every rank."""
    (square,) = objective.agree((inner_product(vector, vector),))
    return math.sqrt(square)


def first_order_step(
    theta: Vector,
    state: StateT,
    objective: Objective,
    rate: float,
    update: Callable[[Vector, float], Update[StateT] | None],
    longest: float = math.inf,
    too_long: str = "the gradient",
) -> tuple[Vector, StateT, StepReport]:
    """Take the update that a sound gradient gives; reject it where a number is not finite.

    Parameters
    ----------
    rate : float
        For the report.
    update : callable
        g (D,) and its length -> the update, or None where it is not finite.
    longest : float
        What the length of g must stay below, and `too_long` what is not finite where it does not.
    """
    at = objective.gradient(theta)
    loss, square = objective.agree((at.loss, inner_product(at.vector, at.vector)))
    norm, wrong = math.sqrt(square), ""
    after = Update(theta, state, 0.0)
    if not math.isfinite(loss):
        wrong = "the risk"
    elif not norm < longest:
        wrong = too_long
    else:
        found = update(at.vector, norm)
        after, wrong = (found, "") if found is not None else (after, "the update")
    report = StepReport(
        loss=loss,
        accepted=not wrong,
        message=f"update rejected: {wrong} is not finite" if wrong else after.message,
        work=Work(gradients=1),
        details={
            "gradient_norm": norm if math.isfinite(norm) else None,
            "step_norm": after.length,
            "rate": rate,
        },
    )
    return after.theta, after.state, report
