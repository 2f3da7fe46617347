"""A PyTorch module as a model: any module that returns one tensor of outputs."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np

from hfmpi.errors import UserError, shown
from hfmpi.frameworks.framework import FrameworkModel, Plan, first_line
from hfmpi.models.batch import CheckedBatch, ScoredOutputs
from hfmpi.models.losses import Loss

try:
    import torch

    from hfmpi.frameworks.torch_passes import TorchPasses, plain_kernels, to_array
except ImportError:
    torch = None

__all__ = ["TorchModel", "TorchPlan"]


@dataclass(frozen=True)
class TorchPlan(Plan):
    """How the passes of a module are computed.

    Attributes
    ----------
    double_backward : bool
        J v by the double backward; else by forward mode.
    kernels : callable
        Makes the context in which the module runs: its effect is that of `plain_kernels`, or none.
    obstacle : str or None
        Why J v works in neither way; None: it works.
    bytes_per_example : int
        Of the graphs that a linearisation keeps.
    unassigned : int or None
        The number of entries of parameters that are expanded per example for squares and factors of
        gradients, because other operations than layers use them; None: not known yet.
    """

    double_backward: bool = True
    kernels: Callable[[], AbstractContextManager[object]] = nullcontext
    obstacle: str | None = None
    bytes_per_example: int = 0
    unassigned: int | None = None


class TorchModel(FrameworkModel):
    """A PyTorch module with a loss.

    The module is called in the mode that it is in, and must return the same outputs each time: no dropout,
    no batch statistics. The first batch is used to check this. Theta (D,) consists of the parameters that
    require a gradient, in the order of `named_parameters`; a tied parameter occurs once. All other
    parameters, and the buffers, remain as they are.

    Parameters
    ----------
    module : torch.nn.Module
        Maps inputs (B, ...), of B examples, to outputs (B, ..., O). Its trained parameters are all float32 or
        all float64, which is the type of theta too; parameters and buffers are on one device. Only
        `write_back` changes the module.
    loss : {'cross-entropy', 'squares', 'bernoulli'} or Loss
        The loss of each scored output (O,).

    Raises
    ------
    UserError
        If PyTorch is not installed, or the module cannot be trained: it has no trained parameter, or types,
        devices or a batch that do not fit.

    Examples
    --------
    >>> model = hfmpi.TorchModel(torch.nn.Linear(2, 4), "cross-entropy")
    >>> result = hfmpi.train(model, (x, y), optimizer="bhf-short", max_steps=10)
    >>> model.write_back(result.theta)
    """

    plan: TorchPlan = TorchPlan()
    batching_error = RuntimeError
    memory_words = "out of memory", "allocate memory", "not enough memory"

    def __init__(self, module: Any, loss: str | Loss) -> None:
        if torch is None:
            raise UserError("TorchModel needs PyTorch: pip install torch")
        if not isinstance(module, torch.nn.Module):
            raise UserError(f"module must be a torch.nn.Module, not {shown(module)}")
        if isinstance(module, torch.jit.ScriptModule):
            raise UserError(
                "a scripted module cannot be called with other parameters: pass the module that was scripted"
            )
        named = dict(module.named_parameters())
        if any(torch.nn.parameter.is_lazy(p) for p in named.values()):
            raise UserError("the module has parameters without a shape: call it once with some inputs")
        trained = {name: p for name, p in named.items() if p.requires_grad and p.numel()}
        if not trained:
            raise UserError("the module has no parameter that requires a gradient")
        types = {p.dtype for p in trained.values()}
        if types not in ({torch.float32}, {torch.float64}):
            names = ", ".join(sorted(str(kind).removeprefix("torch.") for kind in types))
            raise UserError(f"parameters must all be float32 or all be float64, not {names}")
        devices = {tensor.device for tensor in (*named.values(), *module.buffers())}
        if len(devices) > 1:
            names = ", ".join(sorted(map(str, devices)))
            raise UserError(
                f"parameters and buffers of the module must be on one device, not on {names}: module.to(...)"
            )
        self.module, self.device = module, devices.pop()
        self.parameters = trained
        self.frozen = [p for name, p in named.items() if name not in trained]
        self._sizes = [p.numel() for p in trained.values()]
        start = torch.cat([p.detach().reshape(-1) for p in trained.values()]).cpu().numpy()
        shapes = [(name, tuple(p.shape)) for name, p in trained.items()]
        super().__init__(shapes, start, loss, _stacked(module, trained))

    def write_back(self, theta: np.ndarray) -> None:
        """Copy theta (D,) into the parameters of the module.

        Raises
        ------
        UserError
            If theta has a different shape.
        """
        theta = np.asarray(theta)
        if theta.shape != (self.size,):
            raise UserError(f"theta must be a vector of {self.size:,} numbers, not of shape {theta.shape}")
        parts = self.named(torch.from_numpy(theta.astype(self.backend.dtype)))
        with torch.no_grad():
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
        return scored.of(torch.func.functional_call(self.module, parameters, inputs))

    def tensor(self, array: np.ndarray) -> Any:
        """Return an array as a tensor on the module's device; on a CPU it shares the memory if possible."""
        if not array.flags.writeable or any(stride < 0 for stride in array.strides):
            array = array.copy()
        return torch.from_numpy(array).to(self.device)

    def tensors(self, inputs: tuple[np.ndarray, ...]) -> tuple[Any, ...]:
        """Return inputs as tensors; whole numbers become int64, which every module accepts."""
        return tuple(self.tensor(x.astype(np.int64) if x.dtype.kind in "iu" else x) for x in inputs)

    def _outputs(self, theta: np.ndarray, examples: CheckedBatch) -> np.ndarray:
        with self.memory_errors(), torch.no_grad(), self.plan.kernels():
            parameters = self.named(self.tensor(theta))
            return to_array(self.call(parameters, self.tensors(examples.inputs), examples.scored))

    def _linearise(self, theta: np.ndarray, examples: CheckedBatch) -> TorchPasses:
        return TorchPasses(self, theta, examples)

    # The first batch ---------------------------------------------------------------------------

    def _check(self, theta: np.ndarray, examples: CheckedBatch) -> None:
        """Choose the plan; raise a UserError where the module cannot be trained."""
        before = {name: b.detach().clone() for name, b in self.module.named_buffers()}
        once, again = (self._outputs(theta, examples) for _ in range(2))
        changed = False
        with torch.no_grad():
            for name, b in self.module.named_buffers():
                if name in before and not torch.equal(b, before[name]) and not torch.isnan(b).any():
                    changed = True
                    b.copy_(before[name])
        if changed:
            raise UserError(
                "a pass changes buffers of the module, as batch statistics do: call module.eval() first"
            )
        if not np.allclose(once, again, 1e-3, 1e-6, equal_nan=True):
            raise UserError(
                "the module returns different outputs for the same inputs, as with dropout: "
                "call module.eval() first"
            )
        super()._check(theta, examples)
        self._choose_products(theta, examples.first)

    def _choose_products(self, theta: np.ndarray, example: CheckedBatch) -> None:
        """Plan products with J and J' in the first way that works on one example."""
        log, reason = logging.getLogger(__name__), ""
        for double_backward, kernels in product((True, False), (nullcontext, plain_kernels)):
            self.replan(double_backward=double_backward, kernels=kernels)
            try:
                nbytes = self._linearise(theta, example).try_products()
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


def _stacked(module: Any, trained: dict[str, Any]) -> dict[str, int]:
    """Return, by name, how many matrices of a layer PyTorch stacks in one parameter."""
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
