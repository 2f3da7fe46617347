"""What an optimizer sees (an objective) and what it gives (a step): vectors and float64 scalars, no more.

Symbols used throughout this room

    theta   parameters, (D,)                     f(theta)  the risk: a mean over cases, nats
    g       gradient of f, (D,)                  G         Gauss-Newton matrix of f, never formed
    p       proposed step, (D,)                  lambda    damping; unit of f per squared unit of theta
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import Field, dataclass, field
from typing import Any, ClassVar, NamedTuple, Protocol, TypeAlias, TypeVar

import numpy as np

from hfmpi.errors import UserError, shown
from hfmpi.optim.layout import Block, Vector

__all__ = [
    "Gradient",
    "Matrix",
    "Objective",
    "Objectives",
    "Operator",
    "Optimizer",
    "Scalars",
    "StepReport",
    "Work",
    "inner_product",
]

Matrix: TypeAlias = "np.ndarray[tuple[int, ...], np.dtype[np.float64]]"
"""A small matrix on the host."""

Operator = Callable[[Vector], Vector]
"""v (D,) -> A v, a new vector each time."""

Scalars = tuple[float, ...]

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
        The mean over cases of the element-wise squared gradients of each case's own loss, where asked for
        and where the objective has them.
    """

    loss: float
    vector: Vector
    squares: Vector | None = None


class Objective(ABC):
    """A risk that can be minimised; an objective of one's own is a subclass.

    `loss` and `gradient` are what every optimizer needs, `gauss_newton` what Hessian-free needs besides.

    Under MPI every rank calls the same methods in the same order and gets the same vectors. The optimizers
    take every scalar that steers through `agree`.
    """

    @abstractmethod
    def loss(self, theta: Vector) -> float:
        """f(theta)."""

    @abstractmethod
    def gradient(self, theta: Vector) -> Gradient:
        """f(theta) and its gradient."""

    def gauss_newton(self, theta: Vector) -> Operator:
        """Linearise at theta; give the operator v -> G v."""
        raise UserError("the objective has no Gauss-Newton products: take a first-order optimizer")

    def squared_gradients(self, theta: Vector) -> Gradient:
        """f(theta), its gradient and the squares, for the diagonal preconditioner; here, without squares."""
        return self.gradient(theta)

    def factored_gradient(self, theta: Vector) -> tuple[Gradient, Vector]:
        """f(theta), its gradient; and the Kronecker factors A and B of each block, one after the other.

        The curvature of a block is about A x B, A (rows, rows) and B (columns, columns).
        """
        raise UserError("the objective has no Kronecker factors: set directions without kfac")

    def structural_gauss_newton(self, theta: Vector, structural: float) -> Operator:
        """Linearise at theta; give v -> (G + structural * S) v, S the curvature of the hidden states."""
        raise UserError("the objective has no structural damping: set structural_damping=0")

    def columns(self, theta: Vector) -> Operator:
        """Linearise at theta; give V (C, D) -> G V (C, D), each row a direction."""
        product = self.gauss_newton(theta)
        return lambda v: np.stack([product(row) for row in v])

    def project(self, theta: Vector) -> Callable[[Vector], np.ndarray]:
        """Linearise at theta; give V (C, D) -> V G V' (C, C), float64 on the host, symmetric."""
        columns = self.columns(theta)

        def projected(v: Vector) -> np.ndarray:
            found = np.asarray(v, np.float64) @ np.asarray(columns(v), np.float64).T
            return (found + found.T) / 2

        return projected

    def losses(self, thetas: Sequence[Vector]) -> list[float]:
        """F of several candidates theta, one after the other or at once."""
        return [self.loss(theta) for theta in thetas]

    @property
    def blocks(self) -> tuple[Block, ...]:
        """The matrices that theta is made of, all of it, for methods that look at rows and columns."""
        raise UserError("the objective does not name the matrices of theta (blocks): take another optimizer")

    def spread(self, works: Sequence[Callable[[], Vector]], sizes: Sequence[int]) -> list[Vector]:
        """Do each work, which gives so many numbers, on one of the ranks; give all results to all of them.

        For what processors might round differently, such as matrix products of what all ranks hold, and
        for what takes long enough to be shared out.
        """
        return [work() for work in works]

    def agree(self, values: Scalars) -> Scalars:
        """Give rank 0's values of scalars that every rank computed, where ranks might round differently."""
        return values


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
    shared : bool
        The curvature batch is part of the gradient batch, and the gradient's own forward pass linearises it:
        a linearisation where the gradient was just taken is no pass of its own.
    repeated : bool
        The next step has the same gradient objective, so that its risk tells what this step brought.

    Raises
    ------
    TypeError
        If one of them is no Objective.
    """

    gradient: Objective
    curvature: Objective | None = None
    epoch: float = 0.0
    shared: bool = False
    repeated: bool = True

    def __post_init__(self) -> None:
        for given in (self.gradient, self.curvature):
            if not isinstance(given, Objective) and (given is not None or self.gradient is None):
                raise TypeError(f"an objective must be of a subclass of hfmpi.Objective, not {shown(given)}")

    @property
    def second(self) -> Objective:
        """The objective of the curvature, for a method that cannot do without."""
        if self.curvature is None:
            raise UserError("second-order steps need a curvature objective: Objectives(gradient, curvature)")
        return self.curvature


@dataclass(frozen=True)
class Work:
    """Passes that one step really executed, for the cost accounts (hfmpi.measure.cost).

    Attributes
    ----------
    gradients, losses : int
        On the gradient batch.
    linearisations, products : int
        On the curvature batch; of linearisations those with a pass of their own (`Objectives.shared`).
    cg_steps : int
        The paper's I_c: conjugate-gradient iterations.
    projections : int
        V G V', on the curvature batch: J V alone.
    candidates, columns, directions : int
        What went along in the same passes: candidates beyond the first of each loss, columns beyond the first
        of each product, and directions beyond the first of each projection.
    """

    gradients: int = 0
    losses: int = 0
    linearisations: int = 0
    products: int = 0
    cg_steps: int = 0
    projections: int = 0
    candidates: int = 0
    columns: int = 0
    directions: int = 0


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
    """A frozen dataclass of settings, with a functional step and a state that is a frozen dataclass too."""

    __dataclass_fields__: ClassVar[dict[str, Field[Any]]]

    def init(self, theta: Vector, blocks: Sequence[Block] = ()) -> StateT:
        """Give the state before the first step; `blocks` are those of the objectives, if there are any."""

    def step(self, theta: Vector, state: StateT, objectives: Objectives) -> tuple[Vector, StateT, StepReport]:
        """Take one step; theta and state are not changed, the returned ones are new."""


def inner_product(a: Vector, b: Vector) -> float:
    """Give a' b, accumulated in float64; processors may round it differently (`Objective.agree`)."""
    # Products and sum in float64 without float64 copies of the vectors, which cost ten times as much.
    return float(np.einsum("i,i->", a, b, dtype=np.float64))
