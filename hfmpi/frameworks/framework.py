"""The base class of models whose function is differentiated by a framework (torch.py, jax.py).

The framework computes outputs, J v and J' u of a function of theta on one batch; an exchange converts these
vectors (exchange.py). This module adds theta as one vector and its matrices, the checks of a function on
its first batch, and the plan, which determines how the passes of the model are computed.
"""

from __future__ import annotations

import logging
import math
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from textwrap import shorten
from types import MappingProxyType
from typing import Any, ClassVar, Literal, TypeVar

import numpy as np

from hfmpi.backends.base import Array
from hfmpi.backends.numpy import NumpyBackend
from hfmpi.data.batches import spread
from hfmpi.data.examples import Examples
from hfmpi.errors import UserError
from hfmpi.frameworks.exchange import Exchange, FrameworkPasses
from hfmpi.frameworks.trial import DEPENDS, FEW, Trial, elsewhere
from hfmpi.models.batch import CheckedBatch, NotFinite, check_batch, check_symbols, check_targets
from hfmpi.models.factors import FactorSums
from hfmpi.models.linearisation import LossLinearisation
from hfmpi.models.loss_check import check_loss
from hfmpi.models.losses import Loss, choose, total_loss
from hfmpi.models.micro_batches import EveryOutput, check_theta, in_parts, inputs_alone, loss_of_examples
from hfmpi.optim.checks import check_vector
from hfmpi.optim.layout import Block, Layout

__all__ = [
    "SUMMED",
    "FrameworkModel",
    "Plan",
    "check_gradient",
    "first_line",
    "matrices",
    "split_examples",
]

T = TypeVar("T")

MICRO_BATCH_BYTES = 1 << 26
"""Memory in bytes that the linearisation of a micro-batch may occupy: many small examples share one call."""

MOST_MICRO_BATCH = 1024
"""Maximum number of examples in a micro-batch, unless the user chooses the size."""

LARGE_MICRO_BATCH_BYTES = 1 << 30
"""The same for micro-batches of fewer than 32 examples: large examples are processed a few at a time."""

PASSING_NUMBERS = 1 << 20
"""Entries of gradients that are used at once and then discarded: few compared with the vectors of a step."""

GRADIENT_NUMBERS = 1 << 24
"""The maximum number of entries of per-example gradients that are computed at once."""

SUMMED = 4
"""The number of examples whose gradients are compared with that of their batch."""

SEPARATE = {False: 1e-3, True: 1e-2}
"""Relative difference of these gradients that rounding may make, on a CPU and on a GPU."""

BLOCK_FACTOR = 8
"""V G V' uses larger blocks of outputs than in built-in networks: most models here have fewer outputs."""

CACHE = 1 << 25
"""Maximum size in bytes of the tangents of several directions in one call: they should fit a core's cache."""

ALL_DIRECTIONS = 1 << 16

FEWEST_DIRECTIONS, MOST_DIRECTIONS = 4, 8
"""Directions per call on a CPU: the overhead of calls dominates below the minimum; more are not faster."""

Batched = Literal["directions", "examples"]
"""The axes over which a framework can batch a call."""


class NotInFloat64(Exception):
    """Raised if a function does not compute in float64."""


@dataclass(frozen=True)
class Plan:
    """The way in which the passes of a model are computed, determined by its first batch and later failures.

    Attributes
    ----------
    checked : object
        The mode of the model in which a batch has passed all checks; None before the first check.
    width : int
        O, the number of outputs, in the batch that was checked.
    sequential : frozenset of {'directions', 'examples'}
        The axes that are processed one at a time, because the framework cannot batch an operation over them.
    """

    checked: object = None
    width: int = 0
    sequential: frozenset[Batched] = frozenset()


def matrices(layout: Layout[str], stacked: Mapping[str, int] = MappingProxyType({})) -> tuple[Block, ...]:
    """Return the matrix of each array in theta.

    A vector is one row; an array with more than two axes is a matrix of its first axis and the rest.

    Parameters
    ----------
    layout : Layout
    stacked : mapping of str to int
        The number of equal matrices that are stacked in an array along its first axis, by its name.
    """
    blocks = []
    for name, shape in layout.shapes.items():
        start, size = layout.offsets[name], math.prod(shape)
        rows, count = shape[0] if len(shape) > 1 else 1, stacked.get(name, 1)
        if rows > 1:
            cuts = tuple(range(rows // count, rows, rows // count))
            blocks.append(Block(name, start, rows, size // rows, cuts))
        else:
            blocks.append(Block(name, start, rows, size, groups=count))
    return tuple(blocks)


def directions_at_once(nbytes: int) -> int:
    """Return the number of directions per call if the tangents of each have about `nbytes` bytes.

    These are assumed to be as large as the linearisation.
    """
    return max(FEWEST_DIRECTIONS, min(MOST_DIRECTIONS, CACHE // max(1, nbytes)))


def split_examples(count: int, numbers: int, entries: int = GRADIENT_NUMBERS) -> list[slice]:
    """Divide `count` examples into parts whose gradients, of `numbers` entries each, are computed at once.

    The gradients of one part have about `entries` entries in total.
    """
    most = max(1, entries // max(1, numbers))
    return [slice(start, min(start + most, count)) for start in range(0, count, most)]


def first_line(error: Exception) -> str:
    """Return the first line of an error message, at most 120 characters."""
    return shorten(str(error).partition("\n")[0], 120, placeholder=" ...")


def check_gradient(gradient: np.ndarray) -> None:
    """Raise a UserError unless J' u (D,) is finite."""
    if not np.isfinite(gradient).all():
        raise UserError(
            "the derivatives of the outputs are not finite at the initial parameters: check for a root or a "
            "norm at 0, and for a `where` with a branch that is not finite"
        )


class FrameworkModel(ABC):
    """A model of a function that a framework differentiates; satisfies `hfmpi.models.base.Model`.

    Parameters
    ----------
    shapes : sequence of (name, shape)
        The arrays in theta, in order.
    start : (D,) float32 or float64
        The initial parameters of the user's model; their dtype is that of all vectors.
    loss : {'cross-entropy', 'squares', 'mse', 'bernoulli', 'binary-cross-entropy'} or Loss
    stacked : mapping of str to int
        See `matrices`.
    exchange : Exchange, optional
        Converts vectors for the framework. Default: the framework computes with NumPy arrays.

    Attributes
    ----------
    plan : Plan
        How passes are computed; `replan` replaces it.
    backend : NumpyBackend
        The backend of the exchange, which determines the device and the dtype of all vectors.
    on_gpu : bool
        Whether the function runs on a GPU.
    """

    linearisation = LossLinearisation
    plan: Plan = Plan()
    on_gpu = False

    batching_error: ClassVar[type[Exception]] = NotImplementedError
    """What the framework raises if it cannot batch an operation."""

    casts: ClassVar[bool] = True
    """Whether real inputs of batches are converted to the dtype of theta."""

    noun: ClassVar[str] = "the function"
    """The name of the user's function in messages."""

    memory_words: ClassVar[tuple[str, ...]] = ()
    """Phrases that identify a RuntimeError as a lack of memory."""

    def __init__(
        self,
        shapes: Sequence[tuple[str, tuple[int, ...]]],
        start: np.ndarray,
        loss: str | Loss,
        stacked: Mapping[str, int] = MappingProxyType({}),
        exchange: Exchange | None = None,
    ) -> None:
        self.output_loss = choose(loss)
        self.exchange = exchange or Exchange(NumpyBackend(start.dtype.name))
        self.backend = self.exchange.backend
        self.layout = Layout(dict(shapes))
        self.blocks = matrices(self.layout, stacked)
        self.lock = threading.RLock()  # held while a batch is checked
        self._start = start

    def __getstate__(self) -> dict[str, Any]:
        """Return the state for copying and pickling, without the lock."""
        return {name: value for name, value in self.__dict__.items() if name != "lock"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore the state of a copy, with a new lock."""
        self.__dict__.update(state, lock=threading.RLock())

    @property
    def size(self) -> int:
        """The number of parameters, D."""
        return self._start.size

    @property
    def factor_sums(self) -> FactorSums:
        """The layout of the sums of the Kronecker factors of all blocks."""
        return FactorSums(self.blocks)

    def initial(self, seed: int) -> np.ndarray:
        """Return the initial parameters of the user's model, (D,) float64; the seed has no effect."""
        return self._start.astype(np.float64)

    def release(self) -> None:
        """Release scratch memory."""
        self.exchange.release()
        self.backend.release()

    def threads(self, count: int) -> AbstractContextManager[object]:
        """Limit the framework to `count` threads inside the context, if it has such a setting."""
        return nullcontext()

    def outputs(self, theta: Array, batch: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
        """Return outputs (N, O), before the loss, their targets (N,) or (N, O), and a mask (N, 1) or None."""
        with self.exchange.working():
            theta, examples = self._place(theta, batch)
            outputs = self.backend.to_host(self._outputs(theta, examples))
        return outputs, examples.targets, examples.mask

    def predict(self, theta: np.ndarray, x: Any) -> np.ndarray:
        """Compute the outputs for inputs without targets, on this rank only, in micro-batches.

        Parameters
        ----------
        theta : (D,)
            Parameters, such as `result.theta` of `hfmpi.train`.
        x : array or tensor (B, ...), or a tuple of several inputs
            The first axis counts the examples.

        Returns
        -------
        outputs : (B, ..., O)
            Before the loss, in the shape in which the model returns them, but with the classes along the last
            axis.

        Raises
        ------
        UserError
            If theta or the inputs do not fit the model.

        Examples
        --------
        >>> logits = model.predict(result.theta, x_new)
        >>> classes = logits.argmax(axis=-1)
        """
        check_theta(theta, self.size)
        theta = self.backend.to_device(theta.astype(self.backend.dtype, copy=False))
        inputs = inputs_alone(x)
        if self.casts:
            inputs = tuple(
                x.astype(self.backend.dtype, copy=False) if x.dtype.kind == "f" else x for x in inputs
            )

        def batch(inputs: tuple[np.ndarray, ...]) -> CheckedBatch:
            count = len(inputs[0])
            return CheckedBatch(inputs, EveryOutput.of_batch(count), np.zeros((count, 0)), None)

        if self.plan.checked != self._mode():
            with self.lock, self.exchange.working():
                self._plan_outputs(theta, batch(tuple(x[:FEW] for x in inputs)))

        def outputs(part: tuple[np.ndarray, ...]) -> np.ndarray:
            with self.exchange.working():
                return np.asarray(self.backend.to_host(self._outputs(theta, batch(part))))

        return in_parts(outputs, inputs, self.backend.micro_batch)

    def _plan_outputs(self, theta: np.ndarray, few: CheckedBatch) -> None:  # noqa: B027 (no choice by default)
        """Plan the computation of outputs if no batch with targets has been checked."""

    def check(self, theta: Array, batch: Any) -> None:
        """Check the model on a batch before a run, as the first batch is checked.

        Raises
        ------
        UserError
            If the model cannot be trained on the batch.
        """
        with self.lock, self.exchange.working():
            self.replan(checked=None)
            self._place(theta, batch)

    def check_data(self, inputs: Any, targets: np.ndarray, mask: np.ndarray | None) -> None:
        """Raise a UserError unless all scored targets are in the domain of the loss.

        A batch must have been checked before, which determines the number of outputs.
        """
        check_targets(targets, mask, self.output_loss, self.plan.width)

    def loss(self, theta: Array, batch: Any) -> float:
        """Return the summed loss in nats without linearising; `Examples` are processed in micro-batches."""
        if isinstance(batch, Examples):
            return loss_of_examples(self, theta, batch)
        with self.exchange.working():
            theta, examples = self._place(theta, batch)
            return self._value(self._outputs(theta, examples), examples)[0]

    def linearise(
        self, theta: Array, batch: Any, reuse: LossLinearisation | None = None
    ) -> LossLinearisation:
        """Linearise at theta (D,) on a batch; the memory of `reuse` is freed first."""
        return self._linearised(theta, batch, reuse, self._linearise)

    def linearise_rows(
        self, theta: Array, batch: Any, reuse: LossLinearisation | None = None
    ) -> LossLinearisation:
        """Linearise as `linearise` does, for rows as the first pass: other passes may run forward again."""
        return self._linearised(theta, batch, reuse, self._linearise_rows)

    def _linearised(
        self,
        theta: Array,
        batch: Any,
        reuse: LossLinearisation | None,
        linearise: Callable[[Array, CheckedBatch], FrameworkPasses],
    ) -> LossLinearisation:
        if reuse is not None:
            del reuse.passes
        with self.exchange.working():
            theta, examples = self._place(theta, batch)
            passes, loss, backend = linearise(theta, examples), self.output_loss, self.backend
            value, cache, targets, mask = self._value(passes.outputs, examples)
        passes, rows = self.exchange.guarded(passes), BLOCK_FACTOR * backend.block_rows
        directions = ALL_DIRECTIONS if self.on_gpu else directions_at_once(passes.nbytes)
        weights = None if examples.weights is None else backend.to_device(examples.weights)
        return LossLinearisation(
            passes, loss, backend, cache, targets, mask, value, rows, directions, weights
        )

    def replan(self, **changes: Any) -> None:
        """Change fields of the plan."""
        self.plan = replace(self.plan, **changes)

    def batched(self, what: Batched, at_once: Callable[[], T], one_by_one: Callable[[], T]) -> T:
        """Return the result of `at_once`, or of `one_by_one` from the first batching error on."""
        if what not in self.plan.sequential:
            try:
                with self.memory_errors():
                    return at_once()
            except self.batching_error as failure:
                self.replan(sequential=self.plan.sequential | {what})
                logging.getLogger(__name__).warning(
                    "Note: an operation of the model cannot be batched (%s): %s are processed one at a time.",
                    first_line(failure),
                    what,
                )
        with self.memory_errors():
            return one_by_one()

    @contextmanager
    def memory_errors(self) -> Iterator[None]:
        """Raise a MemoryError in place of a RuntimeError that reports a lack of memory."""
        try:
            yield
        except RuntimeError as error:
            if any(words in str(error) for words in self.memory_words):
                raise MemoryError(first_line(error)) from None
            raise

    @abstractmethod
    def _outputs(self, theta: Array, examples: CheckedBatch) -> Array:
        """Return the scored outputs (N, O)."""

    def host_outputs(self, theta: np.ndarray, examples: CheckedBatch) -> np.ndarray:
        """Return the scored outputs (N, O) on the host for theta (D,) on the host; used by checks."""
        return self.backend.to_host(self._outputs(self.backend.to_device(theta), examples))

    @abstractmethod
    def _linearise(self, theta: Array, examples: CheckedBatch) -> FrameworkPasses:
        """Linearise the scored outputs."""

    def _linearise_rows(self, theta: Array, examples: CheckedBatch) -> FrameworkPasses:
        """Linearise the scored outputs for rows as the first pass."""
        return self._linearise(theta, examples)

    def trial(self, theta: np.ndarray, few: CheckedBatch) -> Trial:
        """Return the outputs at theta (D,) of a few examples, for comparisons."""
        return Trial(self.host_outputs, theta, few, self.on_gpu)

    def in_float64(self, theta: np.ndarray, examples: CheckedBatch) -> np.ndarray | None:
        """Return the scored outputs (N, O) computed in float64 at theta (D,) float64, or None.

        None if the function does not compute in float64 throughout. Only used for models in float32.
        """
        return None

    def _mode(self) -> object:
        """Return what the function depends on besides theta and inputs; a change triggers a new check."""
        return True

    def _check(self, theta: np.ndarray, examples: CheckedBatch) -> None:
        """Raise a UserError if a batch shows that the function cannot be trained as it is.

        Theta is on the host in all checks.
        """
        outputs = self.host_outputs(theta, examples)
        self.replan(width=outputs.shape[1])
        indices = spread(examples.size, FEW)
        few = examples.take(indices)
        trial, near = self.trial(theta, few), elsewhere(theta)
        by_example = outputs.reshape(examples.size, -1)
        if not trial.same(range(few.size), by_example[indices]):
            raise UserError(DEPENDS)
        try:
            self._exact(near, few).check_independence()
        except NotInFloat64:
            self.trial(near, few).check_independence()
        on_device = self.backend.to_device(outputs)
        targets, mask = self._scored(examples, self.plan.width)
        check_loss(self.output_loss, self.backend, on_device, targets, mask)
        with np.errstate(all="ignore"):
            loss = self._value(on_device, examples)[0]
        if not math.isfinite(loss):
            raise NotFinite(loss)
        self._check_gradients(theta, few.take(spread(few.size, SUMMED)))

    def _check_gradients(self, theta: np.ndarray, few: CheckedBatch) -> None:
        """Raise a UserError unless J' u of a few examples is finite and the sum of the per-example J' u."""
        backend = self.backend

        def gradient(batch: CheckedBatch, u: np.ndarray) -> np.ndarray:
            out = backend.xp.zeros(theta.size, theta.dtype)
            with self.running(batch.inputs):
                self._linearise(backend.to_device(theta), batch).vjp(backend.to_device(u), out)
            return backend.to_host(out)

        rows = few.scored.rows // few.size
        u = np.random.default_rng(0).standard_normal((few.size, rows, self.plan.width)).astype(theta.dtype)
        whole = gradient(few, u.reshape(-1, self.plan.width))
        check_gradient(whole)
        each = sum(gradient(few.take([i]), u[i]) for i in range(few.size))
        most = SEPARATE[self.on_gpu] * (np.linalg.norm(whole) + np.linalg.norm(each))
        if not np.linalg.norm(whole - each) <= most:
            raise UserError(
                "the gradient of a batch is not the sum of its per-example gradients: check for a hook or a "
                "derivative rule that depends on the full batch, and for arithmetic in half precision"
            )
        self._note_unused(whole)

    def _note_unused(self, gradient: np.ndarray) -> None:  # noqa: B027 (nothing to note by default)
        """Log a note on parameters that the outputs do not depend on: a random J' u (D,) is 0 there."""

    def _exact(self, theta: np.ndarray, few: CheckedBatch) -> Trial:
        """Return a trial in float64; raise NotInFloat64 if the model does not support float64."""

        def outputs(theta: np.ndarray, batch: CheckedBatch) -> np.ndarray:
            wide = self.in_float64(theta, batch)
            if wide is None:
                raise NotInFloat64
            return wide

        wide = theta.astype(np.float64)
        return Trial(self.host_outputs if theta.dtype == np.float64 else outputs, wide, few)

    @contextmanager
    def running(self, inputs: Sequence[np.ndarray]) -> Iterator[None]:
        """Raise a UserError with the shapes of the inputs if the user's function raises an error."""
        try:
            with self.memory_errors():
                yield
        except (UserError, MemoryError):
            raise
        except Exception as error:
            shapes = " and ".join(f"{x.dtype} {x.shape}" for x in inputs)
            whole = any(x.dtype.kind in "iu" for x in inputs) and "type" in str(error)
            hint = "; integers are not converted: use x.astype('float32') for real inputs" if whole else ""
            raise UserError(
                f"{self.noun} fails on inputs {shapes}: {type(error).__name__}: {first_line(error)}{hint}"
            ) from error

    def _fit_micro_batch(self, nbytes: float) -> None:
        """Set the micro-batch size for examples that occupy `nbytes` bytes each."""
        least = min(NumpyBackend.micro_batch, max(1, int(LARGE_MICRO_BATCH_BYTES / max(nbytes, 1))))
        most = int(MICRO_BATCH_BYTES / max(nbytes, 1))
        self.backend.micro_batch = min(MOST_MICRO_BATCH, max(least, most))

    def _value(self, outputs: Array, examples: CheckedBatch) -> tuple[float, Array, Array, Array | None]:
        """Compute the loss from the outputs.

        Returns
        -------
        value : float
            The summed loss.
        cache : (N, O)
            Intermediate values that the loss needs for its derivatives.
        targets, mask
            See `_scored`.
        """
        cache = outputs.astype(self.backend.dtype, order="C")  # a copy: the framework owns the memory
        targets, mask = self._scored(examples, cache.shape[1])
        return total_loss(self.output_loss, self.backend, cache, targets, mask), cache, targets, mask

    def _scored(self, examples: CheckedBatch, width: int) -> tuple[Array, Array | None]:
        """Return the targets (N,) int32 or (N, O), and the mask (N, 1) or None, on the device.

        Raises
        ------
        UserError
            If a target class is not less than `width`.
        """
        targets, mask, to_device = examples.targets, examples.mask, self.backend.to_device
        if self.output_loss.symbols:
            check_symbols("targets", targets, width)
            targets = targets.astype(np.int32, copy=False)
        return to_device(targets), None if mask is None else to_device(mask)

    def _place(self, theta: Array, batch: Any) -> tuple[Array, CheckedBatch]:
        """Check theta, on the host or the device, and a batch; return both in the model's dtype."""
        on_host = isinstance(theta, np.ndarray)
        check_vector("theta", theta, self.size, np.ndarray if on_host else self.backend.xp.ndarray)
        theta = theta.astype(self.backend.dtype, copy=False)
        theta = self.backend.to_device(theta) if on_host else theta
        examples = check_batch(batch, self.output_loss, self.backend.dtype, self.casts)
        mode = self._mode()
        if self.plan.checked != mode:
            with self.lock:
                if self.plan.checked != mode:
                    self._check(self.backend.to_host(theta), examples)
                    self.replan(checked=mode)
        return theta, examples
