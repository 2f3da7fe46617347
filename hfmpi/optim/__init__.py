"""Optimizers, which depend only on vectors and objectives."""

from hfmpi.optim.adam import Adam
from hfmpi.optim.base import Gradient, Objective, Objectives, Optimizer, StepReport
from hfmpi.optim.gradient_descent import GradientDescent
from hfmpi.optim.hessian_free import HessianFree
from hfmpi.optim.lbfgs import LBFGS
from hfmpi.optim.lm import LM
from hfmpi.optim.muon import Muon
from hfmpi.optim.soap import SOAP
from hfmpi.optim.soap_muon import SOAPMuon
from hfmpi.optim.subspace import Subspace

__all__ = [
    "LBFGS",
    "LM",
    "SOAP",
    "Adam",
    "Gradient",
    "GradientDescent",
    "HessianFree",
    "Muon",
    "Objective",
    "Objectives",
    "Optimizer",
    "SOAPMuon",
    "StepReport",
    "Subspace",
]
