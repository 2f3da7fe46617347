"""Checks of a batch and of its scored outputs; the first axis of every array counts the examples."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np

from hfmpi.data.batches import BadExample, scored_targets
from hfmpi.data.examples import native, one_hot_remedy
from hfmpi.errors import UserError, shown
from hfmpi.models.losses import Loss

__all__ = [
    "Batch",
    "CheckedBatch",
    "NotFinite",
    "ScoredOutputs",
    "burn_in_of",
    "check_batch",
    "check_bounds",
    "check_finite",
    "check_mask",
    "check_symbols",
    "check_targets",
    "example_weights",
    "parts",
]


class NotFinite(UserError):
    """Raised when the loss is not finite at the start of a run."""

    def __init__(self, loss: float) -> None:
        super().__init__(
            f"the loss is not finite at the start ({loss}): check the parameters, inputs and targets"
        )
        self.loss = loss


@runtime_checkable
class Batch(Protocol):
    """A batch of B examples: the first axis of every array counts them."""

    @property
    def inputs(self) -> Any:
        """An array (B, ...), or a tuple of such arrays."""

    @property
    def targets(self) -> Any:
        """Symbols (B, ...), or real numbers (B, ..., O)."""

    @property
    def mask(self) -> Any:
        """The weight of every target (B, ...), 0 where it is not scored; None: all are 1."""

    @property
    def burn_in(self) -> int:
        """The number of outputs at the start of every example (axis 1) that have no target."""


class ScoredOutputs(NamedTuple):
    """The shape of the outputs of a batch that have targets.

    Attributes
    ----------
    shape : tuple of int
        (B, ...), the shape of the targets, without their last axis if they are vectors.
    width : int or None
        O, if the targets determine it.
    burn_in : int
        The number of outputs at the start of every example (axis 1) that have no target.
    """

    shape: tuple[int, ...]
    width: int | None
    burn_in: int = 0

    @property
    def rows(self) -> int:
        """N, the number of these outputs."""
        return math.prod(self.shape)

    @property
    def example(self) -> ScoredOutputs:
        """The scored outputs of a batch of one example."""
        return self.of_examples(1)

    def of_examples(self, count: int) -> ScoredOutputs:
        """Return the scored outputs of a batch of `count` examples."""
        return self._replace(shape=(count, *self.shape[1:]))

    def of(self, outputs: Any) -> Any:
        """Return the scored outputs (N, O) of outputs (B, ..., O), an array of any framework.

        The burn-in, which is at the start of axis 1, is removed. Outputs (B, O) without a time axis fit
        targets of one step.

        Raises
        ------
        UserError
            If the outputs do not fit the targets.
        """
        if not hasattr(outputs, "reshape"):
            raise UserError(
                f"a model must return one array of outputs, not {shown(outputs)}: "
                "wrap it in a function that returns only the outputs"
            )
        z = outputs.reshape(-1, 1) if outputs.ndim < 2 else outputs
        got, shape, k = tuple(z.shape[:-1]), self.shape, self.burn_in
        if k and len(shape) > 1 and got == (shape[0], shape[1] + k, *shape[2:]):
            z = z[:, k:]
        elif k or (got != shape and (*got, 1) != shape):
            raise UserError(self._misfit(tuple(outputs.shape)))
        if self.width not in (None, z.shape[-1]):
            raise UserError(self._misfit(tuple(outputs.shape)))
        return z.reshape(self.rows, z.shape[-1])

    def _misfit(self, outputs: tuple[int, ...]) -> str:
        """Return an error message for outputs of a shape that does not fit the targets."""
        shape, k = self.shape, self.burn_in
        targets = shape if self.width is None else (*shape, self.width)
        steps = (shape[0], *(size + k for size in shape[1:2]), *shape[2:])
        wanted = ", ".join(map(str, (*steps, "classes" if self.width is None else self.width)))
        burn_in = f" with a burn-in of {k}" if k else ""
        said = [
            f"outputs of shape {outputs} do not fit targets of shape {targets}{burn_in}: outputs must be "
            f"({wanted})"
        ]
        more = outputs[1] - shape[1] if len(outputs) == len(shape) + 1 > 2 else 0
        if not k and more > 0 and (outputs[0], *outputs[2:-1]) == (shape[0], *shape[2:]):
            said.append(
                "remove the outputs without a target from the model, or declare the first ones as burn-in: "
                f"hfmpi.Examples(x, y, burn_in={more})"
            )
        if self.width is None and len(outputs) > 2 and (outputs[0], *outputs[2:]) == shape:
            said.append(
                "if axis 1 contains the classes, pass the loss as torch.nn.CrossEntropyLoss(), or move the "
                "axis: outputs.movedim(1, -1)"
            )
        if self.width is None and outputs == shape:
            said.append("if the targets are one-hot vectors, pass their symbols: y.argmax(-1)")
        return "; ".join(said)


class CheckedBatch(NamedTuple):
    """A checked batch, in the form in which a framework model processes it.

    Attributes
    ----------
    inputs : tuple of (B, ...)
    scored : ScoredOutputs
    targets : (N,) integers, or (N, O)
    mask : (N, 1) or None
    weights : (B,) or None
        See `example_weights`.
    """

    inputs: tuple[np.ndarray, ...]
    scored: ScoredOutputs
    targets: np.ndarray
    mask: np.ndarray | None
    weights: np.ndarray | None = None

    @property
    def size(self) -> int:
        """B, the number of examples."""
        return self.scored.shape[0]

    def take(self, indices: Sequence[int]) -> CheckedBatch:
        """Return some of the examples as a batch."""
        at, count = list(indices), self.size
        scored = self.scored.of_examples(len(at))

        def some(rows: np.ndarray) -> np.ndarray:
            by_example = rows.reshape(count, -1, *rows.shape[1:])
            return by_example[at].reshape(scored.rows, *rows.shape[1:])

        mask = None if self.mask is None else some(self.mask)
        weights = None if self.weights is None else self.weights[at]
        return CheckedBatch(tuple(x[at] for x in self.inputs), scored, some(self.targets), mask, weights)


def parts(batch: Any) -> tuple[tuple[np.ndarray, ...], np.ndarray, np.ndarray | None]:
    """Return the inputs, targets and mask of a batch as arrays on the host.

    Raises
    ------
    UserError
        If the batch does not have them.
    """
    if not all(hasattr(batch, name) for name in ("inputs", "targets", "mask")):
        raise UserError(
            f"a batch must have inputs, targets and mask, as in hfmpi.Examples, but it is {shown(batch)}"
        )
    inputs = batch.inputs if isinstance(batch.inputs, tuple) else (batch.inputs,)
    mask = None if batch.mask is None else np.asarray(batch.mask)
    return tuple(native(np.asarray(x)) for x in inputs), native(np.asarray(batch.targets)), mask


def check_batch(batch: Any, loss: Loss, dtype: np.dtype, cast: bool = True) -> CheckedBatch:
    """Check a batch and convert it to the form in which a framework model processes it.

    Parameters
    ----------
    batch : object
        With attributes inputs, targets and mask.
    loss : Loss
    dtype : dtype
        The type of the model, to which real targets and the mask are converted.
    cast : bool
        Whether real inputs are also converted to `dtype`.

    Raises
    ------
    UserError
        If it is not a batch, or its targets are not of the kind that the loss requires.
    """
    inputs, targets, mask = parts(batch)
    check_kind(targets, loss)
    if loss.symbols:
        shape, width = targets.shape, None
    else:
        targets = targets[:, None] if targets.ndim == 1 else targets
        shape, width = targets.shape[:-1], targets.shape[-1]
    check_mask(mask, shape)
    targets = scored_targets(targets, mask).reshape(-1, *targets.shape[len(shape) :])
    if not loss.symbols:
        check_bounds(targets, loss)
        targets = targets.astype(dtype, copy=False)
    scored = ScoredOutputs(shape, width, burn_in_of(batch))
    weights = example_weights(batch, dtype)
    mask = None if mask is None else mask.astype(dtype).reshape(-1, 1)
    if cast:
        inputs = tuple(x.astype(dtype, copy=False) if x.dtype.kind == "f" else x for x in inputs)
    return CheckedBatch(inputs, scored, targets, mask, weights)


def example_weights(batch: Any, dtype: np.dtype) -> np.ndarray | None:
    """Return the weight of each example (B,), the mean weight of its scored targets; None if all are 1.

    Sums over examples that are not linear in their loss, such as that of squared gradients, count each
    example as many times as its weight.
    """
    if not getattr(batch, "weighted", False):
        return None
    by_example = np.asarray(batch.mask, np.float64).reshape(len(batch.mask), -1)
    weights = by_example.sum(axis=1) / np.maximum(1, (by_example > 0).sum(axis=1))
    return None if (weights == 1).all() else weights.astype(dtype)


def burn_in_of(batch: Any) -> int:
    """Return the burn-in of a batch: 0 for batches of user-defined `Cases` without this attribute."""
    return int(getattr(batch, "burn_in", 0))


def check_kind(targets: np.ndarray, loss: Loss) -> None:
    """Raise a UserError unless the targets are symbols or real numbers, as the loss requires."""
    if (targets.dtype.kind in "iu") != loss.symbols:
        wanted = "whole numbers (symbols)" if loss.symbols else "real numbers (y.astype(float))"
        remedy = "; pass y.astype(int)" if loss.symbols and targets.dtype == bool else ""
        if loss.symbols:
            remedy = one_hot_remedy(targets) or remedy
        raise UserError(f"targets of this loss must be {wanted}, not {targets.dtype}{remedy}")


def check_targets(targets: np.ndarray, mask: np.ndarray | None, loss: Loss, width: int) -> None:
    """Raise a UserError unless every scored target is in the domain of the loss.

    Parameters
    ----------
    targets : (B, ...) integers, or (B, ...) or (B, ..., O) real numbers
        The index along the first axis is the number of the example in the message.
    mask : (B, ...) or None
    loss : Loss
    width : int
        O, the number of outputs.
    """
    check_kind(targets, loss)
    targets = scored_targets(targets, mask)
    if loss.symbols:
        wanted = f"symbols from 0 to {width - 1} (the model has {width} outputs)"
        bad = (targets < 0) | (targets >= width)
    else:
        low, high = bounds_of(loss)
        wanted = _wanted(low, high)
        bad = ~(np.isfinite(targets) & (targets >= low) & (targets <= high))
    _refuse(targets, bad, f"targets of this loss must be {wanted}")


def check_finite(targets: np.ndarray, mask: np.ndarray | None) -> None:
    """Raise a UserError unless all scored targets (B, ...) are finite; integers always are."""
    if targets.dtype.kind == "f":
        targets = scored_targets(targets, mask)
        _refuse(targets, ~np.isfinite(targets), "targets must be finite numbers")


def _refuse(targets: np.ndarray, bad: np.ndarray, sentence: str) -> None:
    """Raise a UserError that names the first target for which `bad` is true, if there is one."""
    if bad.any():
        at = np.unravel_index(int(np.argmax(bad)), bad.shape)
        remedy = ": correct it, or exclude it with a mask (hfmpi.Examples(x, y, mask))"
        raise BadExample(f"{sentence}, not {targets[at]} as in", int(at[0]), remedy)


def bounds_of(loss: Loss) -> tuple[float, float]:
    """Return the smallest and the largest target that a loss of real numbers accepts."""
    low, high = getattr(loss, "bounds", (-math.inf, math.inf))
    return low, high


def check_bounds(targets: np.ndarray, loss: Loss) -> None:
    """Raise a UserError unless the scored targets of a batch are finite and within the bounds of the loss."""
    if not targets.size:
        return
    (low, high), least, most = bounds_of(loss), targets.min(), targets.max()
    if not (low <= least <= most <= high and math.isfinite(least) and math.isfinite(most)):
        shown_range = f"{least} to {most}" if least <= most else least
        raise UserError(f"targets of this loss must be {_wanted(low, high)}, not {shown_range}")


def _wanted(low: float, high: float) -> str:
    return "finite numbers" if math.isinf(low) and math.isinf(high) else f"numbers from {low:g} to {high:g}"


def check_mask(mask: np.ndarray | None, shape: tuple[int, ...]) -> None:
    """Raise a UserError if there is a mask and its shape is not that of the scored outputs."""
    if mask is not None and mask.shape != shape:
        raise UserError(f"the mask must have shape {shape}, not {mask.shape}")


def check_symbols(name: str, symbols: np.ndarray, count: int) -> None:
    """Raise a UserError unless all are symbols 0 ... count - 1, with which kernels index tables."""
    if not symbols.size:
        return
    if symbols.dtype.kind not in "iu":
        raise UserError(f"{name} must be whole numbers (symbols), not {symbols.dtype}")
    least, most = symbols.min(), symbols.max()
    if least < 0 or most >= count:
        raise UserError(f"{name} must be symbols from 0 to {count - 1}, not {least} to {most}")
