"""The quadratic model of the risk around theta, which a Hessian-free step minimises."""

from __future__ import annotations

from typing import NamedTuple

from hfmpi.measure.cost import Counts
from hfmpi.optim.base import Objectives, Scalars, inner_product
from hfmpi.optim.damping import noise
from hfmpi.optim.layout import Vector

__all__ = ["Prediction", "QuadraticModel"]


class Prediction(NamedTuple):
    """The prediction for a step p: g' p, p' p, and m(p) - f without damping; the same on all ranks."""

    slope: float
    square: float
    change: float


class QuadraticModel:
    """The model m(p) = f + g' p + p' G p / 2; damping adds lambda p' p / 2 + mu lambda p' S p / 2.

    Parameters
    ----------
    objectives : Objectives
        The curvature objective is linearised at theta.
    theta, gradient : (D,)
        The latest gradient, and the theta where it was computed.
    damping, structural : float
        lambda and mu.

    Attributes
    ----------
    work : Counts
        The passes executed so far.
    """

    def __init__(
        self, objectives: Objectives, theta: Vector, gradient: Vector, damping: float, structural: float
    ) -> None:
        self.objectives, self.theta, self.gradient = objectives, theta, gradient
        self.damping, self.structural = damping, structural
        self.work = Counts(linearisations=1)
        curvature = objectives.second
        if structural * damping == 0:
            self.work = Counts(linearisations=int(not objectives.shared))
            self._product = curvature.gauss_newton(theta)
        else:
            self._product = curvature.structural_gauss_newton(theta, structural * damping)

    def damped(self, v: Vector) -> Vector:
        """Compute (G + mu lambda S + lambda I) v."""
        self.work += Counts(products=1)
        return self._product(v) + v.dtype.type(self.damping) * v

    def predict(self, p: Vector, damped_change: float) -> Prediction:
        """Predict the effect of p; `damped_change` is m(p) - f with damping, from the solver."""
        agree = self.objectives.gradient.agree
        scalars: Scalars = inner_product(self.gradient, p), inner_product(p, p)
        if self.structural == 0:
            slope, square = agree(scalars)
            return Prediction(slope, square, damped_change - 0.5 * self.damping * square)
        slope, square, curvature = agree((*scalars, inner_product(p, self._undamped(p))))
        return Prediction(slope, square, slope + 0.5 * curvature)

    def noise(self, loss: float) -> float:
        """Estimate the rounding of the risk at theta; all ranks get the same number."""
        (curvature,) = self.objectives.gradient.agree(
            (inner_product(self.theta, self._undamped(self.theta)),)
        )
        return noise(loss, self.theta, curvature)

    def _undamped(self, v: Vector) -> Vector:
        """Compute G v."""
        self.work += Counts(products=1)
        if self.structural * self.damping == 0:
            return self._product(v)
        self.work += Counts(linearisations=1)
        return self.objectives.second.gauss_newton(self.theta)(v)
