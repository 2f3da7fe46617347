"""A PyTorch module as a model: any module that gives one tensor of outputs.

Forward runs once for each linearisation, and its graph is kept. J' u goes back through it. J v goes back
twice: J' u is linear in u, and the derivative of a linear function is its transpose, so the gradient of
<J' u, v> in u is J v (the double backward). It needs no forward pass anew, as dual numbers (forward mode)
do, and holds for more operations; these take its place where an operation has no second derivative.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import numpy as np

from hfmpi.errors import UserError, shown
from hfmpi.frameworks.framework import FrameworkModel
from hfmpi.models.batch import Examples, ScoredOutputs
from hfmpi.models.factors import add_examples
from hfmpi.models.losses import Loss

try:
    import torch
    from torch.autograd.forward_ad import dual_level, make_dual, unpack_dual
    from torch.nn.attention import SDPBackend, sdpa_kernel

    from hfmpi.frameworks import torch_layers
except ImportError:
    torch = None

__all__ = ["TorchModel"]

EACH_NUMBERS = 1 << 24
"""Numbers of single cases' gradients that are computed at once."""

_FAILURES = (RuntimeError, NotImplementedError)
"""What PyTorch raises where an operation lacks a derivative or a batching rule."""


class TorchModel(FrameworkModel):
    """A PyTorch module with a loss.

    The module is called with the cases of a batch along the first axis, in the mode that it is in, and must
    give the same outputs each time: no dropout, no batch statistics. Its parameters that require a gradient
    make theta, one after the other, tied ones once; all others, and its buffers, stay as they are.

    Parameters
    ----------
    module : torch.nn.Module
        Gives outputs (cases, ..., O). It is not changed but by `write_back`.
    loss : {'cross-entropy', 'squares', 'bernoulli'} or Loss
        Of each row of outputs.

    Raises
    ------
    UserError
        If PyTorch is not installed, or the module has nothing to train.
    """

    def __init__(self, module: Any, loss: str | Loss) -> None:
        if torch is None:
            raise UserError("TorchModel needs PyTorch: pip install torch")
        if not isinstance(module, torch.nn.Module):
            raise UserError(f"module must be a torch.nn.Module, not {shown(module)}")
        if isinstance(module, torch.jit.ScriptModule):
            raise UserError("a scripted module cannot be called at another theta: give what was scripted")
        named = dict(module.named_parameters())
        if any(torch.nn.parameter.is_lazy(p) for p in named.values()):
            raise UserError("the module has parameters without a shape: call it once with some inputs")
        self._own = {name: p for name, p in named.items() if p.requires_grad and p.numel()}
        if not self._own:
            raise UserError("the module has no parameter that requires a gradient")
        kinds = {p.dtype for p in self._own.values()}
        if kinds not in ({torch.float32}, {torch.float64}):
            found = ", ".join(sorted(str(kind).removeprefix("torch.") for kind in kinds))
            raise UserError(f"parameters must all be float32 or all be float64, not {found}")
        devices = {tensor.device for tensor in (*named.values(), *module.buffers())}
        if len(devices) > 1:
            found = ", ".join(sorted(map(str, devices)))
            raise UserError(
                f"parameters and buffers of the module must be on one device, not on {found}: module.to(...)"
            )
        self.module = module
        self._frozen = [p for name, p in named.items() if name not in self._own]
        self._device = devices.pop()
        self._sizes = [p.numel() for p in self._own.values()]
        self._bytes = 0  # of the graph of a case
        self._kernels: Callable[[], Any] = ExitStack  # a context of no effect
        self._double = True
        self._obstacle: str | None = None
        self._batches = self._cases_apart = True
        self._loose: int | None = None  # parameters of which each case needs its own, once it is known
        start = torch.cat([p.detach().reshape(-1) for p in self._own.values()]).cpu().numpy()
        shapes = [(name, tuple(p.shape)) for name, p in self._own.items()]
        super().__init__(shapes, start, loss, _stacked(module, self._own))

    def write_back(self, theta: np.ndarray) -> None:
        """Copy theta (D,) into the parameters of the module."""
        given = np.asarray(theta)
        if given.shape != (self.size,):
            raise UserError(f"theta must be a vector of {self.size:,} numbers, not of shape {given.shape}")
        parts = torch.from_numpy(given.astype(self.backend.dtype)).split(self._sizes)
        with torch.no_grad():
            for p, part in zip(self._own.values(), parts, strict=True):
                p.copy_(part.view(p.shape))

    @contextmanager
    def threads(self, count: int) -> Iterator[None]:
        """Let PyTorch compute with so many threads inside the context."""
        before = torch.get_num_threads()
        torch.set_num_threads(count)
        try:
            yield
        finally:
            torch.set_num_threads(before)

    # The function of theta ---------------------------------------------------------------------

    def _function(self, inputs: tuple[Any, ...], scored: ScoredOutputs) -> Callable[[Any], Any]:
        """Give the function theta (D,) -> outputs (N, O), of tensors."""

        def function(theta: Any) -> Any:
            return scored.of(torch.func.functional_call(self.module, self._named(theta), inputs))

        return function

    def _named(self, theta: Any) -> dict[str, Any]:
        """Give the parameters in theta (D,) by name, as views."""
        named = zip(self._own.items(), theta.split(self._sizes), strict=True)
        return {name: part.view(p.shape) for (name, p), part in named}

    def tensor(self, array: np.ndarray) -> Any:
        """Give an array as a tensor on the module's device: where that is the CPU, of the same memory."""
        if not array.flags.writeable or any(stride < 0 for stride in array.strides):
            array = array.copy()
        return torch.from_numpy(array).to(self._device)

    def _tensors(self, inputs: tuple[np.ndarray, ...]) -> tuple[Any, ...]:
        """Give inputs as tensors; whole numbers as int64, which every module takes."""
        return tuple(self.tensor(x.astype(np.int64) if x.dtype.kind in "iu" else x) for x in inputs)

    def _outputs(
        self, theta: np.ndarray, inputs: tuple[np.ndarray, ...], scored: ScoredOutputs
    ) -> np.ndarray:
        with _memory(), torch.no_grad(), self._kernels():
            return _array(self._function(self._tensors(inputs), scored)(self.tensor(theta)))

    def _linearise(
        self, theta: np.ndarray, inputs: tuple[np.ndarray, ...], scored: ScoredOutputs
    ) -> TorchPasses:
        return TorchPasses(self, theta, self._tensors(inputs), scored)

    # The first batch ---------------------------------------------------------------------------

    def _check(self, theta: np.ndarray, example: Examples) -> None:
        """Find out what holds for the module; raise a UserError where it cannot be trained."""
        before = {name: b.detach().clone() for name, b in self.module.named_buffers()}
        once, again = (self._outputs(theta, example.inputs, example.scored) for _ in range(2))
        changed = False
        with torch.no_grad():
            for name, b in self.module.named_buffers():
                if name in before and not torch.equal(b, before[name]) and not torch.isnan(b).any():
                    changed = True
                    b.copy_(before[name])
        if changed:
            raise UserError(
                "a pass changes buffers of the module, as batch statistics do: call module.eval() first"
            )
        if not np.allclose(once, again, 1e-3, 1e-6, equal_nan=True):
            raise UserError(
                "the module gives other outputs each time, as with dropout: call module.eval() first"
            )
        super()._check(theta, example)
        self._choose(theta, example.first)

    def _choose(self, theta: np.ndarray, example: Examples) -> None:
        """Choose how to multiply with J, as it works on one case."""
        log, why = logging.getLogger(__name__), ""
        for double, kernels in (True, ExitStack), (True, _plain), (False, ExitStack), (False, _plain):
            self._double, self._kernels = double, kernels
            try:
                self._bytes = self._linearise(theta, example.inputs, example.scored).tried()
                self._fit_micro_batch(self._bytes)
            except _FAILURES as failure:
                why = why or str(failure).partition("\n")[0]
                continue
            if not double:
                log.warning(
                    "Note: an operation of the module has no second derivative (%s): every product runs the "
                    "module anew, in forward mode.",
                    why,
                )
            elif kernels is _plain:
                log.warning(
                    "Note: a fused kernel of the module has no second derivative (%s): plain kernels of "
                    "attention, and of recurrent networks on a GPU, take its place.",
                    why,
                )
            return
        self._double, self._kernels, self._obstacle = True, ExitStack, why


class TorchPasses:
    """The outputs of a module linearised at theta; satisfies `hfmpi.models.linearisation.Passes`."""

    def __init__(
        self, model: TorchModel, theta: np.ndarray, inputs: tuple[Any, ...], scored: ScoredOutputs
    ) -> None:
        self.model, self.inputs, self.scored = model, inputs, scored
        self.function = model._function(inputs, scored)
        self.theta = model.tensor(theta).detach().requires_grad_()
        self.cases = scored.shape[0]
        self._run()

    def _run(self) -> None:
        """Run forward, and keep the graph."""
        with _memory(), torch.enable_grad(), self.model._kernels():
            self.graph = self.function(self.theta)
        if not self.graph.requires_grad:
            raise UserError("the outputs of the module do not depend on its parameters")
        self.outputs = _array(self.graph)
        self._pull: tuple[Any, Any] | None = None

    @property
    def nbytes(self) -> int:
        """About what the graphs keep, as measured on one case."""
        return self.model._bytes * self.cases + self.outputs.nbytes

    def jvp(self, v: np.ndarray) -> np.ndarray:
        """Return J v (N, O) of v (D,), or (N * C, O) of (C, D)."""
        if self.model._obstacle is not None:
            raise UserError(
                "an operation of the module has neither a second derivative nor a forward mode "
                f"({self.model._obstacle}): take a first-order optimizer"
            )
        v = v.astype(self.outputs.dtype, copy=False)
        with _memory(), self.model._kernels():
            push = self._double_backward if self.model._double else self._forward
            tangents = self._each_way(push, v, v.ndim == 2)
        return tangents if v.ndim == 1 else tangents.swapaxes(0, 1).reshape(-1, tangents.shape[-1])

    def vjp(self, u: np.ndarray, out: np.ndarray) -> None:
        """Add J' u of u (N * C, O) to out (D,) or (C, D)."""
        u = u.astype(self.outputs.dtype, copy=False)
        if out.ndim == 2:
            u = np.ascontiguousarray(u.reshape(-1, len(out), u.shape[-1]).swapaxes(0, 1))
        with _memory(), self.model._kernels():
            out += self._each_way(self._backward, u, out.ndim == 2)

    def squares(self, u: np.ndarray, out: np.ndarray, squares: np.ndarray) -> None:
        """Add J' u of u (N, O) to out (D,), and its squares, summed over examples, to squares (D,)."""
        total, own = self._over_cases(u, torch_layers.squares, lambda g: g.square())
        out += total
        squares += own

    def factors(self, u: np.ndarray, out: np.ndarray, sums: np.ndarray) -> None:
        """Add J' u of u (N, O) to out (D,), and the sums of `hfmpi.models.factors` to sums."""
        model = self.model

        def alone(g: Any) -> Any:
            sums = np.zeros(model.factor_sums.size, self.outputs.dtype)
            add_examples(model.blocks, _array(g)[None], sums)
            return torch.from_numpy(sums).to(g)

        total, own = self._over_cases(u, partial(torch_layers.factors, blocks=model.blocks), alone)
        out += total
        sums += own

    def _over_cases(
        self, u: np.ndarray, together: Callable[..., Any], alone: Callable[[Any], Any]
    ) -> tuple[np.ndarray, np.ndarray]:
        """Give J' u and a sum over cases: of many at once, else of each alone, from its gradient."""
        model, apart = self.model, self.model.tensor(u).view(self.cases, -1, u.shape[-1])
        if model._cases_apart:
            try:
                if model._loose is None:
                    model._loose = self._try_cases(apart[:2])
                most = max(1, EACH_NUMBERS // max(1, model._loose))
                parts = [slice(start, start + most) for start in range(0, self.cases, most)]
                with _memory():
                    found = [together(self._cases_together(part, apart[part])[0]) for part in parts]
                return _array(sum(total for total, _ in found)), _array(sum(own for _, own in found))
            except _FAILURES as failure:
                model._cases_apart = False
                _note("case", failure)
        total, own = self._case_by_case(apart, alone)
        return _array(total), _array(own)

    def _case(self, parameters: dict[str, Any], *inputs: Any) -> Any:
        """Give the outputs (N, O) of one case."""
        return self.scored.example.of(
            torch.func.functional_call(self.model.module, parameters, tuple(x[None] for x in inputs))
        )

    def _cases_together(self, part: slice, u: Any) -> tuple[list[Any], int]:
        """Do what `hfmpi.frameworks.torch_layers.gradients` does for some cases and their u (B, N, O)."""
        model, inputs = self.model, [x[part] for x in self.inputs]
        with _memory(), _quiet(), model._kernels():
            named = model._named(self.theta.detach())
            return torch_layers.gradients(self._case, named, model._frozen, inputs, u)

    def _case_by_case(self, u: Any, alone: Callable[[Any], Any]) -> tuple[Any, Any]:
        """Do the same for the first cases, one after the other."""
        model, sums = self.model, list[Any]()
        for own, *inputs in zip(u, *(x[: len(u)] for x in self.inputs), strict=True):
            theta = self.theta.detach().requires_grad_()
            with _memory(), torch.enable_grad(), model._kernels():
                g = torch.autograd.grad(self._case(model._named(theta), *inputs), theta, own)[0]
            sums = [total + one for total, one in zip(sums or (0, 0), (g, alone(g)), strict=True)]
        return sums[0], sums[1]

    def _try_cases(self, like: Any) -> int:
        """Give the parameters that each case needs its own of; RuntimeError where the first cases go wrong.

        So it is where the module changes gradients on their way back (`register_hook`).
        """
        u = torch.from_numpy(np.random.default_rng(0).standard_normal(like.shape)).to(like)
        found, loose = self._cases_together(slice(len(u)), u)
        alone = self._case_by_case(u, lambda g: g.square())
        for ours, right in zip(torch_layers.squares(found), alone, strict=True):
            if not torch.linalg.vector_norm(ours - right) <= 1e-3 * torch.linalg.vector_norm(right):
                raise RuntimeError("a layer's cases cannot be told apart")
        return loose

    def tried(self) -> int:
        """Give the bytes that the graphs keep; raise a RuntimeError where products do not work."""
        found, own = dict[int, int](), self.theta.untyped_storage().data_ptr()

        def pack(tensor: Any) -> Any:
            storage = tensor.untyped_storage()
            if storage.data_ptr() != own:
                found[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            self._run()
            if self.model._double:
                self._pulled()
        rng = np.random.default_rng(0)
        v = rng.standard_normal(self.model.size).astype(self.outputs.dtype)
        u = rng.standard_normal(self.outputs.shape).astype(self.outputs.dtype)
        along, back = self.jvp(v), np.zeros_like(v)
        self.vjp(u, back)
        apart = abs(float(np.vdot(along, u)) - float(np.vdot(v, back)))
        if not apart <= 1e-3 * float(np.linalg.norm(along) * np.linalg.norm(u)):
            raise RuntimeError("an operation's derivatives do not fit one another")
        return sum(found.values())

    def _each_way(self, pass_: Callable[[Any, bool], Any], given: np.ndarray, many: bool) -> np.ndarray:
        """Do a linear pass of one direction, or of several at once where PyTorch can, else of each."""
        model, tensor = self.model, self.model.tensor(given)
        found = None
        if many and model._batches:
            try:
                with _memory(), _quiet():
                    found = _array(pass_(tensor, True))
            except _FAILURES as failure:
                model._batches = False
                _note("direction", failure)
        if found is None and many:
            found = np.stack([_array(pass_(own, False)) for own in tensor])
        elif found is None:
            found = _array(pass_(tensor, False))
        return found.copy() if np.may_share_memory(found, given) else found

    def _backward(self, u: Any, batched: bool) -> Any:
        return torch.autograd.grad(self.graph, self.theta, u, retain_graph=True, is_grads_batched=batched)[0]

    def _pulled(self) -> tuple[Any, Any]:
        """Give J' u with its graph, and the u that it is a function of; made once."""
        if self._pull is None:
            with torch.enable_grad():
                u = torch.zeros_like(self.graph, requires_grad=True)
                self._pull = torch.autograd.grad(self.graph, self.theta, u, create_graph=True)[0], u
        return self._pull

    def _double_backward(self, v: Any, batched: bool) -> Any:
        pulled, u = self._pulled()
        return torch.autograd.grad(pulled, u, v, retain_graph=True, is_grads_batched=batched)[0]

    def _forward(self, v: Any, batched: bool) -> Any:
        theta = self.theta.detach()

        def push(v: Any) -> Any:
            return unpack_dual(self.function(make_dual(theta, v))).tangent

        with torch.no_grad(), dual_level(), _quiet():
            return torch.func.vmap(push)(v) if batched else push(v)


def _stacked(module: Any, named: dict[str, Any]) -> dict[str, int]:
    """Give, by name, how many matrices of a layer PyTorch keeps on top of one another as one parameter."""
    kinds: list[tuple[Any, int, str]] = [
        ((torch.nn.LSTM, torch.nn.LSTMCell), 4, "hidden_size"),
        ((torch.nn.GRU, torch.nn.GRUCell), 3, "hidden_size"),
        (torch.nn.MultiheadAttention, 3, "embed_dim"),
    ]
    found = {
        id(p): count
        for layer in module.modules()
        for kind, count, size in kinds
        if isinstance(layer, kind)
        for p in layer.parameters(recurse=False)
        if p.shape[0] == count * getattr(layer, size)
    }
    return {name: found[id(p)] for name, p in named.items() if id(p) in found}


def _array(tensor: Any) -> np.ndarray:
    """Give a tensor as an array; where it is on the CPU, of the same memory."""
    return np.ascontiguousarray(tensor.detach().cpu().numpy())


def _note(what: str, failure: Exception) -> None:
    logging.getLogger(__name__).warning(
        "Note: an operation of the module cannot be batched (%s): hfmpi takes one %s after the other.",
        str(failure).partition("\n")[0],
        what,
    )


@contextmanager
def _plain() -> Iterator[None]:
    """Leave out fused kernels that have no second derivative."""
    with sdpa_kernel(SDPBackend.MATH), torch.backends.cudnn.flags(enabled=False):
        yield


@contextmanager
def _quiet() -> Iterator[None]:
    """Let PyTorch's transformations do without words to its developers."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "There is a performance drop")  # an operation runs one by one
        warnings.filterwarnings("ignore", ".*torch.jit.script")  # PyTorch's own use
        yield


@contextmanager
def _memory() -> Iterator[None]:
    """Raise a MemoryError where PyTorch raises an error of its own for it."""
    try:
        yield
    except RuntimeError as error:
        said = str(error)
        if any(words in said for words in ("out of memory", "allocate memory", "not enough memory")):
            raise MemoryError(said.partition("\n")[0]) from None
        raise
