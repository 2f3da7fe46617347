"""The line search of More and Thuente for the strong Wolfe conditions.

    f(rate) <= f(0) + sufficient * rate * f'(0)         abs(f'(rate)) <= curvature * abs(f'(0))

f(rate) is the risk at theta + rate p. The algorithm maintains an interval that contains rates which meet the
conditions. It uses the auxiliary function f(rate) - f(0) - sufficient * rate * f'(0) until the value of that
function at a trial is not positive and the slope of f is not negative, and f itself afterwards. A safeguarded
cubic or quadratic interpolation chooses each trial (More and Thuente 1994, Line search algorithms with
guaranteed sufficient decrease, sections 2 to 4; MINPACK-2, dcsrch and dcstep). A trial where the risk is not
finite is a wall: all later trials are shorter.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from hfmpi.optim.layout import Vector

__all__ = ["Evaluate", "MoreThuente", "Trial", "WolfeSearch"]

SHRINK = 0.66
"""The interval must shrink to this fraction in two trials (More and Thuente, section 4; dcsrch, dcstep)."""

NEAREST, FARTHEST = 1.1, 4.0
"""Bounds of an extrapolation, relative to the last change of the rate (dcsrch: xtrapl, xtrapu)."""

BEFORE_WALL = 0.1
"""Fraction of the distance to a wall at which the next trial lies until one is finite; afterwards 0.5."""


class Trial(NamedTuple):
    """A trial: the rate, f and f' at that rate, theta + rate p, and the gradient at that theta."""

    rate: float
    loss: float
    slope: float
    theta: Vector = None
    gradient: Vector = None

    @property
    def finite(self) -> bool:
        """Whether f and f' are finite."""
        return math.isfinite(self.loss) and math.isfinite(self.slope)

    def tilted(self, slope: float) -> Trial:
        """Return the trial for the function f(rate) - slope * rate."""
        return Trial(self.rate, self.loss - slope * self.rate, self.slope - slope)


Evaluate = Callable[[float], Trial]
"""rate -> Trial, with the same numbers on all ranks."""


class WolfeSearch(NamedTuple):
    """The result of a search.

    Attributes
    ----------
    best : Trial
        The trial that meets the strong Wolfe conditions, if there is one; otherwise the trial with the lowest
        risk, or the start if no trial lowers the risk.
    satisfied : bool
        Whether `best` meets the conditions.
    evaluations : int
        The number of trials.
    finite : Trial or None
        The first trial with finite numbers.
    wall : float
        The smallest rate of a trial whose numbers are not finite, or infinity.
    """

    best: Trial
    satisfied: bool
    evaluations: int
    finite: Trial | None
    wall: float


@dataclass(frozen=True)
class MoreThuente:
    """Settings of the line search.

    Attributes
    ----------
    sufficient, curvature : float
        1e-4 and 0.9 for quasi-Newton directions (Nocedal and Wright 2006, section 3.1).
    tries : int
        Maximum number of trials; 20 in L-BFGS-B.
    narrow : float
        The search ends when the interval is shorter than this fraction of its upper end; xtol = 0.1 in
        L-BFGS-B.
    """

    sufficient: float = 1e-4
    curvature: float = 0.9
    tries: int = 20
    narrow: float = 0.1

    def search(self, evaluate: Evaluate, start: Trial, first: float) -> WolfeSearch:
        """Search for a rate that meets the strong Wolfe conditions.

        Parameters
        ----------
        evaluate : callable
            rate -> Trial.
        start : Trial
            The trial at rate 0, whose slope is negative.
        first : float
            The first rate to try.
        """
        least = self.sufficient * start.slope
        low = high = best = start  # low: the end of the interval where the function is lower
        bracketed, auxiliary, wall = False, True, math.inf
        width = before = math.inf
        rate, evaluations = first, 0
        finite: Trial | None = None
        while evaluations < self.tries and math.isfinite(rate):
            trial = evaluate(rate)
            evaluations += 1
            if not trial.finite:
                wall = rate
                rate = low.rate + (0.5 if low.rate else BEFORE_WALL) * (wall - low.rate)
                if not low.rate < rate < wall:
                    break
                continue
            finite = finite or trial
            if trial.loss < best.loss:
                best = trial
            enough = trial.loss <= start.loss + least * rate
            if enough and abs(trial.slope) <= -self.curvature * start.slope:
                return WolfeSearch(trial, True, evaluations, finite, wall)
            auxiliary = auxiliary and not (enough and trial.slope >= 0)
            # The auxiliary function is useful only if f itself decreases, but not sufficiently.
            tilt = least if auxiliary and trial.loss <= low.loss and not enough else 0.0
            low, high, bracketed, rate = _next(low, high, trial, bracketed, tilt)
            if bracketed:
                left, right = sorted((low.rate, high.rate))
                if right - left >= SHRINK * before or not math.isfinite(rate):
                    rate = (left + right) / 2
                before, width = width, right - left
                if not left < rate < right or right - left <= self.narrow * right:
                    break
            elif not rate < wall:
                rate = (low.rate + wall) / 2
                if not low.rate < rate < wall:
                    break
        return WolfeSearch(best, False, evaluations, finite, wall)


def _next(
    low: Trial, high: Trial, trial: Trial, bracketed: bool, tilt: float
) -> tuple[Trial, Trial, bool, float]:
    """Return the interval after a trial, whether it brackets a minimum, and the next rate (dcstep).

    The function f(rate) - tilt * rate is interpolated. Without a bracket the trial's rate is larger than that
    of `low`.
    """
    x, y, p = low.tilted(tilt), high.tilted(tilt), trial.tilted(tilt)
    if p.loss > x.loss:  # case 1: the value is higher, so that there is a minimum in between
        cubic, quadratic = _along(x, _cubic(x, p), p), _along(x, _parabola(x, p), p)
        near = abs(cubic - x.rate) < abs(quadratic - x.rate)
        return low, trial, True, cubic if near else (cubic + quadratic) / 2
    if p.slope * math.copysign(1.0, x.slope) < 0:  # case 2: the value is lower, and the slope changed sign
        cubic, secant = _along(p, _cubic(p, x), x), _along(p, _secant(p, x), x)
        far = abs(cubic - p.rate) > abs(secant - p.rate)
        return trial, low, True, cubic if far else secant
    move = p.rate - x.rate
    nearest = p.rate + NEAREST * move if x.rate else 0.0
    farthest = p.rate + FARTHEST * move
    if abs(p.slope) < abs(x.slope):  # case 3: the value is lower, and the slope is flatter
        ratio, secant = _cubic(p, x), _along(p, _secant(p, x), x)
        # The cubic may not have a minimum farther away than the trial.
        cubic = _along(p, ratio, x) if ratio < 0 else math.copysign(math.inf, move)
        if not bracketed:
            far = abs(cubic - p.rate) > abs(secant - p.rate)
            return trial, high, False, min(max(cubic if far else secant, nearest), farthest)
        rate = cubic if abs(cubic - p.rate) < abs(secant - p.rate) else secant
        limit = p.rate + SHRINK * (y.rate - p.rate)
        return trial, high, True, min(limit, rate) if move > 0 else max(limit, rate)
    # case 4: the value is lower, and the slope is not flatter
    return trial, high, bracketed, _along(p, _cubic(p, y), y) if bracketed else farthest


def _along(a: Trial, ratio: float, b: Trial) -> float:
    return a.rate + ratio * (b.rate - a.rate)


def _cubic(a: Trial, b: Trial) -> float:
    """Return the minimum of the cubic with the values and slopes of a and b (0: at a, 1: at b), or NaN."""
    theta = 3 * (a.loss - b.loss) / (b.rate - a.rate) + a.slope + b.slope
    scale = max(abs(theta), abs(a.slope), abs(b.slope))
    if not 0 < scale < math.inf:
        return math.nan
    square = (theta / scale) ** 2 - (a.slope / scale) * (b.slope / scale)
    if square <= 0:  # the cubic is monotonic
        return math.nan
    gamma = math.copysign(scale * math.sqrt(square), b.rate - a.rate)
    bottom = 2 * gamma - a.slope + b.slope
    return (gamma - a.slope + theta) / bottom if bottom else math.nan


def _parabola(a: Trial, b: Trial) -> float:
    """Return the minimum of the parabola through a and b with the slope of a (0: at a, 1: at b)."""
    return a.slope / ((a.loss - b.loss) / (b.rate - a.rate) + a.slope) / 2


def _secant(a: Trial, b: Trial) -> float:
    """Return the zero of the line through the slopes of a and b (0: at a, 1: at b)."""
    return a.slope / (a.slope - b.slope)
