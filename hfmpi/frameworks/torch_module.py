"""A PyTorch module as a function of its parameters, which are replaced during a call.

`torch.func.functional_call` does not restore a module object that is registered in two places. Here all
places that hold a parameter are known in advance, and each is restored, even if the call fails.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hfmpi.errors import UserError

__all__ = [
    "Allocations",
    "Narrowing",
    "Substitution",
    "plain_module",
]

_locks: weakref.WeakKeyDictionary[Any, Any] = weakref.WeakKeyDictionary()
_making = threading.Lock()


def plain_module(module: Any) -> Any:
    """Return the module inside the wrappers of torch.compile and PyTorch's data parallelism."""
    wrappers = torch.nn.DataParallel, torch.nn.parallel.DistributedDataParallel
    while True:
        if isinstance(module, wrappers):
            module = module.module
        elif "_orig_mod" in getattr(module, "_modules", {}):
            module = module._orig_mod
        else:
            return module


class Substitution:
    """Replaces the parameters and buffers of a module wherever it holds them.

    Parameters
    ----------
    module : torch.nn.Module
    aliases : mapping of int to tensor
        By the identity of a tensor, the tensor with the same memory that represents both.

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
        compiled = any(hasattr(p, "_orig_mod") or p._compiled_call_impl is not None for p in module.modules())
        self._eager = partial(torch.compiler.set_stance, "force_eager") if compiled else nullcontext

    def _slots(self) -> list[tuple[dict[str, Any], str, Any]]:
        """Return the dict and the key that hold each tensor, and the tensor or the one that represents it."""
        return [
            (store, name, self.aliases.get(id(tensor), tensor))
            for part in self.module.modules()
            for store in (part._parameters, part._buffers)
            for name, tensor in store.items()
            if tensor is not None
        ]

    def refresh(self) -> bool:
        """Locate buffers again, which a pass may have replaced; return whether parameters were replaced."""

        def parameters(slots: list[tuple[dict[str, Any], str, Any]]) -> list[tuple[int, str, int]]:
            return [(id(store), name, id(p)) for store, name, p in slots if isinstance(p, torch.nn.Parameter)]

        with self.lock:
            now = self._slots()
            if parameters(now) != parameters(self.slots):
                return True
            self.slots = now
        self.tensors = [*{id(tensor): tensor for _, _, tensor in now}.values()]
        return False

    @contextmanager
    def replaced(self, tensors: Mapping[int, Any]) -> Iterator[None]:
        """Replace tensors, by identity, inside the context; no other thread can call the module meanwhile.

        Raises
        ------
        UserError
            If the module assigns another tensor to the name of a parameter.
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
                with self._eager():  # torch.compile would compile again for every kind of pass
                    yield
                lost = [
                    name
                    for store, name, original, tensor in before
                    if store.get(name) is not tensor and isinstance(original, torch.nn.Parameter)
                ]
            finally:
                for store, name, original, _ in before:
                    store[name] = original
        if lost:
            raise UserError(f"a pass of the module assigns to its parameter {lost[0]}: use a local variable")


class _Watch(TorchDispatchMode):  # type: ignore[misc]
    """Observes every operation of a pass."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Prevent PyTorch from importing its compiler for this class, which takes seconds."""
        return False


class Narrowing(_Watch):
    """Detects results of lower precision than float64 that are computed from tensors.

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


class Allocations(_Watch):
    """Adds up the sizes of the results of all operations, an upper bound of what their graph keeps.

    Attributes
    ----------
    nbytes : int
    """

    nbytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        results = func(*args, **kwargs or {})
        tensors = (x for x in tree_leaves(results) if isinstance(x, torch.Tensor))
        self.nbytes += sum(x.numel() * x.element_size() for x in tensors)  # sparse tensors have no nbytes
        return results


def _lock_of(module: Any) -> Any:
    with _making:
        return _locks.setdefault(module, threading.RLock())
