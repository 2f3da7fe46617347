"""The reference: every kernel as plain NumPy, to be read beside docs/theory.md."""

from __future__ import annotations

import numpy as np

from hfmpi.backends.base import Array, Backend

__all__ = ["NumpyBackend"]


def sigmoid(a: Array) -> Array:
    """1 / (1 + exp(-a)), through tanh so that nothing overflows."""
    half = a.dtype.type(0.5)
    return half * np.tanh(half * a) + half


class NumpyBackend(Backend):
    """Plain NumPy on the host."""

    name = "numpy"

    def gated_forward(
        self, a: Array, table: Array, x: Array, bias_h: Array, c: Array, h: Array, k: Array, w: Array
    ) -> None:
        n = c.shape[1]
        a += table[x]
        i, f, o = (sigmoid(a[:, j * n : (j + 1) * n]) for j in range(3))
        u = a[:, 3 * n :]
        if bias_h is None:
            u = np.tanh(u)
        new_c = f * c + i * u
        if bias_h is None:
            s = np.tanh(new_c)
            h[...] = o * s
        else:  # Krause (2016): linear update, output gate inside the tanh
            s = np.tanh(o * new_c + bias_h)
            h[...] = s
        if k is not None:
            slope = 1 - s * s
            k[0] = f
            k[1] = u * i * (1 - i)
            k[2] = c * f * (1 - f)
            if bias_h is None:
                k[3] = s * o * (1 - o)
                k[4] = i * (1 - u * u)
            else:
                k[3] = slope * new_c * o * (1 - o)
                k[4] = i
            k[5] = o * slope
        c[...] = new_c
        if w is not None:  # structural damping: the matching-loss curvature of each unit
            for j, gate in enumerate((i, f, o)):
                w[:, j * n : (j + 1) * n] = gate * (1 - gate)
            w[:, 3 * n :] = 0.25 * (1 - u * u) if bias_h is None else 0.25

    def gated_tangent(
        self, pre: Array, table: Array, x: Array, k: Array, dc: Array, dh: Array, add: bool
    ) -> None:
        n = dc.shape[1]
        f, k_i, k_f, k_o, k_u, k_c = k
        pre += table[x]
        ri, rf, ro, ru = (pre[:, j * n : (j + 1) * n] for j in range(4))
        dc[...] = f * dc + k_i * ri + k_f * rf + k_u * ru
        rh = k_o * ro + k_c * dc
        dh[...] = dh + rh if add else rh

    def gated_adjoint(self, dh: Array, back: Array, k: Array, dc: Array, da: Array, inject: bool) -> None:
        f, k_i, k_f, k_o, k_u, k_c = k
        dh += back
        dc += k_c * dh
        own = np.concatenate((k_i * dc, k_f * dc, k_o * dh, k_u * dc), axis=1)
        da[...] = da + own if inject else own
        dc *= f

    def plain_forward(self, a: Array, table: Array, x: Array, h: Array, w: Array) -> None:
        h[...] = np.tanh(a + table[x])
        if w is not None:
            w[...] = 0.25 * (1 - h * h)

    def plain_tangent(self, pre: Array, table: Array, x: Array, h: Array, dh: Array) -> None:
        pre += table[x]
        dh[...] = (1 - h * h) * pre

    def plain_adjoint(self, dh: Array, back: Array, h: Array, da: Array, inject: bool) -> None:
        dh += back
        own = (1 - h * h) * dh
        da[...] = da + own if inject else own

    def factor_forward(self, p_table: Array, x: Array, q: Array, m: Array) -> None:
        np.multiply(p_table[x], q, out=m)

    def factor_tangent(
        self, p_table: Array, dp_table: Array, x: Array, q: Array, dq: Array, dm: Array
    ) -> None:
        dm[...] = dp_table[x] * q + p_table[x] * dq

    def factor_adjoint(self, p_table: Array, x: Array, q: Array, dm: Array, dp: Array, dq: Array) -> None:
        np.multiply(dm, q, out=dp)
        np.multiply(dm, p_table[x], out=dq)

    def softmax_loss(self, logits: Array, targets: Array) -> float:
        rows = np.arange(len(targets))
        logits -= logits.max(axis=1, keepdims=True)
        chosen = logits[rows, targets].astype(np.float64)
        np.exp(logits, out=logits)
        total = logits.sum(axis=1, keepdims=True)
        logits /= total
        return float(np.sum(np.log(total[:, 0].astype(np.float64)) - chosen))

    def softmax_gradient(self, p: Array, targets: Array, scale: float, out: Array) -> None:
        np.multiply(p, p.dtype.type(scale), out=out)
        out[np.arange(len(targets)), targets] -= p.dtype.type(scale)

    def softmax_hessian(self, p: Array, u: Array, scale: float) -> None:
        u -= np.sum(p * u, axis=1, keepdims=True)
        u *= p * p.dtype.type(scale)

    def segment_sum(self, rows: Array, x: Array, out: Array) -> None:
        out[...] = 0
        np.add.at(out, x, rows)

    def segment_sum_each(self, rows: Array, x: Array, out: Array) -> None:
        for b in range(rows.shape[1]):
            self.segment_sum(rows[:, b], x[:, b], out[b])

    def accumulate_squares(self, each: Array, total: Array, squares: Array) -> None:
        for g in each:
            self.accumulate_square(g, total, squares)

    def accumulate_square(self, g: Array, total: Array, squares: Array) -> None:
        total += g
        squares += g * g
