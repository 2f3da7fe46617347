"""The cells by name: the cells of Krause et al. (2015), eq. 1-3, and the GRU of Cho et al. (2014).

The `krause` variant of the gated cells follows Krause's released code (2016).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from hfmpi.backends.base import Array
from hfmpi.backends.numpy import NumpyBackend
from hfmpi.errors import UserError, did_you_mean
from hfmpi.networks.gru import GRU
from hfmpi.networks.recurrence import Adjoint, Cell, Recurrence, Step, Tangent

__all__ = ["CELLS", "VARIANTS", "Gated", "Plain", "cell"]


@dataclass(frozen=True)
class Plain(Cell):
    """The tanh cell h = tanh(W_x x + W_h h' + b), whose derivative 1 - h^2 is computed from h."""

    kernels: ClassVar[str] = "plain"
    groups: ClassVar[int] = 1
    of_inputs: ClassVar[int] = 1
    of_state: ClassVar[int] = 1

    def tanh_columns(self, name: str, n: int) -> slice:
        """Return the slice of all columns, because every unit is a tanh unit."""
        return slice(None)

    def forward(self, backend: NumpyBackend, r: Recurrence, table: Array, a: Array, c: Array) -> Step:
        """Return a function that runs step t of the forward loop by a kernel of the backend."""
        kernel, x, hidden, w = backend.plain_forward, r.views.x, r.views.hidden, r.views.weights

        def step(t: int) -> None:
            kernel(a, table, x[t], hidden[t + 1], w[t])

        return step

    def tangent(self, backend: NumpyBackend, r: Recurrence, arrays: Tangent) -> Step:
        """Return a function that runs step t of the tangent loop by a kernel of the backend."""
        kernel, (x, hidden, *_) = backend.plain_tangent, r.views
        table, pre, dh, _ = arrays

        def step(t: int) -> None:
            kernel(pre[t], table, x[t], hidden[t + 1], dh[t + 1])

        return step

    def adjoint(self, backend: NumpyBackend, r: Recurrence, arrays: Adjoint) -> Step:
        """Return a function that runs step t of the adjoint loop by a kernel of the backend."""
        kernel, hidden = backend.plain_adjoint, r.views.hidden
        dh, back, _, da, inject = arrays

        def step(t: int) -> None:
            kernel(dh[t + 1], back, hidden[t + 1], da[t], inject)

        return step


@dataclass(frozen=True)
class Gated(Cell):
    """The LSTM cell: gates i, f, o and update u, in this order, and a cell state c.

    Attributes
    ----------
    krause : bool
        Whether u is linear and the output gate is inside the tanh, which has a bias b_h.
    """

    krause: bool = False
    kernels: ClassVar[str] = "gated"
    groups: ClassVar[int] = 4
    of_inputs: ClassVar[int] = 4
    of_state: ClassVar[int] = 4
    coefficients: ClassVar[int] = 6
    forget: ClassVar[int | None] = 1
    recurrent_scale: ClassVar[float | None] = 0.02

    @property
    def on_rows(self) -> int:
        """The number of groups of the bias that are added to the rows of inputs: all but b_h (`krause`)."""
        return 3 if self.krause else 4

    @property
    def adds(self) -> bool:
        """Whether the cell has a bias b_h."""
        return self.krause

    def tanh_columns(self, name: str, n: int) -> slice:
        """Return the columns of u, the only group with a tanh."""
        return slice(3 * n, None)

    def forward(self, backend: NumpyBackend, r: Recurrence, table: Array, a: Array, c: Array) -> Step:
        """Return a function that runs step t of the forward loop by a kernel of the backend."""
        kernel, bias_h, (x, hidden, k, w, *_) = backend.gated_forward, r.bias_h, r.views

        def step(t: int) -> None:
            kernel(a, table, x[t], bias_h, c, hidden[t + 1], k[t], w[t])

        return step

    def tangent(self, backend: NumpyBackend, r: Recurrence, arrays: Tangent) -> Step:
        """Return a function that runs step t of the tangent loop by a kernel of the backend."""
        kernel, x, k, add = backend.gated_tangent, r.views.x, r.views.coefficients, self.krause
        table, pre, dh, dc = arrays

        def step(t: int) -> None:
            kernel(pre[t], table, x[t], k[t], dc, dh[t + 1], add)

        return step

    def adjoint(self, backend: NumpyBackend, r: Recurrence, arrays: Adjoint) -> Step:
        """Return a function that runs step t of the adjoint loop by a kernel of the backend."""
        kernel, k = backend.gated_adjoint, r.views.coefficients
        dh, back, dc, da, inject = arrays

        def step(t: int) -> None:
            kernel(dh[t + 1], back, k[t], dc, da[t], inject)

        return step

    def bias_tangent(self, r: Recurrence, v: Array, pre: Array, dh: Array) -> None:
        """Fill R h with g R b_h, where g = 1 - h^2."""
        np.multiply(r.hidden[1:], r.hidden[1:], out=dh[1:])
        np.subtract(1, dh[1:], out=dh[1:])
        dh[1:] *= v

    def bias_cotangent(self, hidden: Array, dh: Array, da: Array) -> Array:
        """Return g dh, the cotangents of b_h, where g = 1 - h^2."""
        return (1 - hidden * hidden) * dh


CELLS: dict[str, Cell] = {
    "rnn": Plain(),
    "mrnn": Plain(multiplicative=True),
    "lstm": Gated(),
    "mlstm": Gated(multiplicative=True),
    "gru": GRU(),
}
"""All cells by name, in their standard variant."""

VARIANTS = ("standard", "krause")


def cell(name: str, variant: str = "standard") -> Cell:
    """Return the cell of this name and variant.

    Raises
    ------
    UserError
        If it does not exist.
    """
    if name not in CELLS:
        raise UserError(
            f"there is no model {name!r}{did_you_mean(name, CELLS)}; choose one of {', '.join(CELLS)}"
        )
    if variant not in VARIANTS:
        raise UserError(
            f"there is no variant {variant!r}{did_you_mean(variant, VARIANTS)}; choose one of "
            f"{', '.join(VARIANTS)}"
        )
    standard = CELLS[name]
    if variant == "standard":
        return standard
    if not isinstance(standard, Gated):
        raise UserError(f"the krause variant is for lstm and mlstm, not for {name}")
    return Gated(standard.multiplicative, krause=True)
