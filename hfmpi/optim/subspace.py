"""One Gauss-Newton step in the space of many directions, for the fewest sequential passes.

The model on the directions V is that of `hfmpi.optim.reduced_model`; V G V' takes J V alone, in one pass for
all of them. Directions are those of K-FAC at several dampings, the gradient and the gradient over its
root mean square, and the last steps, each cut into parts (a gate of a matrix). There is no rate to tune and
no line search; lambda follows the reduction ratio, which needs no pass where the next gradient is of the same
batch, since it brings the risk after the step. Where that rose, part of the step is taken back: the minimum
of the parabola through both risks and the slope. On other batches the risk takes a forward pass.

Directions from K-FAC and an exact quadratic model along them are how K-FAC sets its rate and momentum
(Martens and Grosse 2015, section 7), there with two directions.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated

import numpy as np

from hfmpi.optim import kfac
from hfmpi.optim.base import Matrix, Objective, Objectives, StepReport, Work, inner_product
from hfmpi.optim.checks import check_blocks, check_state, check_vector, checked
from hfmpi.optim.layout import Block, Vector, kronecker_layout
from hfmpi.optim.reduced_model import Directions, Part, ReducedModel, Step, directions, parts
from hfmpi.optim.soap import SOAP, SOAPState
from hfmpi.settings import NOT_NEGATIVE, POSITIVE, Rule, at_least, check, within

__all__ = ["Subspace", "SubspaceState"]

KINDS = "kfac", "gradient", "rms", "soap"
METRICS = "identity", "kfac"

ROTATED = SOAP(rate=1.0, beta1=0.9, epsilon=1e-6, refresh=2)
"""SOAP for directions, of which the length does not matter."""

LEAST, MOST = 0.1, 0.5
"""Of a step after which the risk rose, what is kept of it: bounds of the parabola's minimum."""


@dataclass(frozen=True)
class SubspaceState:
    """What a step takes from those before.

    Attributes
    ----------
    updates : int
    damping : float
        lambda.
    loss, descent, curvature : float
        The risk f before the last step p, -g' p and p' G p: the model promises f - descent + curvature / 2
        after it. 0 where there is none to judge.
    factors, decomposition : vector
        Running means of the Kronecker factors, and their eigenvalues and eigenvectors.
    mean_square : (D,)
        Running mean of squared gradients.
    soap : vector
        SOAP's two means, factors and bases, one after the other.
    steps : (max(1, memory) * D,)
        The last steps, the latest first: one at least, to go back.
    """

    updates: int
    damping: float
    loss: float
    descent: float
    curvature: float
    factors: Vector
    decomposition: Vector
    mean_square: Vector
    soap: Vector
    steps: Vector


def _known(directions: str) -> bool:
    words = directions.split("+")
    return len(set(words)) == len(words) and set(words) <= set(KINDS)


@dataclass(frozen=True)
class Subspace:
    """Settings of the step.

    Attributes
    ----------
    directions : str
        Some of kfac, gradient, rms (the gradient over its root mean square) and soap (that of SOAP, with the
        constants of the preset), joined by +.
    memory : int
        Last steps among the directions.
    cut : bool
        Cut every direction into the parts of the blocks.
    kfac_damping, kfac_dampings, kfac_ratio
        The smallest gamma, how many, and the ratio of one to the next.
    factor_decay, refresh
        Decay of the running mean of K-FAC's factors, and steps between decompositions. On a large batch old
        factors help less than they mislead.
    square_decay : float
        Decay of the running mean of squares.
    damping, damping_minimum, damping_maximum : float
        lambda at the start, and its bounds.
    metric : str
        What lambda damps: `identity` the length of the step, `kfac` its length in K-FAC's own metric at the
        smallest gamma, p' (A x B + gamma) p, an ellipsoidal trust region.
    krylov : int
        Further blocks of directions: those of the model's gradient g + G p at its minimum so far, at the cost
        of a product and a projection each.
    weight_decay : float
        The model and all risks that steer gain weight_decay / 2 * theta' theta; the risk of the history does
        not.
    candidates : int
        So many lambda, by factors of 4, are tried on the gradient batch in one pass, and the best is taken.
        0: the risk after a step is that of the next gradient where that is of the same batch; else as 1.
    """

    directions: Annotated[str, Rule(f"must be some of {', '.join(KINDS)} joined by +", _known)] = "kfac"
    memory: Annotated[int, NOT_NEGATIVE] = 3
    cut: bool = True
    kfac_damping: Annotated[float, POSITIVE] = 1e-4
    kfac_dampings: Annotated[int, at_least(1)] = 3
    kfac_ratio: Annotated[float, POSITIVE] = 10.0
    factor_decay: Annotated[float, within("[0, 1)")] = 0.0
    square_decay: Annotated[float, within("[0, 1)")] = 0.9
    refresh: Annotated[int, at_least(1)] = 1
    damping: Annotated[float, NOT_NEGATIVE] = 1e-3
    damping_minimum: Annotated[float, NOT_NEGATIVE] = 1e-8
    damping_maximum: Annotated[float, POSITIVE] = 1e10
    metric: Annotated[str, Rule(f"must be {' or '.join(METRICS)}", METRICS.__contains__)] = "identity"
    krylov: Annotated[int, NOT_NEGATIVE] = 0
    weight_decay: Annotated[float, NOT_NEGATIVE] = 0.0
    candidates: Annotated[int, NOT_NEGATIVE] = 0

    def __post_init__(self) -> None:
        check(self)
        if not self.damping_minimum <= self.damping_maximum:
            raise ValueError("damping_minimum must not exceed damping_maximum")
        if self.metric == "kfac" and "kfac" not in self._kinds:
            raise ValueError("metric=kfac needs directions with kfac")

    @property
    def _kinds(self) -> list[str]:
        return self.directions.split("+")

    def init(self, theta: Vector, blocks: Sequence[Block] = ()) -> SubspaceState:
        """Give the state before the first step.

        Raises
        ------
        UserError
            Without blocks.
        """
        check_vector("theta", theta)
        check_blocks("subspace", blocks)
        has = "kfac" in self._kinds
        return SubspaceState(
            0,
            self.damping,
            0.0,
            0.0,
            0.0,
            np.zeros_like(theta, shape=has * kronecker_layout(blocks).size),
            np.zeros_like(theta, shape=has * kfac.decomposition_size(blocks)),
            np.zeros_like(theta, shape=("rms" in self._kinds) * theta.size),
            _packed(ROTATED.init(theta, blocks)) if "soap" in self._kinds else theta[:0],
            np.zeros_like(theta, shape=max(1, self.memory) * theta.size),
        )

    def step(
        self, theta: Vector, state: SubspaceState, objectives: Objectives
    ) -> tuple[Vector, SubspaceState, StepReport]:
        """Take one step, or take part of the last one back if the risk rose."""
        objectives = checked(theta, objectives)
        check_state(state, SubspaceState, theta)
        objective, kind = objectives.gradient, theta.dtype.type
        candidates = self.candidates or int(not objectives.repeated)
        factors = None
        if "kfac" in self._kinds:
            at, factors = objective.factored_gradient(theta)
        else:
            at = objective.gradient(theta)
        plain, g = at.loss, at.vector
        if self.weight_decay:
            g = g + kind(self.weight_decay) * theta
        plain, loss, square = objective.agree((plain, plain + self._penalty(theta), inner_product(g, g)))
        norm, rho, work = math.sqrt(square), None, Work(gradients=1)
        report = StepReport(plain, False, "", work, _details(norm, state.damping))
        promised = state.descent - state.curvature / 2
        least = float(np.finfo(theta.dtype).eps) * abs(state.loss)  # a promise below it cannot be judged
        if not candidates and promised > least:
            rho = (state.loss - loss) / promised
            report = replace(report, details=_details(norm, state.damping, rho))
            if not rho > 0:
                return self._back(theta, state, loss, report)
            state = replace(state, damping=self._damped(state.damping, rho))
        if not math.isfinite(loss) or not math.isfinite(norm):
            return theta, state, replace(report, message="the risk or its gradient is not finite")
        if norm == 0:
            return theta, state, replace(report, accepted=True, message="the gradient is zero")
        before = state
        state, found = self._directions(state, objective, g, factors)
        model, work = self._model(theta, state, objectives, g, found)
        report = replace(report, work=work, details=_details(norm, state.damping, rho))
        if model is None:
            return theta, before, replace(report, message="a direction is not finite")
        state = replace(state, loss=loss)
        if not candidates:
            return self._taken(theta, state, objective, model.step(state.damping), report)
        dampings = [state.damping * 4.0 ** (i - (candidates - 1) // 2) for i in range(candidates)]
        steps = [model.step(damping) for damping in dampings]
        ends = [theta + step.p for step in steps]
        losses = [risk + self._penalty(end) for risk, end in zip(objective.losses(ends), ends, strict=True)]
        losses = list(objective.agree(tuple(losses)))
        work = replace(work, losses=1, candidates=candidates - 1)
        best = min(range(len(losses)), key=lambda i: losses[i] if math.isfinite(losses[i]) else math.inf)
        promised = steps[best].descent - steps[best].curvature / 2
        rho = (loss - losses[best]) / promised if promised > 0 else math.nan
        if not losses[best] < loss:
            state = replace(state, damping=min(4 * max(dampings), self.damping_maximum))
            report = replace(report, work=work, details=_details(norm, state.damping, rho))
            return theta, state, replace(report, message="no candidate lowers the risk")
        state = replace(state, damping=self._damped(dampings[best], rho))
        report = replace(report, work=work, details=_details(norm, state.damping, rho))
        return self._taken(theta, state, objective, steps[best], report)

    def _penalty(self, theta: Vector) -> float:
        return self.weight_decay / 2 * inner_product(theta, theta) if self.weight_decay else 0.0

    def _directions(
        self, state: SubspaceState, objective: Objective, g: Vector, new: Vector
    ) -> tuple[SubspaceState, list[Vector]]:
        """Give the directions, not yet cut, and the state with the means that they come from."""
        kind = g.dtype.type
        first = 1 - 1 / (state.updates + 1)
        whole = [g] if "gradient" in self._kinds else []
        if "rms" in self._kinds:
            keep = min(first, self.square_decay)
            mean_square = kind(keep) * state.mean_square + kind(1 - keep) * g * g
            state = replace(state, mean_square=mean_square)
            whole.append(g / (np.sqrt(mean_square) + kind(1e-8)))
        if "soap" in self._kinds:
            p, soap = ROTATED.direction(g, 1.0, _unpacked(state.soap, g.size, state.updates), objective, 1.0)
            state = replace(state, soap=_packed(soap))
            whole.append(p)
        if "kfac" in self._kinds:
            keep = min(first, self.factor_decay)
            state = replace(state, factors=kind(keep) * state.factors + kind(1 - keep) * new)
            due = state.updates % self.refresh == 0
            more, decomposition = self._preconditioned(objective, g, state, due)
            state, whole = replace(state, decomposition=decomposition), whole + more
        whole += [state.steps[i * g.size : (i + 1) * g.size] for i in range(self.memory)]
        return state, whole

    def _preconditioned(
        self, objective: Objective, g: Vector, state: SubspaceState, refresh: bool
    ) -> tuple[list[Vector], Vector]:
        """Give K-FAC's directions of g, and the decomposition."""
        gammas = [self.kfac_damping * self.kfac_ratio**i for i in range(self.kfac_dampings)]
        return kfac.directions(objective, g, state.factors, state.decomposition, gammas, refresh)

    def _parts(self, blocks: Sequence[Block], size: int) -> list[Part]:
        return parts(blocks if self.cut else [Block("theta", 0, 1, size)])

    def _model(
        self, theta: Vector, state: SubspaceState, objectives: Objectives, g: Vector, found: list[Vector]
    ) -> tuple[ReducedModel | None, Work]:
        """Give the model on these directions and Krylov's, and the work; None if one is not finite."""
        objective, second = objectives.gradient, objectives.second
        work, places = Work(gradients=1), self._parts(objective.blocks, g.size)
        along = directions(objective, found, places)
        if along is None:
            return None, work
        project = second.project(theta)
        multiply = second.gauss_newton(theta) if self.krylov else lambda p: p
        linearisations = 0 if objectives.shared else 1 + (self.krylov > 0)
        model = self._projected(objective, along, project(along.v), g, state.factors)
        work = replace(work, linearisations=linearisations, projections=1, directions=len(along.v) - 1)
        for _ in range(self.krylov):
            p = model.step(state.damping).p
            residual = g + multiply(p) + theta.dtype.type(self.weight_decay) * p
            has = "kfac" in self._kinds
            whole = self._preconditioned(objective, residual, state, False)[0] if has else [residual]
            more = directions(objective, whole, places)
            if more is None:
                return None, work
            along = along.with_more(more)
            model = self._projected(objective, along, project(along.v), g, state.factors)
            work = replace(
                work,
                products=work.products + 1,
                projections=work.projections + 1,
                directions=work.directions + len(along.v) - 1,
            )
        return model, work

    def _projected(
        self, objective: Objective, along: Directions, m: Matrix, g: Vector, factors: Vector
    ) -> ReducedModel:
        """Give the model of V, M = V G V' and what lambda damps."""
        gram, slopes = along.inner_products(g)
        metric = gram
        if self.metric == "kfac":
            metric = kfac.products(objective.blocks, factors, along.v) + self.kfac_damping * gram
        return ReducedModel(objective, along, m + self.weight_decay * gram, metric, slopes)

    def _damped(self, damping: float, rho: float) -> float:
        """Give lambda after a step of this reduction ratio."""
        if rho > 0.75:
            damping *= 0.5
        elif rho < 0.25:
            damping *= 2.25
        elif rho < 0.5:
            damping *= 1.22
        return min(max(damping, self.damping_minimum), self.damping_maximum)

    def _taken(
        self, theta: Vector, state: SubspaceState, objective: Objective, step: Step, report: StepReport
    ) -> tuple[Vector, SubspaceState, StepReport]:
        """Take a step, unless it is not finite."""
        (square,) = objective.agree((inner_product(step.p, step.p),))
        if not math.isfinite(square):
            return theta, state, replace(report, message="the step is not finite")
        report = replace(report, accepted=True, details={**report.details, "step_norm": math.sqrt(square)})
        size, steps = theta.size, state.steps * 1
        steps[size:] = state.steps[: steps.size - size]
        steps[:size] = step.p
        state = replace(
            state, updates=state.updates + 1, steps=steps, descent=step.descent, curvature=step.curvature
        )
        return theta + step.p, state, report

    def _back(
        self, theta: Vector, state: SubspaceState, loss: float, report: StepReport
    ) -> tuple[Vector, SubspaceState, StepReport]:
        """Go back to where the parabola through both risks is least, a tenth to half of the step."""
        part, bend = LEAST, loss - state.loss + state.descent
        if math.isfinite(loss):
            part = min(max(state.descent / (2 * bend), LEAST), MOST) if bend > 0 else MOST
        size, steps, kind = theta.size, state.steps * 1, theta.dtype.type
        p = kind(part) * steps[:size]
        theta, steps[:size] = theta - (steps[:size] - p), p
        descent, curvature = part * state.descent, part * part * state.curvature
        damping = min(4 * state.damping, self.damping_maximum)
        state = replace(state, damping=damping, descent=descent, curvature=curvature, steps=steps)
        message = f"the risk rose: back to {part:.2g} of the last step"
        return theta, state, replace(report, message=message, details={**report.details, "damping": damping})


def _packed(state: SOAPState) -> Vector:
    return np.concatenate([state.mean, state.mean_square, state.factors, state.bases])


def _unpacked(packed: Vector, size: int, updates: int) -> SOAPState:
    means, rest = packed[: 2 * size].reshape(2, size), packed[2 * size :].reshape(2, -1)
    return SOAPState(*means, *rest, updates=updates, average=packed[:0])


def _details(norm: float, damping: float, rho: float | None = None) -> dict[str, float | int | str | None]:
    return {
        "gradient_norm": norm if math.isfinite(norm) else None,
        "step_norm": 0.0,
        "damping": damping,
        "rho": None if rho is None or not math.isfinite(rho) else rho,
    }
