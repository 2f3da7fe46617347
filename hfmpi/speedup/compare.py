"""Compare measured and predicted speedup, and attribute the difference to its causes.

============  ==========================================================================================
T_P           seconds of a step on P ranks, the mean over steps and ranks
P_0           ranks of the run with the fewest ranks, with which the others are compared
S_P           speedup T_{P_0} / T_P, ideally P / P_0
E_P           efficiency S_P P_0 / P
c_P           seconds in passes over the network and in products with rows, which are divided among ranks;
              the mean over ranks
W_P           executed forward passes, without linear algebra (hfmpi.measure.cost.executed)
============  ==========================================================================================

The gap T_P - T_{P_0} P_0 / P is the time by which a step is longer than if its work were divided at no cost.
Every second of a rank belongs to one span, so the gap is the sum of the gaps of its parts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from hfmpi.errors import UserError
from hfmpi.measure import cost
from hfmpi.speedup.prediction import fit, predict
from hfmpi.speedup.runs import TimedRun
from hfmpi.speedup.scaling import Curve, Link
from hfmpi.speedup.steps import StepTimes

__all__ = ["causes", "compare", "study"]


def causes(
    base: StepTimes, run: StepTimes, uneven: float = 0.0, batch_seconds: float | None = None
) -> dict[str, float]:
    """Return the causes of the gap T_P - T_{P_0} P_0 / P in seconds per step; their sum is the gap.

    With the ideal share x -> x P_0 / P of each part:

    - allreduce: the seconds in collectives minus their share, without waiting;
    - uneven shares: `uneven`, the predicted time by which ceil(B / P) sequences take longer than B / P; the
      other ranks wait for it, and P_P counts it;
    - waiting: the remaining time of waiting for slower ranks, which were delayed;
    - redundant: the work that every rank computes itself, minus its share;
    - other work: passes that this run executed and the base run did not (rounding may change a line search),
      c_{P_0} (W_P / W_{P_0} - 1);
    - slower passes: the remainder of c_P. With `batch_seconds`, the predicted time of the passes of a step on
      a single rank with its smaller batch, this is split into smaller batch and shared memory (all other ways
      in which the ranks of a machine slow each other down).
    """
    share = base.ranks / run.ranks
    ours, theirs = run.parts, base.parts
    gaps = {name: ours[name] - share * theirs[name] for name in ("allreduce", "waiting", "redundant")}
    gaps = {"uneven shares": uneven} | gaps | {"waiting": gaps["waiting"] - uneven}
    extra = share * theirs["compute"] * (run.work / base.work - 1)
    slower = ours["compute"] - share * theirs["compute"] - extra
    gaps["other work"] = extra
    if batch_seconds is None:
        return gaps | {"slower passes": slower}
    smaller = batch_seconds - share * theirs["compute"] - extra
    return gaps | {"smaller batch": smaller, "shared memory": slower - smaller}


def compare(
    base: StepTimes, run: StepTimes, uneven: float = 0.0, batch_seconds: float | None = None
) -> dict[str, Any]:
    """Compare a run with the run on the fewest ranks.

    Returns
    -------
    dict
        `speedup` and `efficiency` with their 10 % and 90 % quantiles over steps; `predicted`, P_{P_0} / P_P,
        and `limit`, P_{P_0} / P_I, by the paper's account of the run's counts; `loss`, the parts of 1 - E_P
        by their causes.
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
    """Compare all runs of a job, in order of their ranks, with the first run.

    `job` is any of the runs; `link` and `shapes` are arguments of `hfmpi.speedup.prediction.fit`.

    Returns
    -------
    dict
        `job`, `base_ranks`, `runs` (see `compare`), and with `model` also `model` (see `predict`).

    Raises
    ------
    UserError
        With `model`, if the optimizer sends messages that are not part of the scaling model.
    """
    if model and job.config.preset().optimizer.messages(job.parameters, job.blocks).others:
        # Matrices of M^2 or D^2 numbers are not part of the scaling model: it includes neither their messages
        # nor the work on them, most of which the ranks share.
        raise UserError(
            f"no prediction is possible for {job.config.optimizer}: the scaling model does not include the "
            "cost of its matrices of all residuals on more ranks; omit --model, --latency and --bandwidth"
        )
    base, rows = runs[0], []
    fitted = fit([base], job.messages, link, shapes)
    for run in runs:
        sizes, work = np.array([base.ranks, run.ranks]), run.work / base.work
        even = fitted.compute(sizes, even=True) * work
        uneven = fitted.compute(sizes) * work - even
        extra = float(uneven[1] - uneven[0] * base.ranks / run.ranks)
        rows.append(compare(base, run, extra, float(even[1]) if shapes else None))
    result: dict[str, Any] = {
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
    return result | {"model": predict(runs, job.messages, link, shapes)} if model else result
