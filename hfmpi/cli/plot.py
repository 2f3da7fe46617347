"""`hfmpi plot`: the axes of the paper's Figure 1, and what happens inside a step."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click

from hfmpi.cli.show import MARKERS, STYLES, aligned, label, need_matplotlib, runs_and_figure, save, sparkline
from hfmpi.errors import UserError

if TYPE_CHECKING:
    from hfmpi.files.history import Record

__all__ = ["plot"]

Quantity = Literal[
    "train_bpc",
    "valid_bpc",
    "loss",
    "valid_loss",
    "valid_metric",
    "P_I",
    "P_D",
    "seconds",
    "damping",
    "rho",
    "cg_steps",
    "line_search_rate",
    "rate",
    "gradient_norm",
    "step_norm",
]
"""Keys of a `Record` that are drawn."""

AXES: dict[Quantity, str] = {
    "P_I": "batch-independent forward passes $P_I$",
    "P_D": "batch-dependent forward passes $P_D$",
    "seconds": "seconds",
}
"""What they are, in the order of the panels of Figure 1."""

INTERNALS: dict[Quantity, str] = {
    "damping": "damping $\\lambda$",
    "rho": "reduction ratio $\\rho$",
    "cg_steps": "CG iterations",
    "line_search_rate": "line search rate (0: rejected)",
    "rate": "learning rate, or length of the step",
    "gradient_norm": "norm of the gradient",
    "step_norm": "norm of the step (0: rejected)",
}
"""What they are, in the order of the panels; a method has some of them."""

LOGARITHMIC = "damping", "rate", "gradient_norm"


@click.command()
@runs_and_figure("PNG, SVG or PDF, by its ending [default: small charts on the terminal].")
@click.option(
    "--internals",
    is_flag=True,
    help="Damping, reduction ratio, CG iterations and what else each step tells of itself instead.",
)
def plot(runs: tuple[Path, ...], out: Path | None, internals: bool) -> None:
    """Draw training (lines) and validation (marks) bits/char of RUN... against P_I, P_D and seconds.

    Of a text with other bytes than ASCII they are bits per byte, of a run of hfmpi.train its loss.
    """
    from hfmpi.data.corpus import loss_unit
    from hfmpi.files.checkpoint import trained_on
    from hfmpi.files.history import BITS, History, loss_keys

    if out is not None:
        need_matplotlib()
    histories, kinds = [], {}
    for run in runs:
        records = History.read(run, AXES)
        keys = kinds[run] = loss_keys(records[0]) if records else BITS
        records = History.read(run, (keys.train, keys.valid, *AXES))
        # A step that was rejected because its loss is not finite has none.
        records = [r for r in records if internals or keys.of(r)[0] is not None]
        if not records:
            raise UserError(f"the history of {run} is empty")
        histories.append((click.format_filename(run), records))
    if len(set(kinds.values())) > 1 and not internals:
        names = [next(run for run, own in kinds.items() if (own == BITS) == bits) for bits in (True, False)]
        text, other = map(click.format_filename, names)
        raise UserError(f"{text} has bits/char and {other} the loss of a model: draw them apart")
    corpora = {run: trained_on(run) for run in runs}
    known: dict[str, Path] = {}
    for run, (digest, _) in corpora.items():
        if digest is not None:
            known.setdefault(digest, run)
    if len(known) > 1 and not internals:
        one, other, *_ = map(click.format_filename, known.values())
        click.echo(f"Note: {one} and {other} were trained on different data.", err=True)
    inside = {run: _inside(run, records) for run, records in histories} if internals else {}
    if out is None:
        click.echo("\n".join(charts(histories, inside)))
        return
    unit = loss_unit(b"".join(symbols for _, symbols in corpora.values()))
    if keys != BITS:
        unit = "loss"
    written = save(draw_internals(histories, inside) if internals else draw(histories, unit), out)
    click.echo(f"{click.format_filename(written)}: {len(runs)} run(s)")


def _inside(run: str, records: list[Record]) -> list[Quantity]:
    """Give what every step of a run tells of itself; raise a UserError if that is nothing that is drawn."""
    from hfmpi.files.numbers import is_drawable

    found = [key for key in INTERNALS if all(is_drawable(record.get(key, "")) for record in records)]
    if not any(record["cg_steps"] for record in records):  # every history has them
        found.remove("cg_steps")
    if not found:
        raise UserError(f"the history of {run} has nothing that --internals draws at every step")
    return found


def charts(histories: list[tuple[str, list[Record]]], inside: dict[str, list[Quantity]]) -> list[str]:
    """Give a line a run and quantity: over its steps, and the first and last value."""
    rows, lines = [["run", "steps", "", "first", "last"]], []
    for name, records in histories:
        for key in inside.get(name, _losses(records)):
            values = [record[key] for record in records]
            known = [v for v in values if v is not None]
            ends = [f"{v:.4g}" for v in (known[0], known[-1])] if known else ["", ""]
            rows.append([Path(name).name, f"{records[-1]['step']:,}", key, *ends])
            lines.append(sparkline(values, log=key in LOGARITHMIC))
    left = aligned(rows)
    return [left[0], *(f"{line}  {chart}" for line, chart in zip(left[1:], lines, strict=True))]


def _losses(records: list[Record]) -> list[Quantity]:
    """Give the keys of the losses of a run, and of its metric."""
    keys: tuple[Quantity, ...] = ("train_bpc", "valid_bpc", "loss", "valid_loss", "valid_metric")
    return [key for key in keys if key in records[0]]


def draw_internals(histories: list[tuple[str, list[Record]]], inside: dict[str, list[Quantity]]) -> Any:
    """Make the figure of the internals: a panel a quantity, one line style and marker a run."""
    from matplotlib.figure import Figure

    keys = [key for key in INTERNALS if any(key in own for own in inside.values())]
    rows = -(-len(keys) // 2)
    figure = Figure(figsize=(11, 0.6 + 2.9 * rows), layout="constrained")
    panels = figure.subplots(rows, 2, sharex=True, squeeze=False).flat
    axes = dict(zip(keys, panels, strict=False))
    for panel in list(panels)[len(keys) :]:
        panel.remove()
    for i, (name, records) in enumerate(histories):
        steps = [record["step"] for record in records]
        for key in inside[name]:
            axis = axes[key]
            values = [float("nan") if record[key] is None else record[key] for record in records]
            axis.plot(
                steps,
                values,
                linestyle=STYLES[i % len(STYLES)],
                marker=MARKERS[i % len(MARKERS)],
                color=f"C{i}",
                label=label(name),
                linewidth=1.0,
                markersize=4,
                markerfacecolor="none",
                markevery=max(1, len(steps) // 15),
            )
    for key, axis in axes.items():
        axis.set_ylabel(INTERNALS[key])
        axis.grid(alpha=0.3)
        axis.xaxis.set_tick_params(labelbottom=True)
        if key in LOGARITHMIC:
            axis.set_yscale("log")
    if "cg_steps" in axes:
        axes["cg_steps"].yaxis.get_major_locator().set_params(integer=True)
    if "rho" in axes:
        for level in (0.25, 0.75):  # below and above, lambda grows and falls
            axes["rho"].axhline(level, color="0.5", linestyle=(0, (1, 3)))
        axes["rho"].set_ylim(-0.5, 1.5)
    if "line_search_rate" in axes:
        axes["line_search_rate"].set_ylim(-0.05, 1.05)
    for key in keys[-2:]:
        axes[key].set_xlabel("step")
    axes[keys[0]].legend()
    return figure


def draw(histories: list[tuple[str, list[Record]]], unit: str) -> Any:
    """Make the figure: one panel a cost, one line style a run, so that it reads in black and white."""
    from matplotlib.figure import Figure

    from hfmpi.files.history import loss_keys
    from hfmpi.measure.smoothing import smoothed

    figure = Figure(figsize=(13, 4.2), layout="constrained")
    axes = figure.subplots(1, 3, sharey=True)
    top, handles = 0.0, {}
    for i, (name, records) in enumerate(histories):
        losses = [loss_keys(r).of(r) for r in records]
        smooth = smoothed([train for train, _ in losses if train is not None])
        top = max(top, smooth[min(len(smooth) - 1, len(smooth) // 50 + 1)])
        for axis, key in zip(axes, AXES, strict=True):
            xs = [r[key] for r in records]
            style = STYLES[i % len(STYLES)]
            (line,) = axis.plot(xs, smooth, linestyle=style, color=f"C{i}", linewidth=1.2)
            seen = [(x, valid) for x, (_, valid) in zip(xs, losses, strict=True) if valid is not None]
            mark = MARKERS[i % len(MARKERS)]
            known = zip(*seen, strict=True)  # not all of them are drawn where they would cover the line
            marks = axis.plot(*known, mark, color=f"C{i}", markersize=4, markevery=0.03) if seen else []
        handles[label(name)] = (line, *marks)
    for axis, (key, meaning) in zip(axes, AXES.items(), strict=True):
        axis.set_xlabel(meaning)
        axis.set_xscale("log" if key != "seconds" else "linear")
        axis.grid(alpha=0.3)
    axes[0].set_ylabel(f"{unit} (line: training, marks: validation)")
    lowest = min(y for line in axes[0].lines for y in line.get_ydata())
    axes[0].set_ylim(lowest - 0.03 * (top - lowest or 1.0), top)
    axes[-1].legend(handles.values(), handles.keys())
    return figure
