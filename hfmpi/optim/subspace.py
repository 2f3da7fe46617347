"""Gauss-Newton steps in the space of many directions, for the fewest sequential passes.

`hfmpi.optim.reduced_model` has the quadratic model in the space of the directions V. V G V' needs only J V,
computed in one pass for all directions, or rows of a random sketch of G. The rows do not depend on V, so that
their adjoint passes run at the same time as that of the gradient. The directions are K-FAC's preconditioned
gradients at several dampings, those of rows of examples (S'S / N + gamma)^-1 g, the gradient, the gradient
divided by its root mean square, and the last steps. Each direction is cut into parts (a gate of a matrix).
There is no learning rate to tune and no line search. Lambda follows the reduction ratio. If the next gradient
is on the same batch, the ratio needs no additional pass, because that gradient also returns the risk after
the step. If the risk rose, part of the step is undone: it is shortened to the minimum of the parabola through
both risks and the slope. If no step has been judged yet, as at the start, lambda may not fit the scale of the
problem: then a forward pass first checks the risk, and the step is shortened until it lowers the risk. If the
batch changes, a forward pass computes the risk of every step.

K-FAC also uses its directions and an exact quadratic model along them to choose its rate and momentum
(Martens and Grosse 2015, section 7), with two directions.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated

import numpy as np

from hfmpi.errors import UserError
from hfmpi.measure.cost import Counts
from hfmpi.measure.linear_algebra import gram, product, repeated, together
from hfmpi.optim.base import (
    EntryT,
    Gradient,
    Messages,
    Needs,
    Objective,
    Objectives,
    Optimizer,
    StepReport,
    inner_product,
)
from hfmpi.optim.checks import check_blocks, check_state, check_vector, checked
from hfmpi.optim.damping import UNRESOLVED, noise, rounding, small
from hfmpi.optim.kfac import decomposition_layout, preconditioned_gradients, preconditioning
from hfmpi.optim.layout import Block, Part, Vector, kronecker_layout, parts_of, whole
from hfmpi.optim.reduced_model import ReducedModel, Step, normalised, pieces
from hfmpi.optim.rows import RowMatrix, RowRequest
from hfmpi.optim.shifted_cg import shifted_solutions
from hfmpi.settings import NOT_NEGATIVE, POSITIVE, Meaning, Rule, at_least, check, documented, within

__all__ = ["Subspace", "SubspaceState"]

KINDS = "kfac", "rows", "gradient", "rms"

LEAST, MOST = 0.1, 0.5
"""Bounds of the fraction of a step that remains after the risk rose; they bound the parabola's minimum."""

MOST_CHECKED = 30
"""How often a step is shortened, or lambda raised, before the step is rejected."""

ROW_TOLERANCE = 1e-5
"""Relative residual at which conjugate gradients on the rows stop.

Directions of small curvature converge last: with a tolerance of 1e-2 nearly all of their benefit is lost.
"""

SEEDS = 1 << 32
"""First seed of the sketches for the model, which must differ from the seeds of the rows for directions.

A model from the same rows as the directions would underestimate the curvature along them.
"""

LEAST_ROWS = 6
"""Minimum number of sketch rows per direction: with fewer the relative error of V G V' is 0.4 or more."""

FEW_EXAMPLES = 128
"""For curvature batches of at most this size J V is used, because it is exact and affordable there.

On the 5-bit memory task with 32 sequences, the model from a sketch took 4 to 20 times as many passes.
"""


@dataclass(frozen=True)
class SubspaceState:
    """The state after a step.

    Attributes
    ----------
    updates : int
        The number of steps taken so far.
    damping : float
        lambda.
    loss, descent, curvature : float
        The risk f before the last step p, -g' p and p' G p: the model predicts the risk
        f - descent + curvature / 2 after it. All are 0 if there is no step to judge.
    factors : vector
        Running means of the Kronecker factors; empty if only the factors of the current step are used.
    decomposition : vector
        Eigenvalues and eigenvectors of the factors; empty if every step decomposes them.
    mean_square : (D,)
        Running mean of squared gradients.
    steps : (max(1, memory) * D,)
        The last steps, latest first; at least one is stored, because it may have to be undone.
    """

    updates: int
    damping: float
    loss: float
    descent: float
    curvature: float
    factors: Vector
    decomposition: Vector
    mean_square: Vector
    steps: Vector


def _are_kinds(directions: str) -> bool:
    words = directions.split("+")
    return len(set(words)) == len(words) and set(words) <= set(KINDS)


ROW_KINDS = "scores", "sketch"


@documented
@dataclass(frozen=True)
class Subspace(Optimizer[SubspaceState]):
    """Settings of Gauss-Newton steps in the space of many directions.

    Examples
    --------
    >>> optimizer = hfmpi.Subspace(damping=0.01)  # doctest: +SKIP
    >>> result = hfmpi.train(model, data, optimizer=optimizer, max_steps=50)  # doctest: +SKIP
    """

    directions: Annotated[
        str,
        Rule(f"must be one or more of {', '.join(KINDS)} joined by +", _are_kinds),
        Meaning(
            "One or more of kfac (gradients preconditioned by K-FAC's factors), rows (preconditioned by rows "
            "of examples), gradient and rms (the gradient divided by its root mean square), joined by +."
        ),
    ] = "kfac"
    memory: Annotated[
        int,
        NOT_NEGATIVE,
        Meaning("Number of last steps used as directions.", unit="steps", others=("history_size",)),
    ] = 3
    cut: Annotated[bool, Meaning("Cut every direction into parts, such as a gate of a matrix.")] = True
    kfac_damping: Annotated[
        float, POSITIVE, Meaning("The smallest gamma: the damping of K-FAC's directions.")
    ] = 1e-4
    kfac_dampings: Annotated[int, at_least(1), Meaning("Number of values of gamma for K-FAC.")] = 3
    kfac_ratio: Annotated[float, POSITIVE, Meaning("Ratio of each gamma for K-FAC to the previous one.")] = (
        10.0
    )
    factor_decay: Annotated[
        float,
        within("[0, 1)"),
        Meaning(
            "Decay of the running mean of K-FAC's factors, per step. With large batches, averaging over past "
            "factors hurts."
        ),
    ] = 0.0
    segments: Annotated[
        int,
        at_least(1),
        Meaning(
            "K: the number of time segments of an example, each with one row; at most one per time step.",
            unit="segments",
        ),
    ] = 1
    row_kind: Annotated[
        str,
        Rule("must be scores or sketch", ROW_KINDS.__contains__, ROW_KINDS),
        Meaning(
            "The kind of rows: scores, the gradients of segments, or a random sketch of G, which is drawn "
            "again in every step (hfmpi.optim.rows)."
        ),
    ] = "scores"
    row_damping: Annotated[
        float,
        POSITIVE,
        Meaning(
            "The smallest gamma: the damping of the directions from rows.",
            unit="the risk per squared length of theta",
        ),
    ] = 1e-4
    row_dampings: Annotated[int, at_least(1), Meaning("Number of values of gamma for rows.")] = 3
    row_ratio: Annotated[float, POSITIVE, Meaning("Ratio of each gamma for rows to the previous one.")] = 10.0
    row_steps: Annotated[
        int,
        at_least(1),
        Meaning("Maximum number of CG iterations on the rows.", unit="iterations"),
    ] = 100
    row_iterates: Annotated[
        int,
        NOT_NEGATIVE,
        Meaning(
            "Number of earlier CG iterates, for the smallest gamma of the rows, that are also used as "
            "directions. Their iteration numbers have equal ratios: two iterates are those after 5 and 22 "
            "iterations if row_steps is 100.",
            unit="iterates",
        ),
    ] = 0
    curvature_segments: Annotated[
        int,
        NOT_NEGATIVE,
        Meaning(
            "V G V' is estimated from a random sketch of G that has one row for each of this number of "
            "segments of each example in the curvature batch. V G V' is instead computed from J V, which "
            "cannot start before V is known, if this is 0, if the batch has at most 128 examples, or if "
            "there are fewer than six rows per direction.",
            unit="segments",
        ),
    ] = 0
    square_decay: Annotated[
        float,
        within("[0, 1)"),
        Meaning("Decay of the running mean of squared gradients, per step, for the direction rms."),
    ] = 0.9
    refresh: Annotated[
        int,
        at_least(1),
        Meaning("Number of steps after which K-FAC's factors are decomposed again.", unit="steps"),
    ] = 1
    damping: Annotated[
        float,
        NOT_NEGATIVE,
        Meaning(
            "Initial value of lambda.",
            unit="the risk per squared length of theta",
            others=("lambda", "lambda_"),
        ),
    ] = 1e-3
    damping_minimum: Annotated[
        float, NOT_NEGATIVE, Meaning("Lower bound of lambda.", unit="the risk per squared length of theta")
    ] = 1e-12
    damping_maximum: Annotated[
        float, POSITIVE, Meaning("Upper bound of lambda.", unit="the risk per squared length of theta")
    ] = 1e10
    weight_decay: Annotated[
        float,
        NOT_NEGATIVE,
        Meaning(
            "weight_decay / 2 * theta' theta is added to the model and to all risks that decisions are based "
            "on, but not to the risk in the history.",
            unit="the risk per squared length of theta",
            torch="weight_decay",
            optax="weight_decay",
            others=("decay", "l2", "regularisation"),
        ),
    ] = 0.0
    candidates: Annotated[
        int,
        NOT_NEGATIVE,
        Meaning(
            "Number of values of lambda, with ratio 4, that are tried on the gradient batch in one pass; the "
            "best one is used. 0: the risk after a step comes with the next gradient if that is on the same "
            "batch; otherwise 0 has the effect of 1."
        ),
    ] = 0

    def __post_init__(self) -> None:
        check(self)
        if not self.damping_minimum <= self.damping_maximum:
            raise UserError(
                f"damping_minimum, {self.damping_minimum:g}, must not exceed damping_maximum, "
                f"{self.damping_maximum:g}"
            )

    def init(self, theta: Vector, blocks: Sequence[Block] = ()) -> SubspaceState:
        """Return the state before the first step.

        Raises
        ------
        UserError
            If there are no blocks.
        """
        check_vector("theta", theta)
        check_blocks("subspace", blocks)
        kfac, rms = self._uses("kfac"), self._uses("rms")
        sizes = (
            (kfac and self.factor_decay > 0) * kronecker_layout(blocks).size,
            (kfac and self.refresh > 1) * decomposition_layout(blocks).size,
            rms * theta.size,
            max(1, self.memory) * theta.size,
        )
        vectors = (np.zeros_like(theta, shape=size) for size in sizes)
        return SubspaceState(0, self.damping, 0.0, 0.0, 0.0, *vectors)

    @property
    def needs(self) -> Needs:
        """The capabilities that the step requires with these settings."""
        sketch, kfac, rows = self.curvature_segments > 0, self._uses("kfac"), self._uses("rows")
        return Needs(blocks=True, kronecker_factors=kfac, rows=rows, sketch=sketch)

    def sketch_segments(self, examples: int) -> int:
        """Return the number of segments in the sketch of a curvature batch of this size; 0: J V is used."""
        return 0 if 0 < examples <= FEW_EXAMPLES else self.curvature_segments

    @property
    def seeks_lowest_risk(self) -> bool:
        """Whether a lower risk is always better; False with weight decay."""
        return not self.weight_decay

    def messages(self, parameters: int, blocks: Sequence[Block]) -> Messages:
        """Return the sizes of the messages: sums of the factors, results of K-FAC, and inner products."""
        kfac, rows = self._uses("kfac"), self._uses("rows")
        count = self.memory + kfac * self.kfac_dampings + rows * (self.row_dampings + self.row_iterates)
        count += self._uses("gradient") + self._uses("rms") + 1  # and the gradient
        products = count**2 * len(pieces(self._parts(parameters, blocks), count, parameters))
        if not kfac:
            return Messages(inner_products=products)
        decomposition = (self.refresh > 1) * decomposition_layout(blocks).size // self.refresh
        results = decomposition + self.kfac_dampings * parameters
        return Messages(kronecker_layout(blocks).size + 1, results, products)

    def on_other_batches(self, state: Mapping[str, EntryT]) -> dict[str, EntryT | float]:
        """Return the state without a step to judge, because its risk belongs to a different batch."""
        return {**state, "loss": 0.0, "descent": 0.0, "curvature": 0.0}

    def step(
        self, theta: Vector, state: SubspaceState, objectives: Objectives
    ) -> tuple[Vector, SubspaceState, StepReport]:
        """Take one step, or undo part of the last one if the risk rose."""
        objectives = checked(theta, objectives)
        check_state(state, SubspaceState, theta)
        objective, kind = objectives.gradient, theta.dtype.type
        candidates = self.candidates or int(not objectives.repeated)
        factors = rows = None
        if self._uses("rows"):
            request = RowRequest(self.row_kind, self.segments, state.updates, factors=self._uses("kfac"))
            rows = objective.rows(theta, request)
            at, factors = Gradient(rows.loss, rows.gradient), rows.factors
            if request.factors and factors is None:
                raise UserError("the objective's rows have no Kronecker factors: set RowMatrix.factors")
        elif self._uses("kfac"):
            at, factors = objective.factored_gradient(theta)
        else:
            at = objective.gradient(theta)
        plain, g = at.loss, at.vector
        if self.weight_decay:
            g = g + kind(self.weight_decay) * theta
        plain, loss, square = objective.agree((plain, plain + self._penalty(theta), inner_product(g, g)))
        norm, rho, before = math.sqrt(square), None, state
        passes = Counts(gradients=1, adjoints=rows.cotangents if rows else 0)
        report = StepReport(plain, False, "", passes, _details(norm, state.damping))
        last = Step(theta, state.descent, state.curvature)
        judged = not candidates and last.promise > rounding(state.loss, theta)
        if judged:
            rho = (state.loss - loss) / last.promise
            report = replace(report, details=_details(norm, state.damping, rho))
            if not rho > 0:
                if small(last.promise, state.loss, theta):
                    least, work = _noise(theta, objectives, state.loss)
                    report = replace(report, work=report.work + work)
                    if max(last.promise, loss - state.loss) <= least:
                        report = replace(report, accepted=True, message=UNRESOLVED, converged=True)
                        return theta, before, report
                return self._back(theta, state, loss, report)
            state = replace(state, damping=self._damped(state.damping, rho))
        if not math.isfinite(loss) or not math.isfinite(norm):
            return theta, state, replace(report, message="the risk or its gradient is not finite")
        if norm == 0:
            return (
                theta,
                state,
                replace(report, accepted=True, message="the gradient is zero", converged=True),
            )
        algebra = Counts()
        if self._uses("kfac"):
            refreshes, kept = self._refreshes(state), self.refresh > 1
            algebra = preconditioning(objective.blocks, self.kfac_dampings, refreshes, kept)
        state, directions = self._directions(state, objective, g, factors)
        if self._uses("kfac"):  # the message that g is part of has the factors, which are larger than theta
            g = g * 1
            del factors, at
        if rows is not None:
            further, work = self._row_directions(objective, rows, g)
            directions, algebra = [*(x[None] for x in further), *directions], algebra + work
            del rows, further  # their memory is large
        model, work = self._model(theta, state, objectives, g, directions)
        del g, directions
        report = replace(report, work=passes + work + algebra, details=_details(norm, state.damping, rho))
        if model is None:
            return theta, before, replace(report, message="a direction is not finite")
        state, count = replace(state, loss=loss), max(1, candidates)
        dampings = [state.damping * 4.0 ** (i - (count - 1) // 2) for i in range(count)]
        steps = [model.step(damping) for damping in dampings]
        report = replace(report, work=report.work + together([model.work] * count))
        if all(0 <= step.promise <= rounding(loss, theta) for step in steps):
            return theta, before, replace(report, accepted=True, message=UNRESOLVED, converged=True)
        step: Step | None = steps[0]
        if not judged or not steps[0].promise > 0:
            if candidates:
                step, state, report = self._best(theta, state, objective, dampings, steps, report)
            else:
                step, state, report = self._checked(theta, state, objective, model, steps[0], report)
        if step is not None:
            del model, steps  # the directions
            return self._taken(theta, state, objective, step, report)
        promise = max(step.promise for step in steps)
        if small(promise, loss, theta):
            least, work = _noise(theta, objectives, loss)
            report = replace(report, work=report.work + work)
            if promise <= least:
                return theta, before, replace(report, accepted=True, message=UNRESOLVED, converged=True)
        return theta, state, report

    def _best(
        self,
        theta: Vector,
        state: SubspaceState,
        objective: Objective,
        dampings: list[float],
        steps: list[Step],
        report: StepReport,
    ) -> tuple[Step | None, SubspaceState, StepReport]:
        """Return the step of the damping that has the lowest risk; None if no step lowers the risk."""
        ends = [theta + step.p for step in steps]
        losses = [risk + self._penalty(end) for risk, end in zip(objective.losses(ends), ends, strict=True)]
        losses = list(objective.agree(tuple(losses)))
        work = replace(report.work, losses=1, candidates=len(steps) - 1)
        best = min(range(len(losses)), key=lambda i: losses[i] if math.isfinite(losses[i]) else math.inf)
        promise = steps[best].promise
        rho = (state.loss - losses[best]) / promise if promise > 0 else math.nan
        lower = losses[best] < state.loss
        damping = self._damped(dampings[best], rho) if lower else min(4 * max(dampings), self.damping_maximum)
        state = replace(state, damping=damping)
        details = {**report.details, "damping": damping, "rho": rho if math.isfinite(rho) else None}
        report = replace(report, work=work, details=details)
        if not lower:
            return None, state, replace(report, message="step rejected: no candidate lowers the risk")
        return steps[best], state, report

    def _checked(
        self,
        theta: Vector,
        state: SubspaceState,
        objective: Objective,
        model: ReducedModel,
        step: Step,
        report: StepReport,
    ) -> tuple[Step | None, SubspaceState, StepReport]:
        """Return this step, or the first part of it that lowers the risk, or None; each costs a loss.

        Shortening the step works better than raising lambda, which would be far too large for the following
        steps. Lambda is raised, by factors of 4, only if the model does not predict a decrease.
        """
        losses = 0
        for _ in range(MOST_CHECKED):
            if step.promise > 0:
                end = theta + step.p
                (loss,) = objective.agree((objective.loss(end) + self._penalty(end),))
                losses += 1
                report = replace(report, work=replace(report.work, losses=losses))
                if loss < state.loss:
                    return step, state, report
                step = step.shortened(_part(loss - state.loss, step.descent))
            elif state.damping == self.damping_maximum:
                break
            else:  # rounding errors dominate the model
                damping = min(max(4 * state.damping, self.damping_minimum), self.damping_maximum)
                state = replace(state, damping=damping)
                report = replace(report, details={**report.details, "damping": damping})
                step = model.step(damping)
                report = replace(report, work=report.work + model.work)
            if 0 <= step.promise <= rounding(state.loss, theta):
                break
        return None, state, replace(report, message="step rejected: no part of it lowers the risk")

    def _parts(self, parameters: int, blocks: Sequence[Block]) -> list[Part]:
        return parts_of(blocks) if self.cut else [whole(parameters)]

    def _uses(self, kind: str) -> bool:
        return kind in self.directions.split("+")

    def _penalty(self, theta: Vector) -> float:
        return self.weight_decay / 2 * inner_product(theta, theta) if self.weight_decay else 0.0

    def _directions(
        self, state: SubspaceState, objective: Objective, g: Vector, factors: Vector
    ) -> tuple[SubspaceState, list[Vector]]:
        """Compute the directions, in arrays (n, D), and the state with updated running means."""
        kind = g.dtype.type
        first = 1 - 1 / (state.updates + 1)
        directions = [g[None]] if self._uses("gradient") else []
        if self._uses("rms"):
            keep = min(first, self.square_decay)
            mean_square = kind(keep) * state.mean_square + kind(1 - keep) * g * g
            state = replace(state, mean_square=mean_square)
            directions.append((g / (np.sqrt(mean_square) + kind(1e-8)))[None])
        if self._uses("kfac"):
            if self.factor_decay:
                keep = min(first, self.factor_decay)
                factors = kind(keep) * state.factors + kind(1 - keep) * factors
                state = replace(state, factors=factors)
            gammas = [self.kfac_damping * self.kfac_ratio**i for i in range(self.kfac_dampings)]
            more, decomposition = preconditioned_gradients(
                objective, g, factors, state.decomposition, gammas, self._refreshes(state)
            )
            state = replace(state, decomposition=decomposition)
            directions.append(more)
        last = state.steps.reshape(-1, g.size)[: self.memory]
        return state, [*directions, last] if len(last) else directions

    def _row_directions(
        self, objective: Objective, rows: RowMatrix, g: Vector
    ) -> tuple[list[Vector], Counts]:
        """Compute (S'S / N + gamma)^-1 g for each gamma of the rows; return the work too."""
        scale = g.dtype.type(1 / rows.scored)
        ratio = self.row_steps ** (1 / (self.row_iterates + 1))
        found, iterations = shifted_solutions(
            lambda v: scale * rows.product(v),
            g,
            [self.row_damping * self.row_ratio**i for i in range(self.row_dampings)],
            ROW_TOLERANCE,
            self.row_steps,
            {round(ratio**i) for i in range(1, self.row_iterates + 1)},
            objective.agree,
        )
        one = product(rows.count, g.size)
        return found, repeated(one + one, iterations) + Counts(row_products=iterations)

    def _refreshes(self, state: SubspaceState) -> bool:
        """Return whether this step decomposes the factors."""
        return state.updates % self.refresh == 0

    def _model(
        self, theta: Vector, state: SubspaceState, objectives: Objectives, g: Vector, directions: list[Vector]
    ) -> tuple[ReducedModel | None, Counts]:
        """Compute the model in the space of the directions (None if one is not finite), and the work."""
        objective = objectives.gradient
        parts = self._parts(g.size, objective.blocks)
        found = normalised(objective, directions, parts, g)
        work = gram(1 + sum(map(len, directions)), g.size)
        if found is None:
            return None, work
        basis, inner, slopes = found
        m, count = None, len(basis)
        segments = self.sketch_segments(objectives.second.size)
        if segments:
            request = RowRequest("sketch", segments, SEEDS + state.updates)
            sketch = objectives.second.sketch(theta, basis, request)
            work += Counts(sketches=sketch.cotangents) + basis.along_work(sketch.rows)
            m = sketch.projected if sketch.rows >= LEAST_ROWS * count else None
        if m is None:
            m = objectives.second.project(theta)(basis)
            work += Counts(projections=1)
        model = ReducedModel(objective, basis, m + self.weight_decay * inner, inner, slopes)
        linearisations = int(not objectives.shared)
        return model, work + Counts(linearisations=linearisations, directions=count - 1)

    def _damped(self, damping: float, rho: float) -> float:
        """Return lambda for the step after one with this reduction ratio."""
        if abs(rho - 1) < 0.1:
            damping *= 0.25
        elif rho > 0.75:
            damping *= 0.5
        elif rho < 0.25:
            damping *= 2.25
        elif rho < 0.5:
            damping *= 1.22
        return min(max(damping, self.damping_minimum), self.damping_maximum)

    def _taken(
        self, theta: Vector, state: SubspaceState, objective: Objective, step: Step, report: StepReport
    ) -> tuple[Vector, SubspaceState, StepReport]:
        """Return the result of taking this step, or of rejecting it if it is not finite."""
        (square,) = objective.agree((inner_product(step.p, step.p),))
        if not math.isfinite(square):
            return theta, state, replace(report, message="the step is not finite")
        report = replace(report, accepted=True, details={**report.details, "step_norm": math.sqrt(square)})
        size, steps = theta.size, np.empty_like(state.steps)
        steps[size:], steps[:size] = state.steps[:-size], step.p
        state = replace(
            state, updates=state.updates + 1, steps=steps, descent=step.descent, curvature=step.curvature
        )
        return theta + step.p, state, report

    def _back(
        self, theta: Vector, state: SubspaceState, loss: float, report: StepReport
    ) -> tuple[Vector, SubspaceState, StepReport]:
        """Shorten the last step to the minimum of the parabola through both risks, 0.1 to 0.5 of the step."""
        part = _part(loss - state.loss, state.descent)
        size, steps, kind = theta.size, state.steps * 1, theta.dtype.type
        p = kind(part) * steps[:size]
        theta, steps[:size] = theta - (steps[:size] - p), p
        descent, curvature = part * state.descent, part * part * state.curvature
        damping = min(4 * state.damping, self.damping_maximum)
        state = replace(state, damping=damping, descent=descent, curvature=curvature, steps=steps)
        message = f"the risk rose: the last step was shortened to {part:.2g} of its length"
        return theta, state, replace(report, message=message, details={**report.details, "damping": damping})


def _part(rise: float, descent: float) -> float:
    """Return the fraction of a step that remains if it raised the risk by `rise`; `descent` is -g'p."""
    if not math.isfinite(rise):
        return LEAST
    bend = rise + descent
    return min(max(descent / (2 * bend), LEAST), MOST) if bend > 0 else MOST


def _noise(theta: Vector, objectives: Objectives, loss: float) -> tuple[float, Counts]:
    """Estimate the rounding of the risk at theta, the same number on all ranks; return the passes too."""
    projected = objectives.second.project(theta)(theta[None])
    (curvature,) = objectives.gradient.agree((float(projected[0, 0]),))
    work = Counts(linearisations=int(not objectives.shared), projections=1)
    return noise(loss, theta, curvature), work


def _details(norm: float, damping: float, rho: float | None = None) -> dict[str, float | int | str | None]:
    return {
        "gradient_norm": norm if math.isfinite(norm) else None,
        "step_norm": 0.0,
        "damping": damping,
        "rho": None if rho is None or not math.isfinite(rho) else rho,
    }
