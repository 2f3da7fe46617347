"""The optimizers with the interface of optax: `hfmpi.jax.Optimizer` has `init` and `update`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any, NamedTuple

import numpy as np

from hfmpi.errors import UserError, shown
from hfmpi.facades.steps import Progress, Steps, method_of
from hfmpi.frameworks.jax import JaxModel
from hfmpi.optim.base import StepReport
from hfmpi.parallel.communicator import Communicator
from hfmpi.parallel.failure import together
from hfmpi.parallel.launch import all_ranks

try:
    import jax
except ImportError:
    raise ImportError("hfmpi.jax needs JAX: pip install jax") from None

__all__ = ["Optimizer", "State"]


class State(NamedTuple):
    """The state that `update` needs in addition to the params: a pytree of numbers and arrays.

    Attributes
    ----------
    steps : int
        The number of steps so far.
    examples : int
        The number of examples in the batches of these steps, over all ranks.
    loss : float
        The loss before the last step, a mean over the batch of all ranks; NaN before the first step.
    method : dict
        The fields of the method's state, by name.
    """

    steps: int
    examples: int
    loss: float
    method: dict[str, Any]


class Optimizer:
    """An optimizer of hfmpi for a loop written for optax: `update` takes a batch instead of gradients.

    `update(batch, state, params)` returns updates for `optax.apply_updates`, and the new state. It computes
    losses, gradients and curvature by compiled functions, but makes decisions on the host between them: call
    it outside of functions that `jax.jit` compiles.

    Under mpirun every rank runs the same loop from the same params and passes a part of each batch. A step
    uses the union of the parts, which may have different sizes, and the params remain equal on all ranks. If
    the ranks have different params, an error is raised.

    Parameters
    ----------
    apply : callable
        (params, x) -> outputs, as for `hfmpi.JaxModel`.
    loss : str or Loss
        As for `hfmpi.JaxModel`.
    method : str, Optimizer or Preset
        The name of a preset such as 'subspace', or an object such as `hfmpi.Subspace(damping=0.01)`.
    trained : callable or pytree of bool, optional
        As for `hfmpi.JaxModel`. Arrays that are not trained remain as they were passed to `init`.
    curvature_fraction, same_batch, epoch_examples, micro_batch, communicator, **settings
        As for `hfmpi.torch.Optimizer`.

    Attributes
    ----------
    rank, ranks : int
        This rank and the number of ranks, to divide the data.
    report : StepReport or None
        The report of the last step: whether it was accepted, a message, and `details` such as the damping.

    Examples
    --------
    >>> optimizer = hfmpi.jax.Optimizer(apply, "cross-entropy", "subspace", damping=0.01)
    >>> state = optimizer.init(params)
    >>> updates, state = optimizer.update((x, y), state, params)
    >>> params = optax.apply_updates(params, updates)
    """

    def __init__(
        self,
        apply: Any,
        loss: Any,
        method: Any,
        *,
        trained: Any = None,
        curvature_fraction: float | None = None,
        same_batch: bool = False,
        epoch_examples: int = 0,
        micro_batch: int | None = None,
        communicator: Communicator | None = None,
        **settings: Any,
    ) -> None:
        self._apply, self._loss, self._trained = apply, loss, trained
        self._options = curvature_fraction, same_batch, epoch_examples, micro_batch
        self._communicator = all_ranks() if communicator is None else communicator
        self._method = together(self._communicator, lambda: method_of(method, settings))
        self.rank, self.ranks = self._communicator.rank, self._communicator.size
        self._steps: Steps | None = None
        self.report: StepReport | None = None

    def init(self, params: Any) -> State:
        """Return the state before the first step; collective.

        Raises
        ------
        UserError
            On all ranks, if the function cannot be trained with these params.
        """
        steps = self._made(params)
        return self._state(steps, steps.start(self._model.theta(params)), float("nan"))

    def update(
        self, batch: Any, state: State, params: Any = None, *, curvature: Any = None
    ) -> tuple[Any, State]:
        """Compute one step from the params; return the updates to add to them, and the new state; collective.

        The state may come from a checkpoint: the next steps are then the same as those of the saved loop.

        Parameters
        ----------
        batch : tuple (x, y), dict or hfmpi.Examples
            This rank's examples; a dict has the keys "x" and "y". x may be a tuple of several inputs.
        state : State
        params : pytree
            The current params, with the structure that was passed to `init`.
        curvature : as batch, optional
            A separate batch for the curvature, either on all ranks or on none.

        Returns
        -------
        updates : pytree
            With the structure of the params; zeros for arrays that are not trained.
        state : State

        Raises
        ------
        UserError
            On all ranks, if the batch or the params are not valid.
        """
        steps = self._steps or self._made(params)

        def before() -> tuple[np.ndarray, Progress]:
            if params is None:
                raise UserError("update needs the params: call update((x, y), state, params)")
            return self._model.theta(params), self._progress(state)

        theta, progress = together(steps.communicator, before)
        theta, progress, self.report = steps.step(
            theta, progress, lambda: _batch(batch), None if curvature is None else lambda: _batch(curvature)
        )
        return self._model.updates(params, theta), self._state(steps, progress, self.report.loss)

    def averaged(self, params: Any, state: State) -> Any:
        """Return the mean of the iterates as params, or `params` if the method does not compute a mean."""
        steps = self._steps or self._made(params)
        mean = steps.averaged(self._progress(state))
        return params if mean is None else self._model.params(mean)

    def _progress(self, state: Any) -> Progress:
        """Convert a state, whose arrays may have become JAX arrays, to a `Progress`."""
        if not isinstance(state, State):
            raise UserError(f"state must be a State from init or update, not {shown(state)}")
        values = {name: self._host(value) for name, value in state.method.items()}
        if set(values) != {field.name for field in fields(self._kind)}:
            raise UserError(
                f"the state belongs to a different method than {self._method.name}: call init(params) again"
            )
        return Progress(int(state.steps), int(state.examples), self._kind(**values))

    def _host(self, value: Any) -> Any:
        """Convert an entry of a state to a number or an array of the backend."""
        if isinstance(value, (int, float, str)):
            return value
        array = np.asarray(value)
        return self._model.backend.to_device(array) if array.ndim else array.item()

    def _made(self, params: Any) -> Steps:
        """Create the model and the steps from the params; collective."""

        def build() -> Steps:
            if params is None:
                raise UserError("update needs the params: call update((x, y), state, params)")
            self._model = JaxModel(self._apply, params, self._loss, self._trained)
            theta = self._model.theta(params)
            steps = Steps(self._model, self._method, self._communicator, None, *self._options)
            self._kind = type(steps.start(theta).state)
            return steps

        self._steps = together(self._communicator, build)
        return self._steps

    def _state(self, steps: Steps, progress: Progress, loss: float) -> State:
        return State(progress.steps, progress.examples, loss, dict(steps.saved(progress)))


def _batch(batch: Any) -> Any:
    """Convert the arrays of a batch to NumPy."""
    if isinstance(batch, Mapping):
        if set(batch) != {"x", "y"}:
            raise UserError(
                f"a batch that is a dict must have the keys x and y, not {', '.join(map(str, batch))}"
            )
        batch = batch["x"], batch["y"]
    if not isinstance(batch, tuple):
        return batch
    return tuple(jax.tree_util.tree_map(np.asarray, part) for part in batch)
