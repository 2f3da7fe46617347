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

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from hfmpi.measure import cost
from hfmpi.speedup.prediction import fit, predict
from hfmpi.speedup.runs import TimedRun
from hfmpi.speedup.scaling import Curve, Link
from hfmpi.speedup.steps import StepTimes

__all__ = ["causes", "compare", "study"]


def causes(
    base: StepTimes, run: StepTimes, uneven: float = 0.0, batch_seconds: float | None = None
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
    base: StepTimes, run: StepTimes, uneven: float = 0.0, batch_seconds: float | None = None
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


def study(
    job: TimedRun,
    runs: Sequence[StepTimes],
    link: Link | None = None,
    shapes: Mapping[str, Curve] | None = None,
    model: bool = False,
) -> dict[str, Any]:
    """Set all runs of a job, from the fewest ranks to the most, beside the first.

    `job` is any of them; `link` and `shapes` are those of `hfmpi.speedup.prediction.fit`.

    Returns
    -------
    dict
        `job`, `base_ranks`, `runs` (see `compare`) and, where it is asked for, `model` (see `predict`).
    """
    base, rows = runs[0], []
    alone = fit([base], job.messages, link, shapes)
    for run in runs:
        sizes, work = np.array([base.ranks, run.ranks]), run.work / base.work
        even = alone.compute(sizes, even=True) * work
        uneven = alone.compute(sizes) * work - even
        more = float(uneven[1] - uneven[0] * base.ranks / run.ranks)
        rows.append(compare(base, run, more, float(even[1]) if shapes else None))
    found: dict[str, Any] = {
        "job": {
            "model": job.model,
            "optimizer": job.config.optimizer,
            "gradient_batch": base.gradient_batch,
            "curvature_batch": base.curvature_batch,
            "parameters": job.parameters,
            "first_step": job.first,
            "last_step": job.last,
            "device": job.device,
            "threads": job.threads,
        },
        "base_ranks": base.ranks,
        "runs": rows,
    }
    return found | {"model": predict(runs, job.messages, link, shapes)} if model else found
