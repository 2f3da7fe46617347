"""The curves of a run as numbers for its page: losses, what each step tells of itself, and times of ranks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from hfmpi.measure.smoothing import smoothed
from hfmpi.report.contents import COSTS, Contents
from hfmpi.report.steps import COUNTS

__all__ = ["INTERNALS", "Panel", "curves", "panels"]

MOST = 2000
"""Points of a curve; more are not told apart, and make a page slow."""

MOST_OTHERS = 12
"""Quantities that are drawn without being known here."""


@dataclass(frozen=True)
class Panel:
    """How a quantity of a step is drawn.

    Attributes
    ----------
    meaning : str
    log : bool
        Whether its axis is logarithmic.
    range : tuple of float, optional
        Of its axis.
    levels : tuple of float
        At which a thin line is drawn.
    """

    meaning: str
    log: bool = False
    range: tuple[float, float] | None = None
    levels: tuple[float, ...] = ()


INTERNALS = {
    "valid_metric": Panel("metric on the validation set"),
    "damping": Panel("damping λ", log=True),
    # Below and above the levels, lambda grows and falls.
    "rho": Panel("reduction ratio ρ", range=(-0.5, 1.5), levels=(0.25, 0.75)),
    "cg_steps": Panel("CG iterations"),
    "cg_chosen": Panel("CG iterate that backtracking chose"),
    "line_search_rate": Panel("line search rate (0: rejected)", range=(-0.05, 1.05)),
    "rate": Panel("learning rate, or length of the step", log=True),
    "gradient_norm": Panel("norm of the gradient", log=True),
    "step_norm": Panel("norm of the step (0: rejected)"),
    "step_seconds": Panel("seconds of the step", log=True),
}
"""What methods tell of a step; a method has some of them. Other numbers of a history are drawn too."""

CG = "cg_steps"
"""Which every history has, of methods without it too."""


def panels(runs: Sequence[Contents]) -> dict[str, Panel]:
    """Give the quantities that steps of these runs tell, in the order of their panels."""
    found = dict.fromkeys(key for run in runs for key in _told(run))
    known = {key: panel for key, panel in INTERNALS.items() if key in found}
    return known | {key: Panel(key) for key in [key for key in found if key not in known][:MOST_OTHERS]}


def _told(run: Contents) -> list[str]:
    """Give the keys under which steps of a run have numbers, but for losses and costs."""
    others = {*COSTS, *COUNTS, "P_P", run.loss.train, run.loss.valid} - {CG}
    columns = run.steps.columns.items()
    return [key for key, values in columns if key not in others and (key != CG or values.any())]


def curves(run: Contents, keys: Sequence[str]) -> dict[str, Any]:
    """Give the curves of a run as JSON can hold them.

    Returns
    -------
    dict
        `x`: what a step has cost, by key of `COSTS`; `train` and `valid` losses; `told`: for each of the
        keys, what the step tells of itself, or nothing. Lists have one length, and null for what is unknown.
    """
    kept = thinned(len(run.steps))
    valid = run.steps.column(run.loss.valid)
    # Where it is known it is shown, if there are not too many.
    seen = np.flatnonzero(~np.isnan(valid))
    kept = np.union1d(kept, seen[thinned(len(seen))])
    own = _told(run)
    return {
        "x": {key: _plain(run.steps.column(key)[kept]) for key in COSTS},
        "train": _plain(smoothed(run.steps.column(run.loss.train))[kept]),
        "valid": _plain(valid[kept]),
        "told": [_plain(run.steps.column(key)[kept]) if key in own else [] for key in keys],
    }


def thinned(count: int, most: int = MOST) -> np.ndarray:
    """Give at most so many of the indices below `count`: even ones, and for logarithmic axes early ones."""
    if count <= most:
        return np.arange(count)
    even = np.linspace(0, count - 1, most - most // 4)
    early = np.geomspace(1, count, most // 4) - 1
    return np.unique(np.concatenate([even, early]).astype(int))


def _plain(values: np.ndarray) -> list[float | int | None]:
    """Give numbers as JSON has them, with the digits that can be seen."""
    return [
        None if v != v else int(v) if v.is_integer() and abs(v) < 2**53 else float(f"{v:.7g}")
        for v in values.tolist()
    ]
