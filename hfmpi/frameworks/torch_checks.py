"""Checks that a PyTorch module is a function of parameters and inputs, and that passes change nothing."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from hfmpi.errors import UserError
from hfmpi.frameworks.torch_exchange import to_array
from hfmpi.frameworks.torch_passes import TorchPasses
from hfmpi.frameworks.torch_state import numbers
from hfmpi.frameworks.trial import FLOORS, Trial, elsewhere
from hfmpi.measure.machine import free_memory
from hfmpi.models.batch import CheckedBatch

if TYPE_CHECKING:
    from hfmpi.frameworks.torch import TorchModel

__all__ = [
    "CHANGES",
    "check_memory",
    "check_module",
    "check_types",
    "fresh_copy",
    "stochastic",
]

CHANGES = (
    "a pass of the module changes its parameters in place (a constraint, or max_norm of an embedding?): "
    "compute with a changed copy instead, such as weight.clamp(...)"
)

HIDDEN = (
    "the module accesses a parameter other than by its registered name (a list, an attribute, or a tensor "
    "computed from it earlier?), so that hfmpi cannot replace it: use self.NAME in forward"
)

LATE = 10**6
"""Added to numbers that a pass changes, such as counts of calls, to detect outputs that depend on them."""


def check_types(module: Any, trained: Mapping[str, Any]) -> None:
    """Raise a UserError unless a module's tensors have dtypes and devices that can be trained."""
    for name, p in trained.items():
        if p.layout != torch.strided:
            raise UserError(f"the parameter {name} is sparse: convert it with to_dense()")
    if any(isinstance(part, torch.jit.ScriptModule) for part in module.modules()):
        raise UserError("a part of the module is scripted: use the original module in its place")
    types = {p.dtype for p in trained.values()}
    if types not in ({torch.float32}, {torch.float64}):
        names = ", ".join(sorted(str(kind).removeprefix("torch.") for kind in types))
        raise UserError(f"parameters must all be float32 or all be float64, not {names}")
    tensors = [*module.parameters(), *module.buffers()]
    devices = {tensor.device for tensor in tensors}
    if len(devices) > 1:
        names = ", ".join(sorted(map(str, devices)))
        raise UserError(
            f"parameters and buffers of the module must be on one device, not on {names}: call module.to(...)"
        )
    if any(tensor.is_inference() for tensor in tensors):
        raise UserError(
            "the module was created under torch.inference_mode(), which excludes derivatives: create it "
            "outside"
        )
    for name, layer in module.named_modules():
        if isinstance(layer, (torch.nn.Embedding, torch.nn.EmbeddingBag)) and layer.sparse:
            raise UserError(f"the table {name} has sparse gradients: create it with sparse=False")


def check_memory(parameters: Mapping[str, Any], others: Iterable[Any]) -> dict[int, Any]:
    """Return the parameters that represent other tensors with the same memory and shape, by identity.

    Parameters
    ----------
    parameters : mapping of str to tensor
        The trained parameters.
    others : iterable of tensor
        Frozen parameters and buffers.

    Raises
    ------
    UserError
        If memory is shared in any other way, because a step in one parameter would change another tensor.
    """
    for name, p in parameters.items():
        if any(size > 1 and stride == 0 for size, stride in zip(p.shape, p.stride(), strict=True)):
            raise UserError(
                f"entries of the parameter {name} share memory (expand): replace it by a copy, p.clone()"
            )
    named = [*((name, p) for name, p in parameters.items()), *(("", q) for q in others)]
    named = [(name, p) for name, p in named if p.numel() and p.layout == torch.strided]
    named.sort(key=lambda pair: (str(pair[1].device), _range(pair[1])[0]))
    aliases, reaching = dict[int, Any](), list[tuple[str, Any]]()
    for name, p in named:
        start = _range(p)[0]
        reaching = [(other, q) for other, q in reaching if q.device == p.device and _range(q)[1] > start]
        for other, q in reaching:
            if p is q or not (name or other) or not _overlap(p, q):
                continue
            if not (name and other):
                raise UserError(
                    f"the parameter {name or other} shares memory with a buffer or a frozen parameter: "
                    "replace one of them by a copy (clone)"
                )
            if (p.data_ptr(), p.shape, p.stride()) != (q.data_ptr(), q.shape, q.stride()):
                raise UserError(
                    f"the parameters {other} and {name} share memory with different shapes or strides: "
                    "replace one of them by a copy, or use one parameter in both places"
                )
            aliases[id(p)] = aliases.get(id(q), q)
        reaching.append((name, p))
    return aliases


def stochastic(module: Any) -> str:
    """Return the first layer in training mode with outputs that are random or depend on the batch, or ""."""
    nn = torch.nn
    for name, layer in module.named_modules():
        rate = getattr(layer, "p", None) if isinstance(layer, nn.modules.dropout._DropoutNd) else None
        if isinstance(layer, nn.RNNBase):
            rate = layer.dropout if layer.num_layers > 1 else 0
        if isinstance(layer, nn.MultiheadAttention):
            rate = layer.dropout
        batch_norm = isinstance(layer, nn.modules.batchnorm._BatchNorm)
        if layer.training and (rate or batch_norm or isinstance(layer, nn.RReLU)):
            return f"{name or 'it'} ({type(layer).__name__})"
        if batch_norm and not layer.track_running_stats:
            return f"{name or 'it'} ({type(layer).__name__} without running statistics)"
    return ""


def fresh_copy(module: Any) -> Any:
    """Return a copy of a module before its first call, or None if it cannot be copied."""
    tensors = [t for t in (*module.parameters(), *module.buffers()) if t.device.type == "cpu"]
    nbytes = sum(t.numel() * t.element_size() for t in tensors)
    if nbytes > free_memory() / 4:
        return None
    try:
        return copy.deepcopy(module)
    except Exception:  # any error: the module contains something that cannot be copied
        return None


def check_module(model: TorchModel, theta: np.ndarray, few: CheckedBatch, fresh: Any) -> None:
    """Raise a UserError unless a module is a function of its named parameters, with and without gradients.

    Parameters
    ----------
    model : TorchModel
    theta : (D,)
        The module is evaluated near theta, because special initial values may hide dependencies.
    few : CheckedBatch
        A few examples.
    fresh : torch.nn.Module or None
        A copy of the module before its first call.
    """
    theta = elsewhere(theta)
    trial, everything = model.trial(theta, few), range(few.size)
    with model.running(few.inputs):
        passes = TorchPasses(model, model.backend.to_device(theta), few)
    outputs = model.backend.to_host(passes.outputs)
    same = trial.same(everything, outputs.reshape(few.size, -1))
    wide = theta.astype(np.float64)
    exact = model.in_float64(wide, few)
    if exact is not None and not model.plan.differentiates:
        model.replan(differentiates=True)  # enables gradients, in float64 too
        again = model.in_float64(wide, few)
        model.replan(differentiates=False)
        bound = FLOORS["float64"] * np.abs(exact).max(initial=0)
        same &= again is None or np.allclose(again, exact, 1e-8, bound, equal_nan=True)
    if not same:
        raise UserError(
            "the module computes different outputs with and without gradients: it must not depend on "
            "torch.is_grad_enabled()"
        )
    leaves = _leaves(passes.graph, passes.theta)
    if any(leaf is p for leaf in leaves for p in model.parameters.values()):
        raise UserError(HIDDEN)
    if leaves:
        shapes = ", ".join(str(tuple(leaf.shape)) for leaf in leaves[:3])
        logging.getLogger(__name__).warning(
            "Note: the outputs depend on %d tensors that require gradients but are not parameters of the "
            "module (shapes %s%s): they are not trained.",
            len(leaves),
            shapes,
            ", ..." if len(leaves) > 3 else "",
        )
    _check_numbers(model, trial)
    _check_other_parameters(model, trial, fresh)


def _check_numbers(model: TorchModel, trial: Trial) -> None:
    """Raise a UserError if the outputs depend on a number that a pass changes, such as a call counter."""
    before, everything = numbers(model.module), range(trial.examples.size)
    trial.of(everything)
    changed = [(store, key, value) for store, key, value in before if store[key] != value]
    for store, key, value in changed:
        store[key] = not value if isinstance(value, bool) else value + LATE
    if changed and not trial.same(everything, trial.of(everything)):
        raise UserError(
            f"the outputs of the module depend on {changed[0][1]}, which its passes change: they must depend "
            "only on parameters and inputs"
        )


def _leaves(graph: Any, theta: Any) -> list[Any]:
    """Return the tensors that require a gradient and that a graph depends on, except theta."""
    seen, leaves, functions = set[Any](), list[Any](), [graph.grad_fn]
    while functions:
        function = functions.pop()
        if function is None or function in seen:
            continue
        seen.add(function)
        leaf = getattr(function, "variable", None)
        if leaf is not None and leaf is not theta:
            leaves.append(leaf)
        functions += [following for following, _ in function.next_functions]
    return leaves


def _check_other_parameters(model: TorchModel, trial: Trial, fresh: Any) -> None:
    """Raise a UserError unless the module with the values of the trial has the same outputs as the trial.

    The outputs differ if the module accesses a parameter through a list or an attribute. If it caches values
    that it computed from earlier parameters, the outputs of its copy before the first call differ.
    """
    everything = range(trial.examples.size)
    named = model.named(model.exchange.moved(trial.theta))
    values = {id(p): named[name] for name, p in model.parameters.items()}
    paired = [
        (name, values[id(model.aliases.get(id(p), p))])
        for name, p in model.module.named_parameters(remove_duplicate=False)
        if id(model.aliases.get(id(p), p)) in values
    ]
    few = trial.examples
    for module in (model.module, *([] if fresh is None else [fresh])):
        held = dict(module.named_parameters(remove_duplicate=False))
        with model.places.lock, model.running(few.inputs), model.plan.kernels():
            before = [p.detach().clone() for p in held.values()]
            try:
                with torch.no_grad():
                    for name, value in paired:
                        held[name].copy_(value)
                with model.forward_context():
                    theirs = to_array(model.run(module, model.tensors(few.inputs), few.scored))
                kept = all(torch.equal(held[name], value) for name, value in paired)
            finally:
                with torch.no_grad():
                    for p, was in zip(held.values(), before, strict=True):
                        p.copy_(was)
        if not kept:
            raise UserError(CHANGES)
        if not trial.same(everything, theirs.reshape(few.size, -1)):
            raise UserError(HIDDEN)


def _overlap(p: Any, q: Any) -> bool:
    """Return whether two tensors on one device with overlapping address ranges share memory."""
    if p.device.type != "cpu" or torch.bfloat16 in (p.dtype, q.dtype):
        return True
    try:
        return np.shares_memory(p.detach().numpy(), q.detach().numpy(), 10**6)  # type: ignore[arg-type]
    except np.exceptions.TooHardError:
        return True


def _range(p: Any) -> tuple[int, int]:
    """Return the first address of a tensor's memory and the address after its last byte."""
    last = sum((size - 1) * stride for size, stride in zip(p.shape, p.stride(), strict=True))
    return p.data_ptr(), p.data_ptr() + (last + 1) * p.element_size()
