"""Draw the figure of `hfmpi speedup`: speedup against ranks, and the time of each rank by spans."""

from __future__ import annotations

from typing import Any

import numpy as np

from hfmpi.display import HATCHES
from hfmpi.measure.spans import ALLREDUCE, SHARED, WAITING
from hfmpi.speedup.steps import mean_spans

__all__ = ["draw"]

MOST_BARS = 40
"""Maximum number of bars for single ranks; with more ranks the mean of each run is drawn."""


def draw(study: dict[str, Any]) -> Any:
    """Return the figure of a study (`hfmpi.speedup.compare.study`); it can be read in black and white."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    _speedup(left, study)
    _seconds(right, study["runs"])
    return figure


def _speedup(axis: Any, study: dict[str, Any]) -> None:
    runs, base = study["runs"], study["base_ranks"]
    ranks = np.array([run["ranks"] for run in runs])
    measured = np.array([run["speedup"] for run in runs])
    low, high = np.array([run["speedup_spread"] for run in runs]).T
    model = study.get("model")
    sizes = np.array([*ranks, *(row["ranks"] for row in model["rows"])] if model else ranks)
    span = np.unique(sizes[sizes >= base])
    axis.plot(span, span / base, ":", color="0.5", label="ideal")
    predicted = model["rows"] if model else runs
    axis.plot(
        [row["ranks"] for row in predicted],
        [row["predicted"] for row in predicted],
        "s--",
        color="C1",
        mfc="none",
        ms=5,
        label="predicted, $P_D / P_P$",
    )
    errors = np.abs([np.minimum(low - measured, 0), np.maximum(high - measured, 0)])
    axis.errorbar(
        ranks, measured, errors, fmt="o-", color="C0", capsize=3, label="measured (10 to 90 % of steps)"
    )
    if model:
        rows = model["rows"]
        axis.plot(
            *np.array([(r["ranks"], r["speedup"]) for r in rows]).T, "^-.", color="C2", ms=4, label="model"
        )
        for row in rows:
            names = " and ".join(name for name in ("knee", "fastest") if row["ranks"] == model[name])
            if names:
                axis.annotate(
                    f"{names}: {row['ranks']:,} ranks",
                    (row["ranks"], row["speedup"]),
                    (8, -40 if row["ranks"] == model["knee"] else -70),
                    textcoords="offset points",
                    ha="left",
                    arrowprops={"arrowstyle": "->"},
                )
        limit = runs[0]["limit"]
        axis.axhline(limit, ls=(0, (8, 3)), color="0.3", lw=1, label=f"limit $P_D / P_I$ = {limit:.1f}")
        highest = max(limit, *(row["speedup"] for row in rows))
        axis.set_ylim(0.3 * min([*low, 1.0]), 16 * highest)
    axis.set_xscale("log", base=2)
    axis.set_yscale("log", base=2)
    if not model:
        axis.set_xticks(ranks, [str(r) for r in ranks])
        axis.set_yticks(span / base, [f"{s / base:g}" for s in span])
    axis.set_xlabel("ranks")
    axis.set_ylabel("speedup" if base == 1 else f"speedup relative to {base} ranks")
    axis.grid(alpha=0.3)
    axis.legend(loc="upper left")


def _seconds(axis: Any, runs: list[dict[str, Any]]) -> None:
    single = sum(run["ranks"] for run in runs) <= MOST_BARS
    bars = [
        (f"{run['ranks']}: rank {i}" if single else f"{run['ranks']}", spans)
        for run in runs
        for i, spans in enumerate(run["spans"] if single else [mean_spans(run["spans"])])
    ]
    drawn = [*SHARED, ALLREDUCE, WAITING]
    rest = [sum(v for k, v in spans.items() if k not in drawn) for _, spans in bars]
    parts = [(name, [spans.get(name, 0.0) for _, spans in bars]) for name in drawn]
    parts.insert(len(SHARED), ("redundant", rest))
    top = np.zeros(len(bars))
    for i, (name, heights) in enumerate(parts):
        if not any(heights):
            continue
        shade = str(1.0 - 0.06 * i)
        axis.bar(
            range(len(bars)),
            heights,
            bottom=top,
            label=name,
            color=shade,
            edgecolor="black",
            lw=0.5,
            hatch=HATCHES[i % len(HATCHES)],
        )
        top += heights
    axis.set_xticks(range(len(bars)), [name for name, _ in bars], rotation=90 if len(bars) > 8 else 0)
    axis.set_xlabel("ranks of the run: rank" if single else "ranks of the run (mean over them)")
    axis.set_ylabel("seconds per step")
    handles, labels = axis.get_legend_handles_labels()
    axis.legend(handles[::-1], labels[::-1], loc="upper left", bbox_to_anchor=(1.0, 1.0), fontsize="small")
