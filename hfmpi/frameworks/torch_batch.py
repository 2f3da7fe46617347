"""Per-example gradients of a PyTorch module from one ordinary pass of a batch, without `torch.func.vmap`.

The module runs as it is on all examples. A layer (a product with a matrix, a table, a recurrent network, a norm,
a sum or product with a parameter) is recorded where the module calls it: its inputs, and the gradients of its
outputs, which one backward pass computes. Rows of these belong to examples wherever the module puts them, sorted
by length in packed sequences for example. A backward pass of random numbers tells which row belongs to which
example: the numbers of example b are multiplied by a power of two, so are all rows that belong to it, exactly,
and a row that mixes examples is noticed.

Modules that differentiate their outputs in their inputs, as physics-informed networks do, multiply with the
matrices again in these derivatives, which are recorded too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.autograd.graph import get_gradient_edge
from torch.overrides import TorchFunctionMode

from hfmpi.frameworks.torch_gradients import ExampleGradients
from hfmpi.frameworks.torch_recurrent import CELLS, PACKED, UNPACKED

__all__ = ["BatchPass"]

DIGITS = 32
"""How many examples one backward pass tells apart: their factors are 1, 2, ..., 2^31."""

PURE = 1e-3
"""Relative difference at which a row counts as one of several examples."""


class BatchPass:
    """One ordinary forward pass of B examples, of which each has a gradient in each parameter.

    Parameters
    ----------
    function : callable
        (parameters by name, inputs) -> outputs (B * N, O), those of an example one after the other.
    parameters : dict of str to tensor
        In the order of theta.
    frozen : iterable of tensor
        The module's other parameters.
    inputs : sequence of (B, ...)
    derivatives : bool
        Whether the module may differentiate its layers.
    shared : list of bool, or None
        For each table that is looked up, in the order of the calls, whether the indices are the same for all
        examples, so that each example looks them up. None: determine it. See `shared` below.
    together : bool
        Whether gradients of examples are only needed where inputs and output gradients do not determine the
        Kronecker factors of a parameter: all rows of other parameters are then those of one example.

    Attributes
    ----------
    shared : list of bool
        Of this pass. The number of examples must not be a size of such indices where it is determined.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        parameters: dict[str, Any],
        frozen: Iterable[Any],
        inputs: Sequence[Any],
        derivatives: bool,
        shared: Sequence[bool] | None = None,
        together: bool = False,
    ) -> None:
        self.parameters, self.examples, self.together = parameters, len(inputs[0]), together
        # What the module does with a parameter other than calling a layer depends on its stand-in.
        self._standing = {name: p.detach().requires_grad_() for name, p in parameters.items()}
        self._recorder = recorder = _Recorder(self.examples, derivatives, shared)
        recorder.known = {id(p): ("", p) for p in frozen}
        for name, p in parameters.items():
            recorder.known[id(self._standing[name])] = name, p.detach().requires_grad_()
        for x in inputs:
            recorder.mark(x)
        with torch.enable_grad(), recorder:
            outputs = function(self._standing, *inputs)
        self._outputs = outputs.reshape(self.examples, -1, outputs.shape[-1])
        recorder.closed = True
        self.shared, self._calls = recorder.shared, recorder.calls
        kinds = {name: {call.kind for call in self._calls if call.name == name} for name in parameters}
        # The rows of all examples have the factors of layers, where only one kind of layer has the parameter.
        self._joint = {
            name for name, of in kinds.items() if together and len(of) == 1 and not of & {"rest"}
        }
        self._index: list[Any] | None = None

    def gradients(self, u: Any, last: bool = True) -> tuple[list[ExampleGradients], int]:
        """Return the gradients of <outputs, u> of each example.

        Parameters
        ----------
        u : (B, N, O)
        last : bool
            Whether this is the last call, after which the graph is freed.

        Returns
        -------
        gradients : list of ExampleGradients
        unassigned : int
            0: no parameter is expanded per example.

        Raises
        ------
        RuntimeError
            If the module uses a parameter in another way than by a layer, or a row mixes examples.
        """
        index = self._rows_of_examples()
        wanted = [*(call.edge for call in self._calls), *self._standing.values()]
        found = torch.autograd.grad(self._outputs, wanted, u, allow_unused=True, retain_graph=not last)
        if any(gradient is not None for gradient in found[len(self._calls) :]):
            raise RuntimeError("a parameter is used in another way than by a layer")
        gradients = {
            name: ExampleGradients(p.detach(), [], [], [], []) for name, p in self.parameters.items()
        }
        kinds = dict[str, set[str]]()
        for call, cotangent, where in zip(self._calls, found, index, strict=False):
            if cotangent is not None:
                call.add(gradients[call.name], cotangent, where, self.examples)
                kinds.setdefault(call.name, set()).add(call.kind)
        for name, of in kinds.items():
            if {"product", "transposed"} <= of:  # of one scale only within each of them
                gradients[name] = gradients[name]._replace(mixed=True)
        return [*gradients.values()], 0

    def _rows_of_examples(self) -> list[Any]:
        """Return the rows (B, n) of each example in each call, R where it has fewer; or (1, R), all of them."""
        if self._index is not None:
            return self._index
        joint = [call.name in self._joint for call in self._calls]
        self._index = [torch.arange(call.rows, device=call.device)[None] for call in self._calls]
        if all(joint) or self.examples == 1:
            return self._index
        edges = [call.edge for call, of_all in zip(self._calls, joint, strict=True) if not of_all]
        calls = [call for call, of_all in zip(self._calls, joint, strict=True) if not of_all]
        u = torch.from_numpy(np.random.default_rng(0).standard_normal(self._outputs.shape)).to(self._outputs)
        numbers = torch.arange(self.examples, device=u.device)
        plain = self._back(edges, u)
        labels, unit = [torch.zeros(call.rows, dtype=torch.int64, device=u.device) for call in calls], 1
        while unit < self.examples:
            factors = torch.pow(2.0, (numbers // unit) % DIGITS).to(u)
            for i, (call, one, scaled) in enumerate(
                zip(calls, plain, self._back(edges, u * factors[:, None, None]), strict=True)
            ):
                if one is not None:
                    labels[i] += unit * _digits(call.flat(one), call.flat(scaled))
            unit *= DIGITS
        for i, (call, one) in enumerate(zip(calls, plain, strict=True)):
            used = torch.zeros_like(labels[i], dtype=torch.bool)
            if one is not None:
                used = call.flat(one).abs().amax(1) > 0
            if (labels[i] >= self.examples).any():
                raise RuntimeError("a row of a layer belongs to several examples")
            labels[i][~used] = self.examples  # nothing depends on this row
        grouped = iter([_grouped(one, self.examples) for one in labels])
        self._index = [
            every if of_all else next(grouped) for every, of_all in zip(self._index, joint, strict=True)
        ]
        return self._index

    def _back(self, edges: list[Any], u: Any) -> Any:
        return torch.autograd.grad(self._outputs, edges, u, allow_unused=True, retain_graph=True)


def _digits(one: Any, scaled: Any) -> Any:
    """Return the exponents k (R,) of scaled = 2^k one, of rows (R, width), 0 for a row of zeros.

    Raises
    ------
    RuntimeError
        If a row is not scaled by one power of two.
    """
    size, column = one.abs().max(1)
    ratio = scaled.gather(1, column[:, None])[:, 0] / one.gather(1, column[:, None])[:, 0]
    used = size > 0
    exponents = torch.where(used & (ratio > 0), ratio, 1).log2().round().clamp(0, DIGITS - 1)
    factor = torch.pow(2.0, exponents)
    if ((scaled - factor[:, None] * one).abs().amax(1) > PURE * factor * size).any():
        raise RuntimeError("a row of a layer belongs to several examples")
    return exponents.long()


def _grouped(labels: Any, examples: int) -> Any:
    """Return the rows (B, n) that have each label (R,) below B, padded by R."""
    count = torch.bincount(labels, minlength=examples + 1)[:examples]
    order = torch.argsort(labels, stable=True)[: int(count.sum())]
    starts = torch.cumsum(count, 0) - count
    label = labels[order]
    index = torch.full((examples, max(1, int(count.max()))), len(labels), device=labels.device)
    index[label, torch.arange(len(order), device=labels.device) - starts[label]] = order
    return index


class _Call(NamedTuple):
    """A call of a layer with one parameter.

    Attributes
    ----------
    kind : str
        product: inputs @ p'. transposed: inputs @ p. lookup: p[inputs]. added: p (O,) added to rows, or
        multiplied with them. rest: p of another shape.
    name : str
        Of the parameter p.
    input : tensor or None
        The rows (R, I), or the indices (R,).
    edge : GradientEdge
        Of the result; of a parameter that is added or multiplied, of the parameter expanded to the result.
    rows : int
        R.
    device : torch.device
    shape : tuple of int
        Of p without leading axes of size 1, in a call of kind rest.
    """

    kind: str
    name: str
    input: Any
    edge: Any
    rows: int
    device: Any
    shape: tuple[int, ...] = ()

    def flat(self, cotangent: Any) -> Any:
        """Return the gradient at the edge as rows (R, width)."""
        return cotangent.reshape(self.rows, -1)

    def add(self, gradients: ExampleGradients, cotangent: Any, index: Any, examples: int) -> None:
        """Add the gradients of the examples, whose rows are `index` (B, n), to those of the parameter."""
        u = _taken(self.flat(cotangent), index)
        if self.kind == "product":
            gradients.products.append((u, _taken(self.input, index)))
        elif self.kind == "transposed":
            gradients.products.append((_taken(self.input, index), u))
        elif self.kind == "lookup":
            gradients.lookups.append((u, _taken(self.input, index)))
        elif self.kind == "added":
            gradients.added.append(u)
        else:
            each = u.sum(1).reshape(len(u), *cotangent.shape[cotangent.ndim - len(self.shape) :])
            narrow = [1 + i for i, size in enumerate(self.shape) if size == 1]
            each = each.sum(narrow, keepdim=True) if narrow else each
            gradients.rest.append(each.reshape(len(u), *gradients.p.shape))


def _taken(rows: Any, index: Any) -> Any:
    """Return rows (R, ...) by index (B, n), zeros for the index R."""
    if len(index) == 1 and index.shape[1] == len(rows):
        return rows[None]
    return torch.cat([rows, rows.new_zeros(1, *rows.shape[1:])])[index]


class _Recorder(TorchFunctionMode):  # type: ignore[misc]
    """Calls layers with the parameters themselves in place of their stand-ins, and records the calls.

    Attributes
    ----------
    known : dict of int to (str, tensor)
        By the identity of a stand-in, or of a frozen parameter: its name, empty if it is frozen, and the
        parameter itself.
    calls : list of _Call
    shared : list of bool
        See `BatchPass`.
    closed : bool
        Whether the forward pass is over: what later passes multiply is not recorded.
    """

    def __init__(self, examples: int, derivatives: bool, shared: Sequence[bool] | None) -> None:
        super().__init__()
        self.examples, self.derivatives, self._decided = examples, derivatives, shared
        self.known, self.calls, self.shared = dict[int, tuple[str, Any]](), list[_Call](), list[bool]()
        self._transposed, self._kept, self.closed = dict[int, Any](), list[Any](), False

    def mark(self, results: Any) -> Any:
        """Mark tensors that are computed from inputs; return them."""
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
        """Return input @ weight', or input @ weight, + bias, recorded; weight and bias are stand-ins or frozen."""
        (name, p), (added, b) = self.known[id(weight)], self.known.get(id(bias), ("", bias))
        product = self.times(name, p, input.reshape(-1, input.shape[-1]), transposed, added, b)
        return product.view(*input.shape[:-1], product.shape[-1])

    def times(
        self, name: str, p: Any, rows: Any, transposed: bool, added: str = "", b: Any = None
    ) -> Any:
        """Return rows (R, .) times the matrix p, recorded under its name."""
        if self.derivatives:
            product = _Times.apply(rows, p, b, self, name, transposed)
        else:
            product = _times(rows, p, transposed, b)
        if not self.closed and product.requires_grad and (name or added):
            edge = get_gradient_edge(product)
            about = edge, len(rows), rows.device
            if name:
                self.calls.append(_Call("transposed" if transposed else "product", name, rows.detach(), *about))
            if added:
                self.calls.append(_Call("added", added, None, *about))
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
        self.calls.append(_Call("lookup", name, flat, get_gradient_edge(rows), len(flat), flat.device))
        if padding_idx is None:
            return rows
        constant = (input == padding_idx % len(p)).unsqueeze(-1)  # this row gets no gradient
        return torch.where(constant, rows.detach(), rows)

    def _by_example(self, indices: Any) -> Any:
        """Return the indices that are the same for all examples, such as positions, once for each example."""
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
        """Add or multiply by a parameter, expanded to the result."""
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
        self.calls.append(_Call(kind, name, None, edge, count, p.device, tuple(short)))
        return func(*(expanded if k == i else other for k, other in enumerate(args)), **kwargs)

    def _recurrent(self, func: Any, packed: bool, args: Any) -> Any:
        """Run a recurrent network step by step, with recorded products."""
        weights = args[3] if packed else args[2]
        if not self._is_trained(weights) or any(id(p) not in self.known for p in weights):
            return func(*args)
        input, *others = args
        if not input.requires_grad:  # otherwise a fused kernel runs, without calls of `linear`
            input = input.detach().requires_grad_()
        if packed:
            others[0] = others[0].tolist()
        with _Steps(self):
            return (PACKED if packed else UNPACKED)[func](input, *others)


class _Steps(TorchFunctionMode):  # type: ignore[misc]
    """Records the products in a recurrent network."""

    def __init__(self, recorder: _Recorder) -> None:
        super().__init__()
        self.recorder = recorder

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.nn.functional.linear:
            return self.recorder._linear(*args, **kwargs or {})
        return func(*args, **kwargs or {})


class _Times(torch.autograd.Function):  # type: ignore[misc]
    """A product with a matrix whose derivative in the rows is a recorded product with the transposed matrix."""

    @staticmethod
    def forward(ctx: Any, rows: Any, p: Any, b: Any, recorder: _Recorder, name: str, transposed: bool) -> Any:
        """Return the product."""
        ctx.about = p, recorder, name, transposed
        return _times(rows, p, transposed, b)

    @staticmethod
    def backward(ctx: Any, u: Any) -> Any:
        """Return the gradient in the rows alone."""
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
