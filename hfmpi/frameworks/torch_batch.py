"""Per-example gradients of a PyTorch module from one ordinary pass of a batch, without `torch.func.vmap`.

The module runs as it is on all examples. A layer (a product with a matrix, a table, a recurrent network, a
norm, a sum or product with a parameter) is recorded where the module calls it: its inputs, and the gradients
of its outputs, which one backward pass computes. Each row of these belongs to one example, wherever the
module puts it: in packed sequences the rows are sorted by step and length, for example. A second backward
pass shows which row belongs to which example. The cotangents of each example are multiplied by a different
number, and so are all rows that belong to the example. A row that mixes examples is detected.

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
"""Exponents of two, and steps between two powers of two, that tell examples apart."""

PURE = 1e-3
"""Relative difference at which a row counts as one of several examples: less than a tenth of a step."""


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
    outputs : (B, N, O)
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
        self.parameters, self.examples = parameters, len(inputs[0])
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
        self.outputs = outputs.reshape(self.examples, -1, outputs.shape[-1])
        recorder.closed = True
        self.shared, self._calls = recorder.shared, recorder.calls
        kinds = {name: {call.kind for call in self._calls if call.name == name} for name in parameters}
        # The rows of all examples have the factors of layers, where only one kind of layer has the parameter.
        self._joint = {name for name, of in kinds.items() if together and len(of) == 1 and "rest" not in of}
        self._labels: dict[int, Any] | None = None

    def gradients(self, u: Any, last: bool = True) -> tuple[list[ExampleGradients], int]:
        """Return the gradients of <outputs, u> of each example.

        Parameters
        ----------
        u : (B, N, O)
        last : bool
            Whether this is the last call: rows that are zero for its u then need no example.

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
        wanted = [*(call.edge for call in self._calls), *self._standing.values()]
        found = torch.autograd.grad(self.outputs, wanted, u, allow_unused=True, retain_graph=True)
        if any(gradient is not None for gradient in found[len(self._calls) :]):
            raise RuntimeError("a parameter is used in another way than by a layer")
        used = [(call, g) for call, g in zip(self._calls, found, strict=False) if g is not None]
        gradients = {
            name: ExampleGradients(p.detach(), [], [], [], []) for name, p in self.parameters.items()
        }
        separate = dict[tuple[str, str], list[tuple[_Call, Any]]]()
        for call, cotangent in used:
            if call.name in self._joint:
                call.add(gradients[call.name], cotangent.reshape(1, call.rows, -1), call.input)
            else:
                separate.setdefault((call.name, call.kind), []).append((call, cotangent))
        labels = self._labels_of([pair for pairs in separate.values() for pair in pairs], u if last else None)
        for (name, kind), pairs in separate.items():
            of_pairs = [labels[id(call.edge)] for call, _ in pairs]
            if kind == "rest":
                for (call, cotangent), of in zip(pairs, of_pairs, strict=True):
                    call.add_rest(gradients[name], cotangent, _grouped(of, self.examples))
                continue
            call, index = pairs[0][0], _grouped(torch.cat(of_pairs), self.examples)
            rows = torch.cat([g.reshape(one.rows, -1) for one, g in pairs])
            inputs = None if call.input is None else torch.cat([one.input for one, _ in pairs])
            call.add(gradients[name], _taken(rows, index), None if inputs is None else _taken(inputs, index))
        for name in {name for name, kind in separate if kind == "transposed"}:
            mixed = (name, "product") in separate  # of one scale only within each of them
            gradients[name] = gradients[name]._replace(mixed=mixed)
        if last:
            self._labels = None
        return [*gradients.values()], 0

    def _labels_of(self, calls: list[tuple[_Call, Any]], u: Any) -> dict[int, Any]:
        """Return, by the identity of an edge, the example (R,) of each row; B for a row of zeros.

        Parameters
        ----------
        calls : list of (_Call, tensor)
            With the gradients at the edges for the cotangents u.
        u : (B, N, O), or None
            None: use random cotangents, whose labels serve any other ones.
        """
        if self._labels is not None or not calls:
            return self._labels or {}
        edges = {id(call.edge): (call, g) for call, g in calls}
        if u is None:
            numbers = np.random.default_rng(0).standard_normal(self.outputs.shape)
            u = torch.from_numpy(numbers).to(self.outputs)
            plain = self._back([call for call, _ in edges.values()], u)
        else:
            plain = [g for _, g in edges.values()]
        calls = [(call, g) for (call, _), g in zip(edges.values(), plain, strict=True)]
        self._labels = {}
        widths = dict[int, list[tuple[_Call, Any]]]()
        for call, g in calls:
            rows = None if g is None else g.reshape(call.rows, -1)
            if rows is None or self.examples == 1:
                label = 0 if self.examples == 1 else self.examples
                self._labels[id(call.edge)] = torch.full((call.rows,), label, device=call.device)
            else:
                widths.setdefault(rows.shape[1], []).append((call, rows))
        groups = [*widths.values()]
        every = [call for group in groups for call, _ in group]

        def scaled(factors: Any) -> list[Any]:
            back = iter(self._back(every, u * factors[:, None, None]))
            return [
                torch.cat([g.reshape(len(rows), -1) for (_, rows), g in zip(group, back, strict=False)])
                for group in groups
            ]

        rows = [_Rows(torch.cat([rows for _, rows in group])) for group in groups]
        for group, labels in zip(groups, _labelled(rows, self.examples, scaled), strict=True):
            split = labels.split([call.rows for call, _ in group])
            self._labels |= {id(call.edge): part for (call, _), part in zip(group, split, strict=True)}
        return self._labels

    def _back(self, calls: list[_Call], u: Any) -> Any:
        edges = [call.edge for call in calls]
        return torch.autograd.grad(self.outputs, edges, u, allow_unused=True, retain_graph=True)


class _Rows:
    """Rows (R, width), to compare with the same rows of scaled cotangents."""

    def __init__(self, rows: Any) -> None:
        self.rows = rows
        self.size, column = rows.abs().max(1)
        self.column, self.used = column[:, None], self.size > 0
        self._largest = rows.gather(1, self.column)[:, 0]

    def ratio(self, changed: Any) -> Any:
        """Return by what each row is scaled, (R,), 1 for a row of zeros; wrong if its numbers disagree."""
        quotient = changed.gather(1, self.column)[:, 0] / self._largest
        return torch.where(self.used & (quotient > 0), quotient, 1)

    def are_scaled(self, changed: Any, factors: Any) -> bool:
        """Return whether each row is scaled by its factor (R,)."""
        wrong = (changed - factors[:, None] * self.rows).abs().amax(1)
        return bool((wrong <= PURE * factors * self.size).all())


def _labelled(groups: list[_Rows], examples: int, scaled: Callable[[Any], list[Any]]) -> list[Any]:
    """Return the example (R,) that each row belongs to, B for a row of zeros, for each group of rows.

    Parameters
    ----------
    scaled : callable
        Numbers (B,) -> the groups where the cotangents of each example are multiplied by its number.

    Raises
    ------
    RuntimeError
        If a row belongs to several examples.
    """
    if not groups:
        return []
    like, numbers = groups[0].rows, torch.arange(examples, device=groups[0].rows.device)

    def code(labels: Any) -> Any:
        power = torch.pow(2.0, torch.div(labels, DIGITS, rounding_mode="floor"))
        return (power * (1 + labels % DIGITS / DIGITS)).to(like)

    def decoded(ratio: Any) -> Any:
        power = torch.floor(torch.log2(ratio * (1 + 1 / (4 * DIGITS)))).clamp(0, DIGITS - 1)
        step = ((ratio / torch.pow(2.0, power) - 1) * DIGITS).round().clamp(0, DIGITS - 1)
        return (DIGITS * power + step).long()

    def checked(labels: list[Any]) -> list[Any]:
        if any((of >= examples).any() for of in labels):
            raise RuntimeError("a row of a layer belongs to several examples")
        return [torch.where(one.used, of, examples) for one, of in zip(groups, labels, strict=True)]

    if examples <= DIGITS**2:
        changed = scaled(code(numbers))
        labels = [decoded(one.ratio(other)) for one, other in zip(groups, changed, strict=True)]
        triples = zip(groups, changed, labels, strict=True)
        if all(one.are_scaled(other, code(of)) for one, other, of in triples):
            return checked(labels)
    labels, unit = [torch.zeros_like(one.column[:, 0]) for one in groups], 1
    while unit < examples:  # products with powers of two are exact, whatever cancels in a row
        changed = scaled(torch.pow(2.0, torch.div(numbers, unit, rounding_mode="floor") % DIGITS).to(like))
        for i, (one, other) in enumerate(zip(groups, changed, strict=True)):
            digits = one.ratio(other).log2().round().clamp(0, DIGITS - 1)
            if not one.are_scaled(other, torch.pow(2.0, digits).to(like)):
                raise RuntimeError("a row of a layer belongs to several examples")
            labels[i] = labels[i] + unit * digits.long()
        unit *= DIGITS
    return checked(labels)


def _grouped(labels: Any, examples: int) -> Any:
    """Return the rows (B, n) that have each label (R,) below B, padded by R."""
    count = torch.bincount(labels, minlength=examples + 1)[:examples]
    order = torch.argsort(labels, stable=True)[: int(count.sum())]
    starts = torch.cumsum(count, 0) - count
    label = labels[order]
    index = torch.full((examples, max(1, int(count.max()))), len(labels), device=labels.device)
    index[label, torch.arange(len(order), device=labels.device) - starts[label]] = order
    return index


def _taken(rows: Any, index: Any) -> Any:
    """Return rows (R, ...) by index (B, n), zeros for the index R."""
    if int(index.max()) < len(rows):  # equally many of each example
        return rows[index]
    return torch.cat([rows, rows.new_zeros(1, *rows.shape[1:])])[index]


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

    def add(self, gradients: ExampleGradients, u: Any, inputs: Any) -> None:
        """Add the term of rows u (B, n, .), and inputs (B, n, .) or (R, .), to those of the parameter."""
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
        u = _taken(cotangent.reshape(self.rows, -1), index)
        each = u.sum(1).reshape(len(u), *cotangent.shape[cotangent.ndim - len(self.shape) :])
        narrow = [1 + i for i, size in enumerate(self.shape) if size == 1]
        each = each.sum(narrow, keepdim=True) if narrow else each
        gradients.rest.append(each.reshape(len(u), *gradients.p.shape))


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
        """Return input @ weight', or input @ weight, + bias, recorded; of stand-ins, or frozen parameters."""
        (name, p), (added, b) = self.known[id(weight)], self.known.get(id(bias), ("", bias))
        product = self.times(name, p, input.reshape(-1, input.shape[-1]), transposed, added, b)
        return product.view(*input.shape[:-1], product.shape[-1])

    def times(self, name: str, p: Any, rows: Any, transposed: bool, added: str = "", b: Any = None) -> Any:
        """Return rows (R, .) times the matrix p, recorded under its name."""
        if self.derivatives:
            product = _Times.apply(rows, p, b, self, name, transposed)
        else:
            product = _times(rows, p, transposed, b)
        if not self.closed and product.requires_grad and (name or added):
            edge = get_gradient_edge(product)
            about = edge, len(rows), rows.device
            if name:
                self.calls.append(
                    _Call("transposed" if transposed else "product", name, rows.detach(), *about)
                )
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
    """A product with a matrix, whose derivative in the rows is a recorded product too."""

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
