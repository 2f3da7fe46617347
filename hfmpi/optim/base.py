"""What an optimizer sees (an objective) and what it gives (a step): vectors and float64 scalars, no more.

Symbols used throughout this room

    theta   parameters, (D,)                     f(theta)  the risk: a mean over cases, nats
    g       gradient of f, (D,)                  G         Gauss-Newton matrix of f, never formed
    p       proposed step, (D,)                  lambda    damping; unit of f per squared unit of theta
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol, TypeVar

import numpy as np

__all__ = [
    "Gradient",
    "Objective",
    "Objectives",
    "Optimizer",
    "StepReport",
    "Vector",
    "Work",
    "agreement",
    "inner_product",
]

Vector = Any
"""A NumPy array (D,), or an array of the same interface on a device."""

StateT = TypeVar("StateT")


class Gradient(NamedTuple):
    """The risk and its gradient at one point.

    Attributes
    ----------
    loss : float
        f(theta).
    vector : (D,)
        g.
    squares : (D,) or None
        The mean over cases of the element-wise squared gradients of each case's own loss, where asked for.
    """

    loss: float
    vector: Vector
    squares: Vector | None = None


class Objective(Protocol):
    """A risk that can be minimised. Anything with these three methods will do.

    Under MPI every rank calls the same methods in the same order and gets the same numbers. An objective
    whose ranks might round differently offers `agree(value) -> value` (rank 0's) as well; the optimizers
    then take every steering scalar through it.
    """

    def loss(self, theta: Vector) -> float:
        """f(theta)."""

    def gradient(self, theta: Vector) -> Gradient:
        """f(theta) and its gradient; with `squares=True` (the diagonal preconditioner) also the squares."""

    def gauss_newton(self, theta: Vector) -> Callable[[Vector], Vector]:
        """Linearise at theta; give the operator v -> G v, a new vector each time.

        With `structural=s` (structural damping) the operator adds s times the curvature of the hidden
        states to G.
        """


@dataclass(frozen=True)
class Objectives:
    """The objectives of one step.

    Attributes
    ----------
    gradient : Objective
        Gradient, backtracking, reduction ratio and line search (batch B_g).
    curvature : Objective
        Gauss-Newton products (batch B_c); unused by first-order methods.
    epoch : float
        Passes over the data so far, for settings that change per epoch.
    """

    gradient: Any
    curvature: Any = None
    epoch: float = 0.0


@dataclass(frozen=True)
class Work:
    """Passes that one step really executed, for the cost accounts (hfmpi.measure.cost).

    Attributes
    ----------
    gradients, losses : int
        On the gradient batch.
    linearisations, products : int
        On the curvature batch.
    cg_steps : int
        The paper's I_c: conjugate-gradient iterations.
    """

    gradients: int = 0
    losses: int = 0
    linearisations: int = 0
    products: int = 0
    cg_steps: int = 0


@dataclass(frozen=True)
class StepReport:
    """What happened in one step.

    Attributes
    ----------
    loss : float
        f before the step, on the gradient batch.
    accepted : bool
    message : str
        Why the step is what it is; empty where nothing is to be said.
    work : Work
    details : dict
        Method-specific scalars for the history (damping, rho, ...).
    """

    loss: float
    accepted: bool
    message: str
    work: Work
    details: dict[str, float | int | str | None] = field(default_factory=dict)


class Optimizer(Protocol[StateT]):
    """An immutable set of settings with a functional step."""

    def init(self, theta: Vector) -> StateT:
        """Give the state before the first step."""

    def step(self, theta: Vector, state: StateT, objectives: Objectives) -> tuple[Vector, StateT, StepReport]:
        """Take one step; theta and state are not changed, the returned ones are new."""


def agreement(objective: Any) -> Callable[[float], float]:
    """Give the function that turns a rank's own scalar into the one all ranks of the objective use."""
    return getattr(objective, "agree", float)


def inner_product(objective: Any) -> Callable[[Vector, Vector], float]:
    """Give the inner product, accumulated in float64, the same number on every rank of the objective."""
    agree = agreement(objective)

    def inner(a: Vector, b: Vector) -> float:
        # Products and sum in float64 without float64 copies of the vectors, which cost ten times as much.
        return agree(float(np.einsum("i,i->", a, b, dtype=np.float64)))

    return inner
