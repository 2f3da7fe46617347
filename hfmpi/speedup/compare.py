"""Measured speedup beside the predicted one, and what became of the difference.

============  ==========================================================================================
T_P           seconds of a step on P ranks, the mean over steps and ranks
P_0           ranks of the run that the others are compared to, the smallest
S_P           speedup T_{P_0} / T_P, at best P / P_0
E_P           efficiency S_P P_0 / P
c_P           mean over ranks of the seconds in passes over the network: what is shared out
W_P           forward passes that were executed (hfmpi.measure.cost.full)
============  ==========================================================================================

The gap T_P - T_{P_0} P_0 / P is what a step takes longer than if the work were shared out for free. Every
second of a rank belongs to one span, so the gap is the sum of its parts' gaps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from hfmpi.measure import cost
from hfmpi.measure.cost import Counts

__all__ = ["PASSES", "Measured", "compare", "mean_spans"]

PASSES = "forward", "gradient", "linearise", "products", "line search", "input"
"""Spans of the work that ranks share."""


@dataclass(frozen=True)
class Measured:
    """The steps of a job on one number of ranks.

    Attributes
    ----------
    ranks : int
    seconds : (repeats, steps) float64
        Duration of each step.
    spans : tuple of dict of str to float
        For each rank, seconds per step by name, `allreduce` without `waiting`; their sum is the step.
    outside : tuple of dict of str to float
        For each rank, seconds of the whole run outside its steps by name: evaluation, files.
    counts : Counts
        What was executed in these steps, in all repeats.
    gradient_batch, curvature_batch : int
        Sequences, of all ranks together.
    """

    ranks: int
    seconds: np.ndarray
    spans: tuple[dict[str, float], ...]
    outside: tuple[dict[str, float], ...]
    counts: Counts
    gradient_batch: int
    curvature_batch: int

    @property
    def batches(self) -> tuple[int, int]:
        """B_g and B_c."""
        return self.gradient_batch, self.curvature_batch

    @property
    def step_seconds(self) -> float:
        """T_P, from the spans."""
        return sum(self.mean_spans.values())

    @property
    def mean_spans(self) -> dict[str, float]:
        """Seconds per step by name, the mean over ranks."""
        return mean_spans(self.spans)

    @property
    def parts(self) -> dict[str, float]:
        """The same in four parts; what is neither pass, Allreduce nor waiting is done by every rank."""
        spans = self.mean_spans
        compute = sum(spans.get(name, 0.0) for name in PASSES)
        allreduce, waiting = spans.get("allreduce", 0.0), spans.get("waiting", 0.0)
        redundant = self.step_seconds - compute - allreduce - waiting
        return {"compute": compute, "allreduce": allreduce, "waiting": waiting, "redundant": redundant}

    @property
    def imbalance(self) -> float:
        """Seconds in passes of the slowest rank over those of the mean."""
        compute = [sum(spans.get(name, 0.0) for name in PASSES) for spans in self.spans]
        return float(max(compute) / np.mean(compute)) if any(compute) else 1.0

    @property
    def work(self) -> float:
        """W_P, executed forward passes of a step."""
        return cost.full(self.counts, *self.batches)[0] / self.counts.steps


def mean_spans(all_spans: Sequence[dict[str, float]]) -> dict[str, float]:
    """Give the mean of seconds by name; a name that is missing somewhere counts as 0 there."""
    names = dict.fromkeys(name for spans in all_spans for name in spans)
    return {name: float(np.mean([spans.get(name, 0.0) for spans in all_spans])) for name in names}


def causes(
    base: Measured, run: Measured, uneven: float = 0.0, batch_seconds: float | None = None
) -> dict[str, float]:
    """Give the gap T_P - T_{P_0} P_0 / P by its causes, seconds per step; they add up to it.

    With the ideal share x -> x P_0 / P of each part:

    - allreduce: the seconds in collectives less their share, without waiting;
    - uneven shares: `uneven`, what a rank with ceil(B / P) sequences should take longer than with B / P; the
      others wait for it, and P_P counts it;
    - waiting: for slower ranks, without that: something held them up;
    - redundant: what every rank does for itself, less its share;
    - other work: passes that this run executed and the other did not (rounding leads to another line search),
      c_{P_0} (W_P / W_{P_0} - 1);
    - slower passes: c_P less all that. With `batch_seconds`, what the passes of a step should take on a rank
      alone with its smaller batch, it is split into smaller batch and shared memory (everything else by which
      ranks beside one another slow each other down).
    """
    share = base.ranks / run.ranks
    ours, theirs = run.parts, base.parts
    gaps = {name: ours[name] - share * theirs[name] for name in ("allreduce", "waiting", "redundant")}
    gaps = {"uneven shares": uneven} | gaps | {"waiting": gaps["waiting"] - uneven}
    more = share * theirs["compute"] * (run.work / base.work - 1)
    slower = ours["compute"] - share * theirs["compute"] - more
    gaps["other work"] = more
    if batch_seconds is None:
        return gaps | {"slower passes": slower}
    smaller = batch_seconds - share * theirs["compute"] - more
    return gaps | {"smaller batch": smaller, "shared memory": slower - smaller}


def compare(
    base: Measured, run: Measured, uneven: float = 0.0, batch_seconds: float | None = None
) -> dict[str, Any]:
    """Set a run beside the one with the fewest ranks.

    Returns
    -------
    dict
        `speedup` and `efficiency` with their 10 % and 90 % quantiles over steps; `predicted`, P_{P_0} / P_P,
        and `limit`, P_{P_0} / P_I, by the paper's account of the run's own counts; `loss`, 1 - E_P by its
        causes, which add up to it.
    """
    share = base.ranks / run.ranks
    speedup = base.step_seconds / run.step_seconds
    each = base.seconds.mean(axis=0) / run.seconds.mean(axis=0)
    spread = [float(q) for q in np.quantile(each, (0.1, 0.9))]
    before, after = (cost.ranks(run.counts, *run.batches, size) for size in (base.ranks, run.ranks))
    limit = cost.paper(run.counts, *run.batches)[1]
    gaps = causes(base, run, uneven, batch_seconds)
    return {
        "ranks": run.ranks,
        "repeats": len(run.seconds),
        "steps": run.seconds.shape[1],
        "seconds_per_step": run.step_seconds,
        "seconds_spread": [float(q) for q in np.quantile(run.seconds, (0.1, 0.9))],
        "speedup": speedup,
        "speedup_spread": spread,
        "efficiency": speedup * share,
        "efficiency_spread": [bound * share for bound in spread],
        "predicted": before / after,
        "limit": before / limit,
        "loss": {name: gap / run.step_seconds for name, gap in gaps.items()},
        "imbalance": run.imbalance,
        "spans": list(run.spans),
        "outside": list(run.outside),
    }
