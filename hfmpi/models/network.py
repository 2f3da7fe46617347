"""A recurrent character model: linearise once (forward), then J v (jvp) and J' u (vjp) without exponentials.

The output of the network, seen by the Gauss-Newton matrix, is the pair (logits, pre-activations): the
loss is a function of the logits, and structural damping is a second loss, of the pre-activations, that
has only a second derivative. So the product reads

    v -> J v -> H (J v) -> J' (H (J v)),    H = diag(loss Hessian, structural weights).

All matrices multiply from the right; rows are sequences, time-major. Products that involve no recurrence
are taken over many steps at once; only h W_h (and h W_mh) and their transposes are sequential. The steps are
worked off in blocks, so that what one pass over a block leaves is still in the cache for the next.
Derivation: docs/theory.md.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from typing import Any, NamedTuple, Protocol

import numpy as np

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

    network: Network
    recurrence: Recurrence
    output: Array
    targets: Array
    probabilities: Array
    loss: float
    memory: Workspace

    @property
    def nbytes(self) -> int:
        """What it keeps in the device's memory."""
        steps, sequences = self.recurrence.inputs.shape
        return self.network.tape_bytes(steps, sequences, self.recurrence.weights is not None)

    def gradient(self, scale: float, out: Array) -> None:
        """Add scale times the gradient of the summed loss to out (D,)."""
        self.network.gradient(self, scale, out)

    def squared_gradients(self, scale: float, out: Array, squares: Array) -> None:
        """Add what `gradient` adds to out (D,), and the sum of its squares over sequences to squares (D,)."""
        self.network.gradient(self, scale, out, squares)

    def jvp(self, v: Array) -> Outputs:
        """J v: what a direction v (D,) does to the logits."""
        return self.network.jvp(self, v)

    def vjp(self, u: Outputs, out: Array) -> None:
        """Add J' u to out (D,)."""
        self.network.vjp(self, u, out)

    def gauss_newton(self, v: Array, scale: float, out: Array) -> None:
        """Add scale * J' H_L J v to out (D,)."""
        self.network.gauss_newton(self, v, scale, 0.0, out)

    def structural_gauss_newton(self, v: Array, scale: float, structural: float, out: Array) -> None:
        """Add scale * (J' H_L J + structural * J_a' W J_a) v to out (D,)."""
        self.network.gauss_newton(self, v, scale, structural, out)


class Network:
    """One of the four cells with a softmax output, on one device.

    Parameters
    ----------
    cell : Cell
    backend : Backend
    block_rows : int, optional
        About how many rows (steps times sequences) the time-batched products take at once; changes the
        results within rounding. Without it, what suits the backend.
    """

    def __init__(self, cell: Cell, backend: Backend, block_rows: int | None = None) -> None:
        self.cell = cell
        self.backend = backend
        self.block_rows = block_rows or backend.block_rows
        self.layout = cell.layout
        self._scratch = backend.new_workspace()

    @property
    def size(self) -> int:
        """D, the number of parameters."""
        return self.layout.size

    def initial(self, seed: int) -> np.ndarray:
        """Parameters to start from, (D,) float64."""
        return self.cell.initial(seed)

    def linearise(self, theta: Array, batch: Batch, reuse: Tape | None = None) -> Tape:
        """Linearise at theta on a batch."""
        return self.forward(theta, batch, False, reuse)

    def linearise_structural(self, theta: Array, batch: Batch, reuse: Tape | None = None) -> Tape:
        """Linearise with the structural-damping weights of the pre-activations."""
        return self.forward(theta, batch, True, reuse)

    def release(self) -> None:
        """Forget all scratch memory of this network and of its backend."""
        self._scratch.flat.clear()
        self.backend.release()

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
        memory = reuse.memory if reuse else self.backend.new_workspace()
        return self._run(theta, batch, True, structural, memory)

    def tape_bytes(self, steps: int, size: int, structural: bool = False) -> int:
        """Give the memory that the tape of a batch (steps, size) takes, without running it.

        Per step and sequence 7n + V numbers for a gated cell and n + V for a plain one, 2n more for a
        multiplicative one and K more with structural damping.
        """
        n, v = self.cell.hidden, self.cell.vocabulary
        numbers = n + v + 6 * n * self.cell.gated + 2 * n * self.cell.multiplicative
        numbers += structural * self.layout.shapes["W_h"][1]
        return (steps * numbers + n) * size * self.backend.dtype.itemsize

    def loss(self, theta: Array, batch: Batch) -> float:
        """Give the summed loss in nats, without a linearisation."""
        return self._run(theta, batch, False, False, self._scratch).loss

    def _run(self, theta: Array, batch: Batch, linearise: bool, structural: bool, memory: Workspace) -> Tape:
        inputs, targets = self.backend.to_device(batch.inputs), self.backend.to_device(batch.targets)
        (steps, size), n, cell = inputs.shape, self.cell.hidden, self.cell
        p = self.layout.views(theta)

        hidden = memory("hidden", (steps + 1, size, n))
        hidden[0] = 0
        state = self.backend.workspace("forward.c", (size, n))
        state[...] = 0
        r = self._recurrence(p, inputs, hidden, linearise, memory)
        kept = steps if linearise else 1
        if cell.gated and linearise:
            r.coefficients = memory("coefficients", (steps, 6, size, n))
        if cell.multiplicative:
            r.factors = memory("factors", (kept, size, n))
            r.intermediate = memory("intermediate", (kept, size, n))
        if structural:
            r.weights = memory("weights", (steps, size, r.recurrent.matrix.shape[1]))
        self.backend.forward(r, self._input_table(p), state)
        logits = memory("logits", (targets.size, cell.vocabulary))
        self._logits(p, hidden[1 + steps - len(targets) :], logits)
        loss = self.backend.softmax_loss(logits, targets.reshape(-1))
        return Tape(self, r, p["W_o"], targets.reshape(-1), logits, loss, memory)

    def _recurrence(
        self, p: dict[str, Array], inputs: Array, hidden: Array, linearise: bool, memory: Workspace
    ) -> Recurrence:
        pack = self.backend.pack
        r = Recurrence(
            gated=self.cell.gated,
            linear_update=self.cell.variant == "krause",
            inputs=inputs,
            hidden=hidden,
            recurrent=pack(p["W_h"], memory, "W_h"),
        )
        if linearise:
            r.recurrent_t = pack(p["W_h"].T, memory, "W_h.T")
        if self.cell.multiplicative:
            r.factor, r.factor_table = pack(p["W_mh"], memory, "W_mh"), p["W_mx"]
            if linearise:
                r.factor_t = pack(p["W_mh"].T, memory, "W_mh.T")
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
        self.backend.matmul(hidden.reshape(-1, self.cell.hidden), p["W_o"], out)
        if "b_o" in p:
            out += p["b_o"]

    # Linearised passes -------------------------------------------------------------------------

    def _blocks(self, tape: Tape, whole: bool) -> Iterator[tuple[slice, slice, slice]]:
        """Cut the steps into blocks of nearly one length, in order.

        Yields
        ------
        steps, scored : slice
            Of the recurrence, and those among them that are scored (perhaps none).
        rows : slice
            Of the logits (T * B, V) that belong to `scored`.
        """
        length, size = tape.recurrence.inputs.shape
        warmup = length - len(tape.targets) // size
        count = 1 if whole else min(length, -(-length * size // self.block_rows))
        for i in range(count):
            start, stop = length * i // count, length * (i + 1) // count
            first = min(max(start, warmup), stop)
            rows = slice(max(first - warmup, 0) * size, max(stop - warmup, 0) * size)
            yield slice(start, stop), slice(first, stop), rows

    def jvp(self, tape: Tape, v: Array, pre: bool = False) -> Outputs:
        """J v: what a parameter direction v (D,) does to the logits and, with `pre`, to the pre-activations.

        The result lies in the backend's workspace, until the next pass.
        """
        n, backend = self.cell.hidden, self.backend
        size, q = tape.recurrence.inputs.shape[1], self.layout.views(v)
        table = self._input_table(q)
        logits = backend.workspace("logits", tape.probabilities.shape)
        dc = backend.workspace("tangent.c", (size, n))
        dc[...] = 0
        last = backend.workspace("tangent.h", (size, n))
        last[...] = 0
        for steps, scored, rows in self._blocks(tape, pre):
            r = tape.recurrence.part(steps)
            a, dh = self._block_tangent(r, q, table, last, dc)
            last[...] = dh[-1]
            at = slice(1 + scored.start - steps.start, 1 + scored.stop - steps.start)
            direct = backend.workspace("logits.direct", logits[rows].shape)
            self._logits(q, r.hidden[at], direct)
            backend.matmul(dh[at].reshape(-1, n), tape.output, logits[rows])
            logits[rows] += direct
        return Outputs(logits, a if pre else None)

    def _block_tangent(
        self, r: Recurrence, q: dict[str, Array], table: Array, last: Array, dc: Array
    ) -> tuple[Array, Array]:
        """R a (L, B, K) and R h (L + 1, B, n) of one block, from the state before it."""
        n, backend, xp = self.cell.hidden, self.backend, self.backend.xp
        (steps, size), width = r.inputs.shape, r.recurrent.matrix.shape[1]
        before = r.hidden[:-1].reshape(-1, n)
        factors = None
        if r.intermediate is not None:
            factors = backend.workspace("factors", (steps, size, n))
            backend.matmul(before, q["W_mh"], factors.reshape(-1, n))
            before = r.intermediate.reshape(-1, n)
        a = backend.workspace("pre", (steps, size, width))
        backend.matmul(before, q["W_h"], a.reshape(-1, width))
        dh = backend.workspace("hidden", (steps + 1, size, n))
        dh[0] = last
        if r.linear_update:  # R h gains g R b_h, g = 1 - h^2
            xp.multiply(r.hidden[1:], r.hidden[1:], out=dh[1:])
            xp.subtract(1, dh[1:], out=dh[1:])
            dh[1:] *= q["b"][3 * n :]
        backend.tangent(r, table, a, q.get("W_mx"), factors, dh, dc)
        return a, dh

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
        n, backend = self.cell.hidden, self.backend
        size, width = tape.recurrence.inputs.shape[1], tape.recurrence.recurrent.matrix.shape[1]
        single = backend.workspace("gradient", (self.layout.size,))
        back, dc = backend.workspace("adjoint.h", (size, n)), backend.workspace("adjoint.c", (size, n))
        back[...] = 0
        dc[...] = 0
        whole = squares is not None or u.pre is not None
        for steps, scored, rows in reversed(list(self._blocks(tape, whole))):
            r = tape.recurrence.part(steps)
            length = len(r.inputs)
            dh = backend.workspace("hidden", (length + 1, size, n))
            first = 1 + scored.start - steps.start
            dh[1:first] = 0
            backend.matmul(u.logits[rows], tape.output.T, dh[first:].reshape(-1, n))
            da = backend.workspace("pre", (length, size, width)) if u.pre is None else u.pre
            dp = dq = None
            if r.factors is not None:
                dp = backend.workspace("rows", (length, size, n))
                dq = backend.workspace("factors", (length, size, n))
            backend.adjoint(r, dh, da, dp, dq, back, dc, inject=u.pre is not None)
            du = u.logits[rows].reshape(-1, size, self.cell.vocabulary)
            arrays = (r.inputs, r.hidden, r.intermediate, dh[1:], da, dp, dq, du)
            if squares is None:
                self._collect(single, *arrays)
                out += single
                continue
            if backend.each_numbers:
                self._collect_squares(out, squares, *arrays)
                continue
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
            self.backend.matmul(source.T, flat(dq), g["W_mh"])
            self.backend.segment_sum(flat(dp), symbols, g["W_mx"])
            source = flat(intermediate)
        self.backend.matmul(source.T, flat(da), g["W_h"])
        self.backend.segment_sum(flat(da), symbols, g["W_x"])
        xp.sum(g["W_x"], axis=0, out=g["b"])
        if self.cell.variant == "krause":
            h = hidden[1:]
            g["b"][3 * n :] = xp.sum((1 - h * h) * dh, axis=(0, 1))
        self.backend.matmul(flat(hidden[len(hidden) - len(du) :]).T, flat(du), g["W_o"])
        if "b_o" in g:
            xp.sum(du, axis=(0, 1), out=g["b_o"])

    def _collect_squares(self, out: Array, squares: Array, *arrays: Any) -> None:
        """Gain the cotangents of all sequences, and the squares of each, many sequences at a time."""
        inputs, backend, xp = arrays[0], self.backend, self.backend.xp
        many = max(1, backend.each_numbers // self.layout.size)
        for start in range(0, inputs.shape[1], many):
            part = slice(start, start + many)
            cut: list[Any] = [None if a is None else xp.ascontiguousarray(a[:, part]) for a in arrays]
            x, hidden, m, dh, da, dp, dq, du = cut
            each = backend.workspace("each", (x.shape[1], self.layout.size))
            g, at = {}, self.layout.offsets
            for name, shape in self.layout.shapes.items():
                flat = each[:, at[name] : at[name] + prod(shape)]
                g[name] = flat.reshape(-1, *shape)
            source = hidden[:-1]
            if m is not None:
                g["W_mh"][...] = xp.matmul(source.transpose(1, 2, 0), dq.transpose(1, 0, 2))
                backend.segment_sum_each(dp, x, g["W_mx"])
                source = m
            g["W_h"][...] = xp.matmul(source.transpose(1, 2, 0), da.transpose(1, 0, 2))
            backend.segment_sum_each(da, x, g["W_x"])
            g["b"][...] = xp.sum(g["W_x"], axis=1)
            if self.cell.variant == "krause":
                h = hidden[1:]
                g["b"][:, 3 * self.cell.hidden :] = xp.sum((1 - h * h) * dh, axis=0)
            scored = hidden[len(hidden) - len(du) :]
            g["W_o"][...] = xp.matmul(scored.transpose(1, 2, 0), du.transpose(1, 0, 2))
            if "b_o" in g:
                g["b_o"][...] = xp.sum(du, axis=0)
            backend.accumulate_squares(each, out, squares)

    # Gradient and curvature --------------------------------------------------------------------

    def gradient(self, tape: Tape, scale: float, out: Array, squares: Array | None = None) -> None:
        """Add scale * the gradient of the summed loss to out (D,), and per-sequence squares to squares."""
        u = self.backend.workspace("logits", tape.probabilities.shape)
        self.backend.softmax_gradient(tape.probabilities, tape.targets, scale, u)
        self.vjp(tape, Outputs(u), out, squares)

    def gauss_newton(self, tape: Tape, v: Array, scale: float, structural: float, out: Array) -> None:
        """Add scale * (J' H_L J + structural J_a' W J_a) v to out (D,), J_a the pre-activations' part."""
        u = self.jvp(tape, v, pre=structural != 0)
        self.backend.softmax_hessian(tape.probabilities, u.logits, scale)
        if u.pre is not None:
            u.pre[...] *= tape.recurrence.weights
            u.pre[...] *= self.backend.dtype.type(scale * structural)
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
        r = self._recurrence(p, inputs, hidden, False, self._scratch)
        if self.cell.multiplicative:
            r.factors, r.intermediate = xp.empty_like(hidden[:1]), xp.empty_like(hidden[:1])
        self.backend.forward(r, self._input_table(p), c)
        logits = xp.empty((size, self.cell.vocabulary), self.backend.dtype)
        self._logits(p, hidden[-1], logits)
        return State(hidden[-1], c), logits
