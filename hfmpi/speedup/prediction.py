"""From runs to the model of their job, and from the model to predictions that the runs can check."""

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
    """A kind of message: the spans of its pass, how many there were, and whether on the gradient batch."""

    spans: tuple[str, ...]
    count: Callable[[Counts], int]
    on_gradient: bool


KINDS = {
    **{kind.name: Kind(kind.spans, attrgetter(name), kind.on_gradient) for name, kind in PASSES.items()},
    # The work on matrices of theta has a message alone: its time is in r.
    "matrices": Kind((), lambda counts: counts.projections or counts.gradients, True),
}


def fit(
    runs: Sequence[StepTimes],
    messages: Mapping[str, float],
    link: Link | None = None,
    shapes: Mapping[str, Curve] | None = None,
) -> Job:
    """Give the job that runs measured.

    Parameters
    ----------
    runs : sequence of StepTimes
        From the fewest ranks to the most. The first sets the level of every t_k; s and r are the last's. r is
        that of the rank with most of it, for which the others wait: matrices are shared out one by one, so
        that more ranks do not make the largest quicker.
    messages : mapping of str to float
        For each kind of pass the bytes that the ranks sum after it, none where it is 0 or missing.
    link : Link, optional
        Without it one without latency, on which the last run's collectives take what they took; None if
        that is one rank alone.
    shapes : mapping of str to Curve, optional
        How t_k depends on b. Without it, as from run to run.
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
    found = Job(tuple(passes), last.most_redundant, link)
    ranks = np.array([float(last.ranks)])
    if last.ranks > 1:
        passing = last.parts["compute"] + last.parts["waiting"]
        passing -= last.most_redundant - last.parts["redundant"]  # waited for in r
        found = replace(found, slowdown=passing / float(found.compute(ranks)[0]))
        spent = last.parts["allreduce"]
        if link is None and spent > 0:
            unit = float(replace(found, link=Link(0.0, 1.0)).allreduce(ranks)[0])
            found = replace(found, link=Link(0.0, unit / spent))
    return found


def _pass_seconds(run: StepTimes, kind: Kind) -> float:
    """Give the seconds of one pass, with its part of the input, the mean over ranks."""
    mean = run.mean_spans
    named = sum(mean.get(name, 0.0) for name in {name for each in KINDS.values() for name in each.spans})
    own = sum(mean.get(name, 0.0) for name in kind.spans) * run.parts["compute"] / named
    return own * run.counts.steps / kind.count(run.counts)


def predict(
    runs: Sequence[StepTimes],
    messages: Mapping[str, float],
    link: Link | None = None,
    shapes: Mapping[str, Curve] | None = None,
    most: int = 16_384,
) -> dict[str, Any]:
    """Predict steps on 1 to `most` ranks, and each run from those on fewer ranks; arguments as of `fit`.

    Returns
    -------
    dict
        `rows` for powers of two, the knee and the fastest number of ranks; `check`, with the relative error
        of each prediction; and the parameters of the model. Speedups are relative to the first run's ranks.
    """
    base = runs[0]
    job = fit(runs, messages, link, shapes)
    knee, fastest = best(job, most)
    sizes = sorted({2**k for k in range(most.bit_length())} | {knee, fastest})
    ranks = np.array(sizes, np.float64)
    seconds, allreduce = job.seconds(ranks), job.allreduce(ranks)
    relative = float(job.seconds([base.ranks])[0])
    paper = {size: cost.ranks(base.counts, *base.batches, size) for size in (base.ranks, *sizes)}
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
                "predicted": paper[base.ranks] / paper[size],
                "compute": t - a - job.redundant,
                "allreduce": a,
                "redundant": job.redundant,
            }
            for size, t, a in zip(sizes, seconds.tolist(), allreduce.tolist(), strict=True)
        ],
        "knee": knee,
        "fastest": fastest,
        "slowdown": job.slowdown,
        "latency": job.link and job.link.latency,
        "bandwidth": job.link and job.link.bandwidth,
        "least_batch": {kind: min(curve.batches) for kind, curve in (shapes or {}).items()},
        "check": check,
    }
