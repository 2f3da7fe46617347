"""The protocols of a model: a loss and its linearisation, on one device and without MPI.

A model sums over the examples of a batch; the objective divides by their number and sums over ranks.
In addition to `Model` and `Linearisation`, each optional capability has a separate protocol. Capabilities
belong to the linearisation. The attribute `linearisation` of a model is the class of its linearisations, so
that their capabilities are known before the first linearisation.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np

from hfmpi.backends.base import Array, Backend
from hfmpi.data.augmented import Augmented, AugmentedStep
from hfmpi.data.batches import Cases
from hfmpi.data.by_index import Dataset
from hfmpi.data.examples import Examples
from hfmpi.errors import UserError
from hfmpi.measure.cost import ForwardPass
from hfmpi.models.factors import FactorSums
from hfmpi.optim.layout import Along, Block, Directions

__all__ = [
    "Blocks",
    "Costed",
    "DataChecks",
    "GradientFirst",
    "KroneckerFactors",
    "Linearisation",
    "Model",
    "Outputs",
    "Projection",
    "PulledBack",
    "Rows",
    "RowsFirst",
    "Scoring",
    "SquaredGradients",
    "StructuralDamping",
    "StructuralLinearisation",
    "Trials",
    "has_bends",
    "has_rows",
    "has_squared_gradients",
    "with_scoring",
]


class Linearisation(Protocol):
    """A model linearised at theta on one batch: J v, J' u, and products with the Gauss-Newton matrix."""

    @property
    def loss(self) -> float:
        """The weighted sum of the losses of the scored outputs at theta, in nats; float64."""

    @property
    def nbytes(self) -> int:
        """The number of bytes that the linearisation occupies in the device's memory."""

    def gradient(self, scale: float, out: Array) -> None:
        """Add scale times the gradient of the summed loss to out (D,)."""

    def jvp(self, v: Array) -> Any:
        """Return J v, the tangent of the outputs along v (D,); the next pass of the model overwrites it."""

    def vjp(self, u: Any, out: Array) -> None:
        """Add J' u, for a cotangent u in the form that `jvp` returns, to out (D,)."""

    def gauss_newton(self, v: Array, scale: float, out: Array) -> None:
        """Add scale * J' H_L J v to out (D,); H_L is the Hessian of the loss with respect to the outputs."""


@runtime_checkable
class Model(Protocol):
    """A loss as a function of the parameters theta (D,), on one device.

    A model whose linearisations have capabilities also has an attribute `linearisation`, their class.
    """

    @property
    def size(self) -> int:
        """D, the number of parameters."""

    @property
    def backend(self) -> Backend:
        """The backend, which determines the device and the dtype of theta and of all vectors."""

    def initial(self, seed: int) -> np.ndarray:
        """Draw initial parameters (D,), float64, which do not depend on the device or the number of ranks."""

    def loss(self, theta: Array, batch: Any) -> float:
        """Return the loss summed over a batch, in nats, float64, without a linearisation."""

    def linearise(self, theta: Array, batch: Any, reuse: Any = None) -> Linearisation:
        """Linearise at theta on a batch.

        Parameters
        ----------
        reuse : Linearisation, optional
            A linearisation of this model that is no longer needed; its memory may be overwritten.
        """

    def release(self) -> None:
        """Release scratch memory."""


@runtime_checkable
class Trials(Protocol):
    """A model that checks itself on a batch before a run."""

    def check(self, theta: Array, batch: Any) -> None:
        """Raise a UserError if the model cannot be trained on batches like this one."""


@runtime_checkable
class DataChecks(Protocol):
    """A model that checks examples in memory before a run."""

    def check_data(self, inputs: Any, targets: np.ndarray, mask: np.ndarray | None) -> None:
        """Raise a UserError if some of the examples do not fit the model or the domain of its loss."""


@runtime_checkable
class Scoring(Protocol):
    """A model whose loss ignores or weights some targets, as `ignore_index` and `weight` of PyTorch do.

    If the optional attribute `scores_all` is True, `scoring` returns all data unchanged, so that examples
    that are read by index can be counted without reading them. If the optional attribute `needs_scoring` is
    False, targets that are not scored lie outside the domain of the loss, so that they are refused if
    `scoring` was not called.
    """

    def scoring(self, data: Examples) -> Examples:
        """Return the examples with a mask of the scored targets and with their weights."""


@runtime_checkable
class Outputs(Protocol):
    """A model that returns its outputs, for metrics and predictions."""

    def outputs(self, theta: Array, batch: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
        """Return outputs (N, O), before the loss, their targets (N,) or (N, O), and weights (N, 1) or None.

        The arrays are on the host. An output of weight 0 is not scored. N is the number of outputs of the
        batch: its examples times the steps that have targets.
        """


@runtime_checkable
class Blocks(Protocol):
    """A model that names the matrices of theta."""

    @property
    def blocks(self) -> tuple[Block, ...]:
        """The matrices, which together cover theta."""


@runtime_checkable
class Costed(Protocol):
    """A model that knows the cost of its forward pass, the unit in which linear algebra is counted."""

    def forward_pass(self, steps: int) -> ForwardPass:
        """Return the cost of the forward pass of an example with `steps` outputs, including the burn-in."""


@runtime_checkable
class KroneckerFactors(Protocol):
    """A model whose linearisations can sum the Kronecker factors of the curvature in the gradient pass.

    These linearisations have a method factored_gradient(scale, out, sums). It adds the same to out (D,) as
    `gradient`, and the sums for the factors to sums (factor_sums.size,).
    """

    @property
    def factor_sums(self) -> FactorSums:
        """The layout of the sums that `factored_gradient` adds to, and their conversion to factors."""


@runtime_checkable
class Projection(Protocol):
    """A linearisation that processes many directions V (C, D) at once."""

    def project(self, v: Array | Directions, scale: float, out: np.ndarray) -> None:
        """Add scale * V G V' to out (C, C), float64 on the host; this takes J V but no J'.

        `Directions` are computed a few at a time, or all at once by `numpy.asarray`.
        """


@runtime_checkable
class SquaredGradients(Protocol):
    """A linearisation that can also sum the squared gradients of the examples."""

    def squared_gradients(self, scale: float, out: Array, squares: Array) -> None:
        """Add the scaled gradient to out (D,), and the sum of the examples' squared gradients to squares.

        `out` receives the same as from `gradient`. The squares (D,) are element-wise; an example of weight w
        counts w times.
        """


@runtime_checkable
class Rows(Protocol):
    """A linearisation that returns rows of single examples; `hfmpi.optim.rows` describes the kinds of rows.

    B is the number of examples in the batch, T the number of steps of an example that have outputs, and O the
    number of outputs of a step.
    """

    def residual_count(self) -> int:
        """Return T * O, the number of rows of residuals per example."""

    def segment_count(self, segments: int) -> int:
        """Return K, the number of segments per example: `segments`, but at most the number of its steps."""

    def scores(self, segments: int, out: Array) -> None:
        """Fill out (B, K, D) with the gradient of the summed loss of each of K = `segments` segments.

        A segment consists of consecutive steps of an example. If T < K, some are empty and have rows of
        zeros.
        """

    def sketch(self, signs: Array, segments: int, out: Array) -> None:
        """Fill out (B, K, D) with J' A e of each segment, for signs e (B, T * O) of 1 and -1; A A' = H."""

    def sketch_along(self, signs: Array, segments: int, along: Along) -> Array:
        """Return V S' (k, B * K) for the rows S that `sketch` computes, without storing S."""

    def residual_rows(self, out: Array, residuals: Array) -> bool:
        """Fill out (B, T * O, D) with the rows of A' J, and residuals (B, T * O) with r.

        Returns
        -------
        complete : bool
            Whether A r is the complete gradient of the loss with respect to the outputs. It is incomplete if
            a part of the gradient is in the null space of the Hessian H.
        """


@runtime_checkable
class PulledBack(Protocol):
    """A linearisation that can also multiply J' H with tangents at a different theta."""

    def pulled_back(self, u: Any, scale: float, out: Array) -> None:
        """Add scale * J' H u to out (D,), for u in the form that `jvp` returns; u is overwritten."""


@runtime_checkable
class RowsFirst(Protocol):
    """A model with a linearisation that is cheaper if its first pass computes rows."""

    def linearise_rows(self, theta: Array, batch: Any, reuse: Any = None) -> Linearisation:
        """Linearise as `Model.linearise` does."""


@runtime_checkable
class GradientFirst(Protocol):
    """A model with a linearisation that is cheaper if its first and often only pass computes a gradient."""

    def linearise_gradient(
        self, theta: Array, batch: Any, reuse: Any = None, *, extra: Literal["", "squares", "factors"] = ""
    ) -> Linearisation:
        """Linearise as `Model.linearise` does.

        Parameters
        ----------
        extra : {'', 'squares', 'factors'}
            The method of the first pass: `gradient`, `squared_gradients` or `factored_gradient`.
        """


class StructuralLinearisation(Linearisation, Protocol):
    """A linearisation with the curvature of the hidden pre-activations."""

    def structural_gauss_newton(self, v: Array, scale: float, structural: float, out: Array) -> None:
        """Add scale * (J' H_L J + structural * J_a' W J_a) v to out (D,).

        J_a is the Jacobian of the hidden pre-activations, and W their weights.
        """


@runtime_checkable
class StructuralDamping(Protocol):
    """A model whose hidden pre-activations can be damped (Martens and Sutskever 2011)."""

    def linearise_structural(self, theta: Array, batch: Any, reuse: Any = None) -> StructuralLinearisation:
        """Linearise as `Model.linearise` does, and compute the weights W of the pre-activations."""


def has_bends(model: Model) -> bool:
    """Return whether the linearisations of a model satisfy `PulledBack`."""
    return issubclass(getattr(model, "linearisation", object), PulledBack)


def has_squared_gradients(model: Model) -> bool:
    """Return whether the linearisations of a model satisfy `SquaredGradients`.

    This needs no linearisation, so that ranks with an empty shard know it too.
    """
    return issubclass(getattr(model, "linearisation", object), SquaredGradients)


def has_rows(model: Model) -> bool:
    """Return whether the linearisations of a model satisfy `Rows`; this needs no linearisation."""
    return issubclass(getattr(model, "linearisation", object), Rows)


def with_scoring(model: Model, cases: Cases) -> Cases:
    """Return the examples with the mask and the weights that the loss of the model requires.

    Raises
    ------
    UserError
        If the loss ignores or weights targets and the class of the examples does not support weights.
    """
    if not isinstance(model, Scoring) or getattr(model, "scores_all", False):
        return cases
    if isinstance(cases, Augmented):
        return cases.of(with_scoring(model, cases.data))
    if isinstance(cases, AugmentedStep):
        return replace(cases, data=with_scoring(model, cases.data))
    if isinstance(cases, Dataset):
        return cases.with_scoring(model.scoring)
    if isinstance(cases, Examples):
        return model.scoring(cases)
    if not getattr(model, "needs_scoring", True):
        return cases
    raise UserError(
        f"the loss ignores targets or weights classes, which {type(cases).__name__} does not support: pass "
        "hfmpi.Examples or hfmpi.Dataset"
    )
