"""Hessian-free optimization: one step minimises a damped quadratic model by conjugate gradients.

Martens (2010); Martens and Sutskever (2011); Kiros (2013). The constants of the defaults are Martens';
`hfmpi.optim.presets` has the paper's two settings.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Annotated

from hfmpi.optim.base import Objectives, StepReport, Vector, Work, agreement, inner_product
from hfmpi.optim.cg import CGResult, Stop, cg
from hfmpi.optim.damping import LevenbergMarquardt, reduction_ratio
from hfmpi.optim.line_search import Choice, LineSearch, armijo, backtrack
from hfmpi.optim.preconditioner import diagonal
from hfmpi.settings import NOT_NEGATIVE, POSITIVE, Rule, at_least, check, within

__all__ = ["HessianFree", "HessianFreeState"]


@dataclass(frozen=True)
class HessianFreeState:
    """What a step takes from the one before: lambda, and the last CG iterate (zero after a rejection)."""

    damping: float
    direction: Vector


@dataclass(frozen=True)
class HessianFree:
    """Settings of the Hessian-free step. Every part can be switched off.

    Attributes
    ----------
    damping : float
        lambda at the start; unit of the risk per squared unit of theta (nats per character for the
        models here). Martens: 45.
    damping_factor, damping_minimum, damping_maximum : float
        The Levenberg-Marquardt rule; factor 1 keeps lambda fixed.
    structural_damping : float
        mu: the curvature gains mu * lambda times that of the hidden pre-activations (Martens and
        Sutskever 2011). 0: off.
    cg_max_steps, cg_tolerance, cg_refresh
        Limit, Martens' epsilon (0: no test), and how often the residual is computed afresh (0: never).
    keep_ratio : float
        Which CG iterates backtracking may choose; 1: all.
    warm_start, warm_start_growth, warm_start_maximum : float
        CG starts at warm_start times the last iterate of the step before; the factor grows by
        `growth` per epoch up to the maximum. 0: start at zero.
    preconditioner : {'diagonal', 'none'}
    preconditioner_exponent : float
    backtracking : bool
        Off: take the last CG iterate.
    line_search : bool
        Off: take the step at rate 1 if it lowers the risk at all.
    line_search_sufficient, line_search_shrink, line_search_tries
        Armijo's constant, the factor between rates, and the number of rates.
    step_scale, step_scale_decay : float
        The accepted step is multiplied by step_scale * decay^epoch (Kiros).
    """

    damping: Annotated[float, NOT_NEGATIVE] = 45.0
    damping_factor: Annotated[float, within("(0, 1]")] = 2 / 3
    damping_minimum: float = 1e-10
    damping_maximum: float = 1e10
    structural_damping: Annotated[float, NOT_NEGATIVE] = 0.0
    cg_max_steps: Annotated[int, at_least(1)] = 250
    cg_tolerance: Annotated[float, NOT_NEGATIVE] = 5e-4
    cg_refresh: Annotated[int, NOT_NEGATIVE] = 0
    keep_ratio: Annotated[float, Rule("must be at least 1 and finite", within("[1, inf)").holds)] = 1.3
    warm_start: Annotated[float, within("[0, 1]")] = 0.95
    warm_start_growth: Annotated[float, POSITIVE] = 1.0
    warm_start_maximum: Annotated[float, within("[0, 1]")] = 0.99
    preconditioner: Annotated[
        str, Rule("must be 'diagonal' or 'none'", ("diagonal", "none").__contains__)
    ] = "diagonal"
    preconditioner_exponent: Annotated[float, NOT_NEGATIVE] = 0.75
    backtracking: bool = True
    line_search: bool = True
    line_search_sufficient: Annotated[float, within("[0, 1)")] = 1e-2
    line_search_shrink: Annotated[float, within("(0, 1)")] = 0.8
    line_search_tries: Annotated[int, at_least(1)] = 60
    step_scale: Annotated[float, within("(0, 1]")] = 1.0
    step_scale_decay: Annotated[float, within("(0, 1]")] = 1.0

    def __post_init__(self) -> None:
        check(self)
        if not self.damping_minimum <= self.damping_maximum:
            raise ValueError("damping_minimum must not exceed damping_maximum")

    def init(self, theta: Vector) -> HessianFreeState:
        """Give the state before the first step."""
        return HessianFreeState(self.damping, theta * 0)

    def step(
        self, theta: Vector, state: HessianFreeState, objectives: Objectives
    ) -> tuple[Vector, HessianFreeState, StepReport]:
        """Take one Hessian-free step.

        The model of the risk around theta is q(p) = f + g' p + p' G p / 2; conjugate gradients minimise it
        with the damped curvature A = G + mu lambda S + lambda I in place of G.
        """
        diagonal_wanted = self.preconditioner == "diagonal"
        at = objectives.gradient.gradient(theta, **({"squares": True} if diagonal_wanted else {}))
        agree, inner = agreement(objectives.gradient), inner_product(objectives.gradient)
        before, norm = agree(at.loss), math.sqrt(inner(at.vector, at.vector))
        if not (math.isfinite(before) and math.isfinite(norm)):
            what = "gradient" if math.isfinite(before) else "risk"
            report = self._nothing(state, before, norm, Stop.NOT_FINITE, Work(gradients=1))
            return self._rejected(theta, state, f"the {what} is not finite", report)
        if norm == 0:
            report = self._nothing(state, before, norm, Stop.SOLVED, Work(gradients=1))
            return theta, state, replace(report, accepted=True, message="the gradient is zero: nothing to do")
        curvature = self._curvature(theta, state.damping, objectives)

        solution = cg(
            lambda v: curvature(v) + v.dtype.type(state.damping) * v,
            -at.vector,
            self._start(state, objectives.epoch),
            inner=inner,
            max_steps=self.cg_max_steps,
            tolerance=self.cg_tolerance,
            keep_ratio=self.keep_ratio,
            refresh=self.cg_refresh,
            precondition=diagonal(at.squares, state.damping, self.preconditioner_exponent)
            if diagonal_wanted
            else None,
        )

        if solution.stop is Stop.NOT_FINITE and solution.steps == 0:  # nothing is known but the warm start
            work = Work(gradients=1, linearisations=1, products=solution.products)
            report = self._nothing(state, before, norm, solution.stop, work)
            return self._rejected(theta, state, solution.stop.value, report)

        def risk(p: Vector) -> float:
            return agree(objectives.gradient.loss(theta + p))

        choice = backtrack(risk, solution.iterates if self.backtracking else solution.iterates[-1:])
        p, slope = choice.iterate.x, inner(at.vector, choice.iterate.x)
        model, extra = self._undamped(theta, state.damping, choice, slope, inner, objectives)
        rho = reduction_ratio(before, choice.loss, model)
        search = self._search(risk, p, before, choice.loss, slope)

        scale = search.rate * self.step_scale * self.step_scale_decay**objectives.epoch
        report = StepReport(
            loss=before,
            accepted=search.rate > 0 and math.isfinite(search.loss),
            message="",
            work=Work(
                gradients=1,
                losses=choice.evaluations + search.evaluations,
                linearisations=1 + extra,
                products=solution.products + extra,
                cg_steps=solution.steps,
            ),
            details={
                "damping": state.damping,
                "rho": rho if math.isfinite(rho) else None,
                "cg_steps": solution.steps,
                "cg_stop": solution.stop.name,
                "cg_chosen": choice.iterate.step,
                "line_search_rate": search.rate,
                "gradient_norm": norm,
                "step_norm": scale * math.sqrt(inner(p, p)),
            },
        )
        if not report.accepted:
            return self._rejected(theta, state, _why(solution, choice, slope), report)
        after = HessianFreeState(self._rule().update(state.damping, rho), solution.iterates[-1].x)
        return theta + p.dtype.type(scale) * p, after, report

    def _nothing(
        self, state: HessianFreeState, loss: float, norm: float, stop: Stop, work: Work
    ) -> StepReport:
        """Report of a step that ends before the line search."""
        details: dict[str, float | int | str | None] = {
            "damping": state.damping,
            "rho": None,
            "cg_steps": 0,
            "cg_stop": stop.name,
            "cg_chosen": 0,
            "line_search_rate": 0.0,
            "gradient_norm": norm if math.isfinite(norm) else None,
            "step_norm": 0.0,
        }
        return StepReport(loss, False, "", work, details)

    def _rejected(
        self, theta: Vector, state: HessianFreeState, cause: str, report: StepReport
    ) -> tuple[Vector, HessianFreeState, StepReport]:
        """Leave theta as it is, raise lambda, forget the direction, and say why."""
        after = HessianFreeState(self._rule().update(state.damping, math.nan), theta * 0)
        bound = "; the damping is at its maximum" if after.damping == self.damping_maximum else ""
        return theta, after, replace(report, accepted=False, message=f"step rejected: {cause}{bound}")

    def _rule(self) -> LevenbergMarquardt:
        return LevenbergMarquardt(self.damping_factor, self.damping_minimum, self.damping_maximum)

    def _start(self, state: HessianFreeState, epoch: float) -> Vector:
        factor = min(self.warm_start * self.warm_start_growth**epoch, self.warm_start_maximum)
        return state.direction * state.direction.dtype.type(max(factor, 0.0))

    def _curvature(self, theta: Vector, damping: float, objectives: Objectives) -> Callable[[Vector], Vector]:
        structural = self.structural_damping * damping
        if structural == 0:
            return objectives.curvature.gauss_newton(theta)
        return objectives.curvature.gauss_newton(theta, structural=structural)

    def _undamped(
        self,
        theta: Vector,
        damping: float,
        choice: Choice,
        slope: float,
        inner: Callable[[Vector, Vector], float],
        objectives: Objectives,
    ) -> tuple[float, int]:
        """Model value at p without any damping, and the number of products that it took."""
        p = choice.iterate.x
        if self.structural_damping == 0:  # phi is known from CG: take lambda |p|^2 / 2 off
            return choice.iterate.value - 0.5 * damping * inner(p, p), 0
        return slope + 0.5 * inner(p, objectives.curvature.gauss_newton(theta)(p)), 1

    def _search(
        self, risk: Callable[[Vector], float], p: Vector, before: float, after: float, slope: float
    ) -> LineSearch:
        if not self.line_search:
            return LineSearch(1.0 if after < before else 0.0, after, 0)
        return armijo(
            risk,
            p,
            before,
            after,
            slope,
            sufficient=self.line_search_sufficient,
            shrink=self.line_search_shrink,
            tries=self.line_search_tries,
        )


def _why(solution: CGResult, choice: Choice, slope: float) -> str:
    """Say why nothing along the choice was good enough."""
    if choice.iterate.step == 0 and solution.stop is Stop.NOT_POSITIVE:
        return solution.stop.value
    if not slope < 0:
        return "the direction of conjugate gradients does not descend"
    if not math.isfinite(choice.loss):
        return "the risk along it is not finite, or not lower at any rate"
    return "no rate along it lowers the risk enough"
