"""The optimizers with the interface of torch.optim: `hfmpi.torch.Optimizer`."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np

from hfmpi.data.augmented import Augmented
from hfmpi.data.batches import Cases
from hfmpi.errors import UserError, shown
from hfmpi.facades.steps import Steps, method_of
from hfmpi.frameworks.torch import TorchModel
from hfmpi.optim.base import StepReport
from hfmpi.parallel.communicator import Communicator, digest
from hfmpi.parallel.failure import together
from hfmpi.parallel.launch import all_ranks

try:
    import torch
except ImportError:
    raise ImportError("hfmpi.torch needs PyTorch: pip install torch") from None

from hfmpi.frameworks.torch_module import plain_module

__all__ = ["Optimizer"]


class Optimizer(torch.optim.Optimizer):  # type: ignore[misc]
    """An optimizer of hfmpi for the training loop of a PyTorch module.

    A step takes a batch instead of gradients: hfmpi calls the module as often as the method needs, and writes
    the new parameters into the module. The module is called in its current mode (training or evaluation), and
    must return the same outputs each time (`hfmpi.TorchModel`); the first step checks this.

    Under mpirun every rank runs the same loop and passes a part of each batch, as with
    DistributedDataParallel. A step uses the union of the parts, which may have different sizes. The
    parameters and buffers of rank 0 are copied to all ranks at construction, and are equal on all ranks after
    every step.

    Parameters
    ----------
    module : torch.nn.Module
    loss : str, torch.nn.CrossEntropyLoss() or Loss
        As for `hfmpi.TorchModel`.
    method : str, Optimizer or Preset
        The name of a preset such as 'subspace', or an object such as `hfmpi.Subspace(damping=0.01)`.
    params : iterable of parameters or dicts, optional
        Parameter groups as in torch.optim: dicts with the entries "params", "frozen" and "scale". A frozen
        parameter is not part of theta: its `requires_grad` is set to False. `scale` is a factor of the step
        (see below). Every parameter that requires a gradient must be in one of the groups. Default: one group
        with all parameters.
    outputs : callable, optional
        Selects the outputs from the module's result, for example `lambda result: result[0]`.
    curvature_fraction : float, optional
        The fraction of each batch that is its curvature batch, which has evenly spaced examples. Default: the
        preset's number of examples, at most the full batch; for an optimizer object, the full batch.
    same_batch : bool
        Whether every step has the same batch, which L-BFGS and Levenberg-Marquardt require. `subspace` then
        judges each step by the loss of the next one, which saves a pass.
    epoch_examples : int
        The number of training examples, for settings that change per epoch (`shf`).
    micro_batch : int, optional
        The number of examples that a rank processes at a time. Default: as many as fit into memory.
    communicator : Communicator, optional
        A communicator from `hfmpi.connect()`. Default: all ranks of the program.
    **settings
        Settings of the preset, such as `damping=0.01`.

    Attributes
    ----------
    rank, ranks : int
        This rank and the number of ranks, to divide the data.
    report : StepReport or None
        The report of the last step: whether it was accepted, a message, and `details` such as the damping.
    param_groups : list of dict
        The parameter groups. For a first-order method "lr" is its learning rate, which the schedulers of
        torch.optim.lr_scheduler may change to the same value in all groups. Other methods have no learning
        rate and ignore "lr".

    Raises
    ------
    UserError
        On all ranks, if an argument is invalid.

    Notes
    -----
    `scale` multiplies the step of the parameters of a group. It is a change of variables, in which loss,
    gradient and curvature are exact. It multiplies the steps of first-order methods, but not their weight
    decay. For second-order methods it divides the damping of these parameters: if damping determines the
    step, the step is multiplied by `scale`; an undamped Newton step does not depend on it.

    Examples
    --------
    >>> optimizer = hfmpi.torch.Optimizer(model, torch.nn.CrossEntropyLoss(), "subspace", damping=0.01)
    >>> for x, y in loader:
    ...     loss = optimizer.step(x, y)
    """

    def __init__(
        self,
        module: Any,
        loss: Any,
        method: Any,
        *,
        params: Iterable[Any] | None = None,
        outputs: Any = None,
        curvature_fraction: float | None = None,
        same_batch: bool = False,
        epoch_examples: int = 0,
        micro_batch: int | None = None,
        communicator: Communicator | None = None,
        **settings: Any,
    ) -> None:
        comm = all_ranks() if communicator is None else communicator
        self._made, self.rank, self.ranks = False, comm.rank, comm.size
        self.report: StepReport | None = None

        def build() -> TorchModel:
            if not isinstance(module, torch.nn.Module):
                raise UserError(f"module must be a torch.nn.Module, not {shown(module)}")
            if outputs is not None and not callable(outputs):
                raise UserError(f"outputs must be a function of the module's result, not {shown(outputs)}")
            chosen, inner = method_of(method, settings), plain_module(module)
            self._rate = getattr(chosen.optimizer, "rate", 1.0) if chosen.optimizer.rates else 1.0
            try:
                groups = [*inner.parameters()] if params is None else params
                super(Optimizer, self).__init__(groups, {"lr": self._rate, "scale": 1.0, "frozen": False})
            except UserError:
                raise
            except (TypeError, ValueError, KeyError) as error:
                raise UserError(f"params: {' '.join(str(error).split())}") from None
            self._freeze(inner)
            model = TorchModel(inner if outputs is None else _Outputs(inner, outputs), loss)
            self._steps = Steps(
                model,
                chosen,
                comm,
                self._scales(model),
                curvature_fraction,
                same_batch,
                epoch_examples,
                micro_batch,
            )
            return model

        self._module, self._outputs = module, outputs
        self._model = together(comm, build)
        _broadcast(plain_module(module), comm)
        self._progress = self._steps.start(self._theta())
        self._written: np.ndarray | None = None  # theta after the last step
        self._noted, self._made, self._inside = False, True, False

    def step(self, x: Any, y: Any = None, *, curvature: Any = None) -> float:
        """Take one step on a batch; return the loss before the step, a mean over the batch of all ranks.

        Parameters
        ----------
        x : tensor (B, ...), tuple of tensors, hfmpi.Examples, or callable
            One of: the inputs of the module; an `hfmpi.Examples` batch with a mask, without y; or a closure
            that calls the module once and returns (outputs, targets) with the unmodified outputs of the
            module. A closure costs one additional forward pass.
        y : tensor
            The targets.
        curvature : tuple (x, y) or hfmpi.Examples, optional
            A separate batch for the curvature, either on all ranks or on none.

        Raises
        ------
        UserError
            On all ranks, if the batch or the module is not valid; module and optimizer are then unchanged.
        """
        if self._inside:
            raise UserError("a step inside averaged() would be lost: leave the context first")
        theta = self._theta()
        if self._written is not None and not np.array_equal(theta, self._written):
            self._progress = self._steps.moved(self._progress)
        theta, self._progress, report = self._steps.step(
            theta,
            self._progress,
            lambda: self._called(x) if callable(x) and y is None else _batch(x, y),
            None if curvature is None else lambda: _batch(*_pair(curvature)),
            self._factor,
        )
        self._model.write_back(theta)
        self._written, self.report = theta, report
        return report.loss

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Replace the module's parameters by the mean of the iterates, if there is one, inside the context.

        A step inside the context raises an error, because the previous parameters are restored at its end.
        """
        theta, mean = self._theta(), self._steps.averaged(self._progress)
        before, self._inside = self._inside, True
        try:
            if mean is not None:
                self._model.write_back(mean)
            yield
        finally:
            self._inside = before
            self._model.write_back(theta)

    def state_dict(self) -> dict[str, Any]:
        """Return the optimizer's state to save alongside the module: tensors and numbers for torch.save."""
        state = {
            name: torch.from_numpy(entry.copy()) if isinstance(entry, np.ndarray) else entry
            for name, entry in self._steps.saved(self._progress).items()
        }
        groups, first = list[dict[str, Any]](), 0
        for group in self.param_groups:
            last = first + len(group["params"])
            groups.append({**group, "params": list(range(first, last))})
            first = last
        about = {
            "method": type(self._steps.method.optimizer).__name__,
            "steps": self._progress.steps,
            "examples": self._progress.examples,
        }
        return {"state": state, "param_groups": groups, "hfmpi": about}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restore a state that `state_dict` returned; load the module's parameters separately.

        With these parameters and the same batches, the next steps are bit-identical to those of the saved
        loop. The settings of the method are those of this object; the entries of the groups are the saved
        ones.

        Raises
        ------
        UserError
            On this rank, if the state belongs to a different method, different groups or a different model.
        """
        about = state_dict.get("hfmpi") if isinstance(state_dict, Mapping) else None
        if not isinstance(about, Mapping):
            raise UserError("load_state_dict needs a state from state_dict() of an hfmpi.torch.Optimizer")
        kind, groups = type(self._steps.method.optimizer).__name__, state_dict["param_groups"]
        if about["method"] != kind:
            raise UserError(
                f"the state belongs to {about['method']}, but this optimizer is {kind}: create the optimizer "
                "with the saved method"
            )
        for i, (ours, saved) in enumerate(zip(self.param_groups, groups, strict=False)):
            same = all(ours[name] == saved[name] for name in ("scale", "frozen"))
            if (
                len(groups) != len(self.param_groups)
                or len(saved["params"]) != len(ours["params"])
                or not same
            ):
                raise UserError(
                    f'group {i} of the state has different parameters, or a different "scale" or "frozen", '
                    "than this optimizer's group: create the optimizer with the saved groups"
                )
        entries = {
            name: entry.detach().cpu().numpy().copy() if isinstance(entry, torch.Tensor) else entry
            for name, entry in state_dict["state"].items()
        }
        self._progress = self._steps.restored(about["steps"], about["examples"], entries)
        for ours, saved in zip(self.param_groups, groups, strict=True):
            ours.update({name: value for name, value in saved.items() if name != "params"})
        self._written = None

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Raise a UserError after construction, when the sizes of theta and the state are fixed.

        Raises
        ------
        UserError
            Always, except during construction.
        """
        if self._made:
            raise UserError("groups cannot be added after construction: pass all groups as params=[...]")
        super().add_param_group(param_group)

    def _freeze(self, module: Any) -> None:
        """Freeze the groups with "frozen": True; raise a UserError unless they are valid and complete."""
        named = {id(p): name for name, p in module.named_parameters()}
        for i, group in enumerate(self.param_groups):
            scale, frozen = group["scale"], group["frozen"]
            if not isinstance(frozen, bool):
                raise UserError(f'group {i}: "frozen" must be True or False, not {shown(frozen)}')
            number = isinstance(scale, (int, float)) and not isinstance(scale, bool)
            if not number or not 0 < scale < float("inf"):
                raise UserError(
                    f'group {i}: "scale" must be a positive number, not {shown(scale)}; set "frozen": True '
                    "for parameters that must not change"
                )
            unknown = set(group) - {"params", "lr", "scale", "frozen", "param_names"}
            if unknown:
                raise UserError(
                    f"group {i} has the unknown entry {min(unknown)!r}: the entries are params, scale and "
                    "frozen; settings of the method apply to all groups"
                )
            if group["lr"] != self._rate:
                raise UserError(
                    f'group {i}: "lr" must be the learning rate of the method, {self._rate:g}, not '
                    f'{group["lr"]}; set "scale" for a factor of the step'
                )
            for p in group["params"]:
                if id(p) not in named:
                    raise UserError(f"group {i} has a parameter that does not belong to the module")
                if frozen:
                    p.requires_grad_(False)
        grouped = {id(p) for group in self.param_groups for p in group["params"]}
        missing = [named[id(p)] for p in module.parameters() if p.requires_grad and id(p) not in grouped]
        if missing:
            raise UserError(
                f'parameter {missing[0]} is not in any group: add it to a group, with "frozen": True if it '
                "must not be trained"
            )

    def _scales(self, model: TorchModel) -> np.ndarray:
        """Return the scale of each entry of theta (D,)."""
        of = {id(p): float(group["scale"]) for group in self.param_groups for p in group["params"]}
        parts = [np.full(p.numel(), of[id(p)]) for p in model.parameters.values()]
        return np.concatenate(parts)

    def _factor(self) -> float:
        """Return the factor of the learning rate that a schedule has set in the groups."""
        rates = {float(group["lr"]) for group in self.param_groups if not group["frozen"]}
        if rates == {self._rate}:
            return 1.0
        method = self._steps.method
        if not method.optimizer.rates:
            if not self._noted:
                self._noted = True
                logging.getLogger(__name__).warning(
                    'Note: %s has no learning rate: "lr" in param_groups is ignored.', method.name
                )
            return 1.0
        if len(rates) > 1 or not 0 <= min(rates) < float("inf"):
            raise UserError(
                '"lr" must be the same number, 0 or more, in all groups: set "scale" for a factor of the step'
            )
        return rates.pop() / self._rate

    def _theta(self) -> np.ndarray:
        """Copy the parameters of the module to theta (D,), a new array on the host."""
        parts = [p.detach().reshape(-1) for p in self._model.parameters.values()]
        theta: np.ndarray = torch.cat(parts).cpu().numpy()
        return theta

    def _called(self, closure: Any) -> Any:
        """Call a closure; return the batch on which it called the module.

        A step needs the outputs as a function of the parameters, on parts of the batch and for several values
        of the parameters. So the closure is called only once, for the inputs and targets; afterwards hfmpi
        calls the module.
        """
        calls = list[tuple[Any, Any, Any]]()
        handle = self._module.register_forward_hook(
            lambda module, args, kwargs, result: calls.append((args, kwargs, result)), with_kwargs=True
        )
        try:
            returned = closure()
        finally:
            handle.remove()
        if not isinstance(returned, tuple) or len(returned) != 2:
            raise UserError(
                f"the closure must return (outputs, targets), not {shown(returned)}: hfmpi computes the loss "
                "and its derivatives"
            )
        if len(calls) != 1:
            raise UserError(f"the closure must call the module once, not {len(calls)} times")
        (args, kwargs, result), (given, targets) = calls[0], returned
        if kwargs:
            raise UserError(
                f"the closure must call the module without keyword arguments, not with {min(kwargs)}="
            )
        if given is not result and (self._outputs is None or given is not self._outputs(result)):
            raise UserError(
                "the closure must return the outputs of the module unchanged, because a step differentiates "
                "the module only: move computations on the outputs into the module"
            )
        return _batch(args, targets)


class _Outputs(torch.nn.Module):  # type: ignore[misc]
    """A module that returns the outputs selected from the result of another module."""

    def __init__(self, module: Any, select: Any) -> None:
        super().__init__()
        self.module, self.select = module, select

    def forward(self, *inputs: Any) -> Any:
        """Call the module and return the selected outputs."""
        return self.select(self.module(*inputs))


def _pair(curvature: Any) -> tuple[Any, Any]:
    """Split a curvature batch into x and y; y is None for Examples."""
    if isinstance(curvature, (tuple, list)) and len(curvature) == 2:
        return curvature[0], curvature[1]
    if isinstance(curvature, (Augmented, Cases)):
        return curvature, None
    raise UserError(f"curvature must be a tuple (x, y) or hfmpi.Examples, not {shown(curvature)}")


def _batch(x: Any, y: Any) -> Any:
    """Copy a batch of tensors from any device to the host."""
    if y is None:
        if isinstance(x, (Augmented, Cases)) and not isinstance(x, type):
            return x
        raise UserError(
            "step needs a batch (x, y), hfmpi.Examples, or a closure that returns (outputs, targets), "
            f"not {shown(x)}"
        )
    x = tuple(map(_host, x)) if isinstance(x, (tuple, list)) else _host(x)
    return x[0] if isinstance(x, tuple) and len(x) == 1 else x, _host(y)


def _host(value: Any) -> Any:
    return value.detach().cpu() if isinstance(value, torch.Tensor) else value


def _broadcast(module: Any, comm: Communicator) -> None:
    """Copy the parameters and buffers of rank 0 to all ranks; collective.

    Raises
    ------
    UserError
        On all ranks, if the modules have different parameters.
    """
    if comm.size == 1:
        return
    tensors = [*module.named_parameters(), *module.named_buffers()]
    form = repr([(name, tuple(t.shape), str(t.dtype)) for name, t in tensors])
    if strays := comm.same(digest(np.frombuffer(form.encode(), np.uint8))):
        raise UserError(
            f"rank {', '.join(map(str, strays))} has a module with different parameters (names, shapes or "
            "types) than the other ranks: build the same module on all ranks"
        )
    parts = [t.detach().reshape(-1).contiguous().view(torch.uint8) for _, t in tensors if t.numel()]
    content = torch.cat([part.cpu() for part in parts]).numpy()
    sizes = [content.size] + [0] * (comm.size - 1)
    content = comm.join(content if comm.rank == 0 else content[:0], sizes)
    with torch.no_grad():
        start = 0
        for _, t in tensors:
            stop = start + t.numel() * t.element_size()
            part = torch.from_numpy(content[start:stop].copy()).view(t.dtype) if stop > start else t
            t.copy_(part.reshape(t.shape))
            start = stop
