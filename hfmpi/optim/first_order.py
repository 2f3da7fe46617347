"""The common part of first-order steps: compute one gradient and reject an update that is not finite.

The adaptive methods also share the schedule, decoupled weight decay and averaging of the iterates.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, ClassVar, Generic, NamedTuple, TypeVar

from hfmpi.measure.cost import Counts
from hfmpi.optim.base import Objective, Objectives, Optimizer, StepReport, inner_product
from hfmpi.optim.checks import check_state, checked
from hfmpi.optim.layout import Block, Vector
from hfmpi.optim.schedule import Schedule
from hfmpi.settings import NOT_NEGATIVE, POSITIVE, Meaning, check, documented, within

__all__ = [
    "Adaptive",
    "AdaptiveState",
    "Beta1",
    "Beta2",
    "Epsilon",
    "Rate",
    "Update",
    "agreed_norm",
    "evaluated",
    "first_order_step",
]

StateT = TypeVar("StateT")

# Settings that several methods have, with different defaults.
Rate = Annotated[
    float,
    POSITIVE,
    Meaning("Learning rate, which the factor of the schedule multiplies.", torch="lr", optax="learning_rate"),
]
Beta1 = Annotated[
    float,
    within("[0, 1)"),
    Meaning(
        "Decay of the running mean of the gradients, per update.",
        torch="betas[0]",
        optax="b1",
        others=("momentum",),
    ),
]
Beta2 = Annotated[
    float,
    within("[0, 1)"),
    Meaning("Decay of the running mean of squared gradients, per update.", torch="betas[1]", optax="b2"),
]
Epsilon = Annotated[
    float,
    POSITIVE,
    Meaning(
        "Added to the root mean square of the gradients, by which the step is divided.",
        unit="that of the gradient",
        torch="eps",
        optax="eps",
    ),
]


class Update(NamedTuple, Generic[StateT]):
    """Theta and the state after an update, the length of the step, and a message for the report."""

    theta: Vector
    state: StateT
    length: float
    message: str = ""


def agreed_norm(objective: Objective, vector: Vector) -> float:
    """Compute the Euclidean norm of a vector; all ranks get the same number."""
    (square,) = objective.agree((inner_product(vector, vector),))
    return math.sqrt(square)


NOTHING = Counts()


def first_order_step(
    theta: Vector,
    state: StateT,
    objective: Objective,
    rate: float,
    update: Callable[[Vector, float], Update[StateT] | None],
    longest: float = math.inf,
    too_long: str = "the gradient",
    algebra: Counts = NOTHING,
) -> tuple[Vector, StateT, StepReport]:
    """Compute the gradient and the update, and take the update unless a number is not finite.

    Parameters
    ----------
    rate : float
        The learning rate, for the report.
    update : callable
        (g (D,), its norm) -> the update, or None if it is not finite.
    longest : float
        The update is rejected if the norm of g is not below this bound.
    too_long : str
        The subject of the message "... is not finite" in that case.
    algebra : Counts
        The linear algebra of `update`.
    """
    at = objective.gradient(theta)
    loss, square = objective.agree((at.loss, inner_product(at.vector, at.vector)))
    norm, wrong, work = math.sqrt(square), "", Counts(gradients=1)
    after = Update(theta, state, 0.0)
    if not math.isfinite(loss):
        wrong = "the risk"
    elif not norm < longest:
        wrong = too_long
    else:
        updated, work = update(at.vector, norm), work + algebra
        after, wrong = (updated, "") if updated is not None else (after, "the update")
    report = StepReport(
        loss=loss,
        accepted=not wrong,
        message=f"update rejected: {wrong} is not finite" if wrong else after.message,
        work=work,
        details={
            "gradient_norm": norm if math.isfinite(norm) else None,
            "step_norm": after.length,
            "rate": rate,
        },
    )
    return after.theta, after.state, report


ETA = 8
"""Parameter of polynomial-decay averaging (Shamir and Zhang 2013, section 4): the window is t / 9 updates."""


@dataclass(frozen=True, kw_only=True)
class AdaptiveState:
    """The number of updates so far, and the mean of the iterates, (D,), or (0,) without averaging."""

    updates: int
    average: Vector


AdaptiveT = TypeVar("AdaptiveT", bound=AdaptiveState)


@documented
@dataclass(frozen=True, kw_only=True)
class Adaptive(Schedule, Optimizer[AdaptiveT]):
    """A method that computes a step p from the gradient and running means: theta <- theta - p."""

    _state: ClassVar[type]
    _means: ClassVar[tuple[str, ...]] = "mean", "mean_square"

    rate: Rate
    decay: Annotated[
        float,
        NOT_NEGATIVE,
        Meaning(
            "Decoupled weight decay, as in AdamW: rate * decay * theta is added to the step (Loshchilov and "
            "Hutter 2019). 0: no decay.",
            torch="weight_decay",
            optax="weight_decay",
            others=("l2", "regularisation"),
        ),
    ] = 0.0
    averaging: Annotated[
        float,
        within("[0, 1)"),
        Meaning(
            "Decay of an exponential moving average of the iterates, which is evaluated in place of theta; "
            "training continues from theta. At first the window of the average grows with the number of "
            "updates (Shamir and Zhang 2013), so that a decay near 1 suits a run of any length. 0: no "
            "average.",
            torch="AveragedModel",
            optax="ema",
        ),
    ] = 0.0

    def __post_init__(self) -> None:
        check(self)

    @property
    def seeks_lowest_risk(self) -> bool:
        """Whether a lower risk is always better; False with weight decay or a mean of the iterates."""
        return not (self.decay or self.averaging)

    @property
    def rates(self) -> tuple[str, ...]:
        """The settings that a schedule of the learning rate multiplies."""
        return ("rate",)

    @property
    def degree(self) -> int:
        """0: the step of a parameter does not depend on the size of its gradients (`Optimizer.degree`)."""
        return 0

    @abstractmethod
    def direction(
        self, g: Vector, norm: float, state: AdaptiveT, objective: Objective, factor: float
    ) -> tuple[Vector, AdaptiveT]:
        """Compute p (D,), without weight decay, and the state with means updated by g, of length `norm`."""

    def algebra(self, state: AdaptiveT, blocks: Sequence[Block]) -> Counts:
        """Return the linear algebra that `direction` executes in this state for these blocks of theta."""
        return NOTHING

    def step(
        self, theta: Vector, state: AdaptiveT, objectives: Objectives
    ) -> tuple[Vector, AdaptiveT, StepReport]:
        """Compute one update and take it unless a number is not finite."""
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

        algebra = self.algebra(state, objective.blocks) if self.needs.blocks else NOTHING
        return first_order_step(theta, state, objective, rate, update, algebra=algebra)

    def _first(self, theta: Vector) -> Vector:
        """Return the mean of the iterates before the first update."""
        return theta * 1 if self.averaging else theta[:0]


def evaluated(theta: Vector, state: object) -> Vector:
    """Return the parameters to evaluate: the mean of the iterates if the state has one, otherwise theta."""
    if isinstance(state, AdaptiveState) and state.average.size > 0:
        return state.average
    return theta
