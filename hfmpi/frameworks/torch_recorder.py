"""Records the calls of layers in an ordinary pass of a PyTorch module: inputs, and edges of outputs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.autograd.graph import get_gradient_edge
from torch.overrides import TorchFunctionMode

from hfmpi.frameworks.torch_gradients import ExampleGradients
from hfmpi.frameworks.torch_labels import taken
from hfmpi.frameworks.torch_recurrent import CELLS, PACKED, UNPACKED

__all__ = ["Call", "Recorder"]


class Call(NamedTuple):
    """A call of a layer with one parameter.

    Attributes
    ----------
    kind : str
        product: inputs @ p'. transposed: inputs @ p. lookup: p[inputs]. added: p (O,) added to rows, or
        multiplied with them. rest: p of another shape.
    name : str
        The name of the parameter p.
    input : tensor or None
        The rows (R, I), or the indices (R,).
    edge : GradientEdge
        The edge of the result; if p is added or multiplied, the edge of p expanded to the result's shape.
    rows : int
        R.
    device : torch.device
    shape : tuple of int
        The shape of p without leading axes of size 1, for calls of kind rest.
    """

    kind: str
    name: str
    input: Any
    edge: Any
    rows: int
    device: Any
    shape: tuple[int, ...] = ()

    def add(self, gradients: ExampleGradients, u: Any, inputs: Any) -> None:
        """Add the term of rows u (B, n, .), and inputs (B, n, .) or (R, .), to the parameter's gradients."""
        if self.kind == "added":
            gradients.added.append(u)
            return
        inputs = inputs.reshape(*u.shape[:2], *inputs.shape[inputs.ndim - (self.kind != "lookup") :])
        if self.kind == "product":
            gradients.products.append((u, inputs))
        elif self.kind == "transposed":
            gradients.products.append((inputs, u))
        else:
            gradients.lookups.append((u, inputs))

    def add_rest(self, gradients: ExampleGradients, cotangent: Any, index: Any) -> None:
        """Add the gradient at the edge, whose rows `index` (B, n) belong to each example."""
        u = taken(cotangent.reshape(self.rows, -1), index)
        each = u.sum(1).reshape(len(u), *cotangent.shape[cotangent.ndim - len(self.shape) :])
        narrow = [1 + i for i, size in enumerate(self.shape) if size == 1]
        each = each.sum(narrow, keepdim=True) if narrow else each
        gradients.rest.append(each.reshape(len(u), *gradients.p.shape))


class Recorder(TorchFunctionMode):  # type: ignore[misc]
    """Calls layers with the actual parameters in place of their stand-ins, and records the calls.

    Attributes
    ----------
    known : dict of int to (str, tensor)
        By the identity of a stand-in or a frozen parameter: the name, empty if it is frozen, and the
        actual parameter.
    calls : list of Call
    shared : list of bool
        See `BatchPass`.
    closed : bool
        Whether the forward pass has ended: products in later passes are not recorded.
    """

    def __init__(self, examples: int, derivatives: bool, shared: Sequence[bool] | None) -> None:
        super().__init__()
        self.examples, self.derivatives, self._decided = examples, derivatives, shared
        self.known, self.calls, self.shared = dict[int, tuple[str, Any]](), list[Call](), list[bool]()
        self._transposed, self._kept, self.closed = dict[int, Any](), list[Any](), False

    def mark(self, results: Any) -> Any:
        """Mark tensors as computed from inputs; return them."""
        for x in _tensors(results):
            x._hfmpi_of_inputs = True
        return results

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        of_inputs = any(_is_marked(x) for x in _tensors((args, tuple(kwargs.values()))))
        results = self._call(func, args, kwargs)
        return self.mark(results) if of_inputs else results

    def _call(self, func: Any, args: Any, kwargs: Any) -> Any:
        functional = torch.nn.functional
        if func is functional.linear:
            return self._linear(*args, **kwargs)
        if func is functional.embedding:
            return self._embedding(*args, **kwargs)
        if func is functional.layer_norm:
            return self._norm(functional.layer_norm, *args, **kwargs)
        if func in CELLS and self._is_trained(args[2:]):
            return CELLS[func](self._linear, *args, **kwargs)
        if func in _TRANSPOSES and id(args[0]) in self.known and args[0].ndim == 2:
            transposed = func(*args, **kwargs)
            self._transposed[id(transposed)] = args[0]
            self._kept.append(transposed)
            return transposed
        if func in _PRODUCTS and len(args) == 2 and not kwargs:
            return self._product(func, *args)
        if func is torch.addmm and len(args) == 3 and not kwargs and self._is_trained(args):
            return self._elementwise(torch.add, (self._product(torch.mm, *args[1:]), args[0]), {})
        if func in _ELEMENTWISE:
            return self._elementwise(func, args, kwargs)
        packed = func in PACKED and isinstance(args[3], (list, tuple))
        if (packed or (func in UNPACKED and isinstance(args[2], (list, tuple)))) and len(args) == 9:
            return self._recurrent(func, packed, args)
        return func(*args, **kwargs)

    def _is_trained(self, tensors: Iterable[Any]) -> bool:
        return any(self.known.get(id(p), ("", None))[0] for p in tensors)

    def multiply(self, input: Any, weight: Any, bias: Any = None, transposed: bool = False) -> Any:
        """Return input @ weight' or input @ weight, plus bias, and record it; parameters may be stand-ins."""
        (name, p), (added, b) = self.known[id(weight)], self.known.get(id(bias), ("", bias))
        product = self.times(name, p, input.reshape(-1, input.shape[-1]), transposed, added, b)
        return product.view(*input.shape[:-1], product.shape[-1])

    def times(self, name: str, p: Any, rows: Any, transposed: bool, added: str = "", b: Any = None) -> Any:
        """Return rows (R, .) times the matrix p, and record the product under the parameter's name."""
        if self.derivatives:
            product = _Times.apply(rows, p, b, self, name, transposed)
        else:
            product = _times(rows, p, transposed, b)
        if not self.closed and product.requires_grad and (name or added):
            edge = get_gradient_edge(product)
            about = edge, len(rows), rows.device
            if name:
                self.calls.append(
                    Call("transposed" if transposed else "product", name, rows.detach(), *about)
                )
            if added:
                self.calls.append(Call("added", added, None, *about))
        return product

    def _linear(self, input: Any, weight: Any, bias: Any = None) -> Any:
        if id(weight) in self.known and self._is_trained((weight, bias)):
            return self.multiply(input, weight, bias)
        product = torch.nn.functional.linear(input, weight)
        return product if bias is None else self._elementwise(torch.add, (product, bias), {})

    def _product(self, func: Any, input: Any, other: Any) -> Any:
        if isinstance(input, torch.Tensor) and input.ndim and isinstance(other, torch.Tensor):
            if id(other) in self.known and other.ndim == 2 and self._is_trained((other,)):
                return self.multiply(input, other, transposed=True)
            if id(other) in self._transposed and self._is_trained((self._transposed[id(other)],)):
                return self.multiply(input, self._transposed[id(other)])
        return func(input, other)

    def _embedding(
        self,
        input: Any,
        weight: Any,
        padding_idx: int | None = None,
        max_norm: float | None = None,
        norm_type: float = 2.0,
        scale_grad_by_freq: bool = False,
        sparse: bool = False,
    ) -> Any:
        if max_norm is not None or scale_grad_by_freq or sparse or not self._is_trained((weight,)):
            return torch.nn.functional.embedding(
                input, weight, padding_idx, max_norm, norm_type, scale_grad_by_freq, sparse
            )
        input = self._by_example(input)
        name, p = self.known[id(weight)]
        rows = torch.nn.functional.embedding(input, p)
        flat = input.reshape(-1)
        self.calls.append(Call("lookup", name, flat, get_gradient_edge(rows), len(flat), flat.device))
        if padding_idx is None:
            return rows
        constant = (input == padding_idx % len(p)).unsqueeze(-1)  # the padding row has no gradient
        return torch.where(constant, rows.detach(), rows)

    def _by_example(self, indices: Any) -> Any:
        """Return indices that all examples share, such as positions, repeated for each example."""
        fixed = not _is_marked(indices) and indices.ndim > 0
        if self._decided is None:
            shared = fixed and len(indices) != self.examples
        elif len(self.shared) < len(self._decided):
            shared = self._decided[len(self.shared)]
        else:
            raise RuntimeError("the calls of tables change from batch to batch")
        if shared and not fixed:
            raise RuntimeError("the calls of tables change from batch to batch")
        self.shared.append(shared)
        if not shared:
            return indices
        return indices.expand(self.examples, *indices.shape[len(indices) == 1 :])

    def _norm(
        self, func: Any, input: Any, shape: Any, weight: Any = None, bias: Any = None, *eps: Any, **more: Any
    ) -> Any:
        if not self._is_trained((weight, bias)):
            return func(input, shape, weight, bias, *eps, **more)
        scaled = func(input, shape, None, None, *eps, **more)
        if weight is not None:
            scaled = self._elementwise(torch.mul, (scaled, weight), {})
        return scaled if bias is None else self._elementwise(torch.add, (scaled, bias), {})

    def _elementwise(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Add or multiply by a parameter that is expanded to the shape of the result."""
        trained = [i for i, p in enumerate(args) if self._is_trained((p,))]
        if len(args) != 2 or len(trained) != 1 or not isinstance(args[1 - trained[0]], torch.Tensor):
            return func(*args, **kwargs)
        (i,) = trained
        name, p = self.known[id(args[i])]
        form = torch.broadcast_shapes(args[0].shape, args[1].shape)
        expanded = p.expand(form)
        short = list(p.shape)
        while short and short[0] == 1:
            del short[0]
        kind = "added" if p.ndim == 1 and form[-1] == len(p) else "rest"
        count = int(np.prod(form[: len(form) - len(short)], dtype=int))
        edge = get_gradient_edge(expanded)
        self.calls.append(Call(kind, name, None, edge, count, p.device, tuple(short)))
        return func(*(expanded if k == i else other for k, other in enumerate(args)), **kwargs)

    def _recurrent(self, func: Any, packed: bool, args: Any) -> Any:
        """Run a recurrent network step by step and record its products."""
        weights = args[3] if packed else args[2]
        if not self._is_trained(weights) or any(id(p) not in self.known for p in weights):
            return func(*args)
        input, *others = args
        if not input.requires_grad:  # otherwise a fused kernel runs without calling `linear`
            input = input.detach().requires_grad_()
        if packed:
            others[0] = others[0].tolist()
        with _Steps(self):
            return (PACKED if packed else UNPACKED)[func](input, *others)


class _Steps(TorchFunctionMode):  # type: ignore[misc]
    """Records the products in a recurrent network."""

    def __init__(self, recorder: Recorder) -> None:
        super().__init__()
        self.recorder = recorder

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.nn.functional.linear:
            return self.recorder._linear(*args, **kwargs or {})
        return func(*args, **kwargs or {})


class _Times(torch.autograd.Function):  # type: ignore[misc]
    """A product with a matrix, whose derivative with respect to the rows is recorded too."""

    @staticmethod
    def forward(ctx: Any, rows: Any, p: Any, b: Any, recorder: Recorder, name: str, transposed: bool) -> Any:
        """Return the product."""
        ctx.about = p, recorder, name, transposed
        return _times(rows, p, transposed, b)

    @staticmethod
    def backward(ctx: Any, u: Any) -> Any:
        """Return the gradient with respect to the rows only."""
        p, recorder, name, transposed = ctx.about
        rows = recorder.times(name, p, u, not transposed) if ctx.needs_input_grad[0] else None
        return rows, None, None, None, None, None


def _times(rows: Any, p: Any, transposed: bool, b: Any) -> Any:
    return torch.nn.functional.linear(rows, p.T if transposed else p, b)


def _is_marked(x: Any) -> bool:
    return getattr(x, "_hfmpi_of_inputs", False)


def _tensors(tree: Any) -> Iterable[Any]:
    """Yield the tensors in lists and tuples."""
    if isinstance(tree, torch.Tensor):
        yield tree
    elif isinstance(tree, (list, tuple)):
        for part in tree:
            yield from _tensors(part)


def _forms(*names: str) -> set[Any]:
    """Return the functions of PyTorch and the methods of tensors that have these names."""
    places = torch, torch.Tensor
    return {getattr(place, name) for place in places for name in names if hasattr(place, name)}


_ELEMENTWISE = _forms(
    *("add", "sub", "mul", "div", "true_divide", "add_", "sub_", "mul_", "div_"),
    *("__add__", "__radd__", "__iadd__", "__sub__", "__rsub__", "__isub__"),
    *("__mul__", "__rmul__", "__imul__", "__truediv__", "__rtruediv__", "__itruediv__"),
)
_PRODUCTS = _forms("matmul", "mm", "__matmul__")
_TRANSPOSES = {torch.t, torch.Tensor.t, torch.Tensor.T.__get__, torch.Tensor.mT.__get__}
