"""Derivatives that a module computes inside its forward pass, for all examples of `torch.func.vmap` at once.

Physics-informed networks call `requires_grad_` and `torch.autograd.grad` on their inputs, which PyTorch does
not support inside `vmap`. Both work on the tensors of all examples (B, ...) instead: the outputs of an
example depend on its inputs alone, so that the gradient of their sum over the examples is the gradient of
each example.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

__all__ = ["InnerDerivatives", "OnlyBatched"]


class InnerDerivatives(TorchFunctionMode):  # type: ignore[misc]
    """Makes `torch.autograd.grad` and `requires_grad_` work inside one `torch.func.vmap`."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        replacement, kwargs = _REPLACEMENTS.get(func), kwargs or {}
        if func == _SETTER:  # PyTorch's setter silently has no effect inside `vmap`
            return _require(*args)
        if replacement is None:
            return func(*args, **kwargs)
        try:
            return func(*args, **kwargs)  # works in other transformations of torch.func, which call both too
        except RuntimeError:
            return replacement(*args, **kwargs)


def _require(tensor: Any, requires_grad: bool = True) -> Any:
    """Set `requires_grad` of a tensor and return the tensor."""
    _Require.apply(tensor, requires_grad)
    return tensor


def _gradients(
    outputs: Any, inputs: Any, *, grad_outputs: Any = None, is_grads_batched: bool = False, **options: Any
) -> tuple[Any, ...]:
    """Return the gradients as `torch.autograd.grad` does, which passes on all options by name."""
    if is_grads_batched:
        raise NotImplementedError("a derivative of many cotangents inside a module")
    of, at = _several(outputs), _several(inputs)
    along = [None] * len(of) if grad_outputs is None else _several(grad_outputs)
    unused = set[int]()
    given = [i for i, u in enumerate(along) if u is not None]

    def differentiate(size: int, axes: Sequence[int | None], *tensors: Any) -> tuple[Any, ...]:
        if None in axes[: len(of) + len(at)]:
            raise NotImplementedError("a derivative of a value that all examples share")
        z, x, u = tensors[: len(of)], tensors[len(of) :][: len(at)], dict[int, Any]()
        for i, one, axis in zip(given, tensors[len(of) + len(at) :], axes[len(of) + len(at) :], strict=True):
            examples = one.expand(size, *one.shape) if axis is None else one.movedim(axis, 0)
            u[i] = examples.movedim(0, axes[i])
        for i, one in enumerate(z):
            if i not in u:
                if one.numel() != size:
                    raise RuntimeError("grad can be implicitly created only for scalar outputs")
                u[i] = torch.ones_like(one)
        found = torch.autograd.grad(z, x, [u[i] for i in range(len(z))], **options)
        unused.update(i for i, one in enumerate(found) if one is None)
        return tuple(torch.zeros_like(x[i]) if one is None else one for i, one in enumerate(found))

    results = _Differentiate.apply(differentiate, len(of), *of, *at, *(along[i] for i in given))
    return tuple(None if i in unused else one for i, one in enumerate(results))


def _several(tensors: Any) -> tuple[Any, ...]:
    return (tensors,) if isinstance(tensors, torch.Tensor) else tuple(tensors)


class OnlyBatched(torch.autograd.Function):  # type: ignore[misc]
    """A function that only works in `torch.func.vmap`."""

    @staticmethod
    def forward(*args: Any) -> Any:
        """Raise an error: the function was called outside of `vmap`."""
        raise NotImplementedError("a layer or a derivative inside another transformation")

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        """Raise an error: the function was called in a transformation that differentiates."""
        raise NotImplementedError("a layer or a derivative inside another transformation")


class _Differentiate(OnlyBatched):
    """Calls a function with the tensors of all examples and their axes; results have the axes of inputs."""

    @staticmethod
    def vmap(info: Any, axes: Any, function: Any, outputs: int, *tensors: Any) -> Any:
        results = function(info.batch_size, axes[2:], *tensors)
        return results, axes[2 + outputs :][: len(results)]


class _Require(OnlyBatched):
    """Calls `requires_grad_` on the tensor of all examples."""

    @staticmethod
    def vmap(info: Any, axes: Any, tensor: Any, requires_grad: bool) -> Any:
        tensor.requires_grad_(requires_grad)
        return tensor.detach(), axes[0]


_REPLACEMENTS: dict[Any, Any] = {torch.autograd.grad: _gradients, torch.Tensor.requires_grad_: _require}
_SETTER = torch.Tensor.requires_grad.__set__
