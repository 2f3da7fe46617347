"""The curvature of a model at one point, for Laplace approximations and custom methods: `hfmpi.curvature`."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np

from hfmpi.data.batches import Cases
from hfmpi.data.by_index import Dataset
from hfmpi.data.digest import digest_of
from hfmpi.data.examples import Examples
from hfmpi.data.user_data import as_cases
from hfmpi.errors import UserError
from hfmpi.measure.machine import free_memory
from hfmpi.models.base import DataChecks, KroneckerFactors, Model, with_scoring
from hfmpi.models.batch import check_finite
from hfmpi.objective.data_parallel import DataParallel
from hfmpi.optim.base import Gradient, Operator
from hfmpi.optim.checks import check_vector
from hfmpi.optim.layout import split_factors
from hfmpi.optim.rows import Matrix, RowMatrix, RowRequest
from hfmpi.parallel.communicator import Communicator, digest
from hfmpi.parallel.failure import together
from hfmpi.parallel.launch import connect
from hfmpi.runs import checks

__all__ = ["Curvature", "curvature"]


class Curvature:
    """Loss, gradient and curvature of a model at one theta on all examples of a data set.

    The risk f is the mean loss per scored output, in nats. Under MPI every rank holds a shard of the
    examples; every method is collective, so that all ranks must call it, and returns the same on all ranks.
    Results are NumPy arrays on the host, but for `gradient` and S'a of rows on a GPU, which are CuPy arrays.
    Made by `hfmpi.curvature`.

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
        """(D, D), the shape of G."""
        return self.theta.size, self.theta.size

    def gradient(self) -> Gradient:
        """Compute f and its gradient (D,)."""
        at = self._risk.gradient(self._theta)
        return Gradient(at.loss, self._backend.to_host(at.vector))

    def gauss_newton(self, v: np.ndarray) -> np.ndarray:
        """Compute G v (D,), the product with the Gauss-Newton matrix of f, of v (D,) of theta's type.

        The v of rank 0 counts: ranks may start an iteration with different random vectors.
        """
        check_vector("v", v, self.theta.size, np.ndarray)
        v = self._comm.agree(v)
        if self._products is None:
            self._products = self._risk.gauss_newton(self._theta)
        v = self._backend.to_device(v.astype(self.theta.dtype, copy=False))
        return np.array(self._backend.to_host(self._products(v)))

    def to_scipy(self) -> Any:
        """Return G as a `scipy.sparse.linalg.LinearOperator`, symmetric, of theta's type."""
        from scipy.sparse.linalg import LinearOperator  # takes long to import

        def product(v: np.ndarray) -> np.ndarray:
            return self.gauss_newton(np.ascontiguousarray(v, self.theta.dtype).reshape(-1))

        return LinearOperator(self.shape, matvec=product, rmatvec=product, dtype=self.theta.dtype)

    def matrix(self) -> Matrix:
        """Compute G itself, (D, D) float64.

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
            Of a sketch.

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
            rows) of its rows, B (columns, columns) of its columns. Of more than
            `hfmpi.optim.layout.WHOLE_SIDE` columns each gate of n columns has a matrix, (gates, n, n); of a
            side longer than `LONGEST_SIDE` there is the diagonal alone.

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
    """Return the curvature of a model at theta on data, spread over all ranks of a program under mpirun.

    Parameters
    ----------
    model : Model
        Made by TorchModel, JaxModel or Network, for example.
    theta : (D,)
        Parameters, such as `result.theta` of `hfmpi.train`, or `model.initial(0)`.
    data : tuple, data set or Cases
        As for `hfmpi.train`.
    micro_batch, memory_budget, slices
        As in `hfmpi.DataParallel`.
    communicator : Communicator, optional
        Of `hfmpi.connect()`; by default all ranks of the program.

    Raises
    ------
    UserError
        On all ranks, if the arguments do not fit one another, or differ between ranks.

    Examples
    --------
    >>> c = hfmpi.curvature(model, result.theta, (x, y))
    >>> values = scipy.sparse.linalg.eigsh(c.to_scipy(), 5)[0]
    >>> s = c.rows("residuals")  # s.gram(), s.times(v), s.transposed(a)
    """
    comm = communicator or _all_ranks()

    memory = checks.least(comm, free_memory(comm.local_size))

    def build() -> tuple[DataParallel, Cases, np.ndarray, str]:
        owner = DataParallel(model, comm, micro_batch=micro_batch, memory_budget=memory_budget, slices=slices)
        check_vector("theta", theta, model.size, np.ndarray)
        start = theta.astype(model.backend.dtype)
        cases = with_scoring(model, as_cases(data, getattr(model, "examples", Examples), memory))
        checks.examples(cases, lambda some: check_finite(some.targets, some.mask))
        if isinstance(model, DataChecks):
            if isinstance(cases, (Examples, Dataset)):
                model.loss(owner.model.backend.to_device(start), cases.take(np.arange(1)))  # checks the model
            checks.examples(cases, lambda some: model.check_data(some.inputs, some.targets, some.mask))
        return owner, cases, start, digest_of(cases)

    owner, cases, start, identity = together(comm, build)
    checks.same_start(
        comm,
        {
            "rank {} has other parameters than the other ranks": digest(start),
            "rank {} has other data than the other ranks": identity,
        },
    )
    return Curvature(owner, cases, start)


@cache
def _all_ranks() -> Communicator:
    """Return one communicator for all calls: MPI libraries have a limited number of them."""
    return connect()
