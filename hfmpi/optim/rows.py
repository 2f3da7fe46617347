"""Rows of a Gauss-Newton matrix at one theta: gradients of examples, or rows of a square root of the matrix.

Symbols

    S   the rows, M x D         g   the gradient of the risk, (D,)         N   number of scored outputs

A Gauss-Newton or Fisher matrix is S'S / N. There are three kinds of rows (docs/theory.md):

scores      the gradient of the summed loss of each example, or of each of its K consecutive time segments:
            S'1 / N = g, and S'S / N is the empirical Fisher matrix.
sketch      random cotangents replace the gradient of the loss, with one row per segment: the expectation of
            S'S / N is the Gauss-Newton matrix G.
residuals   one row for each output of each scored step, A' J with A A' = H, the Hessian of the loss:
            S'S / N = G exactly. With the `residuals` r, defined by A r = gradient of the loss, S'r / N = g.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Annotated

import numpy as np

from hfmpi.errors import UserError
from hfmpi.optim.layout import Vector
from hfmpi.settings import NOT_NEGATIVE, Rule, at_least, check

__all__ = ["DenseRows", "Matrix", "RowMatrix", "RowRequest", "check_side"]

KINDS = "scores", "sketch", "residuals"


Matrix = np.ndarray[tuple[int, ...], np.dtype[np.float64]]
"""A matrix, or a vector with one number per row, in float64 on the host."""


@dataclass(frozen=True)
class RowRequest:
    """A request for rows.

    Attributes
    ----------
    kind : {'scores', 'sketch', 'residuals'}
    segments : int
        K, the number of time segments of an example, for scores and sketches; at most the number of time
        steps.
    seed : int
        The seed of a sketch. Its random signs depend on the seed and on the examples, not on the ranks.
    stored : bool
        Whether to store all rows. Otherwise rows of residuals are stored only if there are fewer rows than
        parameters (M < D); if there are not, the result has only `normal`.
    largest_side : int
        Raise an error before rows of residuals are computed if the side of the smaller matrix, min(M, D), is
        larger than this (`check_side`). 0: no limit.
    factors : bool
        For scores and sketches: also compute the Kronecker factors in the same pass (`RowMatrix.factors`).
    """

    kind: Annotated[str, Rule(f"must be one of {', '.join(KINDS)}", KINDS.__contains__)] = "scores"
    segments: Annotated[int, at_least(1)] = 1
    seed: Annotated[int, NOT_NEGATIVE] = 0
    stored: bool = True
    largest_side: Annotated[int, NOT_NEGATIVE] = 0
    factors: bool = False

    def __post_init__(self) -> None:
        check(self)
        if self.factors and self.kind == "residuals":
            raise ValueError("rows of residuals have no Kronecker factors: request scores or a sketch")


def check_side(count: int, parameters: int, largest: int) -> None:
    """Raise a UserError if the matrix for M residuals and D parameters has a side larger than `largest`."""
    side = min(count, parameters)
    if largest and side > largest:
        raise UserError(
            f"{count:,} residuals and {parameters:,} parameters need a matrix of {side:,} x {side:,} "
            f"numbers, which takes {8 * side**2 / 1e9:.3g} GB, and the same amount for its factor: use fewer "
            "examples per step or a different optimizer, or raise largest_side"
        )


class RowMatrix(ABC):
    """Rows S (M, D) at one theta, distributed over the ranks; every method is collective.

    Attributes
    ----------
    loss : float
        The risk f.
    gradient : (D,)
        g.
    count : int
        M, over all ranks.
    scored : float
        N, or the sum of the weights.
    cotangents : int
        Rows per example: the number of adjoint passes that ran concurrently.
    residuals : (M,) float64 or None
        r, for rows of residuals.
    complete : bool
        Whether S'r / N equals g. It does not if the gradient of the loss has a part outside the range of its
        Hessian, as in the linear part of Huber's loss.
    factors : vector or None
        The Kronecker factors as `Objective.factored_gradient` returns them, if they were requested.
    """

    loss: float
    gradient: Vector
    count: int
    scored: float
    cotangents: int
    residuals: Matrix | None
    complete: bool
    factors: Vector | None = None

    @abstractmethod
    def times(self, v: Vector) -> Matrix:
        """Compute S v (M,), float64 on the host, for v (D,)."""

    @abstractmethod
    def transposed(self, a: Matrix) -> Vector:
        """Compute S' a (D,) for a (M,), or (k, D) for (k, M); `a` is float64, the result of theta's dtype."""

    def product(self, v: Vector) -> Vector:
        """Compute S'S v (D,) for v (D,), in the dtype of theta."""
        return self.transposed(self.times(v))

    @abstractmethod
    def gram(self) -> Matrix:
        """Compute S S' (M, M), float64 on the host."""

    @abstractmethod
    def normal(self) -> Matrix:
        """Compute S'S (D, D), float64 on the host."""


@dataclass(frozen=True, eq=False)
class DenseRows(RowMatrix):
    """Rows in one array, for user-defined objectives in one process that compute the Jacobian themselves.

    Examples
    --------
    >>> j, r = np.array([[1.0, 0.0], [1.0, 1.0]]), np.array([3.0, 1.0])
    >>> rows = DenseRows(0.5 * r @ r, j.T @ r, j, r)
    """

    loss: float
    gradient: Vector
    matrix: Vector
    residuals: Matrix | None = None
    scored: float = 1
    cotangents: int = 1
    complete: bool = True
    factors: Vector | None = None

    @property
    def count(self) -> int:  # type: ignore[override]
        """M, the number of rows."""
        return len(self.matrix)

    def times(self, v: Vector) -> Matrix:
        """Compute S v."""
        found: Matrix = np.matmul(np.asarray(self.matrix, np.float64), np.asarray(v, np.float64))
        return found

    def transposed(self, a: Matrix) -> Vector:
        """Compute S' a."""
        return np.matmul(a, np.asarray(self.matrix, np.float64)).astype(self.matrix.dtype)

    def gram(self) -> Matrix:
        """Compute S S'."""
        wide = np.asarray(self.matrix, np.float64)
        found: Matrix = np.matmul(wide, wide.T)
        return found

    def normal(self) -> Matrix:
        """Compute S'S."""
        wide = np.asarray(self.matrix, np.float64)
        found: Matrix = np.matmul(wide.T, wide)
        return found
