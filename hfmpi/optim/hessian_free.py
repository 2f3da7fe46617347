"""Hessian-free optimization: one step minimises a damped quadratic model by conjugate gradients.

The method is that of Martens (2010), Martens and Sutskever (2011) and Kiros (2013). The defaults are Martens'
constants; `hfmpi.optim.presets` has the two sets of settings of Krause et al. (2015).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated

from hfmpi.errors import UserError
from hfmpi.measure.cost import Counts
from hfmpi.optim.base import Messages, Needs, Objectives, Optimizer, StepReport, inner_product
from hfmpi.optim.cg import CGResult, ConjugateGradients, Stop
from hfmpi.optim.checks import check_state, check_vector, checked
from hfmpi.optim.damping import UNRESOLVED, LevenbergMarquardt, reduction_ratio, rounding, small
from hfmpi.optim.layout import Block, Vector
from hfmpi.optim.line_search import Armijo, Choice, LineSearch, backtrack
from hfmpi.optim.preconditioner import diagonal
from hfmpi.optim.quadratic import QuadraticModel
from hfmpi.settings import NOT_NEGATIVE, POSITIVE, Meaning, Rule, at_least, check, documented, within

__all__ = ["HessianFree", "HessianFreeState"]


@dataclass(frozen=True)
class HessianFreeState:
    """The state after a step: lambda, and the last CG iterate, which is zero after a rejected step."""

    damping: float
    direction: Vector


PRECONDITIONERS = "auto", "diagonal", "none"


@documented
@dataclass(frozen=True)
class HessianFree(Optimizer[HessianFreeState]):
    """Settings of Hessian-free optimization; every part of the step can be switched off.

    The defaults are those of Martens (2010).

    Examples
    --------
    >>> optimizer = hfmpi.HessianFree(damping=0.01, cg_max_steps=10)  # doctest: +SKIP
    >>> result = hfmpi.train(model, data, optimizer=optimizer, max_steps=100)  # doctest: +SKIP
    """

    damping: Annotated[
        float,
        NOT_NEGATIVE,
        Meaning(
            "Initial value of lambda. Martens: 45.",
            unit="the risk per squared length of theta",
            others=("lambda", "lambda_"),
        ),
    ] = 45.0
    damping_factor: Annotated[
        float,
        within("(0, 1]"),
        Meaning(
            "The Levenberg-Marquardt rule multiplies lambda by this factor after a good prediction of the "
            "model, and divides lambda by it after a poor one. 1: lambda is fixed."
        ),
    ] = LevenbergMarquardt.factor
    damping_minimum: Annotated[
        float, Meaning("Lower bound of lambda.", unit="the risk per squared length of theta")
    ] = LevenbergMarquardt.minimum
    damping_maximum: Annotated[
        float, Meaning("Upper bound of lambda.", unit="the risk per squared length of theta")
    ] = LevenbergMarquardt.maximum
    structural_damping: Annotated[
        float,
        NOT_NEGATIVE,
        Meaning(
            "mu: the model is also damped by mu * lambda times the curvature of the hidden pre-activations "
            "(Martens and Sutskever 2011). 0: off."
        ),
    ] = 0.0
    cg_max_steps: Annotated[
        int,
        at_least(1),
        Meaning("Maximum number of CG iterations per step.", unit="iterations", others=("cg_max_iter",)),
    ] = ConjugateGradients.max_steps
    cg_tolerance: Annotated[
        float,
        NOT_NEGATIVE,
        Meaning(
            "Martens' epsilon: conjugate gradients stop when the model's relative progress per iteration, "
            "over the last iterations, is smaller than this. 0: no test.",
            others=("cg_tol",),
        ),
    ] = ConjugateGradients.tolerance
    cg_refresh: Annotated[
        int,
        NOT_NEGATIVE,
        Meaning("The residual is recomputed after this number of iterations. 0: never.", unit="iterations"),
    ] = ConjugateGradients.refresh
    keep_ratio: Annotated[
        float,
        Rule("must be at least 1 and finite", within("[1, inf)").holds),
        Meaning(
            "Backtracking chooses among stored iterates, whose iteration numbers grow by this ratio. 1: all "
            "iterates are stored."
        ),
    ] = ConjugateGradients.keep_ratio
    warm_start: Annotated[
        float,
        within("[0, 1]"),
        Meaning(
            "Conjugate gradients start at this factor times the last iterate of the previous step. 0: they "
            "start at zero."
        ),
    ] = 0.95
    warm_start_growth: Annotated[
        float,
        POSITIVE,
        Meaning("warm_start is multiplied by this factor in each epoch, up to warm_start_maximum."),
    ] = 1.0
    warm_start_maximum: Annotated[
        float, within("[0, 1]"), Meaning("Upper bound of warm_start, including its growth.")
    ] = 0.99
    preconditioner: Annotated[
        str,
        Rule("must be 'auto', 'diagonal' or 'none'", PRECONDITIONERS.__contains__, PRECONDITIONERS),
        Meaning(
            "Preconditioner of conjugate gradients. diagonal: computed from squared gradients. auto: "
            "diagonal if the model provides squared gradients, otherwise none."
        ),
    ] = "auto"
    preconditioner_exponent: Annotated[
        float, NOT_NEGATIVE, Meaning("Exponent of the diagonal preconditioner. Martens: 3/4.")
    ] = 0.75
    backtracking: Annotated[
        bool,
        Meaning("Go back through the stored iterates while the risk decreases. Off: take the last iterate."),
    ] = True
    line_search: Annotated[
        bool,
        Meaning(
            "Shorten the step by Armijo's rule. Off: take the full step (rate 1) if it lowers the risk.",
            torch="line_search_fn",
            optax="linesearch",
        ),
    ] = True
    line_search_sufficient: Annotated[
        float,
        within("[0, 1)"),
        Meaning("Constant of Armijo's condition of sufficient decrease.", optax="slope_rtol", others=("c1",)),
    ] = Armijo.sufficient
    line_search_shrink: Annotated[
        float,
        within("(0, 1)"),
        Meaning("Ratio of each rate of the line search to the previous one.", optax="decrease_factor"),
    ] = Armijo.shrink
    line_search_tries: Annotated[
        int,
        at_least(1),
        Meaning(
            "Maximum number of rates that the line search tests. 1: only the full step.",
            unit="rates",
            optax="max_backtracking_steps",
        ),
    ] = Armijo.tries
    step_scale: Annotated[
        float,
        within("(0, 1]"),
        Meaning("Accepted steps are multiplied by step_scale * step_scale_decay^epoch (Kiros 2013)."),
    ] = 1.0
    step_scale_decay: Annotated[
        float, within("(0, 1]"), Meaning("Factor by which accepted steps shrink per epoch; see step_scale.")
    ] = 1.0

    def __post_init__(self) -> None:
        check(self)
        if not self.damping_minimum <= self.damping_maximum:
            raise UserError(
                f"damping_minimum, {self.damping_minimum:g}, must not exceed damping_maximum, "
                f"{self.damping_maximum:g}"
            )

    def init(self, theta: Vector, blocks: Sequence[Block] = ()) -> HessianFreeState:
        """Return the state before the first step."""
        check_vector("theta", theta)
        return HessianFreeState(self.damping, theta * 0)

    @property
    def needs(self) -> Needs:
        """The capabilities that the step requires with these settings."""
        return Needs(
            squared_gradients=self.preconditioner == "diagonal",
            structural_damping=self.structural_damping > 0,
        )

    def messages(self, parameters: int, blocks: Sequence[Block]) -> Messages:
        """Return the sizes of the messages: a gradient's message includes the squares, if they are used."""
        return Messages(with_gradient=parameters if self.preconditioner != "none" else 0)

    def step(
        self, theta: Vector, state: HessianFreeState, objectives: Objectives
    ) -> tuple[Vector, HessianFreeState, StepReport]:
        """Take one Hessian-free step: minimise the damped model at theta and move along the solution."""
        objectives = checked(theta, objectives)
        check_state(state, HessianFreeState, theta, "direction")
        objective, epoch = objectives.gradient, objectives.epoch
        at = (
            objective.gradient(theta) if self.preconditioner == "none" else objective.squared_gradients(theta)
        )
        if at.squares is None and self.preconditioner == "diagonal":
            raise UserError(
                "the objective has no squared gradients, which preconditioner=diagonal needs: set "
                "preconditioner=auto or none"
            )
        before, square = objective.agree((at.loss, inner_product(at.vector, at.vector)))
        norm = math.sqrt(square)

        def report(stop: Stop, work: Counts, **more: float | int | str | None) -> StepReport:
            return StepReport(before, True, "", work, _details(state.damping, stop, norm) | more)

        if not (math.isfinite(before) and math.isfinite(norm)):
            what = "gradient" if math.isfinite(before) else "risk"
            nothing = report(Stop.NOT_FINITE, Counts(gradients=1))
            return self._rejected(theta, state, f"the {what} is not finite", nothing)
        if norm == 0:
            nothing = report(Stop.SOLVED, Counts(gradients=1))
            message = "the gradient is zero: nothing to do"
            return theta, state, replace(nothing, message=message, converged=True)

        model = QuadraticModel(objectives, theta, at.vector, state.damping, self.structural_damping)
        exponent = self.preconditioner_exponent
        m = None if at.squares is None else diagonal(at.squares, state.damping, exponent)
        start = self._start(state, epoch)
        solution = self.solver.solve(model.damped, -at.vector, start, agree=objective.agree, precondition=m)
        if solution.stop is Stop.NOT_FINITE and solution.steps == 0:  # the only iterate is the initial one
            nothing = report(solution.stop, Counts(gradients=1) + model.work)
            return self._rejected(theta, state, solution.stop.value, nothing)

        def risk(p: Vector) -> float:
            (value,) = objective.agree((objective.loss(theta + p),))
            return value

        choice = backtrack(risk, solution.iterates if self.backtracking else solution.iterates[-1:])
        p, after = choice.iterate.x, choice.loss
        predicted, least = model.predict(p, choice.iterate.value), rounding(before, theta)
        sound = solution.stop is not Stop.NOT_POSITIVE
        converged = sound and abs(predicted.change) <= least
        rho = reduction_ratio(before, after, predicted.change)
        search = LineSearch(1.0 if after < before else 0.0, after, 0)
        if self.line_search and not converged:
            search = self.armijo.search(risk, p, before, after, predicted.slope)
        scale = search.rate * self.step_scale * self.step_scale_decay**epoch

        failed = sound and not converged and search.rate == 0 and predicted.slope < 0 and math.isfinite(after)
        if failed and small(-predicted.change, before, theta):
            converged = -predicted.change <= model.noise(before)

        losses = choice.evaluations + search.evaluations
        taken = report(
            solution.stop,
            Counts(gradients=1, losses=losses, cg_steps=solution.steps) + model.work,
            rho=rho if math.isfinite(rho) else None,
            cg_steps=solution.steps,
            cg_chosen=choice.iterate.step,
            line_search_rate=search.rate,
            step_norm=scale * math.sqrt(predicted.square),
        )
        if sound and not search.loss < before:  # if Armijo's condition holds, it does so only by rounding
            converged = converged or search.rate > 0 or abs(after - before) <= least
        if converged:
            nothing = replace(taken, details=taken.details | {"line_search_rate": 0.0, "step_norm": 0.0})
            return theta, state, replace(nothing, message=UNRESOLVED + self._at(state), converged=True)
        if not (search.rate > 0 and math.isfinite(search.loss)):
            return self._rejected(theta, state, _why(solution, choice, predicted.slope), taken)
        later = HessianFreeState(self.rule.update(state.damping, rho), solution.iterates[-1].x)
        if later.damping > state.damping:
            taken = replace(taken, message=self._at(later).removeprefix("; "))
        return theta + p.dtype.type(scale) * p, later, taken

    @property
    def solver(self) -> ConjugateGradients:
        """The settings of conjugate gradients."""
        return ConjugateGradients(self.cg_max_steps, self.cg_tolerance, self.keep_ratio, self.cg_refresh)

    @property
    def rule(self) -> LevenbergMarquardt:
        """The rule for lambda."""
        return LevenbergMarquardt(self.damping_factor, self.damping_minimum, self.damping_maximum)

    @property
    def armijo(self) -> Armijo:
        """The settings of the line search."""
        return Armijo(self.line_search_sufficient, self.line_search_shrink, self.line_search_tries)

    def _start(self, state: HessianFreeState, epoch: float) -> Vector:
        try:
            grown = self.warm_start * self.warm_start_growth**epoch
        except OverflowError:  # a corrupt checkpoint with an absurd number of steps
            grown = math.inf
        factor = min(grown, self.warm_start_maximum)
        return state.direction * state.direction.dtype.type(max(factor, 0.0))

    def _rejected(
        self, theta: Vector, state: HessianFreeState, cause: str, report: StepReport
    ) -> tuple[Vector, HessianFreeState, StepReport]:
        """Return the result of a step rejected for this cause: same theta, larger lambda, zero direction."""
        after = HessianFreeState(self.rule.update(state.damping, math.nan), theta * 0)
        message = f"step rejected: {cause}{self._at(after)}"
        return theta, after, replace(report, accepted=False, message=message)

    def _at(self, state: HessianFreeState) -> str:
        """Return an addition to a message if lambda has reached its maximum, otherwise an empty string."""
        return "; the damping is at its maximum" if state.damping == self.damping_maximum else ""


def _details(damping: float, stop: Stop, norm: float) -> dict[str, float | int | str | None]:
    """Return the history's scalars for a step that has not moved theta, in the order of the history."""
    return {
        "damping": damping,
        "rho": None,
        "cg_steps": 0,
        "cg_stop": stop.name,
        "cg_chosen": 0,
        "line_search_rate": 0.0,
        "gradient_norm": norm if math.isfinite(norm) else None,
        "step_norm": 0.0,
    }


def _why(solution: CGResult, choice: Choice, slope: float) -> str:
    """Return the reason why no step along the chosen iterate was accepted."""
    if choice.iterate.step == 0 and solution.stop is Stop.NOT_POSITIVE:
        return solution.stop.value
    if not slope < 0:
        return "the risk does not decrease along the direction from conjugate gradients"
    if not math.isfinite(choice.loss):
        return "along the direction from conjugate gradients the risk is not finite, or not lower at any rate"
    return "no rate along the direction from conjugate gradients lowers the risk enough"
