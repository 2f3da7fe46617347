"""Fit the scaling model to the runs of a job, and make predictions that the runs can check."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from operator import attrgetter
from typing import Any

import numpy as np

from hfmpi.measure import cost
from hfmpi.measure.cost import PASSES, Counts
from hfmpi.speedup.scaling import Curve, Job, Link, Pass, best
from hfmpi.speedup.steps import StepTimes

__all__ = ["KINDS", "fit", "predict"]


@dataclass(frozen=True)
class Kind:
    """A kind of pass: its spans, the number of its passes, and whether it is over the gradient batch.

    The work on single matrices of theta is a kind that has only a message; its time is w.
    """

    spans: tuple[str, ...]
    count: Callable[[Counts], int]
    on_gradient: bool


KINDS = {
    **{kind.name: Kind(kind.spans, attrgetter(name), kind.on_gradient) for name, kind in PASSES.items()},
    # The work on matrices of theta, and on inner products, has only a message: its time is w.
    "matrices": Kind((), lambda counts: counts.projections or counts.gradients, True),
    "inner products": Kind((), lambda counts: counts.projections or counts.gradients, True),
}


def fit(
    runs: Sequence[StepTimes],
    messages: Mapping[str, float],
    link: Link | None = None,
    shapes: Mapping[str, Curve] | None = None,
) -> Job:
    """Return the job that explains the times of its runs.

    Parameters
    ----------
    runs : sequence of StepTimes
        In order of their ranks. The first run determines the level of every t_k; s, w and r are those of the
        last run. w and r are the maximum over ranks, because the other ranks wait for the slowest one: each
        matrix is assigned to one rank, so that more ranks do not make the largest matrix faster.
    messages : mapping of str to float
        The bytes that the ranks sum after each kind of pass; 0 or missing if there is no message.
    link : Link, optional
        By default a link without latency on which the collectives of the last run take their measured time,
        or None if the last run has one rank.
    shapes : mapping of str to Curve, optional
        The dependence of t_k on b; by default as measured by the runs.
    """
    base, last = runs[0], runs[-1]
    passes = []
    for name, kind in KINDS.items():
        times = kind.count(base.counts) / base.counts.steps
        if not times:
            continue
        batch = base.gradient_batch if kind.on_gradient else base.curvature_batch
        points = {batch / run.ranks: _pass_seconds(run, kind) for run in runs if kind.count(run.counts)}
        curve = Curve.through(points)
        if shapes and name in shapes:
            curve = shapes[name].scaled(batch / base.ranks, points[batch / base.ranks])
        passes.append(Pass(times, batch, curve, messages.get(name, 0)))
    job = Job(tuple(passes), last.most_redundant, link, matrices=last.matrices)
    ranks = np.array([float(last.ranks)])
    if last.ranks > 1:
        passing = last.parts["compute"] + last.parts["waiting"]
        passing -= float(job.alone(ranks)[0]) - last.parts["redundant"]  # waiting that w and r include
        job = replace(job, slowdown=passing / float(job.compute(ranks)[0]))
        spent = last.parts["allreduce"]
        if link is None and spent > 0:
            unit = float(replace(job, link=Link(0.0, 1.0)).allreduce(ranks)[0])
            job = replace(job, link=Link(0.0, unit / spent))
    return job


def _pass_seconds(run: StepTimes, kind: Kind) -> float:
    """Return the seconds of one pass including its share of the input, averaged over ranks."""
    mean = run.mean_spans
    all_kinds = sum(mean.get(name, 0.0) for name in {name for each in KINDS.values() for name in each.spans})
    this_kind = sum(mean.get(name, 0.0) for name in kind.spans) * run.parts["compute"] / all_kinds
    return this_kind * run.counts.steps / kind.count(run.counts)


def predict(
    runs: Sequence[StepTimes],
    messages: Mapping[str, float],
    link: Link | None = None,
    shapes: Mapping[str, Curve] | None = None,
    most: int = 16_384,
) -> dict[str, Any]:
    """Predict steps on 1 to `most` ranks, and each run from runs on fewer ranks; see `fit` for arguments.

    Returns
    -------
    dict
        `rows` for powers of two, the knee and the fastest number of ranks; `check`, with the relative error
        of each prediction of a run; and the parameters of the model. Speedups are relative to the first run.
    """
    base = runs[0]
    job = fit(runs, messages, link, shapes)
    knee, fastest = best(job, most)
    sizes = sorted({2**k for k in range(most.bit_length())} | {knee, fastest})
    ranks = np.array(sizes, np.float64)
    seconds, allreduce, alone = job.seconds(ranks), job.allreduce(ranks), job.alone(ranks)
    relative = float(job.seconds([base.ranks])[0])
    account = {size: cost.ranks(base.counts, *base.batches, size) for size in (base.ranks, *sizes)}
    check = []
    for i, run in enumerate(runs[1:], start=1):
        guess = float(fit(runs[:i], messages, link, shapes).seconds([run.ranks])[0])
        check.append(
            {
                "ranks": run.ranks,
                "from": [other.ranks for other in runs[:i]],
                "predicted_seconds": guess,
                "measured_seconds": run.step_seconds,
                "error": guess / run.step_seconds - 1,
            }
        )
    return {
        "rows": [
            {
                "ranks": size,
                "seconds_per_step": t,
                "speedup": relative / t,
                "efficiency": relative / t * base.ranks / size,
                "predicted": account[base.ranks] / account[size],
                "compute": t - a - r,
                "allreduce": a,
                "redundant": r,
            }
            for size, t, a, r in zip(sizes, *(x.tolist() for x in (seconds, allreduce, alone)), strict=True)
        ],
        "knee": knee,
        "fastest": fastest,
        "slowdown": job.slowdown,
        "latency": job.link and job.link.latency,
        "bandwidth": job.link and job.link.bandwidth,
        "least_batch": {kind: min(curve.batches) for kind, curve in (shapes or {}).items()},
        "check": check,
    }
