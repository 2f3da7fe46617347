"""Format the tables that `hfmpi speedup` prints."""

from __future__ import annotations

from typing import Any

from hfmpi.display import aligned, bar
from hfmpi.measure.spans import ALLREDUCE, EVALUATE, FILES, SHARED, WAITING

__all__ = ["tables"]

TRUSTED = 0.3
"""The largest relative error of a check for which predictions are shown without a note."""

MOST_ROWS = 8
"""Maximum number of ranks with a row each; of a run on more ranks, only the fastest and the slowest."""


def tables(study: dict[str, Any]) -> list[str]:
    """Return the lines of all tables of a study (`hfmpi.speedup.compare.study`)."""
    job, runs, base = study["job"], study["runs"], study["base_ranks"]
    lines = [
        f"{job['model']}, {job['parameters']:,} parameters, {job['optimizer']}, "
        f"B_g = {job['gradient_batch']:,}"
        + (f", B_c = {job['curvature_batch']:,}" if job["curvature_batch"] else "")
        + f"; steps {job['first_step']:,} to {job['last_step']:,}; "
        + f"{job['device']}, {job['threads']} thread(s) per rank",
    ]
    if base > 1:
        lines.append(f"There is no run on 1 rank: speedup and efficiency are relative to {base} ranks.")
    head = ["ranks", "runs", "s/step", "10-90 %", "speedup", "10-90 %", "efficiency", "P_D/P_P", "limit"]
    table = [head]
    for run in runs:
        table.append(
            [
                f"{run['ranks']:,}",
                str(run["repeats"]),
                f"{run['seconds_per_step']:.4g}",
                _interval(run["seconds_spread"], ".4g"),
                f"{run['speedup']:.2f}",
                _interval(run["speedup_spread"], ".2f"),
                f"{run['efficiency']:.3f}",
                f"{run['predicted']:.2f}",
                f"{run['limit']:.1f}",
            ]
        )
    lines += ["", *aligned(table), "", "Speedup; the dots extend to the ideal speedup"]
    largest = max(run["ranks"] for run in runs) / base
    for run in runs:
        ideal = run["ranks"] / base
        lines.append(f"{run['ranks']:>6,}  {bar(run['speedup'], ideal, max(1, round(40 * ideal / largest)))}")
    lines += [
        "",
        "Seconds per step of each rank; evaluate and files: total seconds of the run",
        *aligned(_ranks(runs)),
    ]
    if len(runs) > 1:
        causes = list(runs[-1]["loss"])
        table = [["ranks", "lost", *causes]]
        for run in runs[1:]:
            parts = [f"{100 * run['loss'][cause]:.1f} %" for cause in causes]
            table.append([f"{run['ranks']:,}", f"{100 * (1 - run['efficiency']):.1f} %", *parts])
        lines += ["", "Lost efficiency, as parts of the step", *aligned(table)]
    if "model" in study:
        lines += ["", *_model(study["model"])]
    return lines


def _interval(bounds: list[float], form: str) -> str:
    return "-".join(format(bound, form) for bound in bounds)


def _ranks(runs: list[dict[str, Any]]) -> list[list[str]]:
    """Return the spans of the ranks as the rows of a table."""
    head = [*(n for n in SHARED if any(n in s for run in runs for s in run["spans"])), ALLREDUCE, WAITING]
    table = [["ranks", "rank", *head, "redundant", "max/mean", EVALUATE, FILES]]
    for run in runs:
        spans, outside = run["spans"], run["outside"]
        chosen = [(str(i), spans[i], outside[i]) for i in range(len(spans))]
        if len(spans) > MOST_ROWS:
            order = sorted(chosen, key=lambda row: sum(row[1].get(name, 0.0) for name in SHARED))
            chosen = [("fastest " + order[0][0], *order[0][1:]), ("slowest " + order[-1][0], *order[-1][1:])]
        for name, inside, between in chosen:
            rest = sum(value for key, value in inside.items() if key not in head)
            table.append(
                [
                    f"{run['ranks']:,}",
                    name,
                    *(f"{inside.get(key, 0.0):.4f}" for key in head),
                    f"{rest:.4f}",
                    f"{run['imbalance']:.3f}",
                    f"{between.get(EVALUATE, 0.0):.2f}",
                    f"{between.get(FILES, 0.0):.2f}",
                ]
            )
    return table


def _model(model: dict[str, Any]) -> list[str]:
    """Return the parameters of the scaling model, and its predictions."""
    if model["bandwidth"] is None:
        link = "no Allreduce was measured and no network is specified: communication is assumed to be free"
    else:
        link = f"latency {model['latency'] * 1e6:.3g} us, bandwidth {model['bandwidth'] / 1e9:.3g} GB/s"
    least = model["least_batch"].values()
    batches = (
        f"passes measured down to {max(least):g} sequence(s)"
        if least
        else "no --bench: for fewer sequences than in the runs, the time of a pass is assumed to be "
        "proportional to the sequences, which is too optimistic"
    )
    lines = [
        f"Model: {link};",
        f"simultaneous passes of several ranks take {model['slowdown']:.3f} times as long as those of one;",
        batches,
    ]
    table = [["ranks", "s/step", "speedup", "efficiency", "P_D/P_P", "compute", "allreduce", "redundant", ""]]
    knee, fastest = model["knee"], model["fastest"]
    marks = {fastest: "fastest", knee: "knee" if knee != fastest else "knee and fastest"}
    for row in model["rows"]:
        parts = [f"{row[key]:.4g}" for key in ("compute", "allreduce", "redundant")]
        table.append(
            [
                f"{row['ranks']:,}",
                f"{row['seconds_per_step']:.4g}",
                f"{row['speedup']:.2f}",
                f"{row['efficiency']:.3f}",
                f"{row['predicted']:.2f}",
                *parts,
                marks.get(row["ranks"], ""),
            ]
        )
    lines += aligned(table)
    for check in model["check"]:
        sources = ", ".join(map(str, check["from"]))
        predicted, measured = check["predicted_seconds"], check["measured_seconds"]
        lines.append(
            f"Check: {check['ranks']} ranks from {sources}: predicted {predicted:.4g} s/step, "
            f"measured {measured:.4g}, error {100 * check['error']:+.1f} %"
        )
    if any(abs(check["error"]) > TRUSTED for check in model["check"]):
        lines.append(
            f"Note: a check has an error of more than {100 * TRUSTED:.0f} %: do not rely on these "
            "predictions. Were other programs running, or more ranks than cores? Repeat the runs on an idle "
            "machine."
        )
    return lines
