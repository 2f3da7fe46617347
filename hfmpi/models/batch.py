"""The form of a batch that every model accepts: examples first, checked, with its scored outputs."""

from __future__ import annotations

import math
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np

from hfmpi.errors import UserError, shown
from hfmpi.models.losses import Loss

__all__ = ["Batch", "CheckedBatch", "ScoredOutputs", "check_batch", "check_mask", "check_symbols", "parts"]


@runtime_checkable
class Batch(Protocol):
    """B examples: the first axis of every array counts them."""

    @property
    def inputs(self) -> Any:
        """(B, ...), or a tuple of such."""

    @property
    def targets(self) -> Any:
        """(B, ...) symbols, or (B, ..., O) numbers."""

    @property
    def mask(self) -> Any:
        """(B, ...), 1 where a target is scored and 0 where it is not, or None: all are."""


class ScoredOutputs(NamedTuple):
    """The shape of the outputs of a batch that have targets.

    Attributes
    ----------
    shape : tuple of int
        (B, ...) of the targets, without their last axis where they are vectors.
    width : int or None
        O, where the targets determine it.
    """

    shape: tuple[int, ...]
    width: int | None

    @property
    def rows(self) -> int:
        """N, the number of these outputs."""
        return math.prod(self.shape)

    @property
    def example(self) -> ScoredOutputs:
        """The scored outputs of a batch of one example."""
        return ScoredOutputs((1, *self.shape[1:]), self.width)

    def of(self, outputs: Any) -> Any:
        """Return the scored outputs (N, O) of outputs (B, ..., O), an array of any framework.

        Outputs of more steps (axis 1) than there are targets lose the first ones, the burn-in. Outputs (B, O)
        without steps serve targets of one step.

        Raises
        ------
        UserError
            If the outputs do not fit the targets.
        """
        if not hasattr(outputs, "reshape"):
            raise UserError(
                f"a model must return one array of outputs, not {shown(outputs)}: "
                "wrap it so that it returns the outputs alone"
            )
        z, shape = outputs, self.shape
        if z.ndim == 1:
            z = z.reshape(-1, 1)
        fits = tuple(z.shape[:-1]) == shape
        if not fits and z.ndim == len(shape) + 1 > 2:
            z = z[:, max(0, z.shape[1] - shape[1]) :]
            fits = tuple(z.shape[:-1]) == shape
        elif not fits and z.ndim == 2:
            fits = (z.shape[0], 1) == shape
        if not fits or self.width not in (None, z.shape[-1]):
            wanted = ", ".join(map(str, shape)) + f", {self.width or 'symbols'}"
            raise UserError(
                f"outputs must be of shape ({wanted}) for these targets, not {tuple(outputs.shape)}"
            )
        return z.reshape(self.rows, z.shape[-1])


class CheckedBatch(NamedTuple):
    """A checked batch, the argument of the function of a framework.

    Attributes
    ----------
    inputs : tuple of (B, ...)
    scored : ScoredOutputs
    targets : (N,) integers, or (N, O)
    mask : (N, 1) or None
    """

    inputs: tuple[np.ndarray, ...]
    scored: ScoredOutputs
    targets: np.ndarray
    mask: np.ndarray | None

    @property
    def first(self) -> CheckedBatch:
        """The first example as a batch."""
        scored = self.scored.example
        mask = None if self.mask is None else self.mask[: scored.rows]
        return CheckedBatch(tuple(x[:1] for x in self.inputs), scored, self.targets[: scored.rows], mask)


def parts(batch: Any) -> tuple[tuple[np.ndarray, ...], np.ndarray, np.ndarray | None]:
    """Return the inputs, targets and mask of a batch as arrays on the host.

    Raises
    ------
    UserError
        If it does not have them.
    """
    if not isinstance(batch, Batch):
        raise UserError(
            f"a batch must have inputs, targets and mask, as of hfmpi.Examples, not {shown(batch)}"
        )
    inputs = batch.inputs if isinstance(batch.inputs, tuple) else (batch.inputs,)
    mask = None if batch.mask is None else np.asarray(batch.mask)
    return tuple(map(np.asarray, inputs)), np.asarray(batch.targets), mask


def check_batch(batch: Any, loss: Loss, dtype: np.dtype) -> CheckedBatch:
    """Return a batch with its real numbers in the type `dtype` of the model.

    Raises
    ------
    UserError
        If it is not a batch, or its targets are not of the kind that the loss requires.
    """
    inputs, targets, mask = parts(batch)
    if (targets.dtype.kind in "iu") != loss.symbols:
        wanted = "whole numbers, as symbols are" if loss.symbols else "real numbers, as of astype(float)"
        raise UserError(f"targets of this loss must be {wanted}, not {targets.dtype}")
    if loss.symbols:
        scored, targets = ScoredOutputs(targets.shape, None), targets.reshape(-1)
    else:
        targets = targets[:, None] if targets.ndim == 1 else targets
        scored = ScoredOutputs(targets.shape[:-1], targets.shape[-1])
        targets = targets.reshape(-1, targets.shape[-1]).astype(dtype, copy=False)
    check_mask(mask, scored.shape)
    mask = None if mask is None else mask.astype(dtype).reshape(-1, 1)
    inputs = tuple(x.astype(dtype, copy=False) if x.dtype.kind == "f" else x for x in inputs)
    return CheckedBatch(inputs, scored, targets, mask)


def check_mask(mask: np.ndarray | None, shape: tuple[int, ...]) -> None:
    """Raise a UserError unless the mask, if there is one, has the shape of the scored outputs."""
    if mask is not None and mask.shape != shape:
        raise UserError(f"the mask must be of shape {shape}, not {mask.shape}")


def check_symbols(name: str, symbols: np.ndarray, count: int) -> None:
    """Raise a UserError unless all are symbols 0 ... count - 1: kernels read tables with them."""
    if not symbols.size:
        return
    if symbols.dtype.kind not in "iu":
        raise UserError(f"{name} must be whole numbers, as symbols are, not {symbols.dtype}")
    if symbols.view(f"u{symbols.itemsize}").max() >= count:  # negative ones are huge
        raise UserError(
            f"{name} must be symbols from 0 to {count - 1}, not {symbols.min()} to {symbols.max()}"
        )
