"""The architecture of a network: which parameters it has, how many, and how they are drawn.

With n hidden units, I inputs and O outputs (both V symbols for a text) a network of one layer has

    rnn     n^2 + n I + n + n O + O
    mrnn    2 n^2 + 2 n I + n + n O + O
    lstm    4 n^2 + 4 n I + 4 n + n O + O
    mlstm   5 n^2 + 5 n I + 4 n + n O + O
    gru     3 n^2 + 3 n I + 4 n + n O + O

parameters; the `krause` variant has no output bias (O fewer). A further layer reads the n units of the one
below.
"""

from __future__ import annotations

import math
import numbers
from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from hfmpi.backends.base import Array
from hfmpi.errors import UserError, shown
from hfmpi.models.factors import FactorSums
from hfmpi.networks.cells import Gated, cell
from hfmpi.networks.recurrence import Cell
from hfmpi.optim.layout import Block, Layout
from hfmpi.settings import check

__all__ = ["INITIALISATIONS", "PAPER_PARAMETERS", "Architecture"]

INITIALISATIONS = ("krause", "krause-lstm", "sparse")
PAPER_PARAMETERS = {"rnn": 220_000, "mrnn": 215_000, "lstm": 220_000, "mlstm": 215_000, "gru": 220_000}
"""Budgets of the paper's section 3 (LSTM, mLSTM); the others take those of their gated kin."""

SPARSE_FAN_IN = 15
"""Incoming weights per unit of the sparse initialisation (Martens 2010, section 5)."""


@dataclass(frozen=True)
class Architecture:
    """One kind of recurrent network at one size.

    Attributes
    ----------
    name : {'rnn', 'mrnn', 'lstm', 'mlstm', 'gru'}
        Of the cell.
    hidden : int
        Units n of a layer.
    inputs : int
        Symbols, or numbers of an input vector.
    outputs : int
    layers : int
    variant : {'standard', 'krause'}
        Of lstm and mlstm; other cells are always 'standard'.

    Raises
    ------
    TypeError
        If a value is of another type.
    UserError
        If there is no such network.
    """

    name: str
    hidden: int
    inputs: int
    outputs: int
    layers: int = 1
    variant: str = "standard"

    def __post_init__(self) -> None:
        check(self)
        cell(self.name, self.variant)
        if self.hidden < 1 or self.inputs < 1 or self.outputs < 1:
            raise UserError("a model needs at least one hidden unit and one symbol")
        if self.layers < 1:
            raise UserError(f"a model needs at least one layer, not {self.layers}")

    @cached_property
    def cell(self) -> Cell:
        """The cell of every layer."""
        return cell(self.name, self.variant)

    @cached_property
    def names(self) -> tuple[dict[str, str], ...]:
        """For each layer the names of its parameters in the layout, by those that its cell gives them.

        Those of the first layer are the cell's own; W_h of the second is W_h.2.
        """
        own = self.cell.shapes(1, 1)
        return tuple(
            {name: f"{name}.{i}" if i > 1 else name for name in own} for i in range(1, self.layers + 1)
        )

    @cached_property
    def layout(self) -> Layout[str]:
        """Names and shapes of the parameters: layer by layer from below, then W_o and b_o."""
        shapes: dict[str, tuple[int, ...]] = {}
        for i, names in enumerate(self.names):
            own = self.cell.shapes(self.hidden, self.hidden if i else self.inputs)
            shapes |= {names[name]: shape for name, shape in own.items()}
        shapes["W_o"] = (self.hidden, self.outputs)
        if self.variant == "standard":
            shapes["b_o"] = (self.outputs,)
        return Layout(shapes)

    @cached_property
    def blocks(self) -> tuple[Block, ...]:
        """The matrices of theta: those of one affine map, which lie one after the other, as one.

        So [W_x; W_h; b] is one block where inputs, state and bias all act on the same pre-activations, and
        [W_o; b_o] is. The bias of a cell that they do not is a block of one row.
        """
        found = list[Block]()
        cell, layout = self.cell, self.layout
        joined = {"b_o"}
        if cell.of_inputs == cell.of_state == cell.groups:
            joined |= {"W_h", "b"} if cell.on_rows == cell.groups else {"W_h"}
        for whole, start in layout.offsets.items():
            shape = layout.shapes[whole]
            rows, columns = shape if len(shape) == 2 else (1, shape[0])
            last = found[-1] if found else Block("", 0, 0, 0)
            name = whole.partition(".")[0]
            if name in joined and last.columns == columns:
                cuts = (*last.cuts, last.rows)
                found[-1] = last._replace(name=f"{last.name} {whole}", rows=last.rows + rows, cuts=cuts)
            else:
                groups = columns // self.hidden if name in ("W_x", "W_h", "b") else 1
                found.append(Block(whole, start, rows, columns, groups=groups))
        return tuple(found)

    @cached_property
    def factor_sums(self) -> FactorSums:
        """The sums of the Kronecker factors of all blocks; steps times sequences is one count for all."""
        return FactorSums(self.blocks, shared=True)

    def of_layer(self, i: int, views: Mapping[str, Array]) -> dict[str, Array]:
        """Give the parameters of layer i, from below, by the names that the cell gives them."""
        return {name: views[whole] for name, whole in self.names[i].items()}

    def of_size(self, parameters: int) -> Architecture:
        """Give the same architecture with the hidden units that bring it nearest to this many parameters."""
        if not isinstance(parameters, (int, np.integer)):
            raise TypeError(f"parameters must be a whole number, not {shown(parameters)}")

        def size(hidden: int) -> int:
            return replace(self, hidden=hidden).layout.size

        most = 1
        while size(most) < parameters:
            most *= 2
        above = bisect_left(range(most + 1), parameters, lo=1, key=size)
        nearest = min(range(max(above - 1, 1), above + 1), key=lambda hidden: abs(size(hidden) - parameters))
        return replace(self, hidden=nearest)

    def initial(self, seed: int, initialisation: str = "krause", forget_bias: float = 0.0) -> np.ndarray:
        """Draw the parameters, float64, the same for every backend and number of ranks.

        Parameters
        ----------
        initialisation : {'krause', 'krause-lstm', 'sparse'}
            `krause` (Krause's released mLSTM code, 2016): input and output matrices 0.1 N(0, 1), recurrent
            matrices 0.02 N(0, 1). `krause-lstm` (his LSTM code; lstm and mlstm): recurrent matrices 1e-4
            N(0, 1), bias of the output gate -2. `sparse` (Martens 2010): 15 incoming N(0, 1) weights per
            unit, halved for tanh units, the rest 0. Other biases 0.
        forget_bias : float
            Of the gate that keeps the state of gated cells at the start. Krause's code has 3, with which
            Hessian-free is slower (docs/results/figure1.md).
        """
        if initialisation not in INITIALISATIONS:
            raise UserError(
                f"there is no initialisation {initialisation!r}; choose one of {', '.join(INITIALISATIONS)}"
            )
        lstm = initialisation == "krause-lstm"
        if lstm and not isinstance(self.cell, Gated):
            raise UserError(f"the initialisation krause-lstm is for lstm and mlstm, not for {self.name}")
        if not isinstance(seed, (int, np.integer)) or seed < 0:
            raise UserError(f"a seed must be a whole number that is not negative, not {shown(seed)}")
        if not isinstance(forget_bias, numbers.Real) or not math.isfinite(forget_bias):
            raise UserError(f"forget_bias must be a finite number, not {shown(forget_bias)}")
        rng = np.random.Generator(np.random.PCG64(seed))
        theta, n = np.zeros(self.layout.size), self.hidden
        # rnn and mrnn: Krause gives no scale; 0.02 would leave their memory empty at the start.
        recurrent = 1e-4 if lstm else self.cell.recurrent_scale or 1 / np.sqrt(n)
        for whole, view in self.layout.views(theta).items():
            name = whole.partition(".")[0]
            if view.ndim == 1:
                if name == "b" and self.cell.forget is not None:
                    view[self.cell.forget * n : (self.cell.forget + 1) * n] = forget_bias
                if name == "b" and lstm:
                    view[2 * n : 3 * n] = -2.0  # of the output gate
            elif initialisation != "sparse":
                scale = recurrent if name in ("W_h", "W_mh") else 0.1
                view[...] = scale * rng.standard_normal(view.shape)
            else:
                fan_in = min(SPARSE_FAN_IN, view.shape[0])
                for unit in range(view.shape[1]):
                    rows = rng.choice(view.shape[0], fan_in, replace=False)
                    view[rows, unit] = rng.standard_normal(fan_in)
                if name in ("W_x", "W_h"):
                    view[:, self.cell.tanh_columns(name, n)] *= 0.5
        return theta
