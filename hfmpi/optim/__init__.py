"""Optimizers on vectors and objectives alone."""

from hfmpi.optim.adam import Adam
from hfmpi.optim.base import Gradient, Objective, Objectives, Optimizer, StepReport
from hfmpi.optim.gradient_descent import GradientDescent
from hfmpi.optim.hessian_free import HessianFree

__all__ = [
    "Adam",
    "Gradient",
    "GradientDescent",
    "HessianFree",
    "Objective",
    "Objectives",
    "Optimizer",
    "StepReport",
]
