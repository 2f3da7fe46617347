"""Per-example gradients of a PyTorch module from one ordinary pass of a batch, without `torch.func.vmap`.

The module runs unchanged on all examples. A layer (a product with a matrix, a table, a recurrent network, a
norm, a sum or product with a parameter) is recorded where the module calls it: its inputs, and the gradients
of its outputs, which one backward pass computes. Each row of inputs and gradients belongs to one example,
wherever the module puts it: in packed sequences, for example, the rows are sorted by step and length. A
second backward pass determines which row belongs to which example. The cotangents of each example are
multiplied by a different number, which multiplies all rows of that example. A row that mixes examples is
detected.

Modules that differentiate their outputs in their inputs, as physics-informed networks do, multiply by the
matrices again in these derivatives, which are recorded too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import torch

from hfmpi.frameworks.torch_gradients import ExampleGradients
from hfmpi.frameworks.torch_labels import Rows, grouped, labelled, taken
from hfmpi.frameworks.torch_recorder import Call, Recorder

__all__ = ["BatchPass"]


class BatchPass:
    """One ordinary forward pass of B examples that provides the gradient of each example in each parameter.

    Parameters
    ----------
    function : callable
        (parameters by name, inputs) -> outputs (B * N, O), in the order of the examples.
    parameters : dict of str to tensor
        In the order of theta.
    frozen : iterable of tensor
        The other parameters of the module.
    inputs : sequence of (B, ...)
    derivatives : bool
        Whether the module may differentiate its layers.
    shared : list of bool, or None
        For each call of a table, in order, whether all examples look up the same indices, which are then
        repeated for each example. None: determine it. See `shared` below.
    together : bool
        Whether per-example gradients are only needed where inputs and output gradients do not determine the
        Kronecker factors of a parameter. All rows of the other parameters are then assigned to one example.

    Attributes
    ----------
    outputs : (B, N, O)
    shared : list of bool
        The values for this pass. To determine them, the number of examples must not equal a size of such
        indices.
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
        # Operations other than layers depend on the stand-in of a parameter.
        self._standing = {name: p.detach().requires_grad_() for name, p in parameters.items()}
        self._recorder = recorder = Recorder(self.examples, derivatives, shared)
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
        # The rows of all examples determine the factors of a parameter if only one kind of layer uses it.
        self._joint = {name for name, of in kinds.items() if together and len(of) == 1 and "rest" not in of}
        self._labels: dict[int, Any] | None = None

    def gradients(self, u: Any, last: bool = True) -> tuple[list[ExampleGradients], int]:
        """Return the per-example gradients of <outputs, u>.

        Parameters
        ----------
        u : (B, N, O)
        last : bool
            Whether this is the last call: rows whose gradients are zero for u then need no example.

        Returns
        -------
        gradients : list of ExampleGradients
        unassigned : int
            0: no parameter is expanded per example.

        Raises
        ------
        RuntimeError
            If the module uses a parameter other than by a layer, or a row mixes examples.
        """
        wanted = [*(call.edge for call in self._calls), *self._standing.values()]
        found = torch.autograd.grad(self.outputs, wanted, u, allow_unused=True, retain_graph=True)
        if any(gradient is not None for gradient in found[len(self._calls) :]):
            raise RuntimeError("a parameter is used by an operation that is not a layer")
        used = [(call, g) for call, g in zip(self._calls, found, strict=False) if g is not None]
        gradients = {
            name: ExampleGradients(p.detach(), [], [], [], []) for name, p in self.parameters.items()
        }
        separate = dict[tuple[str, str], list[tuple[Call, Any]]]()
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
                    call.add_rest(gradients[name], cotangent, grouped(of, self.examples))
                continue
            call, index = pairs[0][0], grouped(torch.cat(of_pairs), self.examples)
            rows = torch.cat([g.reshape(one.rows, -1) for one, g in pairs])
            inputs = None if call.input is None else torch.cat([one.input for one, _ in pairs])
            call.add(gradients[name], taken(rows, index), None if inputs is None else taken(inputs, index))
        for name in {name for name, kind in separate if kind == "transposed"}:
            mixed = (name, "product") in separate  # the two kinds have different scales
            gradients[name] = gradients[name]._replace(mixed=mixed)
        if last:
            self._labels = None
        return [*gradients.values()], 0

    def _labels_of(self, calls: list[tuple[Call, Any]], u: Any) -> dict[int, Any]:
        """Return the example (R,) of each row, by the identity of an edge; B for a row of zeros.

        Parameters
        ----------
        calls : list of (Call, tensor)
            Calls with the gradients at their edges for the cotangents u.
        u : (B, N, O), or None
            None: use random cotangents, whose labels are valid for any cotangents.
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
        widths = dict[int, list[tuple[Call, Any]]]()
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

        rows = [Rows(torch.cat([rows for _, rows in group])) for group in groups]
        for group, labels in zip(groups, labelled(rows, self.examples, scaled), strict=True):
            split = labels.split([call.rows for call, _ in group])
            self._labels |= {id(call.edge): part for (call, _), part in zip(group, split, strict=True)}
        return self._labels

    def _back(self, calls: list[Call], u: Any) -> Any:
        edges = [call.edge for call in calls]
        return torch.autograd.grad(self.outputs, edges, u, allow_unused=True, retain_graph=True)
