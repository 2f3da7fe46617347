"""What a model is to the rest of hfmpi: a loss, and its linearisation, on one device; no MPI.

A model sums over the examples of a batch; the objective divides by their number and sums over ranks.
Everything beyond `Model` and `Linearisation` is an optional capability with a separate protocol. Capabilities
belong to the linearisation; the attribute `linearisation` of a model is the class of its linearisations, so
that they are known in advance.
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
        """The loss at theta, summed over the scored outputs times their weights, nats; float64."""

    @property
    def nbytes(self) -> int:
        """The bytes that it occupies in the device's memory."""

    def gradient(self, scale: float, out: Array) -> None:
        """Add scale times the gradient of the summed loss to out (D,)."""

    def jvp(self, v: Array) -> Any:
        """Return J v, the tangent of the outputs along v (D,). It lasts until the next pass of the model."""

    def vjp(self, u: Any, out: Array) -> None:
        """Add J' u, for a cotangent u in the form that `jvp` returns, to out (D,)."""

    def gauss_newton(self, v: Array, scale: float, out: Array) -> None:
        """Add scale * J' H_L J v to out (D,); H_L is the Hessian of the loss on the outputs."""


@runtime_checkable
class Model(Protocol):
    """A loss of parameters theta (D,) on one device.

    A model whose linearisations have capabilities also has an attribute `linearisation`, their class.
    """

    @property
    def size(self) -> int:
        """D, the number of parameters."""

    @property
    def backend(self) -> Backend:
        """The device of theta and of all vectors, and their type."""

    def initial(self, seed: int) -> np.ndarray:
        """Draw initial parameters, (D,) float64, the same for every device and number of ranks."""

    def loss(self, theta: Array, batch: Any) -> float:
        """Sum the loss over a batch, nats, float64, without a linearisation."""

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
    """A model whose loss leaves out or weights some targets, as `ignore_index` and `weight` of PyTorch do.

    If an attribute `scores_all` is True, `scoring` changes nothing for any data: examples that are read by
    index then need not be read to be counted. If an attribute `needs_scoring` is False, targets that are not
    scored lie outside of the domain of the loss, so that they are refused where `scoring` was not called.
    """

    def scoring(self, data: Examples) -> Examples:
        """Return examples with a mask of the targets that are scored, and their weights."""


@runtime_checkable
class Outputs(Protocol):
    """A model that returns its outputs, for metrics and predictions."""

    def outputs(self, theta: Array, batch: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
        """Return outputs (N, O), before the loss, their targets (N,) or (N, O), and weights (N, 1) or None.

        On the host; an output of weight 0 is not scored. N counts the outputs of the whole batch: its
        examples, times the steps with targets.
        """


@runtime_checkable
class Blocks(Protocol):
    """A model that names the matrices of theta."""

    @property
    def blocks(self) -> tuple[Block, ...]:
        """The matrices, which cover theta."""


@runtime_checkable
class Costed(Protocol):
    """A model that knows what its forward pass is worth, the unit of the linear algebra of optimizers."""

    def forward_pass(self, steps: int) -> ForwardPass:
        """Return the unit for examples with so many outputs, those of the burn-in among them."""


@runtime_checkable
class KroneckerFactors(Protocol):
    """A model whose linearisations also sum Kronecker factors of the curvature in the pass of the gradient.

    These have a method factored_gradient(scale, out, sums), which adds what `gradient` adds to out (D,) and
    the sums for the factors to sums (factor_sums.size,).
    """

    @property
    def factor_sums(self) -> FactorSums:
        """What `factored_gradient` adds to, and how it becomes the factors of all blocks."""


@runtime_checkable
class Projection(Protocol):
    """A linearisation that takes many directions V (C, D) at once."""

    def project(self, v: Array | Directions, scale: float, out: np.ndarray) -> None:
        """Add scale * V G V' to out (C, C), float64 on the host; only J V is needed.

        `Directions` are made a few at a time, or all by `numpy.asarray`.
        """


@runtime_checkable
class SquaredGradients(Protocol):
    """A linearisation that can also square the gradient of each example."""

    def squared_gradients(self, scale: float, out: Array, squares: Array) -> None:
        """Add what `gradient` adds to out (D,), and the sum over examples of its squares to squares (D,).

        An example of weight w counts w times.
        """


@runtime_checkable
class Rows(Protocol):
    """A linearisation that returns rows of single examples; `hfmpi.optim.rows` has the kinds.

    B counts the examples of the batch, T the steps of an example that have outputs, O the outputs of a step.
    """

    def residual_count(self) -> int:
        """Return T * O, the rows of residuals of an example."""

    def segment_count(self, segments: int) -> int:
        """Return K, the segments of an example where so many are wanted: no more than it has steps."""

    def scores(self, segments: int, out: Array) -> None:
        """Fill out (B, K, D) with the gradients of the summed loss of K = `segments` segments of examples.

        The segments are consecutive steps; one may be empty, with a row of zeros, if T < K.
        """

    def sketch(self, signs: Array, segments: int, out: Array) -> None:
        """Fill out (B, K, D) with J' A e, by segment, for signs e (B, T * O) of 1 and -1; A A' = H."""

    def sketch_along(self, signs: Array, segments: int, along: Along) -> Array:
        """Return V S' (k, B * K) of the rows S that `sketch` computes, none of which is kept."""

    def residual_rows(self, out: Array, residuals: Array) -> bool:
        """Fill out (B, T * O, D) with the rows of A' J, and residuals (B, T * O) with r.

        Returns
        -------
        complete : bool
            Whether A r is the gradient of the loss in the outputs, of which the Hessian H may miss a part.
        """


@runtime_checkable
class PulledBack(Protocol):
    """A linearisation that also takes J' H of tangents of another theta."""

    def pulled_back(self, u: Any, scale: float, out: Array) -> None:
        """Add scale * J' H u to out (D,), for u in the form that `jvp` returns, which is overwritten."""


@runtime_checkable
class RowsFirst(Protocol):
    """A model with a linearisation that is cheaper where rows are its first pass."""

    def linearise_rows(self, theta: Array, batch: Any, reuse: Any = None) -> Linearisation:
        """Linearise as `Model.linearise` does."""


@runtime_checkable
class GradientFirst(Protocol):
    """A model with a linearisation that is cheaper where a gradient is its first, often its only, pass."""

    def linearise_gradient(
        self, theta: Array, batch: Any, reuse: Any = None, *, extra: Literal["", "squares", "factors"] = ""
    ) -> Linearisation:
        """Linearise as `Model.linearise` does.

        Parameters
        ----------
        extra : {'', 'squares', 'factors'}
            The first pass: `gradient`, `squared_gradients` or `factored_gradient`.
        """


class StructuralLinearisation(Linearisation, Protocol):
    """A linearisation with the curvature of the hidden pre-activations."""

    def structural_gauss_newton(self, v: Array, scale: float, structural: float, out: Array) -> None:
        """Add scale * (J' H_L J + structural * J_a' W J_a) v to out (D,); J_a is that of pre-activations."""


@runtime_checkable
class StructuralDamping(Protocol):
    """A model with hidden pre-activations that can be damped (Martens and Sutskever 2011)."""

    def linearise_structural(self, theta: Array, batch: Any, reuse: Any = None) -> StructuralLinearisation:
        """Linearise as `Model.linearise` does, with the weights W of the pre-activations."""


def has_bends(model: Model) -> bool:
    """Return whether the linearisations of a model take J' H of tangents of another theta."""
    return issubclass(getattr(model, "linearisation", object), PulledBack)


def has_squared_gradients(model: Model) -> bool:
    """Return whether the linearisations of a model have squared gradients.

    It is known without a linearisation, on ranks with an empty shard too.
    """
    return issubclass(getattr(model, "linearisation", object), SquaredGradients)


def has_rows(model: Model) -> bool:
    """Return whether the linearisations of a model have rows of examples; known without a linearisation."""
    return issubclass(getattr(model, "linearisation", object), Rows)


def with_scoring(model: Model, cases: Cases) -> Cases:
    """Return examples with the mask and the weights of what the loss of the model scores of them.

    Raises
    ------
    UserError
        If the loss ignores or weights targets, and the examples are of a class that cannot have weights.
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
        f"the loss ignores targets or gives weights to classes, which {type(cases).__name__} does not "
        "support: pass hfmpi.Examples or hfmpi.Dataset"
    )
