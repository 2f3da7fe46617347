"""Levenberg-Marquardt: the damped Gauss-Newton step, solved exactly.

The step minimises g'p + p'G p / 2 + lambda p'p / 2; `hfmpi.optim.exact_model` computes it from rows.

The method is that of Levenberg (1944) and Marquardt (1963) for least squares, and of Schraudolph (2002) for
other losses. For networks that solve differential equations it is called ENGD (Mueller and Zeinhofer 2023),
with fewer rows than parameters ENGD with Woodbury's identity (Guzman-Cordero et al. 2025), and for wave
functions minSR (Chen and Heyl 2024).

Within a step lambda is multiplied by `RISE`, and by more after several trials, until the risk decreases.
After a step that lowers the risk lambda is multiplied by `FALL`, even if the model was poor (delayed
gratification, Transtrum and Sethna 2012), or by `SLOW_FALL` if lambda rose within the step, so that it does
not rise again in every step. Nielsen's rule (1999), which uses the reduction ratio, results in a larger
lambda on networks that solve differential equations and needs about twice as many steps. If the model is
good, lambda is multiplied by the model's relative error, abs(1 - rho), for quadratic convergence.

If the objective provides `bends`, each step p is corrected for the curvature of the outputs to p + a / 2
(geodesic acceleration, ibid.), unless a is longer than p. In a curved valley such steps are much longer: on
Allen-Cahn's equation the error after 100 steps is at most a tenth of the error without the correction.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated

from hfmpi.measure.cost import Counts
from hfmpi.optim.base import Messages, Needs, Objectives, Optimizer, StepReport, inner_product
from hfmpi.optim.checks import check_state, check_vector, checked
from hfmpi.optim.damping import UNRESOLVED, noise, rounding
from hfmpi.optim.exact_model import DampedStep, exact_model
from hfmpi.optim.layout import Block, Vector
from hfmpi.optim.rows import RowRequest, check_side
from hfmpi.settings import POSITIVE, Meaning, at_least, check, documented, within

__all__ = ["LM", "LMState"]

RISE, FALL, SLOW_FALL, LEAST_FALL = 3.0, 0.1, 0.3, 1e-3
"""Factors of lambda. The exponent of `RISE` increases by one after every `PATIENCE` trials.

`LEAST_FALL` is the smallest factor for a good model.
"""

PATIENCE, MOST_RISEN, AT_ONCE = 4, 42, 3
"""Numbers of trials: until lambda rises faster, until the step gives up, and in one group of trials."""


@dataclass(frozen=True)
class LMState:
    """The state after a step.

    Attributes
    ----------
    damping : float
        lambda; 0 before the first step.
    direction : (D,) or (0,)
        The last step; empty without momentum.
    """

    damping: float
    direction: Vector


@documented
@dataclass(frozen=True)
class LM(Optimizer[LMState]):
    """Settings of the Levenberg-Marquardt step.

    Examples
    --------
    >>> optimizer = hfmpi.LM()  # doctest: +SKIP
    >>> state = optimizer.init(theta)  # doctest: +SKIP
    >>> theta, state, report = optimizer.step(theta, state, hfmpi.Objectives(objective))  # doctest: +SKIP
    """

    damping: Annotated[
        float,
        POSITIVE,
        Meaning(
            "Initial value of lambda. If the batch changes from step to step, it is also the lower bound of "
            "lambda: a step can fit the current batch better than the others, so that the reduction ratio on "
            "this batch does not show that lambda is too small.",
            unit="the mean eigenvalue of G at the start",
            others=("lambda", "lambda_"),
        ),
    ] = 1e-3
    momentum: Annotated[
        float,
        within("[0, 1)"),
        Meaning(
            "mu of SPRING (Goldshlager et al. 2024): the damping pulls the step towards mu times the last "
            "step instead of zero. 0: off. On networks that solve Poisson's equation, 0.5 needs 0.5 to 2.2 "
            "times as many steps as 0, depending on the seed, and 0.9 needs more."
        ),
    ] = 0.0
    largest_side: Annotated[
        int,
        at_least(1),
        Meaning(
            "Maximum side of the matrix, min(M, D). On every rank the matrix and its factor take 16 bytes "
            "per entry, and a factorization takes side^3 / 3 multiplications.",
            unit="rows",
        ),
    ] = 10_000

    def __post_init__(self) -> None:
        check(self)

    def init(self, theta: Vector, blocks: Sequence[Block] = ()) -> LMState:
        """Return the state before the first step."""
        check_vector("theta", theta)
        return LMState(0.0, theta * 0 if self.momentum else theta[:0])

    @property
    def needs(self) -> Needs:
        """LM needs rows of residuals."""
        return Needs(rows=True)

    def messages(self, parameters: int, blocks: Sequence[Block]) -> Messages:
        """Return `others`: the ranks exchange rows, and a matrix of M^2 or D^2 numbers."""
        return Messages(others=True)

    def step(
        self, theta: Vector, state: LMState, objectives: Objectives
    ) -> tuple[Vector, LMState, StepReport]:
        """Take the step of the smallest tested lambda that lowers the risk.

        Raises
        ------
        UserError
            If the matrix would be too large.
        """
        objective = checked(theta, objectives).gradient
        check_state(state, LMState, theta, *("direction",) * (self.momentum > 0))
        rows = objective.rows(theta, RowRequest("residuals", stored=False, largest_side=self.largest_side))
        check_side(rows.count, theta.size, self.largest_side)  # custom objectives may not check it
        g = rows.gradient
        loss, square = objective.agree((float(rows.loss), inner_product(g, g)))
        norm, passes = math.sqrt(square), Counts(gradients=1, adjoints=rows.cotangents - 1)
        report = StepReport(loss, False, "", passes, _details(norm, state.damping))
        if not (math.isfinite(loss) and math.isfinite(norm)):
            what = "gradient" if math.isfinite(loss) else "risk"
            return theta, state, replace(report, message=f"the {what} is not finite")
        if norm == 0:
            return _at_its_end(theta, state, report, "the gradient is zero: nothing to do")
        model = exact_model(objective, rows, self.momentum, state.direction)
        if not math.isfinite(model.trace):
            return theta, state, replace(report, message="the rows of residuals are not finite")
        first = self.damping * model.trace / theta.size
        damping, floor = state.damping or first or 1.0, model.least_damping
        if not objectives.repeated:
            floor = max(floor, first)
        bends = objective.bends(theta)
        least, tried = rounding(loss, theta), False
        start = max(damping, floor)
        for number, group in enumerate(_rising(start, model.at_once)):
            damping, pulled, ended = group[-1], self.momentum > 0 and number == 0, False
            model.count(len(group), pulled, bends is not None)
            last = math.inf
            report = replace(report, work=passes + model.work)
            for some in _cut(group, objective.ranks):
                trials = list[tuple[float, DampedStep]]()
                for each, step in zip(some, model.steps(some, pulled), strict=True):
                    if step is not None and 0 <= step.promise <= least:
                        ended = True
                        break
                    if step is not None and step.promise > 0:
                        trials.append((each, step))
                if trials and last == math.inf:  # count the full group: counts must not depend on the ranks
                    bent = 0 if bends is None else len(group)
                    passes += Counts(losses=1, candidates=len(group) - 1, bends=bent)
                    report = replace(report, work=passes + model.work)
                for each, step in trials:
                    tried, last = True, step.promise
                    trial = step if bends is None else model.bent(step, each, bends(step.p))
                    (risk,) = objective.agree((objective.loss(theta + trial.p),))
                    if risk < loss:
                        return self._taken(theta, trial, each, loss - risk, report, each > start)
                if ended:
                    break
            if last < math.inf:
                (curvature,) = objective.agree((model.curvature(theta),))
                if last <= noise(loss, theta, curvature):
                    return _at_its_end(theta, state, report, UNRESOLVED)
            if ended:
                if not tried:
                    return _at_its_end(theta, state, report, UNRESOLVED)
                break
        details = {**report.details, "damping": damping}
        report = replace(report, message="step rejected: no damping lowers the risk", details=details)
        return theta, replace(state, damping=damping), report

    def _taken(
        self,
        theta: Vector,
        trial: DampedStep,
        damping: float,
        decrease: float,
        report: StepReport,
        risen: bool,
    ) -> tuple[Vector, LMState, StepReport]:
        """Return the result of a step that lowers the risk."""
        rho = decrease / trial.promise
        details = {**report.details, "damping": damping, "rho": rho, "step_norm": trial.norm}
        good, fall = max(LEAST_FALL, abs(1 - rho)), FALL
        if risen:  # the previous decrease of lambda was too large
            good, fall = good if rho > 0.9 else 1.0, SLOW_FALL
        later = LMState(damping * min(fall, good), trial.p if self.momentum else theta[:0])
        return theta + trial.p, later, replace(report, accepted=True, details=details)


def _rising(damping: float, at_once: bool) -> list[list[float]]:
    """Return the increasing lambdas of a step, starting with `damping`, in groups of trials."""
    dampings, most = [damping], AT_ONCE if at_once else 1
    for risen in range(MOST_RISEN - 1):
        dampings.append(dampings[-1] * RISE ** (1 + risen // PATIENCE))
    return [dampings[start : start + most] for start in range(0, MOST_RISEN, most)]


def _cut(group: list[float], ranks: int) -> list[list[float]]:
    """Divide the lambdas of a group into parts of which each rank computes one."""
    return [group[start : start + ranks] for start in range(0, len(group), ranks)]


def _at_its_end(
    theta: Vector, state: LMState, report: StepReport, message: str
) -> tuple[Vector, LMState, StepReport]:
    """Return the result of a step that cannot lower the risk any further."""
    return theta, state, replace(report, accepted=True, message=message, converged=True)


def _details(norm: float, damping: float) -> dict[str, float | int | str | None]:
    """Return the history's scalars for a step that has not moved theta, in the order of the history."""
    return {
        "damping": damping,
        "rho": None,
        "gradient_norm": norm if math.isfinite(norm) else None,
        "step_norm": 0.0,
    }
