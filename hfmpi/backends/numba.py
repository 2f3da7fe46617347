"""Fused loops for the CPU that read every coefficient only once; the formulas are those of `numpy.py`."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any

import numba
import numpy as np
from numba.core import event

from hfmpi.backends import elementary, panels
from hfmpi.backends.base import Array, Packed, Workspace
from hfmpi.backends.compilation import notify
from hfmpi.backends.elementary import exp, tanh
from hfmpi.backends.kernel_cache import kernel_cache
from hfmpi.backends.numpy import NumpyBackend

__all__ = ["NumbaBackend"]


def gated_step(a, table, x, bias_h, c, h, k):
    n = c.shape[1]
    one = a.dtype.type(1)
    half = a.dtype.type(0.5)
    for b in range(c.shape[0]):
        row = table[x[b]]
        for j in range(n):
            i = half * tanh(half * (a[b, j] + row[j])) + half
            f = half * tanh(half * (a[b, n + j] + row[n + j])) + half
            o = half * tanh(half * (a[b, 2 * n + j] + row[2 * n + j])) + half
            au = a[b, 3 * n + j] + row[3 * n + j]
            old = c[b, j]
            u = tanh(au) if bias_h is None else au
            new = f * old + i * u
            if bias_h is None:
                s = tanh(new)
                h[b, j] = o * s
            else:
                s = tanh(o * new + bias_h[j])
                h[b, j] = s
            if k is not None:
                slope = one - s * s
                k[0, b, j] = f
                k[1, b, j] = u * i * (one - i)
                k[2, b, j] = old * f * (one - f)
                if bias_h is None:
                    k[3, b, j] = s * o * (one - o)
                    k[4, b, j] = i * (one - u * u)
                else:
                    k[3, b, j] = slope * new * o * (one - o)
                    k[4, b, j] = i
                k[5, b, j] = o * slope
            c[b, j] = new


def gated_weights(a, table, x, linear_update, w):
    n = a.shape[1] // 4
    one = a.dtype.type(1)
    half = a.dtype.type(0.5)
    quarter = a.dtype.type(0.25)
    for b in range(a.shape[0]):
        row = table[x[b]]
        for j in range(3 * n):
            s = tanh(half * (a[b, j] + row[j]))
            w[b, j] = quarter * (one - s * s)
        if linear_update:
            w[b, 3 * n :] = quarter
        else:
            for j in range(3 * n, 4 * n):
                s = tanh(a[b, j] + row[j])
                w[b, j] = quarter * (one - s * s)


def gated_tangent(pre, table, x, k, dc, dh, add):
    n = dc.shape[1]
    columns = dc.shape[0] // x.shape[0]
    for r in range(dc.shape[0]):
        b = r // columns
        row = table[x[b] * columns + r % columns]
        for j in range(4 * n):
            pre[r, j] += row[j]
        for j in range(n):
            value = k[0, b, j] * dc[r, j] + k[1, b, j] * pre[r, j]
            value += k[2, b, j] * pre[r, n + j] + k[4, b, j] * pre[r, 3 * n + j]
            dc[r, j] = value
            rh = k[3, b, j] * pre[r, 2 * n + j] + k[5, b, j] * value
            if add:
                rh += dh[r, j]
            dh[r, j] = rh


def gated_adjoint(dh, back, k, dc, da, inject):
    # These are many short loops, because with more arrays in a loop the compiler cannot prove that they do
    # not overlap, and emits scalar code. A row remains in the first-level cache from one loop to the next.
    n = dc.shape[1]
    columns = dc.shape[0] // k.shape[1]
    for r in range(dc.shape[0]):
        b = r // columns
        total, state, da_r, pulled = dh[r], dc[r], da[r], back[r]
        f, k_i, k_f, k_o, k_u, k_c = k[0, b], k[1, b], k[2, b], k[3, b], k[4, b], k[5, b]
        da_i, da_f, da_o, da_u = da_r[:n], da_r[n : 2 * n], da_r[2 * n : 3 * n], da_r[3 * n :]
        for j in range(n):
            total[j] += pulled[j]
        for j in range(n):
            state[j] += k_c[j] * total[j]
        if inject:
            for j in range(n):
                da_i[j] += k_i[j] * state[j]
            for j in range(n):
                da_f[j] += k_f[j] * state[j]
            for j in range(n):
                da_o[j] += k_o[j] * total[j]
            for j in range(n):
                da_u[j] += k_u[j] * state[j]
        else:
            for j in range(n):
                da_i[j] = k_i[j] * state[j]
            for j in range(n):
                da_f[j] = k_f[j] * state[j]
            for j in range(n):
                da_o[j] = k_o[j] * total[j]
            for j in range(n):
                da_u[j] = k_u[j] * state[j]
        for j in range(n):
            state[j] *= f[j]


def plain_forward(a, table, x, h, w):
    one = a.dtype.type(1)
    quarter = a.dtype.type(0.25)
    for b in range(h.shape[0]):
        row = table[x[b]]
        for j in range(h.shape[1]):
            s = tanh(a[b, j] + row[j])
            h[b, j] = s
            if w is not None:
                w[b, j] = quarter * (one - s * s)


def plain_tangent(pre, table, x, h, dh):
    one = h.dtype.type(1)
    columns = dh.shape[0] // h.shape[0]
    for r in range(dh.shape[0]):
        b = r // columns
        row = table[x[b] * columns + r % columns]
        for j in range(h.shape[1]):
            value = pre[r, j] + row[j]
            pre[r, j] = value
            dh[r, j] = (one - h[b, j] * h[b, j]) * value


def plain_adjoint(dh, back, h, da, inject):
    one = h.dtype.type(1)
    columns = dh.shape[0] // h.shape[0]
    for r in range(dh.shape[0]):
        b = r // columns
        for j in range(h.shape[1]):
            total = dh[r, j] + back[r, j]
            dh[r, j] = total
            value = (one - h[b, j] * h[b, j]) * total
            if inject:
                value += da[r, j]
            da[r, j] = value


def factor_forward(p_table, x, q, m):
    for b in range(q.shape[0]):
        row = p_table[x[b]]
        for j in range(q.shape[1]):
            m[b, j] = row[j] * q[b, j]


def factor_tangent(p_table, dp_table, x, q, dq, dm):
    columns = dq.shape[0] // q.shape[0]
    for r in range(dq.shape[0]):
        b = r // columns
        row = p_table[x[b]]
        dp = dp_table[x[b] * columns + r % columns]
        for j in range(q.shape[1]):
            dm[r, j] = dp[j] * q[b, j] + row[j] * dq[r, j]


def factor_adjoint(p_table, x, q, dm, dp, dq):
    columns = dq.shape[0] // q.shape[0]
    for r in range(dq.shape[0]):
        b = r // columns
        row = p_table[x[b]]
        for j in range(q.shape[1]):
            dp[r, j] = dm[r, j] * q[b, j]
            dq[r, j] = dm[r, j] * row[j]


def softmax_rows(logits, targets, losses):
    for r in range(logits.shape[0]):
        top = logits[r, 0]
        for v in range(1, logits.shape[1]):
            top = max(top, logits[r, v])
        chosen = logits[r, targets[r]] - top
        for v in range(logits.shape[1]):
            logits[r, v] = exp(logits[r, v] - top)
        total = np.float64(0)
        for v in range(logits.shape[1]):
            total += logits[r, v]
        inverse = logits.dtype.type(1 / total)
        for v in range(logits.shape[1]):
            logits[r, v] *= inverse
        losses[r] = np.log(total) - chosen


def softmax_gradient(p, targets, scale, out):
    for r in range(p.shape[0]):
        for v in range(p.shape[1]):
            out[r, v] = scale * p[r, v]
        out[r, targets[r]] -= scale


def softmax_hessian(p, u, scale):
    columns = u.shape[0] // max(1, p.shape[0])
    for r in range(u.shape[0]):
        row = p[r // columns]
        mean = p.dtype.type(0)
        for v in range(p.shape[1]):
            mean += row[v] * u[r, v]
        for v in range(p.shape[1]):
            u[r, v] = scale * row[v] * (u[r, v] - mean)


def segment_sum(rows, x, out):
    out[...] = 0
    for r in range(rows.shape[0]):
        target = out[x[r]]
        for j in range(rows.shape[1]):
            target[j] += rows[r, j]


def accumulate_square(g, total, squares):
    for j in range(g.shape[0]):
        total[j] += g[j]
        squares[j] += g[j] * g[j]


def compiled(function: Callable) -> Any:
    """Compile a kernel whose sums may be reordered and contracted; NaN and infinity are handled correctly."""
    return numba.njit(function, error_model="numpy", fastmath={"contract", "reassoc", "nsz"})


KERNELS = (
    gated_step,
    gated_weights,
    gated_tangent,
    gated_adjoint,
    plain_forward,
    plain_tangent,
    plain_adjoint,
    factor_forward,
    factor_tangent,
    factor_adjoint,
    softmax_rows,
    softmax_gradient,
    softmax_hessian,
    segment_sum,
    accumulate_square,
    panels.pack,
    panels.multiply,
)


class CompileListener(event.Listener):
    """Notifies listeners when Numba compiles one of the kernels, because it is not in the cache on disk."""

    def __init__(self, kernels: Iterable[Any]) -> None:
        self._kernels, self._depth = frozenset(kernels), 0

    def on_start(self, event: Any) -> None:
        if self._depth or event.data["dispatcher"] in self._kernels:  # includes functions that a kernel calls
            self._depth += 1
            if self._depth == 1:
                notify(True)

    def on_end(self, event: Any) -> None:
        if self._depth:
            self._depth -= 1
            if self._depth == 0:
                notify(False)


@functools.cache
def kernels() -> dict[str, Any]:
    """Return the kernels by name; each one is compiled or loaded from disk when it is first called."""
    with kernel_cache("kernels", (__file__, elementary.__file__, panels.__file__)) as cached:
        by_name = {f.__name__: cached(compiled(f)) for f in KERNELS}
    event.register("numba:compile", CompileListener(by_name.values()))
    return by_name


PLAIN = (
    "gated_tangent",
    "gated_adjoint",
    "plain_forward",
    "plain_tangent",
    "plain_adjoint",
    "factor_forward",
    "factor_tangent",
    "factor_adjoint",
    "segment_sum",
    "accumulate_square",
)
"""The kernels that have the signature of the backend's method of the same name."""


class NumbaBackend(NumpyBackend):
    """Fused loops over NumPy arrays, compiled at the first use and cached.

    The loops and the sequential products run in one thread, because starting threads 400 times per pass costs
    more than it saves (docs/performance.md). The products over many steps use the threads of the BLAS.
    """

    name = "numba"

    def __init__(self, dtype: str = "float32") -> None:
        super().__init__(dtype)
        self._kernels = kernels()
        self._multiply, self._gated_step = self._kernels["multiply"], self._kernels["gated_step"]
        for name in PLAIN:
            setattr(self, name, self._kernels[name])

    def pack(self, matrix: Array, memory: Workspace, name: str) -> Packed:
        packed = memory(name, panels.panels_shape(matrix.shape[0], matrix.shape[1], self.dtype.itemsize))
        self._kernels["pack"](matrix, packed)
        return Packed(matrix, packed)

    def multiply(self, a: Array, b: Packed, out: Array, add: bool = False) -> None:
        self._multiply(a, b.panels, out, add)

    def gated_forward(
        self, a: Array, table: Array, x: Array, bias_h: Array, c: Array, h: Array, k: Array, w: Array
    ) -> None:
        self._gated_step(a, table, x, bias_h, c, h, k)
        if w is not None:
            self._kernels["gated_weights"](a, table, x, bias_h is not None, w)

    def softmax_loss(self, logits: Array, targets: Array) -> Array:
        losses = np.empty(len(targets))
        self._kernels["softmax_rows"](logits, targets, losses)
        return losses

    def softmax_gradient(self, p: Array, targets: Array, scale: float, out: Array) -> None:
        self._kernels["softmax_gradient"](p, targets, self.dtype.type(scale), out)

    def softmax_hessian(self, p: Array, u: Array, scale: float) -> None:
        self._kernels["softmax_hessian"](p, u, self.dtype.type(scale))
