"""The passes J v and J' u of a PyTorch module, and sums over per-example gradients.

The forward pass runs once per linearisation, and its graph stays in memory. J' u is one backward pass through
it. J v takes two backward passes: J' u is linear in u, and the gradient of a linear function is its
transpose, so the gradient of <J' u, v> with respect to u is J v (double backward). Unlike forward mode (dual
numbers) this needs no further forward pass, and more operations support it; forward mode is used if an
operation has no second derivative.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import numpy as np
import torch
from torch.autograd.forward_ad import dual_level, make_dual, unpack_dual
from torch.nn.attention import SDPBackend, sdpa_kernel

from hfmpi.backends.base import Array
from hfmpi.errors import UserError
from hfmpi.frameworks import torch_gradients
from hfmpi.frameworks.framework import first_line, split_examples
from hfmpi.frameworks.torch_batch import BatchPass
from hfmpi.frameworks.torch_layers import ExamplePass
from hfmpi.frameworks.torch_module import Allocations
from hfmpi.models.batch import CheckedBatch
from hfmpi.models.factors import add_examples
from hfmpi.optim.layout import Along

if TYPE_CHECKING:
    from hfmpi.frameworks.torch import TorchModel

__all__ = ["TorchPasses", "plain_kernels"]

EXAMPLES = 256
"""The number of examples whose products with directions are computed at once."""

WAYS = "layers", "batch", "derivatives", "expanded"
"""The ways to compute per-example gradients (`TorchPlan.way`), in the order in which they are tried."""

TOLERANCE = 1e-3
"""Relative difference above which a trial has failed: far above rounding in float32."""

ROUNDING = {torch.float32: 1e-5, torch.float64: 1e-12}
"""Rounding of the gradient in one parameter, relative to the gradient in all parameters."""

T = TypeVar("T")


class _UndecidedError(RuntimeError):
    """Raised if a single example does not determine how per-example gradients can be computed."""


class TorchPasses:
    """The outputs of a module linearised at theta; satisfies `hfmpi.models.linearisation.Passes`.

    Parameters
    ----------
    model : TorchModel
        Its plan determines how each pass is computed.
    theta : (D,)
    examples : CheckedBatch
    first : {'', 'squares', 'factors'}
        The first pass. If one ordinary pass separates the examples (`BatchPass`), it is the forward pass;
        other passes, which may never be needed, then run forward again.

    Attributes
    ----------
    outputs : (N, O)
    examples : int
        B, the number of examples.
    """

    by_step = False
    outputs: Array

    def __init__(
        self,
        model: TorchModel,
        theta: Array,
        examples: CheckedBatch,
        first: Literal["", "squares", "factors"] = "",
    ) -> None:
        self.model, self.scored, self.examples = model, examples.scored, examples.size
        with torch.inference_mode(False), model.running(examples.inputs):
            self.inputs = model.tensors(examples.inputs)
            self.theta = model.tensor(theta).clone().requires_grad_()
            self._separated: tuple[str, BatchPass] | None = None
            self._graph: Any = None
            self._transposed: tuple[Any, Any] | None = None
            if first:
                self._separate(first)
            if self._separated is None and self._graph is None:
                self._record()

    def _separate(self, first: str) -> None:
        """Run forward by a `BatchPass` if it separates the examples, which the first batch determines."""
        if self.model.plan.unassigned is None and "examples" not in self.model.plan.sequential:
            self._record()
            like = self._graph.detach().view(self.examples, -1, self.outputs.shape[1])
            self._batched(lambda: self._know_examples(like), lambda: 0)
        plan = self.model.plan
        decided = plan.unassigned is not None and "examples" not in plan.sequential
        if not decided or plan.way not in ("batch", "derivatives"):
            return
        self._graph = None
        forward = self._batched(lambda: self._forward(slice(None), together=first == "factors"), lambda: None)
        if isinstance(forward, BatchPass):
            self._separated = first, forward
            self.outputs = self.model.array(forward.outputs.flatten(0, 1))

    @property
    def graph(self) -> Any:
        """The outputs (N, O) as a function of theta."""
        if self._graph is None:
            self._record()
        return self._graph

    def _record(self) -> None:
        """Run the forward pass and keep its graph."""
        with self._running(), torch.enable_grad():
            self._graph = self._outputs(self.theta)
        if not self._graph.requires_grad:
            raise UserError("the outputs of the module do not depend on its parameters")
        self.model.check_unchanged(self.theta)
        self.outputs, self._transposed = self.model.array(self._graph), None

    @contextmanager
    def _running(self) -> Iterator[None]:
        with self.model.memory_errors(), torch.inference_mode(False), self.model.plan.kernels():
            yield

    def _outputs(self, theta: Any) -> Any:
        return self.model.call(self.model.named(theta), self.inputs, self.scored)

    @property
    def nbytes(self) -> int:
        """The size in bytes of graphs and outputs, estimated from one example."""
        return self.model.plan.bytes_per_example * self.examples + int(self.outputs.nbytes)

    # Products ----------------------------------------------------------------------------------

    def jvp(self, v: Array) -> Array:
        """Return J v (N, O) of v (D,), or (N * C, O) of (C, D)."""
        plan = self.model.plan
        if plan.obstacle is not None:
            raise UserError(
                "an operation of the module has neither a second derivative nor a forward mode "
                f"({plan.obstacle}): use a first-order optimizer"
            )
        v = v.astype(self.outputs.dtype, copy=False)
        push = self._double_backward if plan.double_backward else self._forward_mode
        tangents = self._pass(push, v, v.ndim == 2)
        if v.ndim == 2:
            tangents = tangents.swapaxes(0, 1).reshape(-1, tangents.shape[-1])
        return tangents.copy() if self.model.backend.xp.may_share_memory(tangents, v) else tangents

    def vjp(self, u: Array, out: Array) -> None:
        """Add J' u of u (N * C, O) to out (D,) or (C, D)."""
        u = u.astype(self.outputs.dtype, copy=False)
        if out.ndim == 2:
            columns = u.reshape(-1, len(out), u.shape[-1]).swapaxes(0, 1)
            u = self.model.backend.xp.ascontiguousarray(columns)
        out += self._pass(self._backward, u, out.ndim == 2)

    def _pass(self, linear: Callable[[Any, bool], Any], vectors: Array, many: bool) -> Array:
        """Apply a linear function (tensor, whether it is a batch of vectors) to one or `many` vectors."""
        tensor = self.model.tensor(vectors)

        def at_once() -> Array:
            with self._running(), _quiet():
                return self.model.array(linear(tensor, True))

        def one_by_one() -> Array:
            with self._running():
                return self.model.array(torch.stack([linear(one, False) for one in tensor]))

        if many:
            return self.model.batched("directions", at_once, one_by_one)
        with self._running():
            return self.model.array(linear(tensor, False))

    def _backward(self, u: Any, many: bool) -> Any:
        return torch.autograd.grad(self.graph, self.theta, u, retain_graph=True, is_grads_batched=many)[0]

    def _transpose(self) -> tuple[Any, Any]:
        """Return J' u with its graph, and the u that it depends on; computed once."""
        if self._transposed is None:
            with torch.enable_grad():
                u = torch.zeros_like(self.graph, requires_grad=True)
                self._transposed = torch.autograd.grad(self.graph, self.theta, u, create_graph=True)[0], u
        return self._transposed

    def _double_backward(self, v: Any, many: bool) -> Any:
        transposed, u = self._transpose()
        return torch.autograd.grad(transposed, u, v, retain_graph=True, is_grads_batched=many)[0]

    def _forward_mode(self, v: Any, many: bool) -> Any:
        theta = self.theta.detach()

        def push(v: Any) -> Any:
            return unpack_dual(self._outputs(make_dual(theta, v))).tangent

        with torch.no_grad(), dual_level(), _quiet():
            return torch.func.vmap(push)(v) if many else push(v)

    def try_products(self) -> int:
        """Return the size in bytes of the graphs; raise a RuntimeError if products do not work."""
        nbytes = self._weigh()
        self._record()  # without hooks on saved tensors, whose results PyTorch does not check
        rng = np.random.default_rng(0)
        v = rng.standard_normal(self.model.size).astype(self.outputs.dtype)
        u = rng.standard_normal(self.outputs.shape).astype(self.outputs.dtype)
        backend = self.model.backend
        out = backend.xp.zeros(v.size, v.dtype)
        tangent = backend.to_host(self.jvp(backend.to_device(v)))
        self.vjp(backend.to_device(u), out)
        gradient = backend.to_host(out)
        difference = abs(float(np.vdot(tangent, u)) - float(np.vdot(v, gradient)))
        if not difference <= TOLERANCE * float(np.linalg.norm(tangent) * np.linalg.norm(u)):
            raise RuntimeError("J v and J' u do not agree")
        return nbytes

    def _weigh(self) -> int:
        """Record the graphs and return their size in bytes."""
        stored, theta = dict[int, int](), self.theta.untyped_storage().data_ptr()

        def pack(tensor: Any) -> Any:
            if tensor.layout != torch.strided:
                return tensor
            storage = tensor.untyped_storage()
            if storage.data_ptr() != theta:
                stored[storage.data_ptr()] = storage.nbytes()
            return tensor

        def record() -> None:
            self._record()
            if self.model.plan.double_backward:
                self._transpose()

        try:
            with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
                record()
        except RuntimeError as failure:
            if "saved tensor hooks" not in str(failure):
                raise
            with Allocations() as allocations:  # torch.func in the module excludes hooks
                record()
            return int(allocations.nbytes)
        return sum(stored.values())

    # Per-example gradients ---------------------------------------------------------------------

    def squares(self, u: Array, out: Array, squares: Array) -> None:
        """Add J' u of u (N, O) to out (D,), and its squares, summed over examples, to squares (D,)."""
        self._add_over_examples(
            u, lambda gradients, _: torch_gradients.squares(gradients), lambda g: g.square(), out, squares
        )

    def factors(self, u: Array, out: Array, sums: Array, weights: Array | None = None) -> None:
        """Add J' u of u (N, O) to out (D,), and the sums of `hfmpi.models.factors`; see `Passes.factors`."""
        blocks = self.model.blocks
        of_examples = None if weights is None else self.model.tensor(weights)

        def of_gradient(g: Any) -> Any:
            sums = self.model.backend.xp.zeros(self.model.factor_sums.size, self.outputs.dtype)
            add_examples(blocks, self.model.array(g)[None], sums)
            return self.model.tensor(sums)

        def of_layers(gradients: Any, part: slice) -> tuple[Any, Any]:
            return torch_gradients.factors(
                gradients, blocks, None if of_examples is None else of_examples[part]
            )

        self._add_over_examples(u, of_layers, of_gradient, out, sums, together=True)

    def rows(self, u: Array, out: Array) -> None:
        """Fill out (B, C, D) with J' u of each example, for each of C cotangents u (N * C, O)."""
        several, layout = out.shape[1], self.model.layout
        cotangents = self._cotangents(u, several)

        def at_once() -> None:
            self._know_examples(cotangents[0])
            for part in split_examples(self.examples, several * self.model.size):
                forward = self._forward(part)
                for c, one in enumerate(cotangents):
                    with self._running(), _quiet():
                        gradients, _ = forward.gradients(one[part], last=c == several - 1)
                        for name, of_parameter in zip(layout.shapes, gradients, strict=True):
                            start, rows = layout.offsets[name], self.model.array(of_parameter.rows())
                            rows = rows.reshape(len(rows), -1)
                            out[part, c, start : start + rows.shape[1]] = rows

        def one_by_one() -> None:
            for i, gradients in enumerate(self._one_by_one(cotangents)):
                for c, gradient in enumerate(gradients):
                    out[i, c] = self.model.array(gradient)

        self._batched(at_once, one_by_one)

    def rows_along(self, u: Array, several: int, along: Along) -> Array:
        """Return V S' (k, B, C) of the rows S that `rows` computes for C cotangents, in parts."""
        xp, to_array = self.model.backend.xp, self.model.array
        by_block = [
            [(first, part, self.model.tensor(v)) for first, part, v in pieces]
            for pieces in along.by_block(self.model.blocks)
        ]
        cotangents = self._cotangents(u, several)

        def at_once() -> Array:
            products = xp.zeros((len(along), self.examples, several), u.dtype)
            self._know_examples(cotangents[0])
            for start in range(0, self.examples, EXAMPLES):
                part = slice(start, start + EXAMPLES)
                forward = self._forward(part)
                for c, one in enumerate(cotangents):
                    with self._running(), _quiet():
                        gradients, _ = forward.gradients(one[part], last=c == several - 1)
                        for pieces, of_parameter in zip(by_block, gradients, strict=True):
                            for first, of_block, v in pieces:
                                into = products[first : first + len(v), part, c]
                                into += to_array(of_parameter.along(of_block, v))
            return products

        def one_by_one() -> Array:
            rows = (to_array(torch.stack(gradients)) for gradients in self._one_by_one(cotangents))
            return xp.stack([along(each) for each in rows], axis=1)

        return self._batched(at_once, one_by_one)

    def _batched(self, at_once: Callable[[], T], one_by_one: Callable[[], T]) -> T:
        """Return the result of `at_once`, or of `one_by_one` if the examples cannot be separated.

        A batch with a single example does not affect how later batches are processed.
        """

        def attempt() -> T:
            try:
                return at_once()
            except _UndecidedError:
                return one_by_one()

        return self.model.batched("examples", attempt, one_by_one)

    def _cotangents(self, u: Array, several: int) -> Any:
        """Return u (N * C, O) as a tensor (C, B, n, O)."""
        u = u.astype(self.outputs.dtype, copy=False)
        return self.model.tensor(u).view(self.examples, -1, several, u.shape[-1]).movedim(2, 0)

    def _add_over_examples(
        self,
        u: Array,
        of_layers: Callable[..., Any],
        of_gradient: Callable[[Any], Any],
        out: Array,
        sums: Array,
        together: bool = False,
    ) -> None:
        """Add J' u to out, and a sum over examples to sums: for many examples at once, or one by one.

        See `BatchPass` for `together`.
        """
        by_example = self.model.tensor(u).view(self.examples, -1, u.shape[-1])

        def at_once() -> Any:
            ready, found = self._separated, list[list[Any]]()
            if ready is not None and ready[0] == ("factors" if together else "squares"):
                self._separated = None
                with self._running(), _quiet():
                    return of_layers(ready[1].gradients(by_example)[0], slice(None))
            for part in split_examples(self.examples, self._know_examples(by_example)):
                forward = self._forward(part, together)
                with self._running(), _quiet():
                    pair = of_layers(forward.gradients(by_example[part])[0], part)
                for totals, more in zip(found, pair, strict=False):
                    for i, each in enumerate(more):
                        totals[i] = totals[i] + each  # not in place: the same tensor may occur several times
                found = found or [*pair]
            return found

        def one_by_one() -> Any:
            sums = list[Any]()
            for (g,) in self._one_by_one(by_example[None]):
                sums = [total + more for total, more in zip(sums or (0, 0), (g, of_gradient(g)), strict=True)]
            return [sums[0]], [sums[1]]

        for array, tensors in zip((out, sums), self._batched(at_once, one_by_one), strict=True):
            start = 0
            for tensor in tensors:
                array[start : start + tensor.numel()] += self.model.array(tensor.reshape(-1))
                start += tensor.numel()

    def _example_outputs(self, parameters: dict[str, Any], *inputs: Any) -> Any:
        """Return the outputs (N, O) of one example."""
        return self.model.call(parameters, tuple(x[None] for x in inputs), self.scored.example)

    def _forward(self, part: slice, together: bool = False) -> ExamplePass | BatchPass:
        """Run forward on a part of the examples, for per-example gradients."""
        inputs = [x[part] for x in self.inputs]
        with self._running(), _quiet():
            named, plan = self.model.named(self.theta.detach()), self.model.plan
            if plan.way in ("layers", "expanded"):
                layers = plan.way == "layers"
                return ExamplePass(self._example_outputs, named, self.model.frozen, inputs, layers)
            scored = self.scored.of_examples(len(inputs[0]))

            def outputs(parameters: dict[str, Any], *inputs: Any) -> Any:
                return self.model.call(parameters, inputs, scored)

            derivatives, shared = plan.way == "derivatives", plan.shared if plan.unassigned == 0 else None
            return BatchPass(outputs, named, self.model.frozen, inputs, derivatives, shared, together)

    def _one_by_one(self, u: Any) -> Iterator[list[Any]]:
        """Yield for each example its gradients (D,), one for each cotangent in u (C, B, N, O)."""
        for i in range(u.shape[1]):
            theta = self.theta.detach().requires_grad_()
            with self._running():
                with torch.enable_grad():
                    outputs = self._example_outputs(self.model.named(theta), *(x[i] for x in self.inputs))
                gradients = [torch.autograd.grad(outputs, theta, one[i], retain_graph=True)[0] for one in u]
            yield gradients

    def _know_examples(self, like: Any) -> int:
        """Return the number of unassigned entries of parameters, in the first way that works on two examples.

        Parameters
        ----------
        like : (B, N, O)
            A tensor with the shape and dtype of cotangents.

        Raises
        ------
        RuntimeError
            If per-example gradients are wrong in all ways, for example because the module changes
            gradients during the backward pass (`register_hook`).
        """
        if self.model.plan.unassigned is None:
            like = like[:2]
            u = torch.from_numpy(np.random.default_rng(0).standard_normal(like.shape)).to(like)
            failures = list[Exception]()
            for way in WAYS if len(u) > 1 else ("layers", "expanded"):
                self.model.replan(way=way)
                try:
                    self._try_examples(u)
                    break
                except MemoryError:
                    raise
                except Exception as failure:  # an ordinary pass may fail in the module itself
                    self.model.replan(unassigned=None)
                    if way in ("layers", "expanded") and not isinstance(failure, RuntimeError):
                        raise
                    failures.append(failure)
            else:
                if len(u) < 2:
                    raise _UndecidedError
                raise RuntimeError(first_line(failures[0])) from failures[0]
        return self.model.plan.unassigned or 0

    def _try_examples(self, u: Any) -> None:
        """Complete the plan for per-example gradients; raise a RuntimeError if one of them is wrong."""
        forward = self._forward(slice(len(u)))
        with self._running(), _quiet():
            gradients, unassigned = forward.gradients(u)
            each = [one.rows().expand(len(u), *one.p.shape).reshape(len(u), -1) for one in gradients]
        for row, (right,) in zip(torch.cat(each, 1), self._one_by_one(u[None]), strict=True):
            self._compare(row, right, [one.shape[1] for one in each])
        self.model.replan(unassigned=unassigned)
        if isinstance(forward, BatchPass):
            self.model.replan(shared=tuple(forward.shared))
            self._try_batch(u)

    def _try_batch(self, like: Any) -> None:
        """Raise a RuntimeError unless the per-example gradients add up to the gradient of the batch."""
        numbers = np.random.default_rng(1).standard_normal(self.outputs.shape)
        u, forward = torch.from_numpy(numbers).to(like), self._forward(slice(None))
        with self._running(), _quiet():
            gradients, _ = forward.gradients(u.view(self.examples, -1, u.shape[-1]))
            total = torch.cat([one.sum().flatten() for one in gradients])
            right = self._backward(u, False)
        self._compare(total, right, [one.p.numel() for one in gradients])

    def _compare(self, ours: Any, right: Any, sizes: list[int]) -> None:
        """Raise a RuntimeError if gradients (D,) differ; for ordinary passes, in any single parameter."""
        parts, norm = [(ours, right)], torch.linalg.vector_norm
        if self.model.plan.way in ("batch", "derivatives"):
            parts = [*zip(ours.split(sizes), right.split(sizes), strict=True)]
        for one, other in parts:
            if not norm(one - other) <= TOLERANCE * norm(other) + ROUNDING[ours.dtype] * norm(right):
                raise RuntimeError("the gradients of examples cannot be separated")


@contextmanager
def plain_kernels() -> Iterator[None]:
    """Exclude fused kernels that have no second derivative."""
    with sdpa_kernel(SDPBackend.MATH), torch.backends.cudnn.flags(enabled=False):
        yield


@contextmanager
def _quiet() -> Iterator[None]:
    """Suppress warnings of PyTorch's transformations that are addressed to its developers."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "There is a performance drop")  # an operation runs once per example
        warnings.filterwarnings("ignore", ".*torch.jit.script")  # PyTorch calls it itself
        yield
