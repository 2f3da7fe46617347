"""The quantities of a step that are drawn: costs, which are axes, and internals, each with a panel."""

from __future__ import annotations

import re
from dataclasses import dataclass

__all__ = ["COSTS", "INTERNALS", "Cost", "Internal"]

INDEXED = re.compile(r"(\w)_(\w)")
"""A symbol and its index, as in P_I."""


@dataclass(frozen=True)
class Cost:
    """A cost of all steps so far, against which curves are drawn.

    Attributes
    ----------
    name : str
    passes : str
        The passes that it counts; empty for other costs.
    log : bool
        Whether its axis is logarithmic in a figure; on a page the reader chooses.
    """

    name: str
    passes: str = ""
    log: bool = True

    @property
    def label(self) -> str:
        """Return the label of an axis for matplotlib."""
        name = INDEXED.sub(r"$\g<0>$", self.name)
        return f"{self.passes} {name}" if self.passes else name

    @property
    def html(self) -> str:
        """Return the name for a page."""
        return INDEXED.sub(r"\1<sub>\2</sub>", self.name)


COSTS = {
    "P_I": Cost("P_I", "sequential passes"),
    "P_D": Cost("P_D", "passes over single examples"),
    "P_I_full": Cost("P_I full", "sequential passes"),
    "P_D_full": Cost("P_D full", "passes over single examples"),
    "step": Cost("steps"),
    "seconds": Cost("seconds", log=False),
}
"""Costs by their keys in a step record."""


@dataclass(frozen=True)
class Internal:
    """A quantity that an optimizer reports for each step.

    Attributes
    ----------
    meaning : str
    log : bool
        Whether its axis is logarithmic.
    range : tuple of float, optional
        The limits of its axis; by default those of the values.
    levels : tuple of float
        Values that are marked by a thin line.
    plotted : bool
        Whether `hfmpi plot --internals` has a panel for it; pages have panels for all.
    """

    meaning: str
    log: bool = False
    range: tuple[float, float] | None = None
    levels: tuple[float, ...] = ()
    plotted: bool = True


INTERNALS = {
    "valid_metric": Internal("metric on the validation set", plotted=False),
    "damping": Internal("damping λ", log=True),
    # The damping grows if rho is below the lower level, and shrinks if it is above the upper level.
    "rho": Internal("reduction ratio ρ", range=(-0.5, 1.5), levels=(0.25, 0.75)),
    "cg_steps": Internal("CG iterations"),
    "cg_chosen": Internal("CG iterate that backtracking chose", plotted=False),
    "line_search_rate": Internal("line search rate (0: rejected)", range=(-0.05, 1.05)),
    "rate": Internal("learning rate, or length of the step", log=True),
    "gradient_norm": Internal("norm of the gradient", log=True),
    "step_norm": Internal("norm of the step (0: rejected)"),
    "step_seconds": Internal("seconds of the step", log=True, plotted=False),
}
"""Internals by their keys in a step record, in the order of their panels; optimizers report some of them."""
