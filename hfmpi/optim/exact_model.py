"""The quadratic model of a risk with its exact damped step, from rows of residuals.

    R   rows of residuals, M x D: R'R / N = G        r   residuals (M,): R'r / N = g, but for `rest`
    K   R R', M x M                                  N   scored outputs

The step minimises g'p + p'G p / 2 + lambda p'p / 2: p = -(G + lambda)^-1 g. With fewer rows than parameters
it is computed from K. That is the same step by Woodbury's identity, without the difference of long vectors
that the identity has in general:

    p = -R' (K + lambda N)^-1 r - (rest - R' (K + lambda N)^-1 R rest) / lambda        rest = g - R'r / N

The rest is zero for a loss whose Hessian sees all of its gradient, such as squares or cross-entropy.

With momentum the damping pulls the step to q = mu times the last step, where it pulls to zero without
(SPRING, Goldshlager et al. 2024, arXiv 2401.10190): its term is lambda (p - q)'(p - q) / 2, which gives

    p = q - (G + lambda)^-1 (g + G q)                  or r + R q in place of r, and q added to the step.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from hfmpi.errors import UserError
from hfmpi.measure.cost import Counts
from hfmpi.measure.linear_algebra import cholesky, gram, product, together, triangular_solve
from hfmpi.optim.base import Objective, inner_product
from hfmpi.optim.cholesky import ALONE, Factors, solutions
from hfmpi.optim.layout import Vector
from hfmpi.optim.rows import Matrix, RowMatrix

__all__ = ["DampedStep", "ExactModel", "exact_model"]

ONE = Counts(row_products=1)


LONGEST = 1.0
"""The longest second-order correction a that is made, relative to the step; Transtrum and Sethna allow 0.375.

A longer one, where the model is poor or a is rounding, is left out, and the step is the plain one.
"""


@dataclass(frozen=True)
class DampedStep:
    """A step p (D,), its length, and the decrease of the risk that the model predicts."""

    p: Vector
    norm: float
    promise: float


class ExactModel(ABC):
    """The model at one theta; the same on all ranks.

    Parameters
    ----------
    objective : Objective
        Its ranks share the factorizations.
    rows : RowMatrix
        Of residuals.
    momentum : float
        mu.
    last : (D,) or (0,)
        The last step, if there is momentum.

    Attributes
    ----------
    trace : float
        The trace of G.
    work : Counts
        The linear algebra so far.
    """

    def __init__(self, objective: Objective, rows: RowMatrix, momentum: float, last: Vector) -> None:
        self.objective, self.rows, self.g = objective, rows, rows.gradient
        self.kind = self.g.dtype.type
        self.pull = self.kind(momentum) * last
        self.work = gram(*sorted((rows.count, self.g.size))) + ONE
        self.matrix = self._matrix()
        self.right = self._right()
        self.shifts, self.factors = list[float](), Factors()
        (self.trace,) = objective.agree((float(np.trace(self.matrix)) / rows.scored,))

    @property
    def least_damping(self) -> float:
        """A lambda that is lost in the rounding of G.

        It is far below the rounding of the largest eigenvalue: Cholesky factors of matrices whose parameters
        have different units are more accurate than their condition suggests (Demmel 1989).
        """
        return max(float(np.finfo(np.float64).eps) ** 2 * self.trace, float(np.finfo(np.float64).tiny))

    @property
    def at_once(self) -> bool:
        """Whether the steps of several lambdas are worth computing at once, each by one rank."""
        return len(self.right) <= ALONE

    def count(self, steps: int, pulled: bool, bent: bool) -> None:
        """Count the work of so many steps side by side."""
        size, columns = self.right.shape
        if bent:
            columns += 1
        one = cholesky(size) + triangular_solve(size, columns) + triangular_solve(size, columns)
        self.work += together([one] * steps) + self._transposed(steps)
        if bent:
            self.work += self._transposed(steps) + self._transposed(steps)
        if pulled:
            self.work += together([self._product] * steps)

    def curvature(self, p: Vector) -> float:
        """Compute p'G p."""
        self.work += self._product
        return self._curvature(p)

    def steps(self, dampings: Sequence[float], pulled: bool = False) -> list[DampedStep | None]:
        """Compute the step of each lambda, with momentum or without; `count` counts the work.

        A step is None if it is not finite, or if G + lambda is not positive definite up to rounding. Each
        rank keeps its factors for `bent`.
        """
        self.shifts = [damping * self.rows.scored for damping in dampings]
        self.factors.clear()
        rights = [self.right] * len(dampings)
        found = solutions(self.objective, self.matrix, self.shifts, rights, self.factors)
        both = [(x, damping) for x, damping in zip(found, dampings, strict=True) if x is not None]
        steps = iter(self._damped([x for x, _ in both], [damping for _, damping in both], pulled))
        return [None if x is None else next(steps) for x in found]

    def bent(self, step: DampedStep, damping: float, bend: Vector) -> DampedStep:
        """Add a / 2 to one of the newest steps, a = -(G + lambda)^-1 b with b = J'H z'' / N along the step.

        Where a is not finite or too long the step stays as it is; norm and promise are those of the model.
        """
        shift = damping * self.rows.scored
        rights = [self._reduced(bend)[:, None] if each == shift else None for each in self.shifts]
        found = solutions(self.objective, self.matrix, self.shifts, rights, self.factors)
        x = found[self.shifts.index(shift)]
        if x is None:
            return step
        with np.errstate(over="ignore", invalid="ignore"):
            a = self._expanded(x[:, 0], bend, damping)
            (square,) = self.objective.agree((inner_product(a, a),))
            follow = math.sqrt(square) <= LONGEST * step.norm
            return replace(step, p=step.p + self.kind(0.5) * a) if follow else step

    def _damped(
        self, solutions: Sequence[Matrix], dampings: Sequence[float], pulled: bool
    ) -> list[DampedStep | None]:
        """Return the steps that are finite; the ranks exchange a message for all of them together."""
        if not solutions:
            return []
        scalars = list[float]()
        with np.errstate(over="ignore", invalid="ignore"):  # a step that is too long is not taken
            steps = self._steps(solutions, dampings, pulled)
            for p, damping in zip(steps, dampings, strict=True):
                square, slope = inner_product(p, p), inner_product(self.g, p)
                # (G + lambda) p = -g, but for momentum
                scalars += square, -slope, self._curvature(p) if pulled else -slope - damping * square
        agreed = self.objective.agree(tuple(scalars))
        triples = zip(agreed[::3], agreed[1::3], agreed[2::3], strict=True)
        return [
            DampedStep(p, math.sqrt(square), descent - curvature / 2) if math.isfinite(square) else None
            for p, (square, descent, curvature) in zip(steps, triples, strict=True)
        ]

    @property
    @abstractmethod
    def _product(self) -> Counts:
        """The work of `_curvature`."""

    @abstractmethod
    def _transposed(self, steps: int) -> Counts:
        """Return the work of `_steps`."""

    @abstractmethod
    def _curvature(self, p: Vector) -> float:
        """Compute p'G p."""

    @abstractmethod
    def _matrix(self) -> Matrix:
        """Compute the matrix to factor, N G or K."""

    @abstractmethod
    def _right(self) -> Matrix:
        """Compute the right-hand sides (n, k), the last one for momentum."""

    @abstractmethod
    def _reduced(self, b: Vector) -> Matrix:
        """Return the right-hand side (n,) of the matrix to factor for b (D,)."""

    @abstractmethod
    def _expanded(self, x: Matrix, b: Vector, damping: float) -> Vector:
        """Return -(G + lambda)^-1 b (D,) from the solution x (n,), in the type of theta."""

    @abstractmethod
    def _steps(self, solutions: Sequence[Matrix], dampings: Sequence[float], pulled: bool) -> list[Vector]:
        """Compute p (D,) of each lambda from its solutions (n, k), in the type of theta."""


class _ByParameters(ExactModel):
    """The model by N G, D x D."""

    def _matrix(self) -> Matrix:
        return self.rows.normal()

    def _right(self) -> Matrix:
        columns = [self.rows.scored * _on_host(self.g)]
        if self.pull.size:
            columns.append(self.matrix @ _on_host(self.pull))
        return np.stack(columns, 1)

    def _steps(self, solutions: Sequence[Matrix], dampings: Sequence[float], pulled: bool) -> list[Vector]:
        sums = [-solution[:, : 1 + pulled].sum(axis=1) for solution in solutions]
        steps = [np.asarray(x, dtype=self.g.dtype, like=self.g) for x in sums]
        return [x + self.pull for x in steps] if pulled else steps

    @property
    def _product(self) -> Counts:
        return product(self.g.size, self.g.size)

    def _transposed(self, steps: int) -> Counts:
        return Counts()

    def _curvature(self, p: Vector) -> float:
        wide = _on_host(p)
        return float(wide @ (self.matrix @ wide)) / self.rows.scored

    def _reduced(self, b: Vector) -> Matrix:
        return self.rows.scored * _on_host(b)

    def _expanded(self, x: Matrix, b: Vector, damping: float) -> Vector:
        return np.asarray(-x, dtype=self.g.dtype, like=self.g)


class _ByRows(ExactModel):
    """The model by K, M x M."""

    def _matrix(self) -> Matrix:
        return self.rows.gram()

    def _right(self) -> Matrix:
        rows = self.rows
        if rows.residuals is None:
            raise UserError("the objective's rows have no residuals, which lm needs: RowMatrix.residuals")
        columns = [np.asarray(rows.residuals, np.float64)]
        if not rows.complete:
            self.rest = self.g - rows.transposed(columns[0] / rows.scored)
            columns.append(rows.times(self.rest))
            self.work += ONE + ONE
        if self.pull.size:
            columns.append(rows.times(self.pull))
            self.work += ONE
        return np.stack(columns, 1)

    def _steps(self, solutions: Sequence[Matrix], dampings: Sequence[float], pulled: bool) -> list[Vector]:
        weights = np.stack([x[:, 0] + (x[:, -1] if pulled else 0.0) for x in solutions])
        if not self.rows.complete:
            weights -= [x[:, 1] / damping for x, damping in zip(solutions, dampings, strict=True)]
        steps = [-p for p in self.rows.transposed(weights).astype(self.g.dtype, copy=False)]
        if not self.rows.complete:
            steps = [p - self.rest / self.kind(damping) for p, damping in zip(steps, dampings, strict=True)]
        return [p + self.pull for p in steps] if pulled else steps

    @property
    def _product(self) -> Counts:
        return product(self.rows.count, self.g.size) + ONE

    def _transposed(self, steps: int) -> Counts:
        return product(self.g.size, self.rows.count, steps) + ONE

    def _curvature(self, p: Vector) -> float:
        along = self.rows.times(p)
        return float(along @ along) / self.rows.scored

    def _reduced(self, b: Vector) -> Matrix:
        return self.rows.times(b)

    def _expanded(self, x: Matrix, b: Vector, damping: float) -> Vector:
        return (self.rows.transposed(x) - b) / self.kind(damping)  # Woodbury


def exact_model(objective: Objective, rows: RowMatrix, momentum: float, last: Vector) -> ExactModel:
    """Return the model by the smaller of both matrices."""
    kind = _ByRows if rows.count < rows.gradient.size else _ByParameters
    return kind(objective, rows, momentum, last)


def _on_host(vector: Vector) -> Matrix:
    """Return a vector of any device in float64 on the host."""
    return np.array(vector.tolist(), np.float64)
