"""The seam of an optimizer: it sees objectives, and knows vectors and float64 scalars alone.

Symbols used throughout this room

    theta   parameters, (D,)                     f(theta)  the risk: a mean over examples, nats
    g       gradient of f, (D,)                  G         Gauss-Newton matrix of f, never formed
    p       proposed step, (D,)                  lambda    damping; unit of f per squared unit of theta
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import Field, dataclass, field
from typing import Any, ClassVar, NamedTuple, Protocol, TypeVar

import numpy as np

from hfmpi.errors import UserError, shown
from hfmpi.measure.cost import Counts
from hfmpi.optim.layout import Block, Directions, Vector
from hfmpi.optim.rows import Matrix, RowMatrix, RowRequest

__all__ = [
    "Gradient",
    "Matrix",
    "Messages",
    "Needs",
    "Objective",
    "Objectives",
    "Operator",
    "Optimizer",
    "Scalars",
    "Sketch",
    "StepReport",
    "inner_product",
    "symmetric",
]

Operator = Callable[[Vector], Vector]
"""v (D,) -> A v, a new vector each time."""

Scalars = tuple[float, ...]

StateT = TypeVar("StateT")
EntryT = TypeVar("EntryT")


def symmetric(matrix: np.ndarray) -> np.ndarray:
    """Return the symmetric part of a matrix."""
    part: np.ndarray = (matrix + matrix.T) / 2
    return part


class Gradient(NamedTuple):
    """The risk and its gradient at one point.

    Attributes
    ----------
    loss : float
        f(theta).
    vector : (D,)
        g.
    squares : (D,) or None
        The mean over examples of the squared gradients (element-wise) of each example's loss, where they
        were requested and the objective has them.
    """

    loss: float
    vector: Vector
    squares: Vector | None = None


class Sketch(NamedTuple):
    """V S'S V' / N (k, k), float64 on the host, symmetric, whose expectation is V G V', from random rows S.

    Attributes
    ----------
    projected : (k, k)
    rows : int
        M, of all examples.
    cotangents : int
        The rows of an example.
    """

    projected: Matrix
    rows: int
    cotangents: int


class Objective(ABC):
    """A risk that can be minimised; a user-defined objective is a subclass.

    Every optimizer needs `loss` and `gradient`; Hessian-free optimization also needs `gauss_newton`.

    Under MPI every rank calls the same methods in the same order and gets the same vectors. The optimizers
    pass every scalar that steers through `agree`.

    Attributes
    ----------
    ranks : int
        How many ranks share the works of `spread`.
    size : int
        The number of examples, 0 if it is not known.
    """

    ranks = 1
    size = 0

    @abstractmethod
    def loss(self, theta: Vector) -> float:
        """Compute f(theta)."""

    @abstractmethod
    def gradient(self, theta: Vector) -> Gradient:
        """Compute f(theta) and its gradient."""

    def gauss_newton(self, theta: Vector) -> Operator:
        """Linearise at theta; return the operator v -> G v."""
        raise UserError("the objective has no Gauss-Newton products: take a first-order optimizer")

    def squared_gradients(self, theta: Vector) -> Gradient:
        """Compute f(theta), its gradient and the squares; by default without squares."""
        return self.gradient(theta)

    def factored_gradient(self, theta: Vector) -> tuple[Gradient, Vector]:
        """Compute f(theta), its gradient, and the Kronecker factors A and B of each block in one vector.

        The curvature of a block is about A x B, A (rows, rows) and B (columns, columns); the vector is
        divided by `hfmpi.optim.layout.kronecker_layout`.
        """
        raise UserError("the objective has no Kronecker factors: set directions without kfac")

    def rows(self, theta: Vector, request: RowRequest) -> RowMatrix:
        """Compute f(theta), its gradient, and rows of a Gauss-Newton or Fisher matrix (hfmpi.optim.rows)."""
        raise UserError("the objective has no rows of examples: take another optimizer")

    def structural_gauss_newton(self, theta: Vector, structural: float) -> Operator:
        """Linearise at theta; return v -> (G + structural * S) v, S the curvature of the hidden states."""
        raise UserError("the objective has no structural damping: set structural_damping=0")

    def bends(self, theta: Vector) -> Operator | None:
        """Return p -> J'H z'' (D,), z'' the second derivative of the outputs along p; None if not known."""
        return None

    def project(self, theta: Vector) -> Callable[[Vector], np.ndarray]:
        """Linearise at theta; return V (k, D) -> V G V' (k, k), float64 on the host, symmetric.

        V is an array or `hfmpi.optim.layout.Directions`.
        """
        product = self.gauss_newton(theta)

        def projected(v: Vector) -> np.ndarray:
            products = np.stack([product(row) for row in v])
            return symmetric(np.asarray(v, np.float64) @ np.asarray(products, np.float64).T)

        return projected

    def sketch(self, theta: Vector, v: Directions, request: RowRequest) -> Sketch:
        """Estimate V G V' of V (k, D) from a sketch of G."""
        rows = self.rows(theta, request)
        along = np.stack([rows.times(each) for each in v.dense()])
        return Sketch(symmetric(along @ along.T / rows.scored), rows.count, rows.cotangents)

    def losses(self, thetas: Sequence[Vector]) -> list[float]:
        """Compute f at several candidates theta."""
        return [self.loss(theta) for theta in thetas]

    @property
    def blocks(self) -> tuple[Block, ...]:
        """The matrices that theta consists of, for methods that work on rows and columns."""
        raise UserError("the objective does not name the matrices of theta (blocks): take another optimizer")

    def spread(
        self, works: Sequence[Callable[[], Vector]], sizes: Sequence[int], wide: bool = False, name: str = ""
    ) -> list[Vector]:
        """Run each work on one of the ranks; return all results, vectors of these sizes, on all ranks.

        For results that processors may round differently, such as matrix products of vectors that all ranks
        hold, and for works that take long enough to be shared out. With `wide` the results are float64 on
        the host, otherwise of the type and on the device of theta. The timer's spans of the works start with
        `name`.
        """
        return [work() for work in works]

    def agree(self, values: Scalars) -> Scalars:
        """Return rank 0's values of scalars that every rank computed, perhaps with different rounding."""
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
        The curvature batch is part of the gradient batch and the gradient's forward pass linearises it: a
        linearisation where the gradient was just computed takes no further pass.
    repeated : bool
        The next step has the same gradient objective, so that its risk is the risk after this step.

    Raises
    ------
    TypeError
        If one of them is not an Objective.
    """

    gradient: Objective
    curvature: Objective | None = None
    epoch: float = 0.0
    shared: bool = False
    repeated: bool = True

    def __post_init__(self) -> None:
        for objective in (self.gradient, self.curvature):
            if not isinstance(objective, Objective) and (objective is not None or self.gradient is None):
                raise TypeError(
                    f"an objective must be of a subclass of hfmpi.Objective, not {shown(objective)}"
                )

    @property
    def second(self) -> Objective:
        """The objective of the curvature, for a method that requires one."""
        if self.curvature is None:
            raise UserError("second-order steps need a curvature objective: Objectives(gradient, curvature)")
        return self.curvature


@dataclass(frozen=True)
class StepReport:
    """What happened in one step.

    Attributes
    ----------
    loss : float
        f before the step, on the gradient batch.
    accepted : bool
    message : str
        Why the step was rejected, or what else the user should know; empty if there is nothing to report.
    work : Counts
        What was executed in the step.
    details : dict
        Method-specific scalars for the history (damping, rho, ...).
    converged : bool
        The method cannot lower this risk any further: it promises less than the rounding of the risk. Theta
        and the state did not change, so that a run whose every step has this risk is at its end.
    """

    loss: float
    accepted: bool
    message: str
    work: Counts
    details: dict[str, float | int | str | None] = field(default_factory=dict)
    converged: bool = False


class Needs(NamedTuple):
    """What an optimizer needs of the model beyond loss, gradient and products.

    Attributes
    ----------
    blocks, kronecker_factors, rows, sketch, squared_gradients, structural_damping : bool
        The part of `Objective` of that name.
    same_batch : bool
        Every step must have the same gradient batch (`Objectives.repeated`).
    """

    blocks: bool = False
    kronecker_factors: bool = False
    rows: bool = False
    sketch: bool = False
    squared_gradients: bool = False
    structural_damping: bool = False
    same_batch: bool = False


class Messages(NamedTuple):
    """How many numbers the ranks exchange for an optimizer besides losses, gradients and products.

    Products S'S v with rows are among the products.

    Attributes
    ----------
    with_gradient : int
        In the message of each gradient.
    matrices : int
        In the message of a step's work on matrices (`Objective.spread`); 0: there is no such message.
    inner_products : int
        In the message of a step's inner products of directions, float64; 0: there is no such message.
    others : bool
        Whether there are other messages too, as of matrices of rows, whose sizes are not known here.
    """

    with_gradient: int = 0
    matrices: int = 0
    inner_products: int = 0
    others: bool = False


class Optimizer(Protocol[StateT]):
    """A frozen dataclass of settings with a functional step; an optimizer inherits from it.

    The state is a frozen dataclass too: exactly what a checkpoint needs besides theta.
    """

    __dataclass_fields__: ClassVar[dict[str, Field[Any]]]

    @abstractmethod
    def init(self, theta: Vector, blocks: Sequence[Block] = ()) -> StateT:
        """Return the state before the first step; `blocks` are those of the objectives, if they have any."""

    @abstractmethod
    def step(self, theta: Vector, state: StateT, objectives: Objectives) -> tuple[Vector, StateT, StepReport]:
        """Take one step; theta and state are not changed, the returned ones are new."""

    @property
    def needs(self) -> Needs:
        """What these settings need of the model."""
        return Needs()

    @property
    def seeks_lowest_risk(self) -> bool:
        """Whether a lower risk is always better: not with weight decay or a mean of the iterates."""
        return True

    @property
    def rates(self) -> tuple[str, ...]:
        """The settings that a schedule of the learning rate multiplies; empty without a learning rate."""
        return ()

    @property
    def degree(self) -> int:
        """How a parameter's step depends on the size of its gradients.

        1: it is proportional to them, as in gradient descent, or where damping determines the step. 0: it is
        divided by their running size, as in Adam.
        """
        return 1

    def messages(self, parameters: int, blocks: Sequence[Block]) -> Messages:
        """Return what the ranks exchange, from D and the matrices of theta, none if they are not known."""
        return Messages()

    def on_other_batches(self, state: Mapping[str, EntryT]) -> dict[str, EntryT | float]:
        """Return the fields of a state for a run that goes on with other batches."""
        return {**state}


def inner_product(a: Vector, b: Vector) -> float:
    """Compute a' b, accumulated in float64; processors may round it differently (`Objective.agree`)."""
    # Products and sum in float64 without float64 copies of the vectors, which cost ten times as much.
    return float(np.einsum("i,i->", a, b, dtype=np.float64))
