"""The four cells: which parameters each has, how many, and how they are drawn.

Krause et al. (2015), eq. 1-3, and Krause's released code of 2016 for the `krause` variant. With n hidden
units and V symbols a cell has

    rnn    n^2 + 2 n V + n + V          lstm   4 n^2 + 5 n V + 4 n + V
    mrnn   2 n^2 + 3 n V + n + V        mlstm  5 n^2 + 6 n V + 4 n + V

parameters; the `krause` variant has no output bias (V fewer).
"""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass

import numpy as np

from hfmpi.errors import UserError
from hfmpi.models.parameters import Layout

__all__ = ["CELLS", "INITIALISATIONS", "PAPER_PARAMETERS", "VARIANTS", "Cell"]

CELLS = ("rnn", "mrnn", "lstm", "mlstm")
VARIANTS = ("standard", "krause")
INITIALISATIONS = ("krause", "sparse")
PAPER_PARAMETERS = {"rnn": 220_000, "mrnn": 215_000, "lstm": 220_000, "mlstm": 215_000}
"""Budgets of the paper's section 3 (LSTM, mLSTM); the plain cells take those of their gated kin."""

SPARSE_FAN_IN = 15
"""Incoming weights per unit of the sparse initialisation (Martens 2010, section 5)."""


@dataclass(frozen=True)
class Cell:
    """One kind of recurrent cell at one size.

    Attributes
    ----------
    name : {'rnn', 'mrnn', 'lstm', 'mlstm'}
    hidden : int
        Units n.
    vocabulary : int
        Symbols V.
    variant : {'standard', 'krause'}
        Of the gated cells; plain cells are always 'standard'.
    """

    name: str
    hidden: int
    vocabulary: int
    variant: str = "standard"

    def __post_init__(self) -> None:
        if self.name not in CELLS:
            raise UserError(f"there is no model {self.name!r}; choose one of {', '.join(CELLS)}")
        if self.variant not in VARIANTS:
            raise UserError(f"there is no variant {self.variant!r}; choose one of {', '.join(VARIANTS)}")
        if self.variant == "krause" and not self.gated:
            raise UserError(f"the krause variant is for lstm and mlstm, not for {self.name}")
        if self.hidden < 1 or self.vocabulary < 1:
            raise UserError("a model needs at least one hidden unit and one symbol")

    @property
    def gated(self) -> bool:
        """LSTM-like."""
        return self.name in ("lstm", "mlstm")

    @property
    def multiplicative(self) -> bool:
        """With the intermediate state m = W_mx x * W_mh h' (the paper's eq. 3)."""
        return self.name in ("mrnn", "mlstm")

    @property
    def layout(self) -> Layout:
        """Names and shapes of the parameters. Gate order i, f, o, u."""
        n, v = self.hidden, self.vocabulary
        k = 4 * n if self.gated else n
        shapes: dict[str, tuple[int, ...]] = {}
        if self.multiplicative:
            shapes |= {"W_mx": (v, n), "W_mh": (n, n)}
        shapes |= {"W_x": (v, k), "W_h": (n, k), "b": (k,), "W_o": (n, v)}
        if self.variant == "standard":
            shapes["b_o"] = (v,)
        return Layout(shapes)

    @classmethod
    def of_size(cls, name: str, parameters: int, vocabulary: int, variant: str = "standard") -> Cell:
        """Give the cell whose number of parameters is nearest to the budget."""

        def size(hidden: int) -> int:
            return cls(name, hidden, vocabulary, variant).layout.size

        most = 1
        while size(most) < parameters:
            most *= 2
        above = bisect_left(range(most + 1), parameters, lo=1, key=size)
        nearest = min(range(max(above - 1, 1), above + 1), key=lambda hidden: abs(size(hidden) - parameters))
        return cls(name, nearest, vocabulary, variant)

    def initial(self, seed: int, initialisation: str = "krause", forget_bias: float = 0.0) -> np.ndarray:
        """Draw the parameters, float64, the same for every backend and number of ranks.

        Parameters
        ----------
        initialisation : {'krause', 'sparse'}
            `krause` (Krause's released code, 2016): input and output matrices 0.1 N(0, 1), recurrent
            matrices 0.02 N(0, 1). `sparse` (Martens 2010): 15 incoming N(0, 1) weights per unit, halved for
            tanh units, the rest 0. Biases 0.
        forget_bias : float
            Of gated cells at the start. Krause's code has 3, with which Hessian-free is slower
            (docs/results/figure1.md).
        """
        if initialisation not in INITIALISATIONS:
            raise UserError(
                f"there is no initialisation {initialisation!r}; choose one of {', '.join(INITIALISATIONS)}"
            )
        rng = np.random.Generator(np.random.PCG64(seed))
        layout = self.layout
        theta = np.zeros(layout.size)
        for name, view in layout.views(theta).items():
            if view.ndim == 1:
                if name == "b" and self.gated:
                    view[self.hidden : 2 * self.hidden] = forget_bias
            elif initialisation == "krause":
                # rnn and mrnn: Krause gives no scale; 0.02 would leave their memory empty at the start.
                recurrent = 0.02 if self.gated else 1 / np.sqrt(self.hidden)
                scale = recurrent if name in ("W_h", "W_mh") else 0.1
                view[...] = scale * rng.standard_normal(view.shape)
            else:
                fan_in = min(SPARSE_FAN_IN, view.shape[0])
                for unit in range(view.shape[1]):
                    rows = rng.choice(view.shape[0], fan_in, replace=False)
                    view[rows, unit] = rng.standard_normal(fan_in)
                if name in ("W_x", "W_h") and not self.gated:
                    view *= 0.5
                elif name in ("W_x", "W_h"):
                    view[:, 3 * self.hidden :] *= 0.5
        return theta
