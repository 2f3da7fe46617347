"""A PyTorch module as a model: any module that returns one tensor of outputs."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from itertools import product
from typing import Any, Literal

import numpy as np

from hfmpi.backends.base import Array
from hfmpi.data.batches import spread
from hfmpi.data.examples import Examples
from hfmpi.errors import UserError, shown
from hfmpi.frameworks.framework import FrameworkModel, Plan, first_line
from hfmpi.frameworks.trial import FEW
from hfmpi.measure.machine import free_memory
from hfmpi.models.batch import CheckedBatch, ScoredOutputs
from hfmpi.models.linearisation import LossLinearisation

try:
    import torch

    from hfmpi.frameworks.torch_checks import (
        CHANGES,
        check_memory,
        check_module,
        check_types,
        fresh_copy,
        stochastic,
    )
    from hfmpi.frameworks.torch_exchange import choose_exchange, to_array
    from hfmpi.frameworks.torch_losses import torch_loss
    from hfmpi.frameworks.torch_module import Narrowing, Substitution, plain_module
    from hfmpi.frameworks.torch_passes import TorchPasses, plain_kernels
    from hfmpi.frameworks.torch_state import Snapshot
except ImportError:
    torch = None

__all__ = ["TorchModel", "TorchPlan"]


@dataclass(frozen=True)
class TorchPlan(Plan):
    """How the passes of a module are computed.

    Attributes
    ----------
    double_backward : bool
        Whether J v is computed by double backward; otherwise by forward mode.
    kernels : callable
        Returns the context in which the module runs: `plain_kernels`, or a context without effect.
    obstacle : str or None
        Why J v cannot be computed in either way; None if it can.
    bytes_per_example : int
        The size per example of the graphs that a linearisation keeps.
    way : {'layers', 'batch', 'derivatives', 'expanded'}
        How per-example gradients are computed. 'layers': `ExamplePass` with layers that process all examples
        in one call. 'batch': `BatchPass`, one ordinary pass. 'derivatives': the same for modules that may
        differentiate their layers. 'expanded': `ExamplePass` with parameters that are expanded per example.
    shared : tuple of bool
        See `BatchPass`.
    unassigned : int or None
        The number of entries of parameters that are expanded per example for squares and factors of
        gradients, because operations other than layers use them; None before it is known.
    differentiates : bool
        Whether the module computes derivatives in its forward pass, as physics-informed networks do.
    as_given : bool
        Whether inputs have the dtypes in which the user passed them; otherwise they are converted.
    """

    double_backward: bool = True
    kernels: Callable[[], AbstractContextManager[object]] = nullcontext
    obstacle: str | None = None
    bytes_per_example: int = 0
    way: Literal["layers", "batch", "derivatives", "expanded"] = "layers"
    shared: tuple[bool, ...] = ()
    unassigned: int | None = None
    differentiates: bool = False
    as_given: bool = False


class TorchModel(FrameworkModel):
    """A PyTorch module with a loss.

    The module is called in its current mode (training or evaluation), and must return the same outputs each
    time: no dropout, no batch statistics. This is checked on the first batch. Theta (D,) consists of the
    parameters that require a gradient, in the order of `named_parameters`; a tied parameter occurs once. All
    other parameters and the buffers are constant.

    Parameters
    ----------
    module : torch.nn.Module
        Maps inputs (B, ...), of B examples, to outputs (B, ..., O). Its trained parameters are all float32 or
        all float64, which is also the dtype of theta; parameters and buffers are on one device. Only
        `write_back` changes the module.
    loss : str, torch.nn.CrossEntropyLoss(), MSELoss(), BCEWithLogitsLoss() or Loss
        The loss of each scored output (O,): 'cross-entropy', 'squares' (half the squared distance), 'mse'
        (the mean over outputs), 'bernoulli' or 'binary-cross-entropy' (its mean over outputs). For
        `CrossEntropyLoss` the classes are on axis 1 of the outputs, (B, O) or (B, O, ...), targets equal to
        its `ignore_index` are not scored, and its `weight` gives weights to the examples (`scoring`).

    Raises
    ------
    UserError
        If PyTorch is not installed, or the module cannot be trained: it has no trained parameter, or its
        dtypes, devices or a batch do not fit.

    Examples
    --------
    >>> model = hfmpi.TorchModel(torch.nn.Linear(2, 4), "cross-entropy")
    >>> result = hfmpi.train(model, (x, y), optimizer="bhf-short", max_steps=10)
    >>> model.write_back(result.theta)
    """

    plan: TorchPlan = TorchPlan()
    noun = "the module"
    casts = False
    batching_error = RuntimeError
    memory_words = "out of memory", "allocate memory", "not enough memory"

    def __init__(self, module: Any, loss: Any) -> None:
        if torch is None:
            raise UserError(
                "TorchModel needs PyTorch: pip install torch (without a GPU, --index-url "
                "https://download.pytorch.org/whl/cpu saves 6 GB)"
            )
        if not isinstance(module, torch.nn.Module):
            raise UserError(f"module must be a torch.nn.Module, not {shown(module)}")
        module = plain_module(module)
        if isinstance(module, torch.jit.ScriptModule):
            raise UserError(
                "a scripted module cannot be called with other parameters: pass the original module instead"
            )
        named = dict(module.named_parameters())
        if any(torch.nn.parameter.is_lazy(p) for p in named.values()):
            raise UserError("the module has lazy parameters without a shape: call it once with some inputs")
        trained = _trained(module)
        if not trained:
            raise UserError("the module has no parameter that requires a gradient")
        check_types(module, trained)
        frozen = [p for name, p in named.items() if name not in trained]
        self.aliases = check_memory(trained, [*frozen, *module.buffers()])
        trained = {name: p for name, p in trained.items() if id(p) not in self.aliases}
        self.module, self.device = module, next(iter(trained.values())).device
        self.parameters, self.frozen, self.on_gpu = trained, frozen, self.device.type != "cpu"
        self.class_axis, self.ignored, self.class_weights = False, None, None
        if isinstance(loss, torch.nn.Module):
            loss, self.class_axis, self.ignored, self.class_weights = torch_loss(loss)
        self._sizes = [p.numel() for p in trained.values()]
        self.places = Substitution(module, self.aliases)
        start = torch.cat([p.detach().reshape(-1) for p in trained.values()]).cpu().numpy()
        shapes = [(name, tuple(p.shape)) for name, p in trained.items()]
        exchange = choose_exchange(self.device, start.dtype.name)
        super().__init__(shapes, start, loss, _stacked(module, trained), exchange)

    def __getstate__(self) -> dict[str, Any]:
        """Return the state for copying and pickling, which includes the module."""
        state = super().__getstate__()
        return {name: value for name, value in state.items() if name not in ("places", "aliases")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore the state of a copy."""
        super().__setstate__(state)
        self.aliases = check_memory(_trained(self.module), [])
        self.places = Substitution(self.module, self.aliases)

    @property
    def scores_all(self) -> bool:
        """Whether `scoring` changes no data."""
        return self.ignored is None and self.class_weights is None

    @property
    def needs_scoring(self) -> bool:
        """Whether the loss would silently be wrong for examples that were not returned by `scoring`."""
        return self.class_weights is not None or (self.ignored is not None and self.ignored >= 0)

    def scoring(self, data: Examples) -> Examples:
        """Return examples with a mask for ignored targets, and with the weights of their classes."""
        if self.ignored is None or data.targets.dtype.kind not in "iu":
            return data
        scored = data.targets != self.ignored
        data = data if scored.all() else data.masked(scored)
        return data if self.class_weights is None else data.weighted_by_class(self.class_weights)

    def write_back(self, theta: Array) -> None:
        """Copy theta (D,), on the host or the device, to the parameters of the module.

        Raises
        ------
        UserError
            If theta has a different shape.
        """
        if not isinstance(theta, self.backend.xp.ndarray):
            theta = self.backend.to_device(np.asarray(theta))
        if theta.shape != (self.size,):
            raise UserError(f"theta must be a vector of {self.size:,} numbers, not of shape {theta.shape}")
        with torch.no_grad(), self.exchange.working():
            parts = self.named(self.tensor(theta.astype(self.backend.dtype, copy=False)))
            for name, part in parts.items():
                self.parameters[name].copy_(part)

    @contextmanager
    def threads(self, count: int) -> Iterator[None]:
        """Limit PyTorch to `count` threads inside the context."""
        before = torch.get_num_threads()
        torch.set_num_threads(count)
        try:
            yield
        finally:
            torch.set_num_threads(before)

    # The module as a function of theta, on tensors -----------------------------------------------

    def named(self, theta: Any) -> dict[str, Any]:
        """Return the parameters in theta (D,) by name, as views."""
        parts = zip(self.parameters.items(), theta.split(self._sizes), strict=True)
        return {name: part.view(p.shape) for (name, p), part in parts}

    def call(self, parameters: dict[str, Any], inputs: tuple[Any, ...], scored: ScoredOutputs) -> Any:
        """Return the scored outputs (N, O) of the module with these parameters."""
        tensors = {id(self.parameters[name]): tensor for name, tensor in parameters.items()}
        return self._called(tensors, inputs, scored)

    def _called(self, tensors: dict[int, Any], inputs: tuple[Any, ...], scored: ScoredOutputs) -> Any:
        """Return the scored outputs (N, O) of the module with tensors replaced, by identity."""
        with self.places.replaced(tensors):
            return self.run(self.module, inputs, scored)

    def run(self, module: Any, inputs: tuple[Any, ...], scored: ScoredOutputs) -> Any:
        """Return the scored outputs (N, O) of a module; it gets copies of inputs, which it may overwrite."""
        outputs = module(*(x.clone() for x in inputs))
        if isinstance(outputs, torch.Tensor):
            if outputs.dtype not in (torch.float32, torch.float64) or outputs.layout != torch.strided:
                kind = str(outputs.dtype).removeprefix("torch.")
                raise UserError(
                    f"the module returns {kind} outputs, but they must be float32 or float64: disable "
                    "autocast, and return complex numbers as real and imaginary parts"
                )
            if self.class_axis and outputs.ndim > 2:
                outputs = outputs.movedim(1, -1)
        elif hasattr(outputs, "reshape"):
            raise UserError(f"the module must return a tensor, not {shown(outputs)}")
        return scored.of(outputs)

    def tensor(self, array: Array) -> Any:
        """Return an array of the backend as a tensor on the module's device; see `Exchange`."""
        return self.exchange.tensor(array)

    def array(self, tensor: Any) -> Array:
        """Return a tensor as a contiguous array of the backend; see `Exchange`."""
        return self.exchange.array(tensor)

    def tensors(self, inputs: tuple[np.ndarray, ...]) -> tuple[Any, ...]:
        """Return inputs as tensors, in the user's dtypes or converted, as planned.

        Conversion casts real numbers to the dtype of the parameters, and integers to int64.
        """
        moved = self.exchange.moved
        return tuple(moved(x if self.plan.as_given else self._converted(x)) for x in inputs)

    def _converted(self, x: np.ndarray) -> np.ndarray:
        if x.dtype.kind == "u" and x.dtype.itemsize == 8 and x.size and x.max() > np.iinfo(np.int64).max:
            raise UserError(f"inputs are integers up to {x.max()}, which int64 cannot represent")
        kinds = {"f": self.backend.dtype, "i": np.dtype(np.int64), "u": np.dtype(np.int64)}
        return x.astype(kinds.get(x.dtype.kind, x.dtype), copy=False)

    def forward_context(self) -> AbstractContextManager[object]:
        """Return the context of a forward pass without derivatives in theta."""
        context: AbstractContextManager[object] = torch.no_grad()
        return torch.enable_grad() if self.plan.differentiates else context

    def _outputs(self, theta: Array, examples: CheckedBatch) -> Array:
        with self.running(examples.inputs), torch.inference_mode(False), self.plan.kernels():
            tensor, inputs = self.tensor(theta).clone(), self.tensors(examples.inputs)
            with self.forward_context():
                outputs = self.array(self.call(self.named(tensor), inputs, examples.scored))
            self.check_unchanged(tensor)
        return outputs

    def check_unchanged(self, theta: Any) -> None:
        """Raise a UserError if a pass has overwritten theta, a new tensor before the pass."""
        if theta._version:
            raise UserError(CHANGES)

    def _linearise(self, theta: Array, examples: CheckedBatch) -> TorchPasses:
        return TorchPasses(self, theta, examples)

    def linearise_gradient(
        self,
        theta: Array,
        batch: Any,
        reuse: LossLinearisation | None = None,
        *,
        extra: Literal["", "squares", "factors"] = "",
    ) -> LossLinearisation:
        """Linearise as `linearise` does, by one ordinary pass for outputs and per-example gradients."""
        if not extra:
            return self.linearise(theta, batch, reuse)

        def linearise(theta: Array, examples: CheckedBatch) -> TorchPasses:
            return TorchPasses(self, theta, examples, extra)

        return self._linearised(theta, batch, reuse, linearise)

    # The first batch ---------------------------------------------------------------------------

    def _mode(self) -> object:
        """Return which parts of the module are in training mode and which parameters it has."""
        with self.places.lock:  # another thread may have replaced the parameters for a call
            parts = [*self.module.modules()]
            held = [p for part in parts for p in part._parameters.values() if p is not None]
            return [part.training for part in parts], [(id(p), p.requires_grad) for p in held]

    def _check(self, theta: np.ndarray, examples: CheckedBatch) -> None:
        """Check the module on a batch and choose the plan."""
        if self.places.refresh():
            raise UserError("parameters of the module were replaced after creating the model: recreate it")
        for name, p in self.module.named_parameters():
            if p.requires_grad != (name in self.parameters or id(p) in self.aliases) and p.numel():
                raise UserError(f"{name} was frozen or unfrozen after creating the model: recreate it")
            if p._backward_hooks or p._post_accumulate_grad_hooks:
                raise UserError(
                    f"the parameter {name} has a hook, which would not be called: change the computation in "
                    "forward instead, for example mask * w + (1 - mask) * w.detach()"
                )
        if layer := stochastic(self.module):
            raise UserError(
                f"{layer} makes the outputs random or dependent on the batch, as dropout and batch "
                "statistics do: call module.eval() first"
            )
        few = examples.take(spread(examples.size, FEW))
        with torch.inference_mode(False), self.places.lock:
            start, fresh = Snapshot(self.module, self.device), fresh_copy(self.module)
            try:
                self._choose_forward(theta, few)
                self.places.refresh()  # the first pass may fill caches
                warm = Snapshot(self.module, self.device)
                try:
                    super()._check(theta, examples)
                    if self.class_weights is not None and len(self.class_weights) != self.plan.width:
                        raise UserError(
                            f"weight of the loss has {len(self.class_weights)} classes, but the module has "
                            f"{self.plan.width} outputs: pass one weight for each class"
                        )
                    check_module(self, theta, few, fresh)
                    self._choose_products(theta, examples.take([0]))
                finally:  # these errors are the cause of others
                    if name := warm.changed():
                        raise UserError(
                            f"passes change {name}, a parameter or buffer of the module, as batch statistics "
                            "do: call module.eval() first"
                        )
            finally:
                drew = start.drew()
                start.restore()
                self.places.refresh()
                if drew:
                    raise UserError(
                        "the module draws random numbers in a pass, as dropout does: call module.eval() first"
                    )

    def _note_unused(self, gradient: np.ndarray) -> None:
        unused = [name for name, part in self.layout.views(gradient).items() if not part.any()]
        if unused:
            logging.getLogger(__name__).warning(
                "Note: the outputs of the first examples do not depend on %s%s.",
                ", ".join(unused[:3]),
                f" and {len(unused) - 3} more parameters" if len(unused) > 3 else "",
            )

    def _choose_forward(self, theta: np.ndarray, few: CheckedBatch) -> None:
        """Plan forward passes: input dtypes, and gradients if the module computes derivatives.

        Inputs keep the user's dtypes if the module accepts them.
        """
        failures = list[UserError]()
        for differentiates, as_given in product((False, True), (True, False)):
            self.replan(differentiates=differentiates, as_given=as_given)
            try:
                self.host_outputs(theta, few)
                break
            except UserError as error:
                failures.append(error)
        else:
            raise failures[1]
        tensor = self.exchange.moved(theta.copy())
        with self.forward_context(), self.running(few.inputs):
            self.call(self.named(tensor), self.tensors(few.inputs), few.scored)
        if not np.array_equal(to_array(tensor), theta, equal_nan=True):
            raise UserError(CHANGES)

    def _plan_outputs(self, theta: np.ndarray, few: CheckedBatch) -> None:
        if layer := stochastic(self.module):
            raise UserError(
                f"{layer} makes the outputs random or dependent on the batch, as dropout and batch "
                "statistics do: call module.eval() first"
            )
        with torch.inference_mode(False), self.places.lock:
            self._choose_forward(theta, few)

    def in_float64(self, theta: np.ndarray, examples: CheckedBatch) -> np.ndarray | None:
        """Return the scored outputs (N, O) at theta (D,) with all tensors in float64; None if that fails."""
        trained = {id(p) for p in self.parameters.values()}
        others = [t for t in self.places.tensors if t.is_floating_point() and id(t) not in trained]
        nbytes = 8 * (self.size + sum(t.numel() for t in others))
        if self.device.type == "cpu" and nbytes > free_memory() / 4:
            return None
        wide = {id(t): t.detach().double() for t in others}
        for name, p in self.named(self.exchange.moved(theta).double()).items():
            wide[id(self.parameters[name])] = p
        given = self.tensors(examples.inputs)
        inputs = tuple(x.double() if x.is_floating_point() else x for x in given)
        narrow = Narrowing()
        try:
            with self.memory_errors(), torch.inference_mode(False), self.forward_context(), narrow:
                outputs = self._called(wide, inputs, examples.scored)
        except UserError:
            raise
        except Exception:
            return None
        return None if narrow.found else to_array(outputs)

    def _choose_products(self, theta: np.ndarray, example: CheckedBatch) -> None:
        """Plan products with J and J' in the first way that works on one example."""
        log, reason, at = logging.getLogger(__name__), "", self.backend.to_device(theta)
        for double_backward, kernels in product((True, False), (nullcontext, plain_kernels)):
            self.replan(double_backward=double_backward, kernels=kernels, obstacle=None)
            try:
                nbytes = self._linearise(at, example).try_products()
            except RuntimeError as failure:
                reason = reason or first_line(failure)
                continue
            self.replan(bytes_per_example=nbytes)
            self._fit_micro_batch(nbytes)
            if not double_backward:
                log.warning(
                    "Note: an operation of the module has no second derivative (%s): every product runs the "
                    "module again, in forward mode.",
                    reason,
                )
            elif kernels is plain_kernels:
                log.warning(
                    "Note: a fused kernel of the module has no second derivative (%s): plain kernels of "
                    "attention, and of recurrent networks on a GPU, replace it.",
                    reason,
                )
            return
        self.replan(double_backward=True, kernels=nullcontext, obstacle=reason)
        with self.running(example.inputs):  # first-order optimizers only need gradients
            passes = TorchPasses(self, at, example)
            zeros_like = self.backend.xp.zeros_like
            passes.vjp(zeros_like(passes.outputs) + 1, zeros_like(at))


def _trained(module: Any) -> dict[str, Any]:
    """Return the non-empty parameters that require a gradient, by name."""
    return {name: p for name, p in module.named_parameters() if p.requires_grad and p.numel()}


def _stacked(module: Any, trained: dict[str, Any]) -> dict[str, int]:
    """Return the number of matrices that PyTorch stacks in one parameter of a layer, by name."""
    kinds: list[tuple[Any, int, str]] = [
        ((torch.nn.LSTM, torch.nn.LSTMCell), 4, "hidden_size"),
        ((torch.nn.GRU, torch.nn.GRUCell), 3, "hidden_size"),
        (torch.nn.MultiheadAttention, 3, "embed_dim"),
    ]
    counts = {
        id(p): count
        for layer in module.modules()
        for kind, count, size in kinds
        if isinstance(layer, kind)
        for p in layer.parameters(recurse=False)
        if p.shape[0] == count * getattr(layer, size)
    }
    return {name: counts[id(p)] for name, p in trained.items() if id(p) in counts}
