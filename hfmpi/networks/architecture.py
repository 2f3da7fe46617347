"""The architecture of a network: the names, shapes and number of its parameters, and their initial values.

With n hidden units, I inputs and O outputs (for a text I = O = V, the number of symbols) a network of one
layer has

    rnn     n^2 + n I + n + n O + O
    mrnn    2 n^2 + 2 n I + n + n O + O
    lstm    4 n^2 + 4 n I + 4 n + n O + O
    mlstm   5 n^2 + 5 n I + 4 n + n O + O
    gru     3 n^2 + 3 n I + 4 n + n O + O

parameters; the `krause` variant has no output bias (O fewer). An upper layer reads the n units of the layer
below, so that I = n.
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
from hfmpi.errors import UserError, did_you_mean, shown
from hfmpi.models.factors import FactorSums
from hfmpi.networks.cells import Gated, cell
from hfmpi.networks.recurrence import Cell
from hfmpi.optim.layout import Block, Layout
from hfmpi.settings import check

__all__ = ["INITIALISATIONS", "PAPER_PARAMETERS", "Architecture"]

INITIALISATIONS = ("krause", "krause-lstm", "sparse")
PAPER_PARAMETERS = {"rnn": 220_000, "mrnn": 215_000, "lstm": 220_000, "mlstm": 215_000, "gru": 220_000}
"""The number of parameters of the LSTM and mLSTM in section 3 of the paper, here of all cells."""

SPARSE_FAN_IN = 15
"""The number of incoming weights per unit in the sparse initialisation (Martens 2010, section 5)."""


@dataclass(frozen=True)
class Architecture:
    """The cell and the sizes of a recurrent network.

    Attributes
    ----------
    name : {'rnn', 'mrnn', 'lstm', 'mlstm', 'gru'}
        The cell.
    hidden : int
        n, the number of units per layer.
    inputs : int
        The number of input symbols, or the length of an input vector.
    outputs : int
        The length of an output vector: the number of symbols if the targets are symbols.
    layers : int
    variant : {'standard', 'krause'}
        The variant of lstm and mlstm; other cells are always 'standard'.

    Raises
    ------
    TypeError
        If a value has the wrong type.
    UserError
        If the cell or variant does not exist, or a size is less than 1.

    Examples
    --------
    >>> architecture = hfmpi.Architecture("lstm", hidden=100, inputs=50, outputs=50)
    >>> architecture.layout.size
    65450
    >>> architecture.of_size(220_000).hidden
    205
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
            raise UserError(
                f"hidden, inputs and outputs must be at least 1, not {self.hidden}, {self.inputs} and "
                f"{self.outputs}"
            )
        if self.layers < 1:
            raise UserError(f"layers must be at least 1, not {self.layers}")

    @cached_property
    def cell(self) -> Cell:
        """The cell of every layer."""
        return cell(self.name, self.variant)

    @cached_property
    def names(self) -> tuple[dict[str, str], ...]:
        """The names of the parameters in the layout by their names in the cell, for each layer.

        For example, the layout calls W_h of the first layer W_h, and W_h of the second layer W_h.2.
        """
        shapes = self.cell.shapes(1, 1)
        return tuple(
            {name: f"{name}.{i}" if i > 1 else name for name in shapes} for i in range(1, self.layers + 1)
        )

    @cached_property
    def layout(self) -> Layout[str]:
        """The names and shapes of the parameters: of each layer, from the lowest, then W_o and b_o."""
        shapes: dict[str, tuple[int, ...]] = {}
        for i, names in enumerate(self.names):
            of_layer = self.cell.shapes(self.hidden, self.hidden if i else self.inputs)
            shapes |= {names[name]: shape for name, shape in of_layer.items()}
        shapes["W_o"] = (self.hidden, self.outputs)
        if self.variant == "standard":
            shapes["b_o"] = (self.outputs,)
        return Layout(shapes)

    @cached_property
    def blocks(self) -> tuple[Block, ...]:
        """The matrices of theta, where adjacent matrices that form one affine map are one block.

        [W_x; W_h; b] is one block if inputs, state and bias contribute to the same pre-activations; otherwise
        the bias is a block of one row. [W_o; b_o] is one block.
        """
        blocks = list[Block]()
        cell, layout = self.cell, self.layout
        joined = {"b_o"}
        if cell.of_inputs == cell.of_state == cell.groups:
            joined |= {"W_h", "b"} if cell.on_rows == cell.groups else {"W_h"}
        for name, start in layout.offsets.items():
            shape = layout.shapes[name]
            rows, columns = shape if len(shape) == 2 else (1, shape[0])
            last = blocks[-1] if blocks else Block("", 0, 0, 0)
            kind = name.partition(".")[0]
            if kind in joined and last.columns == columns:
                cuts = (*last.cuts, last.rows)
                blocks[-1] = last._replace(name=f"{last.name} {name}", rows=last.rows + rows, cuts=cuts)
            else:
                groups = columns // self.hidden if kind in ("W_x", "W_h", "b") else 1
                blocks.append(Block(name, start, rows, columns, groups=groups))
        return tuple(blocks)

    @cached_property
    def factor_sums(self) -> FactorSums:
        """The sums for the Kronecker factors of all blocks; they share one divisor, steps times sequences."""
        return FactorSums(self.blocks, shared=True)

    def of_layer(self, i: int, views: Mapping[str, Array]) -> dict[str, Array]:
        """Return the parameters of layer i by their names in the cell; layer 0 is the lowest."""
        return {name: views[in_layout] for name, in_layout in self.names[i].items()}

    def of_size(self, parameters: int) -> Architecture:
        """Return the architecture whose number of hidden units gives the size nearest to `parameters`.

        Raises
        ------
        TypeError
            If `parameters` is not an integer.
        """
        if not isinstance(parameters, (int, np.integer)):
            raise TypeError(f"parameters must be a whole number, not {shown(parameters)}")

        def size(hidden: int) -> int:
            return replace(self, hidden=hidden).layout.size

        upper = 1
        while size(upper) < parameters:
            upper *= 2
        above = bisect_left(range(upper + 1), parameters, lo=1, key=size)
        nearest = min(range(max(above - 1, 1), above + 1), key=lambda hidden: abs(size(hidden) - parameters))
        return replace(self, hidden=nearest)

    def initial(self, seed: int, initialisation: str = "krause", forget_bias: float = 0.0) -> np.ndarray:
        """Draw initial parameters (D,), float64; they depend only on the arguments and the architecture.

        Parameters
        ----------
        seed : int
            At least 0.
        initialisation : {'krause', 'krause-lstm', 'sparse'}
            `krause` (Krause's released mLSTM code, 2016): input and output matrices 0.1 N(0, 1), recurrent
            matrices 0.02 N(0, 1). `krause-lstm` (his LSTM code; lstm and mlstm): recurrent matrices 1e-4
            N(0, 1), bias of the output gate -2. `sparse` (Martens 2010): 15 incoming N(0, 1) weights per
            unit, halved for tanh units; the remaining weights are 0. All other biases are 0.
        forget_bias : float
            The initial bias of the gate of a gated cell that preserves the state. Krause's code uses 3, with
            which Hessian-free optimisation is slower (docs/results/figure1.md).

        Raises
        ------
        UserError
            If the initialisation does not exist or is not for this cell, or a number is out of range.
        """
        if initialisation not in INITIALISATIONS:
            raise UserError(
                f"there is no initialisation {initialisation!r}"
                f"{did_you_mean(initialisation, INITIALISATIONS)}; choose one of {', '.join(INITIALISATIONS)}"
            )
        lstm = initialisation == "krause-lstm"
        if lstm and not isinstance(self.cell, Gated):
            raise UserError(f"the initialisation krause-lstm is for lstm and mlstm, not for {self.name}")
        if not isinstance(seed, (int, np.integer)) or seed < 0:
            raise UserError(f"a seed must be a whole number, 0 or more, not {shown(seed)}")
        if not isinstance(forget_bias, numbers.Real) or not math.isfinite(forget_bias):
            raise UserError(f"forget_bias must be a finite number, not {shown(forget_bias)}")
        rng = np.random.Generator(np.random.PCG64(seed))
        theta, n = np.zeros(self.layout.size), self.hidden
        # Krause gives no scale for rnn and mrnn. With 0.02 they would forget their state within a few steps.
        recurrent = 1e-4 if lstm else self.cell.recurrent_scale or 1 / np.sqrt(n)
        for name, view in self.layout.views(theta).items():
            kind = name.partition(".")[0]
            if view.ndim == 1:
                if kind == "b" and self.cell.forget is not None:
                    view[self.cell.forget * n : (self.cell.forget + 1) * n] = forget_bias
                if kind == "b" and lstm:
                    view[2 * n : 3 * n] = -2.0  # the output gate
            elif initialisation != "sparse":
                scale = recurrent if kind in ("W_h", "W_mh") else 0.1
                view[...] = scale * rng.standard_normal(view.shape)
            else:
                fan_in = min(SPARSE_FAN_IN, view.shape[0])
                for unit in range(view.shape[1]):
                    rows = rng.choice(view.shape[0], fan_in, replace=False)
                    view[rows, unit] = rng.standard_normal(fan_in)
                if kind in ("W_x", "W_h"):
                    view[:, self.cell.tanh_columns(kind, n)] *= 0.5
        return theta
