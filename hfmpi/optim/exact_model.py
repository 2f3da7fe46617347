"""The quadratic model of a risk and its exact damped step, computed from rows of residuals.

    R   rows of residuals, M x D: R'R / N = G        r   residuals (M,): R'r / N = g - rest
    K   R R', M x M                                  N   number of scored outputs

The step minimises g'p + p'G p / 2 + lambda p'p / 2: p = -(G + lambda)^-1 g. If there are fewer rows than
parameters, it is computed from K. By Woodbury's identity this is the same step; in this form it does not need
the difference of long vectors that the identity has in general:

    p = -R' (K + lambda N)^-1 r - (rest - R' (K + lambda N)^-1 R rest) / lambda        rest = g - R'r / N

The rest is zero for a loss whose gradient lies in the range of its Hessian, such as squares or cross-entropy.

Without momentum the damping pulls the step towards zero. With momentum it pulls the step towards q, which is
mu times the last step (SPRING, Goldshlager et al. 2024, arXiv 2401.10190): the damping term is
lambda (p - q)'(p - q) / 2, so that

    p = q - (G + lambda)^-1 (g + G q)

which from K is the step of r + R q instead of r, with q added.
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
"""Maximum length of the second-order correction a, relative to the step; Transtrum and Sethna allow 0.375.

If a is longer, because the model is poor or a consists of rounding errors, the step is not corrected.
"""


@dataclass(frozen=True)
class DampedStep:
    """A step p (D,), its length, and the decrease of the risk that the model predicts."""

    p: Vector
    norm: float
    promise: float


class ExactModel(ABC):
    """The model at one theta, identical on all ranks.

    Parameters
    ----------
    objective : Objective
        Its ranks share the factorizations.
    rows : RowMatrix
        Rows of residuals.
    momentum : float
        mu.
    last : (D,) or (0,)
        The last step; empty without momentum.

    Attributes
    ----------
    trace : float
        The trace of G.
    work : Counts
        The linear algebra executed so far.
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
        """A lambda so small that it is lost in the rounding of G.

        It is far below the rounding of the largest eigenvalue, because Cholesky factors of matrices whose
        parameters have different units are more accurate than their condition number suggests (Demmel 1989).
        """
        return max(float(np.finfo(np.float64).eps) ** 2 * self.trace, float(np.finfo(np.float64).tiny))

    @property
    def at_once(self) -> bool:
        """Whether the steps of several lambdas should be computed at the same time, each by one rank."""
        return len(self.right) <= ALONE

    def count(self, steps: int, pulled: bool, bent: bool) -> None:
        """Add the work of this number of concurrent steps to `work`."""
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
        """Compute the step of each lambda, with momentum if `pulled`; `count` counts the work.

        A step is None if it is not finite, or if G + lambda is not positive definite up to rounding. Each
        rank stores its factors for `bent`.
        """
        self.shifts = [damping * self.rows.scored for damping in dampings]
        self.factors.clear()
        rights = [self.right] * len(dampings)
        found = solutions(self.objective, self.matrix, self.shifts, rights, self.factors)
        both = [(x, damping) for x, damping in zip(found, dampings, strict=True) if x is not None]
        steps = iter(self._damped([x for x, _ in both], [damping for _, damping in both], pulled))
        return [None if x is None else next(steps) for x in found]

    def bent(self, step: DampedStep, damping: float, bend: Vector) -> DampedStep:
        """Add a / 2 to one of the latest steps, where a = -(G + lambda)^-1 b and b = J'H z'' / N along it.

        If a is not finite or too long, the step is returned unchanged. `norm` and `promise` remain those of
        the uncorrected step.
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
        """Return the step of each lambda, or None if it is not finite; the ranks exchange one message."""
        if not solutions:
            return []
        scalars = list[float]()
        with np.errstate(over="ignore", invalid="ignore"):  # a step that overflows is not taken
            steps = self._steps(solutions, dampings, pulled)
            for p, damping in zip(steps, dampings, strict=True):
                square, slope = inner_product(p, p), inner_product(self.g, p)
                # Without momentum (G + lambda) p = -g, so that p'G p needs no product.
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
        """The linear algebra of `_curvature`."""

    @abstractmethod
    def _transposed(self, steps: int) -> Counts:
        """Return the linear algebra of `_steps`."""

    @abstractmethod
    def _curvature(self, p: Vector) -> float:
        """Compute p'G p."""

    @abstractmethod
    def _matrix(self) -> Matrix:
        """Compute the matrix to factor: N G or K."""

    @abstractmethod
    def _right(self) -> Matrix:
        """Compute the right-hand sides (n, k); with momentum the last column is the one for q."""

    @abstractmethod
    def _reduced(self, b: Vector) -> Matrix:
        """Return the right-hand side (n,) of the factored system that belongs to b (D,)."""

    @abstractmethod
    def _expanded(self, x: Matrix, b: Vector, damping: float) -> Vector:
        """Compute -(G + lambda)^-1 b (D,) from the solution x (n,), in the dtype of theta."""

    @abstractmethod
    def _steps(self, solutions: Sequence[Matrix], dampings: Sequence[float], pulled: bool) -> list[Vector]:
        """Compute p (D,) for each lambda from its solutions (n, k), in the dtype of theta."""


class _ByParameters(ExactModel):
    """The model computed from N G, D x D."""

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
    """The model computed from K, M x M."""

    def _matrix(self) -> Matrix:
        return self.rows.gram()

    def _right(self) -> Matrix:
        rows = self.rows
        if rows.residuals is None:
            raise UserError("lm needs the residuals of the objective's rows: set RowMatrix.residuals")
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
        return (self.rows.transposed(x) - b) / self.kind(damping)  # Woodbury's identity


def exact_model(objective: Objective, rows: RowMatrix, momentum: float, last: Vector) -> ExactModel:
    """Return the model that factors the smaller of the two matrices, N G and K."""
    kind = _ByRows if rows.count < rows.gradient.size else _ByParameters
    return kind(objective, rows, momentum, last)


def _on_host(vector: Vector) -> Matrix:
    """Copy a vector from any device to the host, in float64."""
    return np.array(vector.tolist(), np.float64)
