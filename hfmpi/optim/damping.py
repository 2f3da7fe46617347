"""Predicted and actual decrease of the risk: the reduction ratio, the rule for lambda, and rounding.

The ratio and the rule are those of Levenberg and Marquardt (Martens 2010, section 4.1).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from hfmpi.optim.layout import Vector

__all__ = ["UNRESOLVED", "LevenbergMarquardt", "noise", "reduction_ratio", "rounding", "small"]

UNRESOLVED = (
    "the predicted decrease is smaller than the rounding of the risk: theta is at an optimum, or the damping "
    "is too large"
)
"""The message of a step that is not taken because of `rounding`."""

GRID = 2.0**-50
"""Absolute rounding of a risk in float32: the message of a gradient has multiples of 2^-52 from each rank."""


def rounding(loss: float, theta: Vector) -> float:
    """Return the smallest change of this risk that a model in the precision of theta can resolve."""
    grid = GRID if theta.dtype == np.float32 else 0.0
    return float(np.finfo(theta.dtype).eps) * abs(loss) + grid


def noise(loss: float, theta: Vector, curvature: float) -> float:
    """Estimate the rounding of a risk from the rounding of the outputs, which matters for small residuals.

    Outputs that are rounded by eps change a mean f of squares r^2 / 2 of residuals by up to
    sqrt(2 f) eps z + (eps z)^2 / 2, where z is the root mean square of the outputs. z is estimated by
    sqrt(theta' G theta), which is exact for linear outputs. A model can predict a smaller decrease than this
    and still be right. So this estimate is not a reason to skip a step, but it explains why a step did not
    lower the risk.

    Parameters
    ----------
    curvature : float
        theta' G theta.
    """
    eps, square = float(np.finfo(theta.dtype).eps), max(curvature, 0.0)
    return rounding(loss, theta) + eps * (math.sqrt(2 * abs(loss) * square) + eps * square)


def small(promise: float, loss: float, theta: Vector) -> bool:
    """Return whether the predicted decrease of a failed step is so small that `noise` is worth its pass.

    The bound only saves passes. Its term 1 is large enough because a risk that is close to its rounding is
    far below 1, unless the outputs are very large.
    """
    return promise <= math.sqrt(float(np.finfo(theta.dtype).eps)) * max(1.0, abs(loss))


def reduction_ratio(loss_before: float, loss_after: float, model_value: float) -> float:
    """Compute rho = (f(theta + p) - f(theta)) / (value of the undamped quadratic model at p).

    Returns NaN if the model does not predict a decrease (its value is not negative) or a number is not
    finite.
    """
    change = loss_after - loss_before
    if not (math.isfinite(change) and math.isfinite(model_value)) or model_value >= 0:
        return math.nan
    return change / model_value


@dataclass(frozen=True)
class LevenbergMarquardt:
    """The rule that raises lambda after a poor prediction of the model and lowers it after a good one.

    Attributes
    ----------
    factor : float
        Lambda is divided by it if rho < 1/4 or rho is NaN, and multiplied by it if rho > 3/4. Martens: 2/3.
        Kiros: 0.99. 1: lambda is fixed.
    minimum, maximum : float
        Bounds of lambda.
    """

    factor: float = 2 / 3
    minimum: float = 1e-10
    maximum: float = 1e10

    def update(self, damping: float, rho: float) -> float:
        """Return lambda for the next step."""
        if math.isnan(rho) or rho < 0.25:
            damping /= self.factor
        elif rho > 0.75:
            damping *= self.factor
        return min(max(damping, self.minimum), self.maximum)
