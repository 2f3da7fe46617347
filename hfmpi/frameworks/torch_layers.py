"""Per-example gradients of a PyTorch module, at about the cost of one gradient.

`torch.func.vmap` separates the examples of a batch, wherever a module puts their axis. Linear layers, tables
and recurrent networks, which have most of the parameters, process all examples in one call: their inputs and
the gradients of their outputs determine the gradient of each example. For every other operation the
parameters are expanded per example, so that autograd returns per-example gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch.autograd.graph import get_gradient_edge
from torch.overrides import TorchFunctionMode

from hfmpi.frameworks.torch_derivatives import InnerDerivatives, OnlyBatched
from hfmpi.frameworks.torch_gradients import ExampleGradients
from hfmpi.frameworks.torch_recurrent import CELLS, UNPACKED

__all__ = ["ExamplePass"]


class ExamplePass:
    """One forward pass of B examples that provides the gradient of each example in each parameter.

    Parameters
    ----------
    function : callable
        (parameters by name, one example of each of the inputs) -> its outputs (N, O).
    parameters : dict of str to tensor
        In the order of theta.
    frozen : iterable of tensor
        The other parameters of the module.
    inputs : sequence of (B, ...)
    layers : bool
        Whether layers process all examples in one call. Otherwise all parameters are expanded per example,
        for modules that compute derivatives of their layers.

    Raises
    ------
    RuntimeError
        If PyTorch cannot batch an operation.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        parameters: dict[str, Any],
        frozen: Iterable[Any],
        inputs: Sequence[Any],
        layers: bool,
    ) -> None:
        self.parameters, self.examples = parameters, len(inputs[0])
        shared = {name: p.detach().requires_grad_() for name, p in parameters.items()}
        self._expanded = {
            name: p.detach().expand(self.examples, *p.shape).requires_grad_()
            for name, p in parameters.items()
        }
        recorder = _Recorder(self.examples)
        self._calls = recorder.calls

        def outputs_of(example: dict[str, Any], *inputs: Any) -> Any:
            recorder.parameters = {id(p): ("", p) for p in frozen}
            recorder.parameters |= {id(p): (name, shared[name]) for name, p in example.items()}
            with recorder if layers else InnerDerivatives():
                return function(example, *inputs)

        with torch.enable_grad():
            self._outputs = torch.func.vmap(outputs_of)(self._expanded, *inputs)

    def gradients(self, u: Any, last: bool = True) -> tuple[list[ExampleGradients], int]:
        """Return the per-example gradients of <outputs, u>.

        Parameters
        ----------
        u : (B, N, O)
        last : bool
            Whether this is the last call, after which the graph is freed.

        Returns
        -------
        gradients : list of ExampleGradients
        unassigned : int
            The number of entries of the parameters that were expanded per example.
        """
        wanted = [*(call.edge for call in self._calls), *self._expanded.values()]
        found = torch.autograd.grad(self._outputs, wanted, u, allow_unused=True, retain_graph=not last)
        cotangents = iter(found)
        gradients = {
            name: ExampleGradients(p.detach(), [], [], [], []) for name, p in self.parameters.items()
        }
        for call, cotangent in zip(self._calls, cotangents, strict=False):
            if cotangent is not None:
                back = call.by_example(cotangent)
                if call.looks_up:
                    gradients[call.weight].lookups.append((back, call.input.reshape(self.examples, -1)))
                elif call.weight:
                    gradients[call.weight].products.append((back, call.by_example(call.input)))
                if call.bias:
                    gradients[call.bias].added.append(back)
        unassigned = 0
        for (name, p), gradient in zip(self.parameters.items(), cotangents, strict=True):
            if gradient is not None:
                gradients[name].rest.append(gradient)
                unassigned += p.numel()
        return [*gradients.values()], unassigned


class _Call(NamedTuple):
    """A call of a layer, input @ weight' + bias, or of a table, weight[input].

    Attributes
    ----------
    weight, bias : str
        The names of the parameters; empty if there is none, or it is frozen.
    input : tensor
    edge : GradientEdge
        The edge of the result, whose axes before the last one may be flattened.
    axis : int
        The axis of the examples in input and result, with equally many rows for each example.
    examples : int
    looks_up : bool
    """

    weight: str
    bias: str
    input: Any
    edge: Any
    axis: int
    examples: int
    looks_up: bool = False

    def by_example(self, rows: Any) -> Any:
        """Return the input, or the gradient at the edge, as (B, n, .)."""
        shape, width = self.input.shape if self.looks_up else self.input.shape[:-1], rows.shape[-1]
        rows = rows.reshape(*shape, width).movedim(self.axis, 0)
        return rows.reshape(self.examples, -1, width).contiguous()


class _Recorder(TorchFunctionMode):  # type: ignore[misc]
    """Calls layers with the inputs of all examples and the actual parameters, and records the calls.

    Attributes
    ----------
    parameters : dict of int to (str, tensor)
        By the identity of a tensor that stands for a parameter: the name, empty if it is frozen, and the
        actual parameter.
    calls : list of _Call
    """

    def __init__(self, examples: int) -> None:
        super().__init__()
        self.examples, self.parameters, self.calls = examples, dict[int, tuple[str, Any]](), list[_Call]()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.nn.functional.linear:
            return self._linear(*args, **kwargs or {})
        if func is torch.nn.functional.embedding:
            return self._embedding(*args, **kwargs or {})
        if func in CELLS and self._trained(*args[2:]):
            raise RuntimeError("matrices of cells would be expanded per example: an ordinary pass is faster")
        unpacked = func in UNPACKED and len(args) == 9 and isinstance(args[3], bool)
        if unpacked and self._trained(*args[2]):
            return self._recurrent(UNPACKED[func], *args)
        return func(*args, **kwargs or {})

    def _trained(self, *tensors: Any) -> bool:
        """Return whether all tensors stand for parameters, at least one of which is trained."""
        entries = [self.parameters.get(id(p)) for p in tensors]
        return None not in entries and any(name for name, _ in filter(None, entries))

    def _linear(self, input: Any, weight: Any, bias: Any = None) -> Any:
        tensors = (weight,) if bias is None else (weight, bias)
        if weight.ndim != 2 or not self._trained(*tensors):
            return torch.nn.functional.linear(input, weight, bias)

        def multiply(input: Any, *_: Any) -> Any:
            return self.product(input, 0, *tensors)

        return _AllExamples.apply(multiply, input, *tensors)

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
            name, p = self.parameters[id(weight)]
            rows = torch.nn.functional.embedding(input, p)
            self.calls.append(_Call(name, "", input, get_gradient_edge(rows), 0, self.examples, True))
            if padding_idx is None:
                return rows
            constant = (input == padding_idx % len(p)).unsqueeze(-1)  # the padding row has no gradient
            return torch.where(constant, rows.detach(), rows)

        return _AllExamples.apply(look_up, input, weight)

    def product(self, input: Any, axis: int, *tensors: Any) -> Any:
        """Multiply the inputs of all examples, along the axis, by the actual parameters."""
        names, parameters = zip(*(self.parameters[id(p)] for p in tensors), strict=True)
        # PyTorch itself flattens contiguous inputs and returns a view of the product. The edge of a view no
        # longer belongs to the result once the module overwrites it, so the edge is that of the product.
        flat = input.flatten(0, -2) if input.is_contiguous() else input
        product = torch.nn.functional.linear(flat, *parameters)
        if any(names):
            weight, bias = (*names, "")[:2]
            edge = get_gradient_edge(product)
            self.calls.append(_Call(weight, bias, input.detach(), edge, axis, self.examples))
        return product.view(*input.shape[:-1], product.shape[-1])

    def _recurrent(self, loop: Any, input: Any, state: Any, tensors: Any, *options: Any) -> Any:
        """Run a recurrent network on all examples step by step."""
        batch_first, is_pair = options[-1], isinstance(state, (list, tuple))

        def flat(x: Any, axis: int) -> Any:
            return x.movedim(0, axis).flatten(axis, axis + 1)

        def by_example(x: Any, axis: int) -> Any:
            return x.unflatten(axis, (self.examples, -1)).movedim(axis, 0)

        def run(input: Any, *others: Any) -> Any:
            axis = 0 if batch_first else 1
            states = [flat(x, 1) for x in others[: len(state) if is_pair else 1]]
            if not input.requires_grad:  # otherwise a fused kernel runs without calling `linear`
                input = input.detach().requires_grad_()
            with _StepRecorder(self):
                first = states if is_pair else states[0]
                outputs = loop(flat(input, axis), first, list(tensors), *options)
            return by_example(outputs[0], axis), *(by_example(x, 1) for x in outputs[1:])

        return _AllExamples.apply(run, input, *(state if is_pair else (state,)), *tensors)


class _StepRecorder(TorchFunctionMode):  # type: ignore[misc]
    """Records the products in a recurrent network, where the examples are on the second last axis."""

    def __init__(self, recorder: _Recorder) -> None:
        super().__init__()
        self.recorder = recorder

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.nn.functional.linear:
            input, *tensors = args
            return self.recorder.product(input, -2, *(p for p in tensors if p is not None))
        return func(*args, **kwargs or {})


class _AllExamples(OnlyBatched):
    """Calls a function with the tensors of all examples (B, ...)."""

    @staticmethod
    def vmap(info: Any, axes: Any, function: Any, *tensors: Any) -> Any:
        batches = [
            x.expand(info.batch_size, *x.shape) if axis is None else x.movedim(axis, 0)
            for x, axis in zip(tensors, axes[1:], strict=True)
        ]
        outputs = function(*batches)
        return outputs, (0,) * len(outputs) if isinstance(outputs, tuple) else 0
