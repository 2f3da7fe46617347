"""A recurrent character model: linearise once (forward), then J v (jvp) and J' u (vjp) without exponentials.

The output of the network, seen by the Gauss-Newton matrix, is the pair (logits, pre-activations): the
loss is a function of the logits, and structural damping is a second loss, of the pre-activations, that
has only a second derivative. So the product reads

    v -> J v -> H (J v) -> J' (H (J v)),    H = diag(loss Hessian, structural weights).

All matrices multiply from the right; rows are sequences, time-major. Products that involve no recurrence
are taken over all L * B rows at once; only h W_h (and h W_mh) and their transposes are sequential.
Derivation: docs/theory.md.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from hfmpi.backends.base import Array, Backend, Recurrence, Workspace
from hfmpi.models.cells import Cell

__all__ = ["Batch", "Network", "Outputs", "State", "Tape"]


class Batch(Protocol):
    """Symbols of B sequences, time-major int32: L inputs, and targets of the last T of them."""

    @property
    def inputs(self) -> Any:
        """(L, B)."""

    @property
    def targets(self) -> Any:
        """(T, B), T <= L: steps before the last T are warm-up, left out of the loss."""


class State(NamedTuple):
    """Hidden state between characters: h (B, n), and c (B, n), which plain cells carry along unused."""

    h: Array
    c: Array


class Outputs(NamedTuple):
    """A tangent or a cotangent of the network's outputs.

    Attributes
    ----------
    logits : (T * B, V)
    pre : (L, B, K) or None
        Of the pre-activations, for structural damping.
    """

    logits: Array
    pre: Array | None = None


@dataclass
class Tape:
    """The linearisation of the network at theta on one batch.

    Attributes
    ----------
    loss : float
        Summed over the scored characters, nats.
    """

    recurrence: Recurrence
    output: Array
    targets: Array
    probabilities: Array
    loss: float
    memory: Workspace


class Network:
    """One of the four cells with a softmax output, on one device.

    Parameters
    ----------
    cell : Cell
    backend : Backend
    """

    def __init__(self, cell: Cell, backend: Backend) -> None:
        self.cell = cell
        self.backend = backend
        self.layout = cell.layout
        self._scratch = backend.new_workspace()

    # Forward -----------------------------------------------------------------------------------

    def forward(
        self, theta: Array, batch: Batch, structural: bool = False, reuse: Tape | None = None
    ) -> Tape:
        """Run the network and keep what every later product with J and J' needs.

        Parameters
        ----------
        theta : (D,)
        batch : Batch
        structural : bool
            Keep the structural-damping weights of the pre-activations too.
        reuse : Tape, optional
            A tape whose memory may be overwritten.
        """
        steps = len(batch.inputs)
        memory = reuse.memory if reuse else self.backend.new_workspace()
        return self._run(theta, batch, steps, structural, memory)

    def loss(self, theta: Array, batch: Batch) -> float:
        """Give the summed loss in nats, without a linearisation."""
        return self._run(theta, batch, 1, False, self._scratch).loss

    def _run(self, theta: Array, batch: Batch, kept: int, structural: bool, memory: Workspace) -> Tape:
        inputs, targets = self.backend.to_device(batch.inputs), self.backend.to_device(batch.targets)
        (steps, size), n, cell = inputs.shape, self.cell.hidden, self.cell
        p = self.layout.views(theta)

        hidden = memory("hidden", (steps + 1, size, n))
        hidden[0] = 0
        state = self.backend.workspace("forward.c", (size, n))
        state[...] = 0
        r = self._recurrence(p, inputs, hidden, memory("coefficients", (kept, 6 * cell.gated, size, n)))
        if cell.multiplicative:
            r.factors = memory("factors", (steps, size, n))
            r.intermediate = memory("intermediate", (steps, size, n))
        if structural:
            r.weights = memory("weights", (steps, size, r.recurrent.shape[1]))
        self.backend.forward(r, self._input_table(p), state)
        logits = memory("logits", (targets.size, cell.vocabulary))
        self._logits(p, hidden[1 + steps - len(targets) :], logits)
        loss = self.backend.softmax_loss(logits, targets.reshape(-1))
        return Tape(r, p["W_o"], targets.reshape(-1), logits, loss, memory)

    def _recurrence(
        self, p: dict[str, Array], inputs: Array, hidden: Array, coefficients: Array
    ) -> Recurrence:
        xp = self.backend.xp
        r = Recurrence(
            gated=self.cell.gated,
            linear_update=self.cell.variant == "krause",
            inputs=inputs,
            hidden=hidden,
            coefficients=coefficients,
            recurrent=p["W_h"],
            recurrent_t=xp.ascontiguousarray(p["W_h"].T),
        )
        if self.cell.multiplicative:
            r.factor, r.factor_t = p["W_mh"], xp.ascontiguousarray(p["W_mh"].T)
            r.factor_table = p["W_mx"]
        if r.linear_update:
            r.bias_h = p["b"][3 * self.cell.hidden :]
        return r

    def _input_table(self, p: dict[str, Array]) -> Array:
        """W_x + b (V, K), whose rows the inputs gather; b_h of the `krause` variant acts elsewhere."""
        if self.cell.variant == "standard":
            return p["W_x"] + p["b"]
        table = p["W_x"].copy()
        table[:, : 3 * self.cell.hidden] += p["b"][: 3 * self.cell.hidden]
        return table

    def _logits(self, p: dict[str, Array], hidden: Array, out: Array) -> None:
        self.backend.xp.matmul(hidden.reshape(-1, self.cell.hidden), p["W_o"], out=out)
        if "b_o" in p:
            out += p["b_o"]

    # Linearised passes -------------------------------------------------------------------------

    def jvp(self, tape: Tape, v: Array) -> Outputs:
        """J v: what a parameter direction v (D,) does to the logits and the pre-activations.

        The result lies in the backend's workspace, until the next pass.
        """
        r, n, backend = tape.recurrence, self.cell.hidden, self.backend
        (steps, size), xp, q = r.inputs.shape, self.backend.xp, self.layout.views(v)
        rows, width = steps * size, r.recurrent.shape[1]
        before = r.hidden[:-1].reshape(rows, n)
        pre = backend.workspace("pre", (steps, size, width))
        factors = None
        if r.intermediate is not None:
            factors = backend.workspace("factors", (steps, size, n))
            xp.matmul(before, q["W_mh"], out=factors.reshape(rows, n))
            before = r.intermediate.reshape(rows, n)
        xp.matmul(before, q["W_h"], out=pre.reshape(rows, width))
        dh = backend.workspace("hidden", (steps + 1, size, n))
        dh[0] = 0
        if r.linear_update:  # R h gains g R b_h, g = 1 - h^2
            xp.multiply(r.hidden[1:], r.hidden[1:], out=dh[1:])
            xp.subtract(1, dh[1:], out=dh[1:])
            dh[1:] *= q["b"][3 * n :]
        backend.tangent(r, self._input_table(q), pre, q.get("W_mx"), factors, dh)
        scored = slice(rows - len(tape.targets), rows)
        logits = backend.workspace("logits", tape.probabilities.shape)
        xp.matmul(dh[1:].reshape(rows, n)[scored], tape.output, out=logits)
        direct = backend.workspace("logits.direct", logits.shape)
        self._logits(q, r.hidden[1:].reshape(rows, n)[scored], direct)
        logits += direct
        return Outputs(logits, pre)

    def vjp(self, tape: Tape, u: Outputs, out: Array, squares: Array | None = None) -> None:
        """J' u: add the parameter cotangent of the output cotangents u to out (D,).

        Parameters
        ----------
        u : Outputs
            `u.pre`, if given, must be what `jvp` returned, in place: its memory is used up.
        out : (D,)
            The cotangent is added to it.
        squares : (D,), optional
            Gains, for every sequence of the batch, the element-wise square of that sequence's cotangent.
        """
        r, n, backend = tape.recurrence, self.cell.hidden, self.backend
        (steps, size), xp = r.inputs.shape, self.backend.xp
        rows, width = steps * size, r.recurrent.shape[1]
        start = rows - len(tape.targets)
        dh = backend.workspace("hidden", (steps + 1, size, n))
        flat = dh[1:].reshape(rows, n)
        flat[:start] = 0
        xp.matmul(u.logits, tape.output.T, out=flat[start:])
        da = backend.workspace("pre", (steps, size, width)) if u.pre is None else u.pre
        dp = dq = None
        if r.factors is not None:
            dp = backend.workspace("rows", (steps, size, n))
            dq = backend.workspace("factors", (steps, size, n))
        backend.adjoint(r, dh, da, dp, dq, inject=u.pre is not None)
        scored = (len(tape.targets) // size, size, self.cell.vocabulary)
        arrays: tuple[Array, ...] = (
            r.inputs,
            r.hidden,
            r.intermediate,
            dh[1:],
            da,
            dp,
            dq,
            u.logits.reshape(scored),
        )
        single = backend.workspace("gradient", (self.layout.size,))
        if squares is None:
            self._collect(single, *arrays)
            out += single
            return
        for b in range(size):
            self._collect(single, *(a if a is None else a[:, b : b + 1] for a in arrays))
            backend.accumulate_square(single, out, squares)

    def _collect(
        self,
        out: Array,
        inputs: Array,
        hidden: Array,
        intermediate: Array | None,
        dh: Array,
        da: Array,
        dp: Array | None,
        dq: Array | None,
        du: Array,
    ) -> None:
        """Parameter cotangents from those of all intermediate values, one large product per matrix."""
        xp, n, g = self.backend.xp, self.cell.hidden, self.layout.views(out)

        def flat(array: Array) -> Array:
            # One sequence of a batch stays a strided view (L, .): BLAS takes it as it is.
            return array[:, 0] if array.shape[1] == 1 else array.reshape(-1, array.shape[2])

        symbols = xp.ascontiguousarray(inputs).reshape(-1)
        source = flat(hidden[:-1])
        if intermediate is not None:
            xp.matmul(source.T, flat(dq), out=g["W_mh"])
            self.backend.segment_sum(flat(dp), symbols, g["W_mx"])
            source = flat(intermediate)
        xp.matmul(source.T, flat(da), out=g["W_h"])
        self.backend.segment_sum(flat(da), symbols, g["W_x"])
        xp.sum(g["W_x"], axis=0, out=g["b"])
        if self.cell.variant == "krause":
            h = hidden[1:]
            g["b"][3 * n :] = xp.sum((1 - h * h) * dh, axis=(0, 1))
        xp.matmul(flat(hidden[-len(du) :]).T, flat(du), out=g["W_o"])
        if "b_o" in g:
            xp.sum(du, axis=(0, 1), out=g["b_o"])

    # Gradient and curvature --------------------------------------------------------------------

    def gradient(self, tape: Tape, scale: float, out: Array, squares: Array | None = None) -> None:
        """Add scale * the gradient of the summed loss to out (D,), and per-sequence squares to squares."""
        u = self.backend.workspace("logits", tape.probabilities.shape)
        self.backend.softmax_gradient(tape.probabilities, tape.targets, scale, u)
        self.vjp(tape, Outputs(u), out, squares)

    def gauss_newton(self, tape: Tape, v: Array, scale: float, structural: float, out: Array) -> None:
        """Add scale * (J' H_L J + structural J_a' W J_a) v to out (D,), J_a the pre-activations' part."""
        u = self.jvp(tape, v)
        self.backend.softmax_hessian(tape.probabilities, u.logits, scale)
        if structural and tape.recurrence.weights is not None and u.pre is not None:
            u.pre[...] *= tape.recurrence.weights
            u.pre[...] *= self.backend.dtype.type(scale * structural)
        else:
            u = Outputs(u.logits)
        self.vjp(tape, u, out)

    # Sampling ----------------------------------------------------------------------------------

    def advance(self, theta: Array, state: State | None, inputs: Array) -> tuple[State, Array]:
        """Read symbols (L, B) from a state (None: zero); give the state after and the last logits (B, V)."""
        (steps, size), n, xp = inputs.shape, self.cell.hidden, self.backend.xp
        p = self.layout.views(theta)
        hidden = xp.zeros((steps + 1, size, n), self.backend.dtype)
        c = xp.zeros((size, n), self.backend.dtype)
        if state is not None:
            hidden[0], c[...] = state.h, state.c
        r = self._recurrence(
            p, inputs, hidden, xp.empty((1, 6 * self.cell.gated, size, n), self.backend.dtype)
        )
        if self.cell.multiplicative:
            r.factors, r.intermediate = xp.empty_like(hidden[1:]), xp.empty_like(hidden[1:])
        self.backend.forward(r, self._input_table(p), c)
        logits = xp.empty((size, self.cell.vocabulary), self.backend.dtype)
        self._logits(p, hidden[-1], logits)
        return State(hidden[-1], c), logits
