"""The linearised recurrence of one layer and its three loops over time, the sequential part of a network.

The same loops serve every cell and every device. Shapes: L steps, B sequences, n hidden units, K
pre-activations; the inputs contribute to K_x of them, and the previous state to K_h. The contributions of the
inputs are rows of a table, which are selected by `x`. For symbols the table is W_x + b, with one row per
symbol; for real inputs and in upper layers it is inputs W_x + b, with one row per step and sequence. All
arrays are time-major.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import ClassVar, NamedTuple

from hfmpi.backends.base import Array, Packed
from hfmpi.backends.numpy import NumpyBackend

__all__ = ["Adjoint", "Cell", "Recurrence", "Step", "Tangent", "adjoint", "forward", "tangent"]

Step = Callable[[int], None]
"""A function that runs step t of a loop, before or after its sequential product."""


class Tangent(NamedTuple):
    """The arrays of the tangent steps; a list has one array per step. See `tangent`."""

    table: Array
    pre: list[Array]
    dh: list[Array]
    dc: Array


class Adjoint(NamedTuple):
    """The arrays of the adjoint steps; a list has one array per step. See `adjoint`."""

    dh: list[Array]
    back: Array
    dc: Array
    da: list[Array]
    inject: bool


@dataclass(frozen=True)
class Cell:
    """A recurrent cell of any size: its parameters, and the steps of its loops.

    The K = groups * n pre-activations of a step are columns, in groups of n. The inputs contribute to the
    first `of_inputs` groups, and the previous state to the last `of_state` groups; in most cells both
    contribute to all groups. A step is plain array code on `backend.xp`, which runs on every device, or a
    kernel of the backend.

    Attributes
    ----------
    multiplicative : bool
        Whether the intermediate state m = W_mx x * W_mh h' replaces the previous state (Krause 2015, eq. 3).
    kernels : str
        The name by which the backend knows the loops.
    groups, of_inputs, of_state : int
        Numbers of groups of pre-activations.
    on_rows : int
        The number of groups of the bias that are added to the rows of inputs. The remaining groups, b_h, act
        inside the unit.
    coefficients : int
        The number of coefficients per unit that a linearisation stores for every step.
    carries : bool
        Whether the adjoint step writes a cotangent of the previous state, to which the loop adds its product.
    adds : bool
        Whether the tangent step adds R h to the contribution of b_h.
    forget : int or None
        The group whose bias makes the cell preserve its state.
    recurrent_scale : float or None
        The initial standard deviation of the recurrent matrices; None: 1 / sqrt(n).
    """

    multiplicative: bool = False
    kernels: ClassVar[str]
    groups: ClassVar[int]
    of_inputs: ClassVar[int]
    of_state: ClassVar[int]
    coefficients: ClassVar[int] = 0
    carries: ClassVar[bool] = False
    forget: ClassVar[int | None] = None
    recurrent_scale: ClassVar[float | None] = None

    @property
    def on_rows(self) -> int:
        """The number of groups of the bias that are added to the rows of inputs."""
        return self.of_inputs

    @property
    def adds(self) -> bool:
        """Whether b_h contributes to R h before the tangent step."""
        return False

    def shapes(self, n: int, inputs: int) -> dict[str, tuple[int, ...]]:
        """Return the names and shapes of the parameters of a layer of n units."""
        factors = {"W_mx": (inputs, n), "W_mh": (n, n)} if self.multiplicative else {}
        return {
            **factors,
            "W_x": (inputs, self.of_inputs * n),
            "W_h": (n, self.of_state * n),
            "b": (self.groups * n,),
        }

    def tanh_columns(self, name: str, n: int) -> slice:
        """Return the columns of the matrix `name`, W_x or W_h, that lead to tanh units."""
        raise NotImplementedError

    def forward(self, backend: NumpyBackend, r: Recurrence, table: Array, a: Array, c: Array) -> Step:
        """Return a function that runs step t of the forward loop.

        From a = h' W_h (B, K_h) the step fills h_t, its coefficients and its weights.
        """
        raise NotImplementedError

    def tangent(self, backend: NumpyBackend, r: Recurrence, arrays: Tangent) -> Step:
        """Return a function that runs step t of the tangent loop.

        The step completes R a_t in pre[t], and then R h_t in dh[t + 1].
        """
        raise NotImplementedError

    def adjoint(self, backend: NumpyBackend, r: Recurrence, arrays: Adjoint) -> Step:
        """Return a function that runs step t of the adjoint loop.

        The step adds `back` to dh[t + 1], and fills da[t] (with `inject`, adds to it).
        """
        raise NotImplementedError

    def bias_tangent(self, r: Recurrence, v: Array, pre: Array, dh: Array) -> None:
        """Write the direct contribution of the direction v of b_h to pre or dh, before the tangent steps."""

    def bias_cotangent(self, hidden: Array, dh: Array, da: Array) -> Array:
        """Return the cotangents of b_h at every step and sequence, (L, B, .); dh and hidden are (L, B, n)."""
        raise NotImplementedError


class Views(NamedTuple):
    """Lists of views of a recurrence's arrays, one per step; the views of an absent array are None."""

    x: list[Array]
    hidden: list[Array]
    coefficients: list[Array]
    weights: list[Array]
    factors: list[Array]
    intermediate: list[Array]


@dataclass
class Recurrence:
    """The linearised recurrence of one layer on one batch, with all arrays that the loops read.

    Attributes
    ----------
    cell : Cell
    inputs : (L, B) int32, or (L, B, I)
        Symbols, or the vectors that the layer reads.
    x : (L, B) int32
        Indices of rows of the tables: the symbols, or 0, 1, 2, ...
    hidden : (L + 1, B, n)
        h_0 (the initial state), h_1, ..., h_L.
    recurrent, recurrent_t : (n, K_h), (K_h, n)
        The matrix that is applied to the previous hidden (or intermediate) state, and its transpose.
        Transposes are None if the pass is not linearised.
    coefficients : (L, k, B, n) or None
        The coefficients of the tangent; None if the pass is not linearised or the cell has none.
    bias_h : (n,) or None
        The part of the bias that acts inside the unit, and is not added to the rows of the table.
    factor, factor_t : (n, n) or None
        W_mh of the multiplicative cells, and its transpose.
    factor_table : (R, n) or None
        W_mx, or inputs W_mx, whose rows scale the factors.
    factors : (L, B, n) or None
        q_t = h_{t-1} W_mh; (1, B, n) if the pass is not linearised.
    intermediate : (L, B, n) or None
        m_t = factor_table[x_t] * q_t; (1, B, n) if the pass is not linearised.
    weights : (L, B, K) or None
        Structural-damping weights of the pre-activations; None if they are not needed.
    scales : (B, n) or None
        Dropout: the factor of each unit where the next layer or the output layer reads it; None: 1.
    scaled : (L, B, n) or None
        h_1, ..., h_L times the scales; None without them.
    """

    cell: Cell
    inputs: Array
    x: Array
    hidden: Array
    recurrent: Packed
    recurrent_t: Packed | None = None
    coefficients: Array | None = None
    bias_h: Array | None = None
    factor: Packed | None = None
    factor_t: Packed | None = None
    factor_table: Array | None = None
    factors: Array | None = None
    intermediate: Array | None = None
    weights: Array | None = None
    scales: Array | None = None
    scaled: Array | None = None

    @cached_property
    def views(self) -> Views:
        """The views by step, created once for all loops because creating one costs as much as a kernel."""
        arrays = self.x, self.hidden, self.coefficients, self.weights, self.factors, self.intermediate
        return Views(*(_by_step(array, len(self.x)) for array in arrays))

    @property
    def looks_up(self) -> bool:
        """Whether the inputs are symbols, which select rows of the table."""
        return bool(self.inputs.ndim == 2)

    @property
    def read(self) -> Array:
        """The states that the next layer or the output layer reads, (L, B, n)."""
        return self.hidden[1:] if self.scaled is None else self.scaled

    def scale(self, rows: Array) -> None:
        """Multiply rows (L, B C, n), C of them for each sequence, by the scales, in place."""
        if self.scales is not None:
            steps, size, n = rows.shape
            split = rows.reshape(steps, len(self.scales), size // len(self.scales), n)
            split *= self.scales[:, None]

    def part(self, steps: slice) -> Recurrence:
        """Return the recurrence of some steps, as views of the same arrays."""
        start, stop, _ = steps.indices(len(self.x))
        if stop - start == len(self.x):
            return self
        size = self.x.shape[1]

        def cut(array: Array | None) -> Array | None:
            return array if array is None or len(array) < len(self.x) else array[start:stop]

        table = self.factor_table
        if table is not None and not self.looks_up:
            table = table[start * size : stop * size]
        return replace(
            self,
            inputs=self.inputs[start:stop],
            x=self.x[start:stop] if self.looks_up else self.x[: stop - start],
            hidden=self.hidden[start : stop + 1],
            coefficients=cut(self.coefficients),
            factor_table=table,
            factors=cut(self.factors),
            intermediate=cut(self.intermediate),
            weights=cut(self.weights),
            scaled=cut(self.scaled),
        )


def _by_step(array: Array | None, steps: int) -> list[Array]:
    if array is None:
        return [None] * steps
    return list(array) * steps if len(array) == 1 else list(array)


def forward(backend: NumpyBackend, r: Recurrence, table: Array, c: Array) -> None:
    """Run the recurrence: fill `r.hidden[1:]`, its coefficients, intermediate states and weights.

    Parameters
    ----------
    r : Recurrence
        `hidden[0]` is the initial state.
    table : (R, K_x)
        The contributions of the inputs.
    c : (B, n)
        On entry c_0, on return c_L. Cells without c do not use it.
    """
    steps, batch = r.x.shape
    a = backend.workspace("forward.a", (batch, r.recurrent.matrix.shape[1]))
    stored = 1 if r.factors is None else len(r.factors)

    def run() -> None:
        multiply, recurrent, factor, views = backend.multiply, r.recurrent, r.factor, r.views
        step = r.cell.forward(backend, r, table, a, c)
        for t in range(steps):
            source = views.hidden[t]
            if factor is not None:
                q, m = views.factors[t], views.intermediate[t]
                multiply(source, factor, q)
                backend.factor_forward(r.factor_table, views.x[t], q, m)
                source = m
            multiply(source, recurrent, a)
            step(t)

    arrays = {
        "kept": stored, "recurrent": r.recurrent, "factor": r.factor, "p_table": r.factor_table,
        "table": table, "x": r.x, "bias_h": r.bias_h, "c": c, "hidden": r.hidden, "k": r.coefficients,
        "w": r.weights, "q": r.factors, "m": r.intermediate, "a": a,
    }  # fmt: skip
    backend.loop(f"{r.cell.kernels} forward", run, arrays)


def _of_state(cell: Cell, array: Array, by_step: list[Array]) -> list[Array]:
    """Return the columns of pre-activations (L, B, K) that the previous state contributes to, by step."""
    if cell.of_state == cell.groups:
        return by_step
    width = array.shape[2] // cell.groups * cell.of_state
    return list(array[..., -width:])


def tangent(
    backend: NumpyBackend,
    r: Recurrence,
    table: Array,
    pre: Array,
    factor_table: Array | None,
    factors: Array | None,
    dh: Array,
    dc: Array,
) -> None:
    """Propagate a parameter direction through the recurrence (R-forward).

    Callers process consecutive parts of the steps, from the first to the last.

    Parameters
    ----------
    backend : NumpyBackend
    r : Recurrence
    table : (R, K_x)
        The contributions of the inputs along the direction.
    pre : (L, B, K)
        On entry the time-batched part, h_{t-1} V_h (or m_t V_h); on return R a_t.
    factor_table : (R, n) or None
        The tangent of r.factor_table.
    factors : (L, B, n) or None
        On entry the time-batched part h_{t-1} V_mh; on return R q_t.
    dh : (L + 1, B, n)
        On entry dh[0] is R h of the previous step, and dh[1:] is g_t v_bh if `bias_h` acts on h. On return
        R h_t.
    dc : (B, n)
        On entry R c of the previous step; on return R c of the last step. Cells without c do not use it.
    """
    dm = backend.workspace("tangent.m", dc.shape)

    def run() -> None:
        multiply, recurrent, factor, views = backend.multiply, r.recurrent, r.factor, r.views
        pres, dhs, dqs = list(pre), list(dh), _by_step(factors, len(pre))
        sums = _of_state(r.cell, pre, pres)
        step = r.cell.tangent(backend, r, Tangent(table, pres, dhs, dc))
        for t in range(len(pres)):
            source = dhs[t]
            if factor is not None:
                multiply(source, factor, dqs[t], True)
                backend.factor_tangent(r.factor_table, factor_table, views.x[t], views.factors[t], dqs[t], dm)
                source = dm
            multiply(source, recurrent, sums[t], True)
            step(t)

    arrays = {
        "recurrent": r.recurrent, "factor": r.factor, "p_table": r.factor_table, "dp_table": factor_table,
        "table": table, "x": r.x, "k": r.coefficients, "q": r.factors, "pre": pre, "dq": factors, "dm": dm,
        "dh": dh, "dc": dc, "hidden": r.hidden, "add": int(r.cell.adds),
    }  # fmt: skip
    backend.loop(f"{r.cell.kernels} tangent", run, arrays)


def adjoint(
    backend: NumpyBackend,
    r: Recurrence,
    dh: Array,
    da: Array,
    dp: Array | None,
    dq: Array | None,
    back: Array,
    dc: Array,
    inject: bool,
) -> None:
    """Propagate cotangents back through the recurrence: the transpose of `tangent`.

    Callers process consecutive parts of the steps, from the last to the first.

    Parameters
    ----------
    backend : NumpyBackend
    r : Recurrence
    dh : (L + 1, B, n)
        On entry dh[1:] contains cotangents of h_1 ... h_L; on return their total cotangents.
    da : (L, B, K)
        On return the cotangents of the pre-activations. With `inject` it contains on entry direct cotangents
        of the pre-activations (structural damping), to which the others are added.
    dp, dq : (L, B, n) or None
        On return, for multiplicative cells, the cotangents of the selected rows of the factor table and of
        q_t.
    back, dc : (B, n)
        On entry the cotangents of h_L and c_L from the following steps; on return those of h_0 and c_0.
    inject : bool
        Whether da contains direct cotangents on entry.

    Raises
    ------
    ValueError
        If the pass was not linearised.
    """
    if r.recurrent_t is None:
        raise ValueError("the pass was not linearised")
    recurrent_t, dm = r.recurrent_t, backend.workspace("adjoint.m", back.shape)

    def run() -> None:
        multiply, factor_t, carries, views = backend.multiply, r.factor_t, r.cell.carries, r.views
        das, dps, dqs = list(da), _by_step(dp, len(da)), _by_step(dq, len(da))
        sums = _of_state(r.cell, da, das)
        step = r.cell.adjoint(backend, r, Adjoint(list(dh), back, dc, das, inject))
        for t in range(len(das) - 1, -1, -1):
            step(t)
            if factor_t is not None:
                multiply(sums[t], recurrent_t, dm)
                backend.factor_adjoint(r.factor_table, views.x[t], views.factors[t], dm, dps[t], dqs[t])
                multiply(dqs[t], factor_t, back, carries)
            else:
                multiply(sums[t], recurrent_t, back, carries)

    arrays = {
        "recurrent_t": recurrent_t, "factor_t": r.factor_t, "p_table": r.factor_table, "x": r.x,
        "k": r.coefficients, "q": r.factors, "dh": dh, "da": da, "dp": dp, "dq": dq, "back": back, "dc": dc,
        "inject": int(inject), "hidden": r.hidden, "dm": dm,
    }  # fmt: skip
    backend.loop(f"{r.cell.kernels} adjoint", run, arrays)
