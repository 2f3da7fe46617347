"""Compute the curves of a run for its page: losses and the internals of each step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from hfmpi.measure.smoothing import smoothed
from hfmpi.report.contents import Contents
from hfmpi.report.quantities import COSTS, INTERNALS, Internal
from hfmpi.report.steps import COUNTS

__all__ = ["curves", "panels"]

MOST = 2000
"""Maximum number of points of a curve; more could not be distinguished and would make a page slow."""

MOST_OTHERS = 12
"""Maximum number of panels for quantities that are not in `INTERNALS`."""

CG = "cg_steps"
"""Every history has this key, even that of an optimizer without CG."""


def panels(runs: Sequence[Contents]) -> dict[str, Internal]:
    """Return the internals that these runs report, by their keys, in the order of their panels."""
    keys = dict.fromkeys(key for run in runs for key in _internals(run))
    known = {key: about for key, about in INTERNALS.items() if key in keys}
    others = [key for key in keys if key not in known]
    return known | {key: Internal(key) for key in others[:MOST_OTHERS]}


def _internals(run: Contents) -> list[str]:
    """Return the keys under which steps of a run have numbers, without losses, costs and counts."""
    others = {*COSTS, *COUNTS, "P_P", run.loss.train, run.loss.valid} - {CG}
    columns = run.steps.columns.items()
    return [key for key, values in columns if key not in others and (key != CG or values.any())]


def curves(run: Contents, keys: Sequence[str]) -> dict[str, Any]:
    """Return the curves of a run in a form that JSON can represent.

    Returns
    -------
    dict
        `x`: costs, by their keys in `COSTS`; `train` and `valid`: losses; `internals`: one list for each of
        `keys`, empty if the run does not report it. All other lists have the same length, with null for
        unknown values.
    """
    points = thinned(len(run.steps))
    valid = run.steps.column(run.loss.valid)
    # Every validation loss is shown, unless there are too many.
    validated = np.flatnonzero(~np.isnan(valid))
    points = np.union1d(points, validated[thinned(len(validated))])
    reported = _internals(run)
    return {
        "x": {key: _plain(run.steps.column(key)[points]) for key in COSTS},
        "train": _plain(smoothed(run.steps.column(run.loss.train))[points]),
        "valid": _plain(valid[points]),
        "internals": [_plain(run.steps.column(key)[points]) if key in reported else [] for key in keys],
    }


def thinned(count: int, most: int = MOST) -> np.ndarray:
    """Return at most `most` indices below `count`: evenly spaced, plus early ones for logarithmic axes."""
    if count <= most:
        return np.arange(count)
    even = np.linspace(0, count - 1, most - most // 4)
    early = np.geomspace(1, count, most // 4) - 1
    return np.unique(np.concatenate([even, early]).astype(int))


def _plain(values: np.ndarray) -> list[float | int | None]:
    """Return numbers for JSON, rounded to the digits that can be seen."""
    return [
        None if v != v else int(v) if v.is_integer() and abs(v) < 2**53 else float(f"{v:.7g}")
        for v in values.tolist()
    ]
