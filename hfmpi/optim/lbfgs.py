"""L-BFGS: a quasi-Newton method that needs only gradients, on the same batch in every step.

The direction is -H g, where H approximates the inverse of the curvature from pairs of a step s and the change
of the gradient y (Nocedal 1980; Nocedal and Wright 2006, algorithms 7.4 and 7.5). A line search for the
strong Wolfe conditions (`hfmpi.optim.wolfe`) chooses the rate.

A pair compares gradients at different theta, so that both must belong to the same risk: if the batch changed
from step to step, the pairs would contain the noise of the batches.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated

import numpy as np

from hfmpi.errors import UserError
from hfmpi.measure.cost import Counts
from hfmpi.optim.base import (
    EntryT,
    Gradient,
    Needs,
    Objective,
    Objectives,
    Optimizer,
    Scalars,
    StepReport,
    inner_product,
)
from hfmpi.optim.checks import check_state, check_vector, checked
from hfmpi.optim.damping import rounding
from hfmpi.optim.layout import Block, Vector
from hfmpi.optim.wolfe import Evaluate, MoreThuente, Trial
from hfmpi.settings import Meaning, at_least, check, documented, within

__all__ = ["LBFGS", "LBFGSState", "two_loop"]

UNRESOLVED = "no step along the gradient lowers the risk by more than its rounding: theta is at an optimum"
"""The message of a step that is not taken because of `rounding`."""

SEEN = 100.0
"""Without pairs, the decrease predicted for the first rate is at least this multiple of the risk's rounding.

A smaller decrease would be hidden by rounding errors.
"""


@dataclass(frozen=True)
class LBFGSState:
    """The state after a step; it is valid only with the theta that the same step returned.

    Attributes
    ----------
    pairs : int
        Number of pairs.
    known : int
        1 if `loss` and `gradient` are those at theta on the batch of the next step; otherwise 0.
    loss : float
    gradient : (D,)
    s, y : (memory * D,)
        The steps and the changes of the gradient, latest first.
    """

    pairs: int
    known: int
    loss: float
    gradient: Vector
    s: Vector
    y: Vector


@documented
@dataclass(frozen=True)
class LBFGS(Optimizer[LBFGSState]):
    """Settings of L-BFGS; a step is one iteration including all gradients of its line search.

    Examples
    --------
    >>> optimizer = hfmpi.LBFGS(memory=20)  # doctest: +SKIP
    >>> result = hfmpi.train(model, data, optimizer=optimizer, max_steps=100)  # doctest: +SKIP
    """

    memory: Annotated[
        int,
        at_least(1),
        Meaning(
            "Number of stored pairs of a step and the change of the gradient; a pair takes 2 D numbers.",
            unit="pairs",
            torch="history_size",
            optax="memory_size",
        ),
    ] = 50
    line_search_sufficient: Annotated[
        float,
        within("(0, 1)"),
        Meaning(
            "Constant of the first Wolfe condition, sufficient decrease.", optax="slope_rtol", others=("c1",)
        ),
    ] = MoreThuente.sufficient
    line_search_curvature: Annotated[
        float,
        within("(0, 1)"),
        Meaning(
            "Constant of the second Wolfe condition, curvature, in its strong form; it must be larger than "
            "line_search_sufficient.",
            optax="curv_rtol",
            others=("c2",),
        ),
    ] = MoreThuente.curvature
    line_search_tries: Annotated[
        int,
        at_least(1),
        Meaning(
            "Maximum number of gradients in a line search.",
            unit="gradients",
            torch="max_eval",
            optax="max_linesearch_steps",
        ),
    ] = MoreThuente.tries

    def __post_init__(self) -> None:
        check(self)
        if not self.line_search_sufficient < self.line_search_curvature:
            raise UserError(
                f"line_search_sufficient, {self.line_search_sufficient:g}, must be smaller than "
                f"line_search_curvature, {self.line_search_curvature:g}"
            )

    def init(self, theta: Vector, blocks: Sequence[Block] = ()) -> LBFGSState:
        """Return the state before the first step."""
        check_vector("theta", theta)
        s, y = (np.zeros_like(theta, shape=self.memory * theta.size) for _ in range(2))
        return LBFGSState(0, 0, 0.0, theta * 0, s, y)

    @property
    def needs(self) -> Needs:
        """L-BFGS needs the same batch in every step."""
        return Needs(same_batch=True)

    def on_other_batches(self, state: Mapping[str, EntryT]) -> dict[str, EntryT | float]:
        """Return the state without pairs and gradient, because they belong to a different risk."""
        return {**state, "pairs": 0, "known": 0}

    def step(
        self, theta: Vector, state: LBFGSState, objectives: Objectives
    ) -> tuple[Vector, LBFGSState, StepReport]:
        """Take one step by a line search along -H g, or along -g if that does not lower the risk."""
        objectives = checked(theta, objectives)
        self._check(state, theta)
        objective, count = objectives.gradient, int(not state.known)
        at = Gradient(state.loss, state.gradient) if state.known else objective.gradient(theta)
        g = at.vector
        loss, square = objective.agree((at.loss, inner_product(g, g)))
        norm = math.sqrt(square)

        def report(accepted: bool, message: str = "", **more: float | int | str | None) -> StepReport:
            return StepReport(loss, accepted, message, Counts(gradients=count), _details(norm) | more)

        if not (math.isfinite(loss) and math.isfinite(norm)):
            return theta, state, report(False, "the risk or its gradient is not finite")
        if norm == 0:
            return theta, state, replace(report(True, "the gradient is zero: nothing to do"), converged=True)

        cliff = False
        for pairs in (state.pairs, 0) if state.pairs else (0,):
            p = _direction(objective, g, *(v.reshape(-1, g.size)[:pairs] for v in (state.s, state.y)))
            (slope,) = objective.agree((inner_product(g, p),))
            # The model with inverse curvature H predicts a decrease of -slope / 2. Without pairs H is
            # unknown.
            if not -math.inf < slope < 0 or (pairs and -slope / 2 <= rounding(loss, theta)):
                continue
            first = 1.0 if pairs else _first(square, rounding(loss, theta), theta)
            search = self.line_search.search(_along(objective, theta, p), Trial(0.0, loss, slope), first)
            count += search.evaluations
            best = search.best
            # At a cliff the risk is finite only for trials that are too short to change theta.
            moved = search.finite is not None and bool((search.finite.theta != theta).any())
            cliff = not moved and math.isfinite(search.wall)
            if loss - best.loss > rounding(loss, theta) or (pairs and search.satisfied):
                break
        else:
            if cliff:
                return theta, state, report(False, "step rejected: the risk along the gradient is not finite")
            return theta, state, replace(report(True, UNRESOLVED), converged=True)
        after, gradient = best.theta, best.gradient
        later, length = self._later(objective, replace(state, pairs=pairs), after - theta, gradient - g)
        later = replace(later, known=int(objectives.repeated), loss=best.loss, gradient=gradient)
        return after, later, report(True, step_norm=length, line_search_rate=best.rate, pairs=pairs)

    @property
    def line_search(self) -> MoreThuente:
        """The settings of the line search."""
        return MoreThuente(self.line_search_sufficient, self.line_search_curvature, self.line_search_tries)

    def _check(self, state: LBFGSState, theta: Vector) -> None:
        check_state(state, LBFGSState, theta, "gradient")
        if state.s.shape != (self.memory * theta.size,) or state.y.shape != state.s.shape:
            raise ValueError(
                f"the state does not fit memory={self.memory} and {theta.size:,} parameters: call "
                "init(theta) again"
            )

    def _later(
        self, objective: Objective, state: LBFGSState, s: Vector, y: Vector
    ) -> tuple[LBFGSState, float]:
        """Return the state with a new pair, unless its curvature is not positive, and the length of s."""
        scalars = inner_product(s, y), inner_product(s, s), inner_product(y, y)
        curvature, *squares = objective.agree(scalars)
        length, change = map(math.sqrt, squares)
        # A smaller curvature consists of rounding errors, and H must remain positive definite.
        if not float(np.finfo(s.dtype).eps) * length * change < curvature < math.inf:
            return state, length
        all_s, all_y = (np.concatenate([new, old[: -new.size]]) for new, old in ((s, state.s), (y, state.y)))
        return replace(state, pairs=min(state.pairs + 1, self.memory), s=all_s, y=all_y), length


def two_loop(g: Vector, s: Vector, y: Vector, known: Scalars = ()) -> tuple[Vector, Scalars]:
    """Compute -H g by the two-loop recursion (Nocedal and Wright 2006, algorithm 7.4).

    The initial H is s' y / y' y of the latest pair times the identity (their equation 7.20).

    Parameters
    ----------
    g : (D,)
    s, y : (k, D)
        The pairs, latest first.
    known : tuple of float
        Coefficients to use; if empty, they are computed.

    Returns
    -------
    (D,), tuple of float
        The direction, and the coefficients: alpha of the first loop, the scale, alpha - beta of the second
        loop.
    """
    kind, count, given = g.dtype.type, len(s), list(known)
    curvatures = [] if given else np.einsum("ij,ij->i", s, y, dtype=np.float64).tolist()
    used, p = list[float](), -g
    for i in range(count):
        used.append(given[i] if given else _ratio(inner_product(s[i], p), curvatures[i]))
        p = p - kind(used[i]) * y[i]
    if count:
        used.append(given[count] if given else _ratio(curvatures[0], inner_product(y[0], y[0])))
        p = kind(used[count]) * p
    for i in reversed(range(count)):
        if given:
            used.append(given[len(used)])
        else:
            used.append(used[i] - _ratio(inner_product(y[i], p), curvatures[i]))
        p = p + kind(used[-1]) * s[i]
    return p, tuple(used)


def _direction(objective: Objective, g: Vector, s: Vector, y: Vector) -> Vector:
    """Compute -H g, identical on all ranks: a rank whose coefficients differ uses those of rank 0."""
    p, coefficients = two_loop(g, s, y)
    if not coefficients:
        return p
    agreed = objective.agree(coefficients)
    return p if agreed == coefficients else two_loop(g, s, y, agreed)[0]


def _along(objective: Objective, theta: Vector, p: Vector) -> Evaluate:
    """Return the function rate -> `Trial`: f, its slope, and theta + rate p with its gradient."""

    def evaluate(rate: float) -> Trial:
        end = theta + theta.dtype.type(rate) * p
        at = objective.gradient(end)
        loss, slope = objective.agree((at.loss, inner_product(at.vector, p)))
        return Trial(rate, loss, slope, end, at.vector)

    return evaluate


def _first(square: float, least: float, theta: Vector) -> float:
    """Return the first rate along -g without pairs; `square` is |g|^2, `least` the rounding of the risk."""
    longest = 1 / float(np.finfo(theta.dtype).eps)
    return max(min(1.0, 1 / math.sqrt(square)), min(SEEN * least / square, longest))


def _ratio(a: float, b: float) -> float:
    return a / b if b else math.nan


def _details(norm: float) -> dict[str, float | int | str | None]:
    return {
        "gradient_norm": norm if math.isfinite(norm) else None,
        "step_norm": 0.0,
        "line_search_rate": 0.0,
        "pairs": 0,
    }
