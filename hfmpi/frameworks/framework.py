"""What a model needs besides a framework that differentiates its function (torch.py, jax.py).

The framework gives outputs, J v and J' u of a function of theta on one batch, as arrays of NumPy on the host.
Here are the rest: theta as one vector, its matrices, the rows of outputs that targets stand beside, and the
loss of these rows with its Hessian.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np

from hfmpi.backends.numpy import NumpyBackend
from hfmpi.errors import UserError, shown
from hfmpi.models import factors as case_factors
from hfmpi.models.batch import Batch
from hfmpi.models.losses import Loss, choose
from hfmpi.optim.checks import check_vector
from hfmpi.optim.layout import Block

__all__ = ["FrameworkLinearisation", "FrameworkModel", "Passes", "Rows", "layout"]

MICRO_BATCH_BYTES = 1 << 26
"""What a micro-batch may keep for its linearisation: calls of a framework take long beside small cases."""

MOST_MICRO_BATCH = 1024
"""Cases of a micro-batch, where a user does not choose."""


@runtime_checkable
class _CasesFirst(Protocol):
    """A batch whose first axes count its cases, as hfmpi.data.examples makes it."""

    @property
    def inputs(self) -> Any:
        """(B, ...), or a tuple of such."""

    @property
    def targets(self) -> Any:
        """(B, ...) symbols, or (B, ..., O) numbers."""

    @property
    def mask(self) -> Any:
        """(B, ...) or None."""

    @property
    def cases(self) -> int:
        """B."""


class Rows(NamedTuple):
    """Which rows of the outputs are scored: those that have targets.

    Attributes
    ----------
    shape : tuple of int
        (B, ...) of the targets, without their last axis where they are vectors.
    width : int or None
        O, where the targets say it.
    """

    shape: tuple[int, ...]
    width: int | None

    def of(self, outputs: Any) -> Any:
        """Give the rows (N, O) of outputs (B, ..., O), an array of any framework.

        Outputs of more steps (axis 1) than there are targets lose the first ones, the burn-in. Outputs (B, O)
        without steps serve targets of one step.
        """
        if not hasattr(outputs, "reshape"):
            raise UserError(
                f"a model must give one array of outputs, not {shown(outputs)}: "
                "wrap it in one that gives what the loss is of"
            )
        z, lead = outputs, self.shape
        if z.ndim == 1:
            z = z.reshape(-1, 1)
        fits = tuple(z.shape[:-1]) == lead
        if not fits and z.ndim == len(lead) + 1 > 2:
            z = z[:, max(0, z.shape[1] - lead[1]) :]
            fits = tuple(z.shape[:-1]) == lead
        elif not fits and z.ndim == 2:
            fits = (z.shape[0], 1) == lead
        if not fits or self.width not in (None, z.shape[-1]):
            wanted = ", ".join(map(str, lead)) + f", {self.width or 'symbols'}"
            raise UserError(
                f"outputs must be of shape ({wanted}) for these targets, not {tuple(outputs.shape)}"
            )
        return z.reshape(math.prod(lead), z.shape[-1])


class Example(NamedTuple):
    """A batch as a framework's function takes it.

    Attributes
    ----------
    inputs : tuple of (B, ...)
    rows : Rows
    targets : (N,) int32, or (N, O)
    mask : (N, 1) or None
    """

    inputs: tuple[np.ndarray, ...]
    rows: Rows
    targets: np.ndarray
    mask: np.ndarray | None

    @property
    def first(self) -> Example:
        """Its first case alone."""
        rows = Rows((1, *self.rows.shape[1:]), self.rows.width)
        count = math.prod(rows.shape)
        mask = None if self.mask is None else self.mask[:count]
        return Example(tuple(x[:1] for x in self.inputs), rows, self.targets[:count], mask)


class Passes(Protocol):
    """A function theta (D,) -> rows of outputs (N, O), linearised at one theta; vectors are NumPy's."""

    @property
    def outputs(self) -> np.ndarray:
        """(N, O)."""

    @property
    def nbytes(self) -> int:
        """About what it keeps in memory."""

    def jvp(self, v: np.ndarray) -> np.ndarray:
        """J v (N, O) of v (D,), or (C, N, O) of (C, D); may be overwritten."""

    def vjp(self, u: np.ndarray) -> np.ndarray:
        """J' u (D,) of u (N, O), or (C, D) of (C, N, O)."""

    def squares(self, u: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """J' u (D,) of u (N, O), and the sum over cases of its summands' squares (D,)."""

    def factors(self, u: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """J' u (D,) of u (N, O), and sums for Kronecker factors, as `hfmpi.models.factors` has them."""


@dataclass
class FrameworkLinearisation:
    """A model linearised at theta on one batch.

    Attributes
    ----------
    passes : Passes
    output_loss : Loss
    backend : NumpyBackend
    kept : (N, O)
        What the loss keeps of the outputs.
    targets : (N,) int32, or (N, O)
    mask : (N, 1) or None
    loss : float
        Summed over the scored rows, nats.
    """

    passes: Passes
    output_loss: Loss
    backend: NumpyBackend
    kept: np.ndarray
    targets: np.ndarray
    mask: np.ndarray | None
    loss: float

    @property
    def nbytes(self) -> int:
        """About what it keeps in memory."""
        return self.passes.nbytes + self.kept.nbytes

    def gradient(self, scale: float, out: np.ndarray) -> None:
        """Add scale times the gradient of the summed loss to out (D,)."""
        out += self.passes.vjp(self._loss_gradient(scale))

    def squared_gradients(self, scale: float, out: np.ndarray, squares: np.ndarray) -> None:
        """Add what `gradient` adds to out (D,), and the sum of its squares over cases to squares (D,)."""
        total, own = self.passes.squares(self._loss_gradient(scale))
        out += total
        squares += own

    def factored_gradient(self, scale: float, out: np.ndarray, factors: np.ndarray) -> None:
        """Add what `gradient` adds to out (D,), and sums for Kronecker factors to factors."""
        total, own = self.passes.factors(self._loss_gradient(scale))
        out += total
        factors += own

    def jvp(self, v: np.ndarray) -> np.ndarray:
        """J v (N, O) of v (D,), or (C, N, O) of (C, D)."""
        return self.passes.jvp(v.astype(self.backend.dtype, copy=False))

    def vjp(self, u: np.ndarray, out: np.ndarray) -> None:
        """Add J' u to out (D,)."""
        out += self.passes.vjp(u.astype(self.backend.dtype, copy=False))

    def gauss_newton(self, v: np.ndarray, scale: float, out: np.ndarray) -> None:
        """Add scale * J' H_L J v to out (D,)."""
        u = self.jvp(v)
        self._hessian(u, scale)
        out += self.passes.vjp(u)

    def columns(self, v: np.ndarray, scale: float, out: np.ndarray) -> None:
        """Add scale * G V, row by row, to out (C, D)."""
        u = self.jvp(v)
        for own in u:
            self._hessian(own, scale)
        out += self.passes.vjp(u)

    def project(self, v: np.ndarray, scale: float, out: np.ndarray) -> None:
        """Add scale * V G V' to out (C, C)."""
        u = self.jvp(v)
        before = u.reshape(len(v), -1).copy()
        for own in u:
            self._hessian(own, scale)
        out += before @ u.reshape(len(v), -1).T

    def _loss_gradient(self, scale: float) -> np.ndarray:
        u = np.empty_like(self.kept)
        self.output_loss.gradient(self.backend, self.kept, self.targets, scale, u)
        if self.mask is not None:
            u *= self.mask
        return u

    def _hessian(self, u: np.ndarray, scale: float) -> None:
        """Overwrite u (N, O) with scale * H_L u."""
        self.output_loss.hessian(self.backend, self.kept, u, scale)
        if self.mask is not None:
            u *= self.mask


def layout(shapes: Sequence[tuple[str, tuple[int, ...]]], stacked: Mapping[str, int]) -> tuple[Block, ...]:
    """Give the blocks of named arrays that lie one after the other in theta.

    A vector is one row; what has more axes than two is a matrix of its first axis and the rest. `stacked`
    has, by name, how many equal ones lie in an array along its first axis.
    """
    found, start = [], 0
    for name, shape in shapes:
        size = math.prod(shape)
        rows, count = shape[0] if len(shape) > 1 else 1, stacked.get(name, 1)
        if rows > 1:
            cuts = tuple(range(rows // count, rows, rows // count))
            found.append(Block(name, start, rows, size // rows, cuts))
        else:
            found.append(Block(name, start, rows, size, groups=count))
        start += size
    return tuple(found)


class FrameworkModel(ABC):
    """A model of a function that a framework differentiates; satisfies `hfmpi.models.base.Model`.

    Parameters
    ----------
    shapes : sequence of (name, shape)
        The arrays that theta is made of, one after the other.
    start : (D,) float32 or float64
        The parameters that the user's model has; their type is that of all vectors.
    loss : {'cross-entropy', 'squares', 'bernoulli'} or Loss
    stacked : mapping of str to int
        See `layout`.
    """

    def __init__(
        self,
        shapes: Sequence[tuple[str, tuple[int, ...]]],
        start: np.ndarray,
        loss: str | Loss,
        stacked: Mapping[str, int] = MappingProxyType({}),
    ) -> None:
        self.output_loss = choose(loss)
        self.backend = NumpyBackend(start.dtype.name)
        self.blocks = layout(shapes, stacked)
        self._start = start
        self._checked = False

    @property
    def size(self) -> int:
        """D, the number of parameters."""
        return self._start.size

    def initial(self, seed: int) -> np.ndarray:
        """Give the parameters that the user's model had, (D,) float64, whatever the seed."""
        return self._start.astype(np.float64)

    def release(self) -> None:
        """Give scratch memory back."""
        self.backend.release()

    def _fit_micro_batch(self, nbytes: float) -> None:
        """Let micro-batches be as large as suits cases that keep so many bytes each."""
        most = int(MICRO_BATCH_BYTES / max(nbytes, 1))
        self.backend.micro_batch = min(MOST_MICRO_BATCH, max(NumpyBackend.micro_batch, most))

    def threads(self, count: int) -> AbstractContextManager[object]:
        """Let the framework compute with so many threads inside the context, where it can be told."""
        return nullcontext()

    def outputs(self, theta: np.ndarray, batch: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
        """Give outputs (N, O), before the loss, their targets (N,) or (N, O), and a mask (N, 1) or None."""
        theta, example = self._placed(theta, batch)
        return self._outputs(theta, example.inputs, example.rows), example.targets, example.mask

    def loss(self, theta: np.ndarray, batch: Any) -> float:
        """Give the summed loss in nats, without a linearisation."""
        theta, example = self._placed(theta, batch)
        return self._value(self._outputs(theta, example.inputs, example.rows), example)[0]

    def linearise(
        self, theta: np.ndarray, batch: Any, reuse: FrameworkLinearisation | None = None
    ) -> FrameworkLinearisation:
        """Linearise at theta (D,) on a batch; `reuse` gives its memory back first."""
        if reuse is not None:
            del reuse.passes
        theta, example = self._placed(theta, batch)
        passes = self._linearise(theta, example.inputs, example.rows)
        loss, kept = self._value(passes.outputs, example)
        return FrameworkLinearisation(
            passes, self.output_loss, self.backend, kept, example.targets, example.mask, loss
        )

    def squared_gradients(
        self, at: FrameworkLinearisation, scale: float, out: np.ndarray, squares: np.ndarray
    ) -> None:
        """Add the gradient to out (D,), and the sum of its squares over cases to squares (D,)."""
        at.squared_gradients(scale, out, squares)

    @property
    def factors_size(self) -> int:
        """The numbers that `factored_gradient` adds to."""
        return case_factors.size(self.blocks)

    def factored_gradient(
        self, at: FrameworkLinearisation, scale: float, out: np.ndarray, factors: np.ndarray
    ) -> None:
        """Add the gradient to out (D,), and sums for the Kronecker factors of all blocks to factors."""
        at.factored_gradient(scale, out, factors)

    def normalise_factors(self, factors: np.ndarray, scored: int) -> np.ndarray:
        """Give A and B of each block, one after the other, from sums over all cases, which are used up."""
        return case_factors.normalise(self.blocks, factors, scored)

    @abstractmethod
    def _outputs(self, theta: np.ndarray, inputs: tuple[np.ndarray, ...], rows: Rows) -> np.ndarray:
        """Give the rows of outputs (N, O)."""

    @abstractmethod
    def _linearise(self, theta: np.ndarray, inputs: tuple[np.ndarray, ...], rows: Rows) -> Passes:
        """Linearise the rows of outputs."""

    def _check(self, theta: np.ndarray, example: Example) -> None:
        """Raise a UserError where the first batch shows that the function cannot be trained so.

        The cases of a batch are spread over micro-batches and ranks, so none may depend on another.
        """
        outputs = self._outputs(theta, example.inputs, example.rows)
        first = example.first
        alone = self._outputs(theta, first.inputs, first.rows)
        size = np.abs(alone[np.isfinite(alone)]).max(initial=0)
        if not np.allclose(outputs[: len(alone)], alone, 0, 1e-2 * size, True):  # far above rounding
            raise UserError(
                "the outputs of a case depend on the other cases of its batch, as with batch statistics: "
                "train with fixed ones (in PyTorch: module.eval())"
            )
        with np.errstate(all="ignore"):
            loss = self._value(outputs, example)[0]
        if not math.isfinite(loss):
            raise UserError(
                f"the loss is not finite at the start ({loss}): check parameters, inputs and targets"
            )

    def _value(self, outputs: np.ndarray, example: Example) -> tuple[float, np.ndarray]:
        """Give the summed loss, and what the loss keeps of the outputs (N, O)."""
        kept = np.array(outputs, self.backend.dtype, order="C")  # the framework's own memory stays as it is
        if self.output_loss.symbols:
            _check_symbols(example.targets, kept.shape[1])
        losses = self.output_loss.value(self.backend, kept, example.targets)
        if example.mask is not None:
            losses = losses * example.mask[:, 0]
        return float(losses.sum()), kept

    def _placed(self, theta: np.ndarray, batch: Any) -> tuple[np.ndarray, Example]:
        """Check theta and a batch; give theta in the model's type, and the batch with its cases first."""
        check_vector("theta", theta, self.size, np.ndarray)
        theta = theta.astype(self.backend.dtype, copy=False)
        if isinstance(batch, _CasesFirst):
            several = batch.inputs if isinstance(batch.inputs, tuple) else (batch.inputs,)
            inputs = tuple(map(np.asarray, several))
            targets, mask = np.asarray(batch.targets), batch.mask
        elif isinstance(batch, Batch):  # time first
            inputs, targets = (
                (np.asarray(batch.inputs).swapaxes(0, 1),),
                np.asarray(batch.targets).swapaxes(0, 1),
            )
            mask = None if batch.mask is None else np.asarray(batch.mask).swapaxes(0, 1)
        else:
            raise UserError(
                f"a batch must have inputs, targets and mask, as of hfmpi.Examples, not {shown(batch)}"
            )
        symbols, dtype = self.output_loss.symbols, self.backend.dtype
        if (targets.dtype.kind in "iu") != symbols:
            wanted = "whole numbers, as symbols are" if symbols else "real numbers, as of astype(float)"
            raise UserError(f"targets of this loss must be {wanted}, not {targets.dtype}")
        if symbols:
            rows = Rows(targets.shape, None)
            targets = targets.reshape(-1)
        else:
            if targets.ndim == 1:
                targets = targets[:, None]
            rows = Rows(targets.shape[:-1], targets.shape[-1])
            targets = targets.reshape(-1, targets.shape[-1]).astype(dtype, copy=False)
        if mask is not None:
            if np.shape(mask) != rows.shape:
                raise UserError(f"the mask must be of shape {rows.shape}, not {np.shape(mask)}")
            mask = np.asarray(mask).astype(dtype).reshape(-1, 1)
        inputs = tuple(x.astype(dtype, copy=False) if x.dtype.kind == "f" else x for x in inputs)
        example = Example(inputs, rows, targets, mask)
        if not self._checked:
            self._check(theta, example)
            self._checked = True
        return theta, example


def _check_symbols(targets: np.ndarray, count: int) -> None:
    """Raise a UserError if there are others than 0 ... count - 1."""
    if targets.min() < 0 or targets.max() >= count:
        raise UserError(
            f"targets must be symbols 0 ... {count - 1}, as outputs are, "
            f"not {targets.min()} to {targets.max()}"
        )
