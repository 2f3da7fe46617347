"""Compare what several runs cost to reach the lowest loss that all of them reached, on a terminal."""

from __future__ import annotations

import math

import numpy as np

from hfmpi.display import aligned
from hfmpi.files.history import loss_keys
from hfmpi.measure.smoothing import smoothed
from hfmpi.report.figure import AXES, Runs

__all__ = ["comparison"]

DIGITS = 2
"""Digits of the level, which is rounded up so that a reader can compare it with the figure."""

EXPLAINED = (
    "P_I counts sequential passes: it is the time on hardware without limits. P_D counts passes over single",
    "examples: it is the time on one core. Seconds are those of these runs, without validation.",
)


def comparison(runs: Runs, unit: str) -> list[str]:
    """Return lines with the costs of each run to one level of the training loss; none for a single run.

    The level is the lowest one that the smoothed losses of all runs reached (`hfmpi.measure.smoothing`).
    """
    if len(runs) < 2:
        return []
    losses = [smoothed(np.array([loss_keys(r).of(r)[0] for r in records], float)) for _, records in runs]
    scale = 10**DIGITS
    level = math.ceil(max(float(np.nanmin(each)) for each in losses) * scale) / scale
    rows = [["run", *AXES]]
    for (name, records), each in zip(runs, losses, strict=True):
        record = records[int(np.argmax(each <= level))]
        rows.append([name, f"{record['P_I']:,.0f}", f"{record['P_D']:,.0f}", f"{record['seconds']:,.1f}"])
    unit = "" if unit == "loss" else f" {unit}"
    head = f"Costs to a training loss of {level:.{DIGITS}f}{unit}, which all runs reached:"
    return ["", head, *aligned(rows), *EXPLAINED]
