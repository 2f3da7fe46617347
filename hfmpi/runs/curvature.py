"""The curvature of a model at one point, for Laplace approximations and custom methods: `hfmpi.curvature`."""

from __future__ import annotations

from typing import Any

import numpy as np

from hfmpi.errors import UserError
from hfmpi.models.base import KroneckerFactors, Model
from hfmpi.objective.data_parallel import DataParallel
from hfmpi.optim.base import Gradient, Operator
from hfmpi.optim.checks import check_vector
from hfmpi.optim.layout import split_factors
from hfmpi.optim.rows import Matrix, RowMatrix, RowRequest
from hfmpi.parallel.communicator import Communicator
from hfmpi.runs.one_point import one_point

__all__ = ["Curvature", "curvature"]


class Curvature:
    """Loss, gradient and curvature of a model at one theta on all examples of a data set.

    The risk f is the mean loss per scored output, in nats. Under MPI every rank holds a shard of the
    examples. Every method is collective: all ranks must call it, and it returns the same values on all ranks.
    Results are NumPy arrays on the host, except the `gradient` and S'a of rows on a GPU, which are CuPy
    arrays. `hfmpi.curvature` creates it.

    Attributes
    ----------
    theta : (D,)
    scored : float
        N, the number of scored outputs over which f is a mean, or the sum of their weights.
    """

    def __init__(self, owner: DataParallel, cases: Any, theta: np.ndarray) -> None:
        self._risk = owner.on(cases, np.arange(cases.count))
        self._model, self._backend, self._comm = owner.model, owner.model.backend, owner.communicator
        self._theta = self._backend.to_device(theta)
        self._products: Operator | None = None
        self.theta, self.scored = theta, self._risk.scored

    @property
    def shape(self) -> tuple[int, int]:
        """Return (D, D), the shape of G."""
        return self.theta.size, self.theta.size

    def gradient(self) -> Gradient:
        """Compute f and its gradient (D,)."""
        at = self._risk.gradient(self._theta)
        return Gradient(at.loss, self._backend.to_host(at.vector))

    def gauss_newton(self, v: np.ndarray) -> np.ndarray:
        """Compute G v (D,), the product of the Gauss-Newton matrix of f and a vector v (D,) of theta's type.

        All ranks use the v of rank 0, because they may start an iteration with different random vectors.
        """
        check_vector("v", v, self.theta.size, np.ndarray)
        v = self._comm.agree(v)
        if self._products is None:
            self._products = self._risk.gauss_newton(self._theta)
        v = self._backend.to_device(v.astype(self.theta.dtype, copy=False))
        return np.array(self._backend.to_host(self._products(v)))

    def to_scipy(self) -> Any:
        """Return G as a `scipy.sparse.linalg.LinearOperator`, symmetric, of theta's type."""
        from scipy.sparse.linalg import LinearOperator  # slow to import

        def product(v: np.ndarray) -> np.ndarray:
            return self.gauss_newton(np.ascontiguousarray(v, self.theta.dtype).reshape(-1))

        return LinearOperator(self.shape, matvec=product, rmatvec=product, dtype=self.theta.dtype)

    def matrix(self) -> Matrix:
        """Compute G as a dense matrix, (D, D) float64.

        Raises
        ------
        UserError
            If the model has no rows, or the matrix exceeds the memory budget.
        """
        rows = self._risk.rows(self._theta, RowRequest("residuals", stored=False))
        return rows.normal() / self.scored

    def rows(self, kind: str = "scores", segments: int = 1, seed: int = 0) -> RowMatrix:
        """Compute f, its gradient, and rows S (M, D) of a Gauss-Newton or Fisher matrix S'S / N.

        Parameters
        ----------
        kind : {'scores', 'sketch', 'residuals'}
            See `hfmpi.optim.rows`.
        segments : int
            Time segments of an example, each of which has a row; for scores and sketches.
        seed : int
            Seed of a sketch.

        Raises
        ------
        UserError
            If the model has no rows, they exceed the memory budget, or an argument is wrong.
        """
        try:
            request = RowRequest(kind, segments, seed)
        except (TypeError, ValueError) as error:
            raise UserError(str(error)) from None
        return self._risk.rows(self._theta, request)

    def kronecker_factors(self) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """Compute the Kronecker factors of every matrix of theta, by the name of its block.

        Returns
        -------
        dict of str to (A, B)
            The curvature of a block (rows, columns) is about A x B (K-FAC with observed targets): A (rows,
            rows) of its rows, B (columns, columns) of its columns. If a block has more than
            `hfmpi.optim.layout.WHOLE_SIDE` columns, each gate of n columns has a separate matrix: B is
            (gates, n, n). For a side longer than `LONGEST_SIDE`, the factor is only the diagonal.

        Raises
        ------
        UserError
            If the model has no Kronecker factors.
        """
        if not isinstance(self._model, KroneckerFactors):
            raise UserError(f"{type(self._model).__name__} has no Kronecker factors")
        factors = self._risk.factored_gradient(self._theta)[1]
        host = np.array(self._backend.to_host(factors))
        return {block.name: (a, b) for block, a, b in split_factors(self._risk.blocks, host)}


def curvature(
    model: Model,
    theta: np.ndarray,
    data: Any,
    *,
    micro_batch: int | None = None,
    memory_budget: float = np.inf,
    slices: int = 0,
    communicator: Communicator | None = None,
) -> Curvature:
    """Return the curvature of a model at theta on data, distributed over all ranks of a program under mpirun.

    Parameters
    ----------
    model : Model
        Such as a TorchModel, JaxModel or Network.
    theta : (D,)
        Parameters, such as `result.theta` of `hfmpi.train`, or `model.initial(0)`.
    data : tuple, data set or Cases
        As for `hfmpi.train`.
    micro_batch, memory_budget, slices
        As in `hfmpi.DataParallel`.
    communicator : Communicator, optional
        Returned by `hfmpi.connect()`; by default all ranks of the program.

    Raises
    ------
    UserError
        On all ranks, if the arguments do not match one another, or differ between ranks.

    Examples
    --------
    >>> c = hfmpi.curvature(model, result.theta, (x, y))
    >>> values = scipy.sparse.linalg.eigsh(c.to_scipy(), 5)[0]
    >>> s = c.rows("residuals")  # s.gram(), s.times(v), s.transposed(a)
    """
    options = {"micro_batch": micro_batch, "memory_budget": memory_budget, "slices": slices}
    return Curvature(*one_point(model, theta, data, communicator, **options))
