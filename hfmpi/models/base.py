"""What a model is to the rest of hfmpi: a loss, and its linearisation, on one device; no MPI.

A model sums over the cases of a batch; who divides by how many, and over how many ranks, is not its business.
Everything beyond `Model` and `Linearisation` is a capability with a protocol of its own.
"""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

import numpy as np

from hfmpi.backends.base import Array, Backend
from hfmpi.optim.layout import Block

__all__ = [
    "Blocks",
    "Columns",
    "KroneckerFactors",
    "Linearisation",
    "Model",
    "Outputs",
    "SquaredGradients",
    "StructuralDamping",
    "StructuralLinearisation",
]


class Linearisation(Protocol):
    """A model linearised at theta on one batch: outputs J v, cotangents J' u, and the Gauss-Newton matrix."""

    @property
    def loss(self) -> float:
        """The loss at theta, summed over the scored outputs, nats; float64."""

    @property
    def nbytes(self) -> int:
        """What it keeps in the device's memory."""

    def gradient(self, scale: float, out: Array) -> None:
        """Add scale times the gradient of the summed loss to out (D,)."""

    def jvp(self, v: Array) -> Any:
        """J v: what a direction v (D,) does to the outputs. It lasts until the next pass of the model."""

    def vjp(self, u: Any, out: Array) -> None:
        """Add J' u, for a cotangent u in the form that `jvp` gives, to out (D,)."""

    def gauss_newton(self, v: Array, scale: float, out: Array) -> None:
        """Add scale * J' H_L J v to out (D,); H_L is the Hessian of the loss on the outputs."""


@runtime_checkable
class Model(Protocol):
    """A loss of parameters theta (D,) on one device."""

    @property
    def size(self) -> int:
        """D, the number of parameters."""

    @property
    def backend(self) -> Backend:
        """The device of theta and of all vectors, and their type."""

    def initial(self, seed: int) -> np.ndarray:
        """Draw parameters to start from, (D,) float64, the same for every device and number of ranks."""

    def loss(self, theta: Array, batch: Any) -> float:
        """Sum the loss over a batch, nats, float64, without a linearisation."""

    def linearise(self, theta: Array, batch: Any, reuse: Any = None) -> Linearisation:
        """Linearise at theta on a batch.

        Parameters
        ----------
        reuse : Linearisation, optional
            One of this model that is not needed any more: its memory may be taken.
        """

    def release(self) -> None:
        """Give scratch memory back."""


@runtime_checkable
class Outputs(Protocol):
    """A model that gives its outputs, for metrics and predictions."""

    def outputs(self, theta: Array, batch: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
        """Give outputs (N, O), before the loss, their targets (N,) or (N, O), and a mask (N, 1) or None.

        On the host. N are the rows of outputs of the whole batch: its cases, times the steps with targets.
        """


@runtime_checkable
class Blocks(Protocol):
    """A model that names the matrices of theta."""

    @property
    def blocks(self) -> tuple[Block, ...]:
        """The matrices, which cover theta."""


@runtime_checkable
class Columns(Protocol):
    """A linearisation that takes many directions V (C, D) in one pass."""

    def columns(self, v: Array, scale: float, out: Array) -> None:
        """Add scale * G V, row by row, to out (C, D)."""

    def project(self, v: Array, scale: float, out: np.ndarray) -> None:
        """Add scale * V G V' to out (C, C), float64 on the host; J V alone is needed."""


@runtime_checkable
class SquaredGradients(Protocol):
    """A model that can also square the gradient of each case by itself."""

    def squared_gradients(self, at: Any, scale: float, out: Array, squares: Array) -> None:
        """Add what `at.gradient` adds to out (D,), and its squares, summed over the cases, to squares (D,).

        Parameters
        ----------
        at : Linearisation
            One of this model.
        """


@runtime_checkable
class KroneckerFactors(Blocks, Protocol):
    """A model that can also give Kronecker factors of each block's curvature, from the gradient's pass."""

    @property
    def factors_size(self) -> int:
        """The numbers that `factored_gradient` adds to."""

    def factored_gradient(self, at: Any, scale: float, out: Array, factors: Array) -> None:
        """Add what `at.gradient` adds to out (D,), and sums for the factors to factors (factors_size,)."""

    def normalise_factors(self, factors: Array, scored: int) -> Array:
        """Give the factors A (rows, rows) and B (columns, columns) of each block, one after the other.

        From sums over all cases of a batch with `scored` outputs, with scale = 1 / scored; they are used up.
        """


class StructuralLinearisation(Linearisation, Protocol):
    """A linearisation that keeps the curvature of the hidden pre-activations too."""

    def structural_gauss_newton(self, v: Array, scale: float, structural: float, out: Array) -> None:
        """Add scale * (J' H_L J + structural * J_a' W J_a) v to out (D,); J_a is that of pre-activations."""


@runtime_checkable
class StructuralDamping(Protocol):
    """A model with hidden pre-activations that can be damped (Martens and Sutskever 2011)."""

    def linearise_structural(self, theta: Array, batch: Any, reuse: Any = None) -> StructuralLinearisation:
        """Linearise as `Model.linearise` does, with the weights W of the pre-activations."""
