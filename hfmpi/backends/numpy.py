"""Every kernel in plain array code on `xp`: the reference with NumPy, the fallback on other devices.

The formulas are in docs/theory.md. Shapes: B sequences, n hidden units, R rows of a table, V symbols; arrays
are C-contiguous. A row of a table is the contribution of an input; x (B,) selects the row of each sequence.

A tangent or adjoint step processes one direction or C directions at once, which are called its columns. Its
arrays then have B C rows, where the C rows of a sequence are adjacent, and the table of the directions has
R C rows. The stored coefficients of a sequence are used for all of its rows.
"""

from __future__ import annotations

import numpy as np

from hfmpi.backends.base import Array, Backend

__all__ = ["NumpyBackend", "by_sequence"]


def by_sequence(rows: Array, sequences: int) -> Array:
    """Return rows (B C, n) as a view (B, C, n): the columns of each sequence."""
    return rows.reshape(sequences, -1, rows.shape[-1])


class NumpyBackend(Backend):
    """Plain NumPy on the host; subclasses set `xp` to run on a different device."""

    name = "numpy"

    def sigmoid(self, a: Array) -> Array:
        """Compute 1 / (1 + exp(-a)) from tanh, which cannot overflow."""
        half = a.dtype.type(0.5)
        return half * self.xp.tanh(half * a) + half

    # Steps of gated cells: pre-activations and table rows in the order i, f, o, u --------------------

    def gated_forward(
        self, a: Array, table: Array, x: Array, bias_h: Array, c: Array, h: Array, k: Array, w: Array
    ) -> None:
        """Compute a step of a gated cell: h, c, k (6, B, n) and w (B, 4n) from a = m W_h (B, 4n).

        k and w may be None if they are not needed; bias_h (n,) is None except in the `krause` variant.
        """
        n, tanh = c.shape[1], self.xp.tanh
        a += table[x]
        i, f, o = (self.sigmoid(a[:, j * n : (j + 1) * n]) for j in range(3))
        u = a[:, 3 * n :]
        if bias_h is None:
            u = tanh(u)
        new_c = f * c + i * u
        if bias_h is None:
            s = tanh(new_c)
            h[...] = o * s
        else:  # as in Krause (2016), the update is linear, and the output gate is inside the tanh
            s = tanh(o * new_c + bias_h)
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
        if w is not None:  # for structural damping: the curvature of each unit's matching loss
            for j, gate in enumerate((i, f, o)):
                w[:, j * n : (j + 1) * n] = gate * (1 - gate)
            w[:, 3 * n :] = 0.25 * (1 - u * u) if bias_h is None else 0.25

    def gated_tangent(
        self, pre: Array, table: Array, x: Array, k: Array, dc: Array, dh: Array, add: bool
    ) -> None:
        """Compute R a, R c and R h of a step of a gated cell.

        On entry pre is R a without the rows of the table, and dc is R c of the previous step; both are
        overwritten. R h overwrites dh, or is added to it if `add` is set.
        """
        n = dc.shape[1]
        f, k_i, k_f, k_o, k_u, k_c = k[:, :, None]
        pre, dc, dh = (by_sequence(array, len(x)) for array in (pre, dc, dh))
        pre += table.reshape(-1, *pre.shape[1:])[x]
        ri, rf, ro, ru = (pre[..., j * n : (j + 1) * n] for j in range(4))
        dc[...] = f * dc + k_i * ri + k_f * rf + k_u * ru
        rh = k_o * ro + k_c * dc
        dh[...] = dh + rh if add else rh

    def gated_adjoint(self, dh: Array, back: Array, k: Array, dc: Array, da: Array, inject: bool) -> None:
        """Apply the transpose of gated_tangent: add `back` to dh, and write da (with `inject`, add to it)."""
        f, k_i, k_f, k_o, k_u, k_c = k[:, :, None]
        dh, back, dc, da = (by_sequence(array, k.shape[1]) for array in (dh, back, dc, da))
        dh += back
        dc += k_c * dh
        pulled = self.xp.concatenate((k_i * dc, k_f * dc, k_o * dh, k_u * dc), axis=-1)
        da[...] = da + pulled if inject else pulled
        dc *= f

    # Steps of plain tanh cells -----------------------------------------------------------------------

    def plain_forward(self, a: Array, table: Array, x: Array, h: Array, w: Array) -> None:
        """Compute a step of a tanh cell: h and, unless it is None, w (B, n) from a = m W_h (B, n)."""
        h[...] = self.xp.tanh(a + table[x])
        if w is not None:
            w[...] = 0.25 * (1 - h * h)

    def plain_tangent(self, pre: Array, table: Array, x: Array, h: Array, dh: Array) -> None:
        """Complete R a in pre, and compute R h = (1 - h^2) R a; h is (B, n)."""
        pre, dh = by_sequence(pre, len(x)), by_sequence(dh, len(x))
        pre += table.reshape(-1, *pre.shape[1:])[x]
        dh[...] = (1 - h * h)[:, None] * pre

    def plain_adjoint(self, dh: Array, back: Array, h: Array, da: Array, inject: bool) -> None:
        """Apply the transpose of plain_tangent: add `back` to dh, and write da (with `inject`, add to it)."""
        dh, back, da = (by_sequence(array, len(h)) for array in (dh, back, da))
        dh += back
        pulled = (1 - h * h)[:, None] * dh
        da[...] = da + pulled if inject else pulled

    # The intermediate state of multiplicative cells --------------------------------------------------

    def factor_forward(self, p_table: Array, x: Array, q: Array, m: Array) -> None:
        """Compute m = p * q, where p are the rows x of p_table; all are (B, n)."""
        self.xp.multiply(p_table[x], q, out=m)

    def factor_tangent(
        self, p_table: Array, dp_table: Array, x: Array, q: Array, dq: Array, dm: Array
    ) -> None:
        """Compute R m = R p * q + p * R q, with p_table (R, n) and q (B, n) from the forward pass."""
        dq, dm = by_sequence(dq, len(x)), by_sequence(dm, len(x))
        dm[...] = dp_table.reshape(-1, *dm.shape[1:])[x] * q[:, None] + p_table[x][:, None] * dq

    def factor_adjoint(self, p_table: Array, x: Array, q: Array, dm: Array, dp: Array, dq: Array) -> None:
        """Apply the transpose of factor_tangent: dp = dm * q and dq = dm * p."""
        dm, dp, dq = (by_sequence(array, len(x)) for array in (dm, dp, dq))
        self.xp.multiply(dm, q[:, None], out=dp)
        self.xp.multiply(dm, p_table[x][:, None], out=dq)

    # Complete batches --------------------------------------------------------------------------------

    def softmax_loss(self, logits: Array, targets: Array) -> Array:
        """Overwrite logits (N, V) with probabilities; return the loss of each row in nats, (N,) float64."""
        xp = self.xp
        logits -= logits.max(axis=1, keepdims=True)
        chosen = logits[xp.arange(len(targets)), targets].astype(np.float64)
        xp.exp(logits, out=logits)
        total = logits.sum(axis=1, keepdims=True)
        logits /= total
        return xp.log(total[:, 0].astype(np.float64)) - chosen

    def softmax_gradient(self, p: Array, targets: Array, scale: float, out: Array) -> None:
        """Compute out = scale * (p - onehot(targets)); p and out are (N, V)."""
        self.xp.multiply(p, p.dtype.type(scale), out=out)
        out[self.xp.arange(len(targets)), targets] -= p.dtype.type(scale)

    def softmax_hessian(self, p: Array, u: Array, scale: float) -> None:
        """Overwrite u (N C, V) with scale * p * (u - <p, u>), the Hessian of each row of p (N, V) times u."""
        p, u = p[:, None], by_sequence(u, len(p))
        u -= self.xp.sum(p * u, axis=-1, keepdims=True)
        u *= p * p.dtype.type(scale)

    def segment_sum(self, rows: Array, x: Array, out: Array) -> None:
        """Compute out[s], the sum of the rows (N, K) whose symbol x (N,) is s; out is (V, K)."""
        out[...] = 0
        self.xp.add.at(out, x, rows)

    def segment_sum_each(self, rows: Array, x: Array, out: Array) -> None:
        """Compute out[b, s], the sum of the rows (L, B, K) of sequence b whose symbol x (L, B) is s.

        out is (B, V, K), contiguous except for its first axis; rows are contiguous along their last axis.
        """
        for b in range(rows.shape[1]):
            self.segment_sum(rows[:, b], x[:, b], out[b])

    def accumulate_squares(self, each: Array, total: Array, squares: Array) -> None:
        """Add the sum of the rows of each (B, D) to total (D,), and the sum of their squares to squares."""
        for g in each:
            self.accumulate_square(g, total, squares)

    def accumulate_square(self, g: Array, total: Array, squares: Array) -> None:
        """Add g to total, and g * g to squares; all are vectors of the same length."""
        total += g
        squares += g * g
