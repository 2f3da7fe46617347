"""The gated recurrent unit (Cho et al. 2014), with the reset gate after the product as in cuDNN and PyTorch.

    r = sigmoid(x W_r + h' U_r + b_r)        u  = tanh(x W_u + b_u + r * s),  s = h' U_u + b_h
    z = sigmoid(x W_z + h' U_z + b_z)        h  = u + z * (h' - u)

The pre-activations are u, r, z, s, so that inputs contribute to the first three groups and the previous state
to the last three. W_x has the columns of u, r, z; W_h has the columns of r, z, s; b is (b_u, b_r, b_z, b_h).
A linearisation stores the coefficients k of the tangent of every step:

    R a_u = R(x W_u) + k_1 R a_r + k_2 R s,    R h = k_0 R h' + k_3 R a_z + k_4 R a_u

with k_0, ..., k_4 = z, s r (1 - r), r, (h' - u) z (1 - z), (1 - z) (1 - u^2).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from hfmpi.backends.base import Array
from hfmpi.backends.numpy import NumpyBackend, by_sequence
from hfmpi.networks.recurrence import Adjoint, Cell, Recurrence, Step, Tangent

__all__ = ["GRU"]


@dataclass(frozen=True)
class GRU(Cell):
    """The gated recurrent unit, whose steps are plain array code."""

    kernels: ClassVar[str] = "gru"
    groups: ClassVar[int] = 4
    of_inputs: ClassVar[int] = 3
    of_state: ClassVar[int] = 3
    coefficients: ClassVar[int] = 5
    carries: ClassVar[bool] = True
    forget: ClassVar[int | None] = 2
    recurrent_scale: ClassVar[float | None] = 0.02

    def tanh_columns(self, name: str, n: int) -> slice:
        """Return the columns of u in W_x, or the columns of s in W_h."""
        return slice(0, n) if name == "W_x" else slice(2 * n, None)

    def forward(self, backend: NumpyBackend, r: Recurrence, table: Array, a: Array, c: Array) -> Step:
        """Return a function that runs step t of the forward loop.

        a (B, 3n) contains the products of r, z and s.
        """
        n, tanh, (x, hidden, coefficients, weights, *_) = c.shape[1], backend.xp.tanh, r.views

        def step(t: int) -> None:
            rows, before, k, w = table[x[t]], hidden[t], coefficients[t], weights[t]
            reset = backend.sigmoid(a[:, :n] + rows[:, n : 2 * n])
            z = backend.sigmoid(a[:, n : 2 * n] + rows[:, 2 * n :])
            s = a[:, 2 * n :] + r.bias_h
            u = tanh(rows[:, :n] + reset * s)
            hidden[t + 1][...] = u + z * (before - u)
            if k is not None:
                k[0] = z
                k[1] = s * reset * (1 - reset)
                k[2] = reset
                k[3] = (before - u) * z * (1 - z)
                k[4] = (1 - z) * (1 - u * u)
            if w is not None:  # s has no activation function
                w[:, :n] = 0.25 * (1 - u * u)
                w[:, n : 2 * n] = reset * (1 - reset)
                w[:, 2 * n : 3 * n] = z * (1 - z)
                w[:, 3 * n :] = 0

        return step

    def tangent(self, backend: NumpyBackend, r: Recurrence, arrays: Tangent) -> Step:
        """Return a function that runs step t of the tangent loop.

        The state contributes to the group of u through s and r.
        """
        table, pre, dh, dc = arrays
        n, x, coefficients = dc.shape[1], r.views.x, r.views.coefficients

        def step(t: int) -> None:
            k_h, k_r, k_s, k_z, k_u = coefficients[t][:, :, None]
            da, before, after = (by_sequence(rows, len(x[t])) for rows in (pre[t], dh[t], dh[t + 1]))
            rows = table.reshape(-1, da.shape[1], table.shape[1])[x[t]]
            da[..., n : 3 * n] += rows[..., n:]
            da[..., :n] = rows[..., :n] + k_r * da[..., n : 2 * n] + k_s * da[..., 3 * n :]
            after[...] = k_h * before + k_z * da[..., 2 * n : 3 * n] + k_u * da[..., :n]

        return step

    def adjoint(self, backend: NumpyBackend, r: Recurrence, arrays: Adjoint) -> Step:
        """Return a function that runs step t of the adjoint loop, the transpose of the tangent step."""
        dh, back, dc, da, inject = arrays
        n, coefficients = dc.shape[1], r.views.coefficients

        def step(t: int) -> None:
            k_h, k_r, k_s, k_z, k_u = coefficients[t][:, :, None]
            size = coefficients[t].shape[1]
            total, cotangent, pulled = (by_sequence(rows, size) for rows in (dh[t + 1], da[t], back))
            total += pulled
            if not inject:
                cotangent[...] = 0
            cotangent[..., :n] += k_u * total
            cotangent[..., n : 2 * n] += k_r * cotangent[..., :n]
            cotangent[..., 2 * n : 3 * n] += k_z * total
            cotangent[..., 3 * n :] += k_s * cotangent[..., :n]
            pulled[...] = k_h * total

        return step

    def bias_tangent(self, r: Recurrence, v: Array, pre: Array, dh: Array) -> None:
        """Add R b_h to R s."""
        pre[..., -len(v) :] += v

    def bias_cotangent(self, hidden: Array, dh: Array, da: Array) -> Array:
        """Return the cotangents of s, which are those of b_h."""
        return da[..., 3 * hidden.shape[-1] :]
