"""Gradients of single cases of a PyTorch module, for about the work of one gradient: squares and factors.

`torch.func.vmap` tells the cases of a batch apart, wherever a module puts their axis. Linear layers, tables
and recurrent networks, in which most parameters are, see all cases at once: what goes into them and the
gradient of what comes out give a case's gradient as one product of matrices over all steps, which is squared
part by part in the cache and never kept whole. Every other operation is given parameters of each case's own,
equal ones, whose gradients PyTorch has anyway.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch.autograd.graph import get_gradient_edge
from torch.overrides import TorchFunctionMode

from hfmpi.models.factors import square
from hfmpi.optim.layout import Block, factor_shape

__all__ = ["Gradients", "factors", "gradients", "squares"]

CACHED_NUMBERS = 1 << 17
"""Numbers of single cases' gradients of a matrix that are squared at once on a CPU."""


def gradients(
    function: Callable[..., Any],
    parameters: dict[str, Any],
    frozen: Iterable[Any],
    inputs: Sequence[Any],
    u: Any,
) -> tuple[list[Gradients], int]:
    """Give the gradients of <outputs, u> of single cases, of each parameter.

    Parameters
    ----------
    function : callable
        (parameters by name, one case of each of the inputs) -> its outputs (N, O).
    parameters : dict of tensor
        By name, in the order of theta.
    frozen : iterable of tensor
        The module's other parameters.
    inputs : sequence of (B, ...)
    u : (B, N, O)

    Returns
    -------
    found : list of Gradients
    apart : int
        Parameters that operations were given for each case.

    Raises
    ------
    RuntimeError
        Where PyTorch cannot batch an operation.
    """
    cases = len(u)
    shared = {name: p.detach().requires_grad_() for name, p in parameters.items()}
    own = {name: p.detach().expand(cases, *p.shape).requires_grad_() for name, p in parameters.items()}
    layers = _Layers(cases)

    def case(own: dict[str, Any], *inputs: Any) -> Any:
        layers.known = {id(p): ("", p) for p in frozen}
        layers.known |= {id(p): (name, shared[name]) for name, p in own.items()}
        with layers:
            return function(own, *inputs)

    with torch.enable_grad():
        outputs = torch.func.vmap(case)(own, *inputs)
    wanted = [*(use.edge for use in layers.uses), *own.values()]
    backs = iter(torch.autograd.grad(outputs, wanted, u, allow_unused=True))
    found = {name: Gradients(p.detach(), [], [], [], []) for name, p in parameters.items()}
    for use, back in zip(layers.uses, backs, strict=False):
        if back is not None:
            back = use.by_case(back)
            if use.looks_up:
                found[use.weight].lookups.append((back, use.input.reshape(cases, -1)))
            elif use.weight:
                found[use.weight].products.append((back, use.by_case(use.input)))
            if use.bias:
                found[use.bias].added.append(back)
    apart = 0
    for (name, p), back in zip(parameters.items(), backs, strict=True):
        if back is not None:
            found[name].rest.append(back)
            apart += p.numel()
    return [*found.values()], apart


def squares(found: Iterable[Gradients]) -> tuple[Any, Any]:
    """Give the sums over the cases of their gradients and of their squares, (D,) both."""
    both = zip(*(own.squares() for own in found), strict=True)
    total, squared = (torch.cat([part.reshape(-1) for part in of]) for of in both)
    return total, squared


def factors(found: Iterable[Gradients], blocks: Sequence[Block]) -> tuple[Any, Any]:
    """Give the sum over the cases of their gradients (D,), and the sums of `hfmpi.models.factors`."""
    total, sums, numbers = list[Any](), list[Any](), list[Any]()
    for block, own in zip(blocks, found, strict=True):
        *both, number = own.factors(block)
        total.append(own.sum().reshape(-1))
        sums += [factor.reshape(-1) for factor in both]
        numbers.append(number.reshape(1))
    return torch.cat(total), torch.cat(sums + numbers)


class Gradients(NamedTuple):
    """The gradients of single cases of the parameter p: the sum of what is known of them.

    Attributes
    ----------
    p : tensor
    products : list of ((B, n, O), (B, n, I))
        Of a layer, u of its output and x of its input: u' x.
    lookups : list of ((B, n, O), (B, n))
        Of a table, u of the rows that were looked up and their numbers: u in these rows.
    added : list of (B, n, O)
        Of a layer that adds p, its output's u: the sum over n.
    rest : list of (B, ...)
    """

    p: Any
    products: list[tuple[Any, Any]]
    lookups: list[tuple[Any, Any]]
    added: list[Any]
    rest: list[Any]

    @property
    def _alone(self) -> str:
        """The only kind of what is known; empty where there are several, or none."""
        kinds = [kind for kind in ("products", "lookups", "added", "rest") if getattr(self, kind)]
        return kinds[0] if len(kinds) == 1 else ""

    def sum(self) -> Any:
        """Give the sum over the cases."""
        total = torch.zeros_like(self.p)
        for u, x in self.products:
            total += u.flatten(0, 1).T @ x.flatten(0, 1)
        for u, rows in self.lookups:
            total.index_add_(0, rows.flatten(), u.flatten(0, 1))
        for u in self.added:
            total += u.sum((0, 1))
        for own in self.rest:
            total += own.sum(0)
        return total

    def squares(self) -> tuple[Any, Any]:
        """Give the sums over the cases of the gradients and of their squares."""
        if self._alone == "products" and len(self.products) == 1 and self.products[0][0].shape[1] == 1:
            u, x = (one[:, 0] for one in self.products[0])
            return u.T @ x, u.square().T @ x.square()
        if self._alone == "lookups":
            return self.sum(), self._squared_lookups()
        total, squares = torch.zeros_like(self.p), torch.zeros_like(self.p)
        for each in self.each():
            rows, ones = each.reshape(len(each), -1), each.new_ones(len(each))  # their product sums quickest
            total += (ones @ rows).view(total.shape)
            squares += (ones @ rows.square()).view(total.shape)
        return total, squares

    def _squared_lookups(self) -> Any:
        u, rows = _joined(self.lookups)
        count = len(self.p)
        places = (rows + count * torch.arange(len(rows), device=rows.device)[:, None]).flatten()
        places, inverse = places.unique(return_inverse=True)  # a row may be looked up twice by a case
        sums = u.new_zeros(len(places), u.shape[2]).index_add_(0, inverse, u.flatten(0, 1))
        return torch.zeros_like(self.p).index_add_(0, places % count, sums.square())

    def each(self) -> Iterator[Any]:
        """Give the gradients (b, ...) of some cases after the others."""
        whole = self.rest + [u.sum(1) for u in self.added]
        if not self.products and not self.lookups:
            if whole:
                yield sum(whole[1:], whole[0])
            return
        cases = len((self.products + self.lookups)[0][0])
        most = max(1, CACHED_NUMBERS // self.p.numel()) if self.p.device.type == "cpu" else cases
        for start in range(0, cases, most):
            part = slice(start, start + most)
            if self.products:
                u, x = _joined([(u[part], x[part]) for u, x in self.products])
                each = torch.bmm(u.mT, x)
            else:
                each = self.p.new_zeros(len(self.lookups[0][0][part]), *self.p.shape)
            for u, rows in self.lookups:
                at = rows[part].unsqueeze(-1).expand(u[part].shape)
                each.scatter_add_(1, at, u[part])
            for more in whole:
                each += more[part]
            yield each

    def factors(self, block: Block) -> tuple[Any, Any, Any]:
        """Give the sums for the factors of rows and columns, and their number."""
        if self._alone == "products":
            u, x = (several.flatten(0, 1) for several in _joined(self.products))
            return square(u), square(x), u.new_tensor(len(u))
        if self._alone == "lookups":
            u, rows = (several.flatten(0, 1) for several in _joined(self.lookups))
            counts = rows.bincount(minlength=block.rows).to(u)
            diagonal = len(factor_shape(block.rows)) == 1
            return counts if diagonal else counts.diag(), square(u), u.new_tensor(len(u))
        if self._alone == "added":
            u = torch.cat(self.added, 1).flatten(0, 1)
            return u.new_full((1, 1), len(u)), square(u), u.new_tensor(len(u))
        a, b = (self.p.new_zeros(factor_shape(side)) for side in (block.rows, block.columns))
        number = self.p.new_zeros(())
        for each in self.each():
            g = each.reshape(-1, block.rows, block.columns)
            a += square(g.transpose(1, 2).flatten(0, 1))
            b += square(g.flatten(0, 1))
            number += g.square().sum()
        return a, b, number


def _joined(pairs: list[tuple[Any, Any]]) -> Any:
    """Give pairs of tensors (B, n, .) as one."""
    return (torch.cat(several, 1) if len(several) > 1 else several[0] for several in zip(*pairs, strict=True))


class _Use(NamedTuple):
    """A product of a layer, input @ weight' + bias, or a look into a table, weight[input].

    Attributes
    ----------
    weight, bias : str
        Names of the parameters; empty where there is none, or a frozen one.
    input : tensor
    edge : GradientEdge
        Of the product, and still of it where the module overwrites it.
    axis : int
        Of input and product: the cases, each with as many rows.
    cases : int
    looks_up : bool
    """

    weight: str
    bias: str
    input: Any
    edge: Any
    axis: int
    cases: int
    looks_up: bool = False

    def by_case(self, rows: Any) -> Any:
        """Give rows (B, n, .)."""
        return rows.movedim(self.axis, 0).reshape(self.cases, -1, rows.shape[-1]).contiguous()


class _Layers(TorchFunctionMode):  # type: ignore[misc]
    """Gives layers the inputs of all cases, and keeps what they make of them.

    Attributes
    ----------
    known : dict of (str, tensor)
        By the identity of a tensor that stands for a parameter: the name, empty where it is not trained, and
        the parameter itself.
    uses : list of _Use
    """

    def __init__(self, cases: int) -> None:
        super().__init__()
        self.cases, self.known, self.uses = cases, dict[int, tuple[str, Any]](), list[_Use]()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.nn.functional.linear:
            return self._linear(*args, **kwargs or {})
        if func is torch.nn.functional.embedding:
            return self._embedding(*args, **kwargs or {})
        unpacked = func in _RECURRENT and len(args) == 9 and isinstance(args[3], bool)
        if unpacked and self._trained(*args[2]):
            return self._recurrent(_RECURRENT[func], *args)
        return func(*args, **kwargs or {})

    def _trained(self, *given: Any) -> bool:
        """Whether all of them are parameters, and one of them is trained."""
        found = [self.known.get(id(p)) for p in given]
        return None not in found and any(name for name, _ in filter(None, found))

    def _linear(self, input: Any, weight: Any, bias: Any = None) -> Any:
        given = (weight,) if bias is None else (weight, bias)
        if weight.ndim != 2 or not self._trained(*given):
            return torch.nn.functional.linear(input, weight, bias)

        def product(input: Any, *_: Any) -> Any:
            return self._product(input, 0, *given)

        return _AcrossCases.apply(product, input, *given)

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
        if max_norm is not None or scale_grad_by_freq or sparse or not self._trained(weight):
            return torch.nn.functional.embedding(
                input, weight, padding_idx, max_norm, norm_type, scale_grad_by_freq, sparse
            )

        def look_up(input: Any, _: Any) -> Any:
            name, p = self.known[id(weight)]
            found = torch.nn.functional.embedding(input, p)
            self.uses.append(_Use(name, "", input, get_gradient_edge(found), 0, self.cases, True))
            if padding_idx is None:
                return found
            stays = (input == padding_idx % len(p)).unsqueeze(-1)  # a row that gets no gradient
            return torch.where(stays, found.detach(), found)

        return _AcrossCases.apply(look_up, input, weight)

    def _product(self, input: Any, axis: int, *given: Any) -> Any:
        """Multiply the inputs of all cases, along the axis, with the parameters themselves."""
        names, parameters = zip(*(self.known[id(p)] for p in given), strict=True)
        product = torch.nn.functional.linear(input, *parameters)
        if any(names):
            weight, bias = (*names, "")[:2]
            edge = get_gradient_edge(product)
            self.uses.append(_Use(weight, bias, input.detach(), edge, axis, self.cases))
        return product

    def _recurrent(self, loop: Any, input: Any, state: Any, given: Any, *how: Any) -> Any:
        """Run a recurrent network step by step on all cases."""
        batch_first, several = how[-1], isinstance(state, (list, tuple))

        def flat(x: Any, axis: int) -> Any:
            return x.movedim(0, axis).flatten(axis, axis + 1)

        def apart(x: Any, axis: int) -> Any:
            return x.unflatten(axis, (self.cases, -1)).movedim(axis, 0)

        def run(input: Any, *tensors: Any) -> Any:
            axis = 0 if batch_first else 1
            at = [flat(x, 1) for x in tensors[: len(state) if several else 1]]
            if not input.requires_grad:  # for a fused kernel without our products
                input = input.detach().requires_grad_()
            with _Steps(self):
                out = loop(flat(input, axis), at if several else at[0], list(given), *how)
            return apart(out[0], axis), *(apart(x, 1) for x in out[1:])

        return _AcrossCases.apply(run, input, *(state if several else (state,)), *given)


class _Steps(TorchFunctionMode):  # type: ignore[misc]
    """Keeps the products inside of a recurrent network, the last axis but one of which is that of cases."""

    def __init__(self, layers: _Layers) -> None:
        super().__init__()
        self.layers = layers

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.nn.functional.linear:
            input, *given = args
            return self.layers._product(input, -2, *(p for p in given if p is not None))
        return func(*args, **kwargs or {})


class _AcrossCases(torch.autograd.Function):  # type: ignore[misc]
    """Inside `vmap`, calls a function with the tensors of all cases (B, ...), which `vmap` has a rule for."""

    @staticmethod
    def forward(function: Any, *tensors: Any) -> Any:
        raise NotImplementedError("a layer inside of another transformation")

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        raise NotImplementedError("a layer inside of another transformation")

    @staticmethod
    def vmap(info: Any, axes: Any, function: Any, *tensors: Any) -> Any:
        whole = [
            x.expand(info.batch_size, *x.shape) if axis is None else x.movedim(axis, 0)
            for x, axis in zip(tensors, axes[1:], strict=True)
        ]
        found = function(*whole)
        return found, (0,) * len(found) if isinstance(found, tuple) else 0


def _recurrent_networks() -> dict[Any, Any]:
    """Give PyTorch's recurrent networks in single products and element-wise operations, by their function.

    PyTorch has them for its own compiler, in a module that it may change: without it there are none.
    """
    try:
        from torch._decomp import get_decompositions

        aten = torch.ops.aten
        kinds = aten.lstm, aten.gru, aten.rnn_tanh, aten.rnn_relu
        steps = get_decompositions([kind.input for kind in kinds])
        return {getattr(torch, op._schema.name.removeprefix("aten::")): run for op, run in steps.items()}
    except (ImportError, AttributeError):
        return {}


_RECURRENT = _recurrent_networks()
