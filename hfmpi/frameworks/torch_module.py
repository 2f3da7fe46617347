"""A PyTorch module as a function of its parameters, which are replaced for the time of a call.

`torch.func.functional_call` does not restore a module object that is registered in two places. Here every
place that holds a parameter is known in advance, so that each is restored, whatever happens in the call.
"""

from __future__ import annotations

import random
import threading
import weakref
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hfmpi.errors import UserError

__all__ = [
    "Allocations",
    "Narrowing",
    "Substitution",
    "check_memory",
    "check_types",
    "plain_module",
    "random_states",
    "stochastic",
]

_locks: weakref.WeakKeyDictionary[Any, Any] = weakref.WeakKeyDictionary()
_making = threading.Lock()


def plain_module(module: Any) -> Any:
    """Return the module inside the wrappers of torch.compile and of PyTorch's own data parallelism."""
    wrappers = torch.nn.DataParallel, torch.nn.parallel.DistributedDataParallel
    while True:
        if isinstance(module, wrappers):
            module = module.module
        elif "_orig_mod" in getattr(module, "_modules", {}):
            module = module._orig_mod
        else:
            return module


class Substitution:
    """The places in which a module holds its parameters and buffers.

    Parameters
    ----------
    module : torch.nn.Module
    aliases : mapping of int to tensor
        By the identity of a tensor, another one that occupies the same memory and stands for both.

    Attributes
    ----------
    tensors : list of tensor
        All parameters and buffers, each once.
    """

    def __init__(self, module: Any, aliases: Mapping[int, Any]) -> None:
        self.lock = _lock_of(module)
        self.module, self.aliases = module, aliases
        with self.lock:
            self.slots = self._slots()
        self.tensors = [*{id(tensor): tensor for _, _, tensor in self.slots}.values()]
        compiled = [
            p for p in module.modules() if hasattr(p, "_orig_mod") or p._compiled_call_impl is not None
        ]
        self._eager = partial(torch.compiler.set_stance, "force_eager") if compiled else nullcontext

    def _slots(self) -> list[tuple[dict[str, Any], str, Any]]:
        """Return the place and the name of every tensor, and the tensor, or the one that stands for it."""
        return [
            (store, name, self.aliases.get(id(tensor), tensor))
            for part in self.module.modules()
            for store in (part._parameters, part._buffers)
            for name, tensor in store.items()
            if tensor is not None
        ]

    def complete(self) -> bool:
        """Return whether the module still holds the same tensors in the same places."""
        with self.lock:
            now = self._slots()
        return len(now) == len(self.slots) and all(
            store is other and name == other_name and tensor is other_tensor
            for (store, name, tensor), (other, other_name, other_tensor) in zip(now, self.slots, strict=True)
        )

    @contextmanager
    def replaced(self, tensors: Mapping[int, Any]) -> Iterator[None]:
        """Replace tensors, by their identity, inside the context; no other thread calls the module then.

        Raises
        ------
        UserError
            If the module assigns another tensor to one of their names.
        """
        with self.lock:
            before = [
                (store, name, store[name], tensors[id(tensor)])
                for store, name, tensor in self.slots
                if id(tensor) in tensors
            ]
            try:
                for store, name, _, tensor in before:
                    store[name] = tensor
                with self._eager():  # a compiled part would be compiled again for every kind of pass
                    yield
                lost = [name for store, name, _, tensor in before if store.get(name) is not tensor]
            finally:
                for store, name, original, _ in before:
                    store[name] = original
        if lost:
            raise UserError(
                f"a pass of the module assigns to its parameter or buffer {lost[0]}: use a local variable"
            )


class Narrowing(TorchDispatchMode):  # type: ignore[misc]
    """Watches operations for results of lower precision than float64 that are computed from tensors.

    Attributes
    ----------
    found : bool
    """

    found = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        results = func(*args, **kwargs or {})
        if any(isinstance(x, torch.Tensor) for x in tree_leaves((args, kwargs))):
            for x in tree_leaves(results):
                real = isinstance(x, torch.Tensor) and (x.is_floating_point() or x.is_complex())
                self.found |= real and x.dtype not in (torch.float64, torch.complex128)
        return results


class Allocations(TorchDispatchMode):  # type: ignore[misc]
    """Adds up the results of all operations, at least as much as a graph of them keeps.

    Attributes
    ----------
    nbytes : int
    """

    nbytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        results = func(*args, **kwargs or {})
        self.nbytes += sum(x.nbytes for x in tree_leaves(results) if isinstance(x, torch.Tensor))
        return results


def random_states(device: Any) -> tuple[Any, ...]:
    """Return the states of the random generators that a module may use."""
    name, numbers, *rest = np.random.get_state()  # noqa: NPY002 (users' modules may draw from it)
    legacy = name, np.asarray(numbers).tobytes(), *rest
    states = [random.getstate(), torch.get_rng_state().numpy().tobytes(), legacy]
    if device.type == "cuda":
        states.append(torch.cuda.get_rng_state(device).numpy().tobytes())
    return tuple(states)


def check_types(module: Any, trained: Mapping[str, Any]) -> None:
    """Raise a UserError unless the types and devices of a module's tensors can be trained."""
    types = {p.dtype for p in trained.values()}
    if types not in ({torch.float32}, {torch.float64}):
        names = ", ".join(sorted(str(kind).removeprefix("torch.") for kind in types))
        raise UserError(f"parameters must all be float32 or all be float64, not {names}")
    tensors = [*module.parameters(), *module.buffers()]
    devices = {tensor.device for tensor in tensors}
    if len(devices) > 1:
        names = ", ".join(sorted(map(str, devices)))
        raise UserError(
            f"parameters and buffers of the module must be on one device, not on {names}: module.to(...)"
        )
    if any(tensor.is_inference() for tensor in tensors):
        raise UserError(
            "the module was made under torch.inference_mode(), which excludes derivatives: make it outside"
        )
    for name, layer in module.named_modules():
        if getattr(layer, "sparse", False) is True and isinstance(
            layer, (torch.nn.Embedding, torch.nn.EmbeddingBag)
        ):
            raise UserError(f"the table {name} has sparse gradients: make it with sparse=False")


def check_memory(parameters: Mapping[str, Any], others: Iterable[Any]) -> dict[int, Any]:
    """Return, by identity, the parameter that stands for others with the same memory and form.

    Parameters
    ----------
    parameters : mapping of str to tensor
        The trained parameters.
    others : iterable of tensor
        Frozen parameters and buffers.

    Raises
    ------
    UserError
        If memory is shared in any other way: a step in one parameter would change another tensor.
    """
    for name, p in parameters.items():
        if any(size > 1 and stride == 0 for size, stride in zip(p.shape, p.stride(), strict=True)):
            raise UserError(
                f"entries of the parameter {name} share memory (expand): make it a copy, p.clone()"
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
                    f"the parameter {name or other} shares memory with a buffer or a frozen parameter: make "
                    "one of them a copy (clone)"
                )
            if (p.data_ptr(), p.shape, p.stride()) != (q.data_ptr(), q.shape, q.stride()):
                raise UserError(
                    f"the parameters {other} and {name} share memory in different forms: make one of them a "
                    "copy, or use one parameter in both places"
                )
            aliases[id(p)] = aliases.get(id(q), q)
        reaching.append((name, p))
    return aliases


def stochastic(module: Any) -> str:
    """Return the first layer in training mode whose outputs depend on chance or on the batch, or ""."""
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


def _overlap(p: Any, q: Any) -> bool:
    """Return whether two tensors on one device whose ranges overlap share memory."""
    if p.device.type != "cpu" or torch.bfloat16 in (p.dtype, q.dtype):
        return True
    try:
        return np.shares_memory(p.detach().numpy(), q.detach().numpy(), 10**6)  # type: ignore[arg-type]
    except np.exceptions.TooHardError:
        return True


def _range(p: Any) -> tuple[int, int]:
    """Return the first address of a tensor, and the one after its last."""
    last = sum((size - 1) * stride for size, stride in zip(p.shape, p.stride(), strict=True))
    return p.data_ptr(), p.data_ptr() + (last + 1) * p.element_size()


def _lock_of(module: Any) -> Any:
    with _making:
        return _locks.setdefault(module, threading.RLock())
