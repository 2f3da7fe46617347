"""What all first-order steps have in common: one gradient, and no update from numbers that are not finite.

And what the adaptive methods have in common besides: schedule, decoupled weight decay, averaging.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Annotated, ClassVar, Generic, NamedTuple, TypeVar

from hfmpi.optim.base import Objective, Objectives, StepReport, Work, inner_product
from hfmpi.optim.checks import check_state, checked
from hfmpi.optim.layout import Vector
from hfmpi.optim.schedule import Schedule
from hfmpi.settings import NOT_NEGATIVE, POSITIVE, check, within

__all__ = ["Adaptive", "AdaptiveState", "Update", "agreed_norm", "evaluated", "first_order_step"]

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


ETA = 8
"""Of polynomial-decay averaging (Shamir and Zhang 2013, section 4): a window of a ninth of the updates."""


@dataclass(frozen=True, kw_only=True)
class AdaptiveState:
    """Number of updates so far, and the mean of the iterates, (D,); (0,) without averaging."""

    updates: int
    average: Vector


AdaptiveT = TypeVar("AdaptiveT", bound=AdaptiveState)


@dataclass(frozen=True, kw_only=True)
class Adaptive(Schedule, ABC, Generic[AdaptiveT]):
    """A method that makes its step p of a gradient and running means: theta <- theta - p.

    Attributes
    ----------
    rate : float
        Times the factor of the schedule.
    decay : float
        Weight decay, decoupled: p gains rate * decay * theta (Loshchilov and Hutter 2019).
    averaging : float
        Decay of an exponential mean of the iterates, which is what is evaluated in place of theta; the
        training goes on from theta. While it is young its window grows as the updates do (Shamir and Zhang
        2013), so that one near 1 is right for any length of a run. 0: none.
    """

    _state: ClassVar[type]
    _means: ClassVar[tuple[str, ...]] = "mean", "mean_square"

    rate: Annotated[float, POSITIVE]
    decay: Annotated[float, NOT_NEGATIVE] = 0.0
    averaging: Annotated[float, within("[0, 1)")] = 0.0

    def __post_init__(self) -> None:
        check(self)

    @abstractmethod
    def direction(
        self, g: Vector, norm: float, state: AdaptiveT, objective: Objective, factor: float
    ) -> tuple[Vector, AdaptiveT]:
        """Give p (D,), without decay, and the state of the means after g, of length `norm`."""

    def step(
        self, theta: Vector, state: AdaptiveT, objectives: Objectives
    ) -> tuple[Vector, AdaptiveT, StepReport]:
        """Take one update; one whose numbers are not finite is rejected."""
        objectives = checked(theta, objectives)
        check_state(state, self._state, theta, *self._means)
        objective, kind, t = objectives.gradient, theta.dtype.type, state.updates + 1
        factor = self.factor(state.updates)
        rate = self.rate * factor

        def update(g: Vector, norm: float) -> Update[AdaptiveT] | None:
            p, later = self.direction(g, norm, state, objective, factor)
            if self.decay:
                p = p + kind(rate * self.decay) * theta
            length = agreed_norm(objective, p)
            if not math.isfinite(length):
                return None
            after, average = theta - p, state.average
            if self.averaging:
                new = max(1 - self.averaging, (ETA + 1) / (t + ETA))
                average = kind(1 - new) * average + kind(new) * after
            message = "" if norm > 0 else "the gradient is zero"
            return Update(after, replace(later, updates=t, average=average), length, message)

        return first_order_step(theta, state, objective, rate, update)

    def _first(self, theta: Vector) -> Vector:
        """Give the mean of the iterates before the first update."""
        return theta * 1 if self.averaging else theta[:0]


def evaluated(theta: Vector, state: object) -> Vector:
    """Give the parameters that are evaluated: the mean of the iterates where the state has one, or theta."""
    if isinstance(state, AdaptiveState) and state.average.size > 0:
        return state.average
    return theta
