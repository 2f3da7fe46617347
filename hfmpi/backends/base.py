"""What a device must offer: arrays, a few fused step kernels, and the loops over time built on them.

The loops below are the only sequential part of a recurrent network. They are written once, on the
step kernels that each backend supplies; a backend may replace a whole loop (a captured CUDA graph, a
persistent kernel) without any change above this room.

Shapes: L steps, B sequences, n hidden units, V symbols; K is the number of pre-activations per unit
group, 4n (gated, order i, f, o, u) or n (plain). All arrays are C-contiguous and time-major.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import numpy as np

__all__ = ["Array", "Backend", "Packed", "Recurrence", "Workspace"]

Array = Any
"""A NumPy array, or an array of the same interface on a device (CuPy)."""


@dataclass(frozen=True)
class Packed:
    """A matrix that is multiplied from the left many times, made ready for it by `Backend.pack`.

    Attributes
    ----------
    matrix : (K, N)
    panels : array or None
        The same numbers in the order in which a backend's own product reads them, if it has one.
    """

    matrix: Array
    panels: Array | None = None


@dataclass
class Recurrence:
    """The linearised recurrence of one batch: everything the tangent and adjoint loops read.

    Attributes
    ----------
    gated : bool
        LSTM-like cell (K = 4n) or plain tanh cell (K = n).
    linear_update : bool
        The `krause` gated variant: u = a_u and h = tanh(o c + b_h).
    inputs : (L, B) int32
        Symbol indices.
    hidden : (L + 1, B, n)
        h_0 (the initial state), h_1, ..., h_L.
    coefficients : (L, 6, B, n) or None
        f, k_i, k_f, k_o, k_u, k_c of every step (docs/theory.md); None for plain cells, and where the pass
        is not to be linearised.
    recurrent, recurrent_t : (n, K), (K, n)
        The matrix applied to the previous hidden (or intermediate) state, and its transpose. Transposes
        are None where the pass is not to be linearised.
    bias_h : (n,) or None
        b_h of the `krause` variant.
    factor, factor_t : (n, n) or None
        W_mh of the multiplicative cells, and its transpose.
    factor_table : (V, n) or None
        W_mx, the rows that scale the factors.
    factors : (L, B, n) or None
        q_t = h_{t-1} W_mh. (1, B, n) where the pass is not to be linearised; so `intermediate`.
    intermediate : (L, B, n) or None
        m_t = W_mx[x_t] * q_t.
    weights : (L, B, K) or None
        Structural-damping weights of the pre-activations, if they were asked for.
    """

    gated: bool
    linear_update: bool
    inputs: Array
    hidden: Array
    recurrent: Packed
    recurrent_t: Packed | None = None
    coefficients: Array = None
    bias_h: Array | None = None
    factor: Packed | None = None
    factor_t: Packed | None = None
    factor_table: Array | None = None
    factors: Array | None = None
    intermediate: Array | None = None
    weights: Array | None = None

    def part(self, steps: slice) -> Recurrence:
        """Give the recurrence of some of the steps: views of the same arrays."""
        start, stop, _ = steps.indices(len(self.inputs))

        def cut(array: Array | None) -> Array | None:
            return None if array is None else array[start:stop]

        return replace(
            self,
            inputs=self.inputs[start:stop],
            hidden=self.hidden[start : stop + 1],
            coefficients=cut(self.coefficients),
            factors=cut(self.factors),
            intermediate=cut(self.intermediate),
            weights=cut(self.weights),
        )


class Workspace:
    """Named scratch arrays: the same memory for the same name, growing and never shrinking.

    Fresh pages cost as much as the arithmetic on them, so temporaries and tapes live in workspaces.
    """

    def __init__(self, xp: Any, dtype: np.dtype) -> None:
        self.xp = xp
        self.dtype = dtype
        self.flat: dict[str, Array] = {}

    def __call__(self, name: str, shape: tuple[int, ...]) -> Array:
        """Give an uninitialised array whose content lasts until the next request of its name."""
        size = prod(shape)
        flat = self.flat.get(name)
        if flat is None or flat.size < size:
            flat = self.flat[name] = self.xp.empty(size, self.dtype)
        return flat[:size].reshape(shape)


class Backend:
    """Arrays and kernels of one kind of device. Subclasses supply the step kernels.

    Parameters
    ----------
    dtype : str
        'float32' or 'float64', the type of parameters, tapes and vectors.

    Attributes
    ----------
    micro_batch : int
        Sequences that a rank had best work on at a time.
    block_rows : int
        Steps times sequences that the time-batched products had best take at once: on a CPU a few MB of
        pre-activations, which stay in the cache, yet enough rows for a fast product.
    each_numbers : int
        Numbers of the gradients of single sequences that had best be computed at once; 0: one sequence after
        the other, which suits a CPU.
    device : str
        What it computes on, in words.
    device_id : str or None
        The same for all ranks of a node that share a GPU; None on a CPU.
    """

    name = "base"
    xp: Any = np
    micro_batch = 32
    block_rows = 1024
    each_numbers = 0

    def __init__(self, dtype: str = "float32") -> None:
        if dtype not in ("float32", "float64"):
            raise ValueError(f"dtype must be float32 or float64, not {dtype}")
        self.dtype = np.dtype(dtype)
        self.workspace = self.new_workspace()

    # Arrays ------------------------------------------------------------------------------------

    @property
    def device(self) -> str:
        """What it computes on, in words."""
        return "CPU"

    @property
    def device_id(self) -> str | None:
        """Tell one GPU of the node from another; None on a CPU."""
        return None

    def to_host(self, array: Array) -> np.ndarray:
        """Give the array as a NumPy array."""
        return array

    def to_device(self, array: np.ndarray) -> Array:
        """Give the NumPy array as an array of this device."""
        return array

    def stage(self, vector: Array) -> np.ndarray:
        """Give the content of a vector on the host: the array itself on a CPU, else a reused buffer."""
        return vector

    def unstage(self, message: np.ndarray, vector: Array) -> None:
        """Put what `stage` gave, and what has become of it, back into the vector."""

    def address(self, array: Array) -> int:
        """Say where in the device's memory the array begins."""
        return int(array.ctypes.data)

    def synchronize(self) -> None:
        """Wait until everything asked of the device is done."""

    def has_nccl(self) -> bool:
        """Say whether GPUs can sum vectors among themselves."""
        return False

    def nccl_name(self) -> Any:
        """Give a new name under which ranks can meet."""
        raise NotImplementedError

    def nccl_sum(self, size: int, rank: int, name: Any) -> Callable[[Array], None]:
        """Meet the other ranks; give the function that sums a vector over all of them, in place."""
        raise NotImplementedError

    def free_memory(self) -> int | None:
        """Give the bytes that are free on the device; None where it uses the memory of the node."""
        return None

    def release(self) -> None:
        """Give unused memory back; all workspaces lose what they hold."""
        self.workspace.flat.clear()

    def replay(self, key: Hashable, launch: Callable[[], None]) -> None:
        """Do what `launch` asks of the device, which is always the same for one key."""
        launch()

    def new_workspace(self) -> Workspace:
        """Make an empty workspace on this device."""
        return Workspace(self.xp, self.dtype)

    def matmul(self, a: Array, b: Array, out: Array) -> None:
        """Out = a b: every matrix product of a pass goes through here, so that they can be counted."""
        self.xp.matmul(a, b, out=out)

    def pack(self, matrix: Array, memory: Workspace, name: str) -> Packed:
        """Make a matrix (K, N) ready for many calls of `multiply`, in memory of this name."""
        ready = memory(name, matrix.shape)
        ready[...] = matrix
        return Packed(ready)

    def multiply(self, a: Array, b: Packed, out: Array, add: bool = False) -> None:
        """Out = a b, or out += a b, for the few rows of a (B, K): the sequential products of a pass."""
        if add:
            product = self.workspace("multiply", out.shape)
            self.matmul(a, b.matrix, product)
            out += product
        else:
            self.matmul(a, b.matrix, out)

    # Loops over time ---------------------------------------------------------------------------

    def forward(self, r: Recurrence, table: Array, cell_state: Array) -> None:
        """Run the recurrence, filling `r.hidden[1:]`, its coefficients and intermediates.

        Parameters
        ----------
        r : Recurrence
            With `hidden[0]` set to the initial state.
        table : (V, K)
            Rows W_x + b, gathered by the inputs.
        cell_state : (B, n)
            c_0 of gated cells; holds c_L afterwards.
        """
        steps, batch = r.inputs.shape
        a = self.workspace("forward.a", (batch, r.recurrent.matrix.shape[1]))
        for t in range(steps):
            source = r.hidden[t]
            if r.factor is not None and r.factors is not None and r.intermediate is not None:
                factor, source = r.factors[t % len(r.factors)], r.intermediate[t % len(r.intermediate)]
                self.multiply(r.hidden[t], r.factor, factor)
                self.factor_forward(r.factor_table, r.inputs[t], factor, source)
            self.multiply(source, r.recurrent, a)
            weights = None if r.weights is None else r.weights[t]
            if r.gated:
                coefficients = None if r.coefficients is None else r.coefficients[t]
                self.gated_forward(
                    a, table, r.inputs[t], r.bias_h, cell_state, r.hidden[t + 1], coefficients, weights
                )
            else:
                self.plain_forward(a, table, r.inputs[t], r.hidden[t + 1], weights)

    def tangent(
        self,
        r: Recurrence,
        table: Array,
        pre: Array,
        factor_table: Array,
        factors: Array,
        dh: Array,
        dc: Array,
    ) -> None:
        """Push a parameter direction through the recurrence (R-forward).

        Called for one part of the steps after the other, from the first.

        Parameters
        ----------
        table : (V, K)
            The direction's rows V_x + v_b.
        pre : (L, B, K)
            In: the time-batched part, h_{t-1} V_h (or m_t V_h). Out: R a_t.
        factor_table : (V, n) or None
            The direction of W_mx.
        factors : (L, B, n) or None
            In: the time-batched part h_{t-1} V_mh. Out: R q_t.
        dh : (L + 1, B, n)
            In: dh[0], that of the step before and, for the `krause` variant, the bias term g_t v_bh.
            Out: R h_t.
        dc : (B, n)
            R c of the step before; holds that of the last step afterwards. Unused by plain cells.
        """
        dm = self.workspace("tangent.m", dc.shape)
        for t in range(len(r.inputs)):
            source = dh[t]
            if r.factor is not None and r.factors is not None:
                self.multiply(source, r.factor, factors[t], add=True)
                self.factor_tangent(r.factor_table, factor_table, r.inputs[t], r.factors[t], factors[t], dm)
                source = dm
            self.multiply(source, r.recurrent, pre[t], add=True)
            if r.gated:
                self.gated_tangent(
                    pre[t], table, r.inputs[t], r.coefficients[t], dc, dh[t + 1], r.linear_update
                )
            else:
                self.plain_tangent(pre[t], table, r.inputs[t], r.hidden[t + 1], dh[t + 1])

    def adjoint(
        self, r: Recurrence, dh: Array, da: Array, dp: Array, dq: Array, back: Array, dc: Array, inject: bool
    ) -> None:
        """Pull cotangents back through the recurrence: the transpose of `tangent`.

        Called for one part of the steps after the other, from the last.

        Parameters
        ----------
        dh : (L + 1, B, n)
            In: cotangents of h_1 ... h_L in dh[1:]. Out: the total cotangents.
        da : (L, B, K)
            Out: cotangents of the pre-activations. Where `inject` is set, it holds on entry
            cotangents that act on the pre-activations themselves (structural damping).
        dp, dq : (L, B, n) or None
            Out, multiplicative cells: cotangents of the gathered rows W_mx[x_t] and of q_t.
        back, dc : (B, n)
            What the steps after pull back to h_L and c_L; hold what these pull back to h_0 and c_0
            afterwards.
        """
        if r.recurrent_t is None:
            raise ValueError("the pass was not linearised")
        dm = self.workspace("adjoint.m", back.shape)
        for t in range(len(r.inputs) - 1, -1, -1):
            if r.gated:
                self.gated_adjoint(dh[t + 1], back, r.coefficients[t], dc, da[t], inject)
            else:
                self.plain_adjoint(dh[t + 1], back, r.hidden[t + 1], da[t], inject)
            if r.factor_t is not None and r.factors is not None:
                self.multiply(da[t], r.recurrent_t, dm)
                self.factor_adjoint(r.factor_table, r.inputs[t], r.factors[t], dm, dp[t], dq[t])
                self.multiply(dq[t], r.factor_t, back)
            else:
                self.multiply(da[t], r.recurrent_t, back)

    # Step kernels, supplied by each backend; `numpy.py` is the reference ------------------------

    def gated_forward(
        self, a: Array, table: Array, x: Array, bias_h: Array, c: Array, h: Array, k: Array, w: Array
    ) -> None:
        """One step of a gated cell: from a = m W_h, fill h, update c, fill k (6, B, n) and w (B, 4n).

        Where k or w is None it is not wanted.
        """
        raise NotImplementedError

    def gated_tangent(
        self, pre: Array, table: Array, x: Array, k: Array, dc: Array, dh: Array, add: bool
    ) -> None:
        """R a (into pre, from which the table's rows miss), R c (in place) and R h.

        With `add`, R h is added to what dh holds.
        """
        raise NotImplementedError

    def gated_adjoint(self, dh: Array, back: Array, k: Array, dc: Array, da: Array, inject: bool) -> None:
        """Apply the transpose of gated_tangent; dh gains `back`, da is written (or added to)."""
        raise NotImplementedError

    def plain_forward(self, a: Array, table: Array, x: Array, h: Array, w: Array) -> None:
        """One step of a tanh cell."""
        raise NotImplementedError

    def plain_tangent(self, pre: Array, table: Array, x: Array, h: Array, dh: Array) -> None:
        """R a (into pre) and R h = (1 - h^2) R a."""
        raise NotImplementedError

    def plain_adjoint(self, dh: Array, back: Array, h: Array, da: Array, inject: bool) -> None:
        """Apply the transpose of plain_tangent."""
        raise NotImplementedError

    def factor_forward(self, p_table: Array, x: Array, q: Array, m: Array) -> None:
        """M = W_mx[x] * q."""
        raise NotImplementedError

    def factor_tangent(
        self, p_table: Array, dp_table: Array, x: Array, q: Array, dq: Array, dm: Array
    ) -> None:
        """R m = R p * q + p * R q."""
        raise NotImplementedError

    def factor_adjoint(self, p_table: Array, x: Array, q: Array, dm: Array, dp: Array, dq: Array) -> None:
        """Apply the transpose of factor_tangent: dp = dm * q and dq = dm * p."""
        raise NotImplementedError

    # Whole-array kernels -----------------------------------------------------------------------

    def softmax_loss(self, logits: Array, targets: Array) -> float:
        """Overwrite logits (N, V) with probabilities; give the summed loss in nats (float64)."""
        raise NotImplementedError

    def softmax_gradient(self, p: Array, targets: Array, scale: float, out: Array) -> None:
        """Out = scale * (p - onehot(targets)), all (N, V)."""
        raise NotImplementedError

    def softmax_hessian(self, p: Array, u: Array, scale: float) -> None:
        """Overwrite u with scale * p * (u - <p, u>): the loss Hessian applied to each row (N, V)."""
        raise NotImplementedError

    def segment_sum(self, rows: Array, x: Array, out: Array) -> None:
        """out[s] = the sum of the rows (N, K) whose symbol x (N,) is s; out is (V, K)."""
        raise NotImplementedError

    def segment_sum_each(self, rows: Array, x: Array, out: Array) -> None:
        """out[b, s] = the sum of the rows (L, B, K) of sequence b whose symbol x (L, B) is s.

        out is (B, V, K), contiguous but for its first axis.
        """
        raise NotImplementedError

    def accumulate_squares(self, each: Array, total: Array, squares: Array) -> None:
        """Total (D,) gains the sum of the rows of each (B, D), squares that of their element-wise squares."""
        raise NotImplementedError

    def accumulate_square(self, g: Array, total: Array, squares: Array) -> None:
        """Total += g and squares += g * g, vectors of one length."""
        raise NotImplementedError
