"""Snapshots of a PyTorch module, to detect what passes change and to restore the module."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

__all__ = ["Snapshot", "numbers"]


GENERATORS = random.Random, np.random.Generator, np.random.RandomState, torch.Generator


class Snapshot:
    """The tensors, attributes and random generators of a module.

    Parameters
    ----------
    module : torch.nn.Module
    device : torch.device
    """

    def __init__(self, module: Any, device: Any) -> None:
        self.module = module
        self._stores = [(store, store.copy()) for store in _stores(module)]
        named = [*module.named_parameters(), *module.named_buffers()]
        self._tensors = [(name, tensor, tensor.data, _copied(tensor)) for name, tensor in named]
        self._generators = [(generator, _state(generator)) for generator in _generators(module, device)]

    def changed(self) -> str:
        """Return the name of a parameter or buffer that has changed since the snapshot, or ""."""
        held: dict[str, Any] = dict([*self.module.named_parameters(), *self.module.named_buffers()])
        for name, _, _, was in self._tensors:
            if name not in held or not _same(held[name], was):
                return str(name)
        return ""

    def drew(self) -> bool:
        """Return whether random numbers were drawn since the snapshot."""
        return any(_state(generator) != state for generator, state in self._generators)

    def restore(self) -> None:
        """Restore the attributes, tensors and random generators of the module."""
        for store, was in self._stores:
            if isinstance(store, list):
                store[:] = was
            elif len(store) != len(was) or any(store.get(key, store) is not was[key] for key in was):
                store.clear()
                store.update(was)
        with torch.no_grad():
            for _, tensor, data, was in self._tensors:
                if isinstance(was, torch.Tensor):  # tensors that can be compared
                    tensor.data = data
                    if not _same(tensor, was):
                        tensor.copy_(was)
        for generator, state in self._generators:
            if _state(generator) != state:
                _set_state(generator, state)


def numbers(module: Any) -> list[tuple[Any, Any, Any]]:
    """Return the numbers that a module holds outside of tensors: the list or dict, the key and the value."""
    return [
        (store, key, value)
        for store in _stores(module)
        for key, value in (enumerate(store) if isinstance(store, list) else store.items())
        if isinstance(value, (bool, int, float)) and key != "training"
    ]


def _stores(module: Any) -> list[Any]:
    """Return the attribute dicts of all parts of a module, and the lists and dicts among the attributes."""
    stores = list[Any]()
    for part in module.modules():
        stores.append(vars(part))
        stores += [value for value in vars(part).values() if isinstance(value, (list, dict))]
    return stores


def _copied(tensor: Any) -> Any:
    """Return a copy of a tensor, or its version counter if its layout or dtype cannot be compared."""
    plain = tensor.layout == torch.strided and not tensor.is_quantized
    if not plain or (tensor.is_floating_point() and torch.finfo(tensor.dtype).bits < 16):
        return tensor._version
    return tensor.detach().clone()


def _same(tensor: Any, was: Any) -> bool:
    """Return whether a tensor still has the state that `_copied` returned."""
    if not isinstance(was, torch.Tensor):
        return bool(tensor._version == was)
    if tensor.shape != was.shape or tensor.dtype != was.dtype:
        return False
    same: bool = ((tensor == was) | ((tensor != tensor) & (was != was))).all().item()  # NaN equals NaN
    return same


def _generators(module: Any, device: Any) -> Iterator[Any]:
    """Yield the random generators that a module may use: global ones, and those among its attributes."""
    yield from (random, np.random, torch.default_generator)
    if device.type == "cuda":
        yield torch.cuda.default_generators[device.index or 0]
    for store in _stores(module):
        for value in list(store.values() if isinstance(store, dict) else store):
            if isinstance(value, GENERATORS):
                yield value


def _state(generator: Any) -> Any:
    """Return the state of a generator of Python, NumPy or PyTorch, for comparisons and `_set_state`."""
    if isinstance(generator, torch.Generator):
        return generator.get_state().numpy().tobytes()
    if isinstance(generator, np.random.Generator):
        return repr(generator.bit_generator.state), generator.bit_generator.state
    if hasattr(generator, "get_state"):  # NumPy's module and RandomState
        name, keys, *rest = generator.get_state()
        return name, tuple(keys.tolist()), *rest
    return generator.getstate()


def _set_state(generator: Any, state: Any) -> None:
    if isinstance(generator, torch.Generator):
        generator.set_state(torch.frombuffer(bytearray(state), dtype=torch.uint8))
    elif isinstance(generator, np.random.Generator):
        generator.bit_generator.state = state[1]
    elif hasattr(generator, "set_state"):
        name, keys, *rest = state
        generator.set_state((name, np.array(keys, np.uint32), *rest))
    else:
        generator.setstate(state)
