"""The interface between optimizers and objectives: an optimizer works on vectors and float64 scalars only.

Symbols used throughout this package

    theta   parameters, (D,)                     f(theta)  the risk: a mean over examples, nats
    g       gradient of f, (D,)                  G         Gauss-Newton matrix of f, never formed
    p       proposed step, (D,)                  lambda    damping, in units of f per squared unit of theta
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
"""v (D,) -> A v; every call returns a new vector."""

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
        The mean over examples of the element-wise squares of the gradient of each example's loss, if they
        were requested and the objective provides them.
    """

    loss: float
    vector: Vector
    squares: Vector | None = None


class Sketch(NamedTuple):
    """An unbiased estimate of V G V' from random rows S.

    Attributes
    ----------
    projected : (k, k) float64
        V S'S V' / N, on the host, symmetric; its expectation is V G V'.
    rows : int
        M, the number of rows of all examples.
    cotangents : int
        The number of rows per example.
    """

    projected: Matrix
    rows: int
    cotangents: int


class Objective(ABC):
    """A risk to minimise; a user-defined objective is a subclass.

    Every optimizer needs `loss` and `gradient`; Hessian-free optimization also needs `gauss_newton`.

    Under MPI all ranks call the same methods in the same order and receive the same vectors. The optimizers
    pass every scalar that a decision depends on through `agree`.

    Attributes
    ----------
    ranks : int
        The number of ranks that share the tasks of `spread`.
    size : int
        The number of examples; 0 if it is not known.
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
        raise UserError("the objective has no Gauss-Newton products: use a first-order optimizer")

    def squared_gradients(self, theta: Vector) -> Gradient:
        """Compute f(theta), its gradient and the squared gradients; the default omits the squares."""
        return self.gradient(theta)

    def factored_gradient(self, theta: Vector) -> tuple[Gradient, Vector]:
        """Compute f(theta), its gradient, and the Kronecker factors A and B of all blocks as one vector.

        The curvature of a block is approximated by A x B with A (rows, rows) and B (columns, columns).
        `hfmpi.optim.layout.kronecker_layout` describes the layout of the vector.
        """
        raise UserError("the objective has no Kronecker factors: remove kfac from the setting directions")

    def rows(self, theta: Vector, request: RowRequest) -> RowMatrix:
        """Compute f(theta), its gradient, and rows of a Gauss-Newton or Fisher matrix (hfmpi.optim.rows)."""
        raise UserError("the objective has no rows of examples: use a different optimizer")

    def structural_gauss_newton(self, theta: Vector, structural: float) -> Operator:
        """Linearise at theta; return v -> (G + structural * S) v, where S is the hidden states' curvature."""
        raise UserError("the objective has no structural damping: set structural_damping=0")

    def bends(self, theta: Vector) -> Operator | None:
        """Return p -> J'H z'' (D,), or None if the objective does not provide it.

        z'' is the second derivative of the outputs along p.
        """
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
        """Estimate V G V' for V (k, D) from a sketch of G."""
        rows = self.rows(theta, request)
        along = np.stack([rows.times(each) for each in v.dense()])
        return Sketch(symmetric(along @ along.T / rows.scored), rows.count, rows.cotangents)

    def losses(self, thetas: Sequence[Vector]) -> list[float]:
        """Compute f at several candidates theta."""
        return [self.loss(theta) for theta in thetas]

    @property
    def blocks(self) -> tuple[Block, ...]:
        """The matrices that theta consists of, for methods that work on rows and columns."""
        raise UserError("the objective does not define the matrices of theta (blocks): use another optimizer")

    def spread(
        self, works: Sequence[Callable[[], Vector]], sizes: Sequence[int], wide: bool = False, name: str = ""
    ) -> list[Vector]:
        """Run each task on one of the ranks; return all results, vectors of these sizes, on all ranks.

        Use it for results that processors may round differently, such as matrix products of vectors that
        all ranks hold, and for tasks that take long enough to be shared. With `wide` the results are float64
        on the host; otherwise they have the type and device of theta. The timer's spans of the tasks start
        with `name`.
        """
        return [work() for work in works]

    def agree(self, values: Scalars) -> Scalars:
        """Return rank 0's values of scalars that every rank computed, possibly with different rounding."""
        return values


@dataclass(frozen=True)
class Objectives:
    """The objectives of one step.

    Attributes
    ----------
    gradient : Objective
        For the gradient, backtracking, the reduction ratio and the line search (batch B_g).
    curvature : Objective
        For Gauss-Newton products (batch B_c); first-order methods do not use it.
    epoch : float
        The number of passes over the data so far, for settings that change per epoch.
    shared : bool
        Whether the curvature batch is part of the gradient batch and is linearised by the gradient's forward
        pass. Then linearising at the theta of the latest gradient takes no additional pass.
    repeated : bool
        Whether the next step has the same gradient objective, so that its risk is the risk after this step.

    Raises
    ------
    TypeError
        If one of the objectives is not an Objective.
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
                    f"an objective must be an instance of hfmpi.Objective, not {shown(objective)}"
                )

    @property
    def second(self) -> Objective:
        """The curvature objective; a UserError is raised if there is none."""
        if self.curvature is None:
            raise UserError(
                "a second-order step needs a curvature objective: pass Objectives(gradient, curvature)"
            )
        return self.curvature


@dataclass(frozen=True)
class StepReport:
    """A summary of one step.

    Attributes
    ----------
    loss : float
        f before the step, on the gradient batch.
    accepted : bool
        Whether the step was taken.
    message : str
        Why the step was rejected, or other information for the user; empty if there is nothing to report.
    work : Counts
        The passes and the linear algebra that the step executed.
    details : dict
        Method-specific scalars for the history (damping, rho, ...).
    converged : bool
        Whether the method cannot lower this risk any further because the predicted decrease is smaller than
        the rounding of the risk. Theta and the state are unchanged, so that a run that has the same risk in
        every step can end.
    """

    loss: float
    accepted: bool
    message: str
    work: Counts
    details: dict[str, float | int | str | None] = field(default_factory=dict)
    converged: bool = False


class Needs(NamedTuple):
    """What an optimizer requires in addition to the loss, gradients and Gauss-Newton products.

    Attributes
    ----------
    blocks, kronecker_factors, rows, sketch, squared_gradients, structural_damping : bool
        Whether the optimizer uses that capability of an `Objective`.
    same_batch : bool
        Whether every step must have the same gradient batch (`Objectives.repeated`).
    """

    blocks: bool = False
    kronecker_factors: bool = False
    rows: bool = False
    sketch: bool = False
    squared_gradients: bool = False
    structural_damping: bool = False
    same_batch: bool = False


class Messages(NamedTuple):
    """The sizes of an optimizer's messages in addition to losses, gradients and Gauss-Newton products.

    Products S'S v with rows count as Gauss-Newton products.

    Attributes
    ----------
    with_gradient : int
        Additional numbers in the message of each gradient.
    matrices : int
        Numbers in the message of a step's work on matrices (`Objective.spread`); 0: there is no such message.
    inner_products : int
        Numbers, float64, in the message of a step's inner products of directions; 0: there is no such
        message.
    others : bool
        Whether there are further messages whose sizes are not known here, such as matrices of rows.
    """

    with_gradient: int = 0
    matrices: int = 0
    inner_products: int = 0
    others: bool = False


class Optimizer(Protocol[StateT]):
    """The base class of optimizers: a frozen dataclass of settings with a functional step.

    The state is also a frozen dataclass. It holds exactly what a checkpoint needs in addition to theta.
    """

    __dataclass_fields__: ClassVar[dict[str, Field[Any]]]

    @abstractmethod
    def init(self, theta: Vector, blocks: Sequence[Block] = ()) -> StateT:
        """Return the state before the first step; `blocks` are the blocks of the objectives, if any."""

    @abstractmethod
    def step(self, theta: Vector, state: StateT, objectives: Objectives) -> tuple[Vector, StateT, StepReport]:
        """Take one step; return new theta and state and leave the arguments unchanged."""

    @property
    def needs(self) -> Needs:
        """The capabilities that the optimizer requires with these settings."""
        return Needs()

    @property
    def seeks_lowest_risk(self) -> bool:
        """Whether a lower risk is always better; False with weight decay or a mean of the iterates."""
        return True

    @property
    def rates(self) -> tuple[str, ...]:
        """The settings that a schedule of the learning rate multiplies; empty without a learning rate."""
        return ()

    @property
    def degree(self) -> int:
        """The power of the size of its gradients to which the step of a parameter is proportional.

        1: proportional, as in gradient descent or where damping determines the step. 0: independent, because
        the step is divided by the running size of the gradients, as in Adam.
        """
        return 1

    def messages(self, parameters: int, blocks: Sequence[Block]) -> Messages:
        """Return the sizes of the messages from D and the matrices of theta (empty if they are not known)."""
        return Messages()

    def on_other_batches(self, state: Mapping[str, EntryT]) -> dict[str, EntryT | float]:
        """Return the fields of a state for a run that continues with different batches."""
        return {**state}


def inner_product(a: Vector, b: Vector) -> float:
    """Compute a' b, accumulated in float64; processors may round it differently (`Objective.agree`)."""
    # einsum multiplies and adds in float64 without float64 copies of the vectors, which take ten times as
    # long.
    return float(np.einsum("i,i->", a, b, dtype=np.float64))
