"""Draw runs: losses against costs, the internals of steps, and small charts of both for a terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hfmpi.display import MARKERS, STYLES, aligned, label, sparkline
from hfmpi.errors import UserError
from hfmpi.files.history import Record, loss_keys
from hfmpi.files.numbers import is_drawable
from hfmpi.measure.smoothing import smoothed
from hfmpi.report.quantities import COSTS, INTERNALS

__all__ = ["AXES", "Runs", "charts", "draw", "draw_internals"]

AXES = "P_I", "P_D", "seconds"
"""The costs of the panels of a figure of losses, in the order of the paper's Figure 1."""

LOSSES = "train_bpc", "valid_bpc", "loss", "valid_loss"
"""Keys of losses; a run has some of them. The keys of metrics start with valid_ too."""

Runs = Sequence[tuple[str, Sequence[Record]]]
"""Name and step records of each run."""


def charts(runs: Runs, internals: bool) -> list[str]:
    """Return a line for each run and quantity: its first and last value, and a small chart over the steps.

    Raises
    ------
    UserError
        See `draw_internals`.
    """
    rows, lines = [["run", "steps", "", "first", "last"]], []
    for name, records in runs:
        keys = _internals(name, records) if internals else _losses(records[0])
        for key in keys:
            values = _column(records, key)
            known = [value for value in values if value is not None]
            ends = [f"{value:.4g}" for value in (known[0], known[-1])] if known else ["", ""]
            rows.append([Path(name).name, f"{records[-1]['step']:,}", key, *ends])
            lines.append(sparkline(values, log=key in INTERNALS and INTERNALS[key].log))
    head, *table = aligned(rows)
    return [head, *(f"{row}  {line}" for row, line in zip(table, lines, strict=True))]


def draw(runs: Runs, unit: str) -> Any:
    """Return a figure of training and validation losses, with a panel for each cost of `AXES`.

    The runs differ in line style and marker, so that the figure can be read in black and white.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 4.2), layout="constrained")
    axes = figure.subplots(1, 3, sharey=True)
    top, handles = 0.0, {}
    for i, (name, records) in enumerate(runs):
        losses = [loss_keys(record).of(record) for record in records]
        smooth = smoothed([train for train, _ in losses if train is not None])
        top = max(top, smooth[min(len(smooth) - 1, len(smooth) // 50 + 1)])
        for axis, key in zip(axes, AXES, strict=True):
            xs = _column(records, key)
            (line,) = axis.plot(xs, smooth, linestyle=STYLES[i % len(STYLES)], color=f"C{i}", linewidth=1.2)
            points = [(x, valid) for x, (_, valid) in zip(xs, losses, strict=True) if valid is not None]
            marker = MARKERS[i % len(MARKERS)]
            marks = []
            if points:  # marked at intervals, so that the line remains visible
                columns = zip(*points, strict=True)
                marks = axis.plot(*columns, marker, color=f"C{i}", markersize=4, markevery=0.03)
                axis.plot(*points[-1], marker, color=f"C{i}", markersize=4)  # the last one is always marked
        valid = [value for _, value in losses if value is not None]
        if valid:  # a validation loss that rises stays in the figure
            top = max(top, *valid[valid.index(min(valid)) :])
        handles[label(name)] = (line, *marks)
    for axis, key in zip(axes, AXES, strict=True):
        axis.set_xlabel(COSTS[key].label)
        axis.set_xscale("log" if COSTS[key].log else "linear")
        _readable(axis.xaxis)
        axis.grid(alpha=0.3)
    axes[0].set_ylabel(f"{unit} (line: training, marks: validation)")
    lowest = min(y for line in axes[0].lines for y in line.get_ydata())
    axes[0].set_ylim(lowest - 0.03 * (top - lowest or 1.0), top)
    axes[-1].legend(handles.values(), handles.keys())
    return figure


def _readable(axis: Any) -> None:
    """Label the ticks of a logarithmic axis so that labels do not overlap: 1, 2, 5, 10 or powers of ten."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    if axis.get_scale() != "log":
        return
    low, high = axis.get_view_interval()
    subs = (1.0, 2.0, 5.0) if high < 100 * low else (1.0,)
    axis.set_major_locator(LogLocator(subs=subs, numticks=12))
    axis.set_minor_formatter(NullFormatter())
    axis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.0f}" if 1 <= x < 1e7 else f"{x:.0e}"))


def draw_internals(runs: Runs) -> Any:
    """Return a figure of the quantities that optimizers report for each step, with a panel for each.

    Raises
    ------
    UserError
        If a run has no quantity that is known at every step.
    """
    from matplotlib.figure import Figure

    reported = [_internals(name, records) for name, records in runs]
    drawn = {key: about for key, about in INTERNALS.items() if any(key in keys for keys in reported)}
    rows = -(-len(drawn) // 2)
    figure = Figure(figsize=(11, 0.6 + 2.9 * rows), layout="constrained")
    panels = figure.subplots(rows, 2, sharex=True, squeeze=False).ravel()
    axes = dict(zip(drawn, panels, strict=False))
    for panel in panels[len(drawn) :]:
        panel.remove()
    for i, ((name, records), keys) in enumerate(zip(runs, reported, strict=True)):
        steps = [record["step"] for record in records]
        for key in keys:
            axes[key].plot(
                steps,
                [float("nan") if value is None else value for value in _column(records, key)],
                linestyle=STYLES[i % len(STYLES)],
                marker=MARKERS[i % len(MARKERS)],
                color=f"C{i}",
                label=label(name),
                linewidth=1.0,
                markersize=4,
                markerfacecolor="none",
                markevery=max(1, len(steps) // 15),
            )
    for key, about in drawn.items():
        axis = axes[key]
        axis.set_ylabel(about.meaning)
        axis.grid(alpha=0.3)
        axis.xaxis.set_tick_params(labelbottom=True)
        if about.log:
            axis.set_yscale("log")
        for level in about.levels:
            axis.axhline(level, color="0.5", linestyle=(0, (1, 3)))
        if about.range:
            axis.set_ylim(about.range)
    if "cg_steps" in axes:
        axes["cg_steps"].yaxis.get_major_locator().set_params(integer=True)
    for axis in list(axes.values())[-2:]:
        axis.set_xlabel("step")
    next(iter(axes.values())).legend()
    return figure


def _losses(record: Mapping[str, Any]) -> list[str]:
    """Return the keys of the losses and metrics of a record."""
    metrics = [key for key in record if key.startswith("valid_") and key not in LOSSES]
    return [key for key in LOSSES if key in record] + metrics


def _internals(name: str, records: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the keys of the internals that every step of a run has."""
    keys = [
        key
        for key, about in INTERNALS.items()
        if about.plotted and all(is_drawable(record.get(key, "")) for record in records)
    ]
    if not any(record["cg_steps"] for record in records):  # every history has this key
        keys.remove("cg_steps")
    if not keys:
        raise UserError(f"the history of {name} has no quantity for --internals that is known at every step")
    return keys


def _column(records: Sequence[Mapping[str, Any]], key: str) -> list[float | None]:
    return [record[key] for record in records]
