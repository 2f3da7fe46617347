"""`hfmpi plot`: the axes of the paper's Figure 1."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from hfmpi.errors import UserError

__all__ = ["plot"]

STYLES = ("-", "--", "-.", ":")
MARKERS = "os^Dv*"


@click.command()
@click.argument("runs", nargs=-1, required=True, type=click.Path(path_type=Path), metavar="RUN...")
@click.option(
    "--out",
    required=True,
    type=click.Path(path_type=Path),
    metavar="FIG.png",
    help="PNG, SVG or PDF, by its ending.",
)
def plot(runs: tuple[Path, ...], out: Path) -> None:
    """Draw training (lines) and validation (marks) bits/char of RUN... against P_I, P_D and seconds."""
    try:
        import matplotlib
    except ImportError:
        raise UserError("drawing needs matplotlib: pip install 'hfmpi[plot]'") from None
    from hfmpi.runs.history import History

    drawn = ("train_bpc", "P_I", "P_D", "seconds")
    histories = []
    for run in runs:
        records = History.read(run, (*drawn, "valid_bpc"))
        # A step that was rejected because its loss is not finite has none.
        histories.append((str(run), [r for r in records if all(r[key] is not None for key in drawn)]))
    for name, records in histories:
        if not records:
            raise UserError(f"the history of {name} is empty")
    matplotlib.use("agg")
    figure = draw(histories)
    try:
        figure.savefig(out, dpi=150)
    except (OSError, ValueError) as error:
        raise UserError(f"cannot write {out}: {error}") from None
    click.echo(f"{out}: {len(runs)} run(s)")


def draw(histories: list[tuple[str, list[dict[str, Any]]]]) -> Any:
    """Make the figure: one panel a cost, one line style a run, so that it reads in black and white."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 4.2), layout="constrained")
    axes = figure.subplots(1, 3, sharey=True)
    labels = {
        "P_I": "batch-independent forward passes $P_I$",
        "P_D": "batch-dependent forward passes $P_D$",
        "seconds": "seconds",
    }
    top = 0.0
    for i, (name, records) in enumerate(histories):
        smooth = smoothed([r["train_bpc"] for r in records])
        top = max(top, smooth[min(len(smooth) - 1, len(smooth) // 50 + 1)])
        for axis, key in zip(axes, labels, strict=True):
            xs = [r[key] for r in records]
            style = STYLES[i % len(STYLES)]
            axis.plot(xs, smooth, style, color=f"C{i}", label=Path(name).name, linewidth=1.2)
            seen = [
                (x, r["valid_bpc"]) for x, r in zip(xs, records, strict=True) if r["valid_bpc"] is not None
            ]
            if seen:
                axis.plot(*zip(*seen, strict=True), MARKERS[i % len(MARKERS)], color=f"C{i}", markersize=3)
    for axis, (key, label) in zip(axes, labels.items(), strict=True):
        axis.set_xlabel(label)
        axis.set_xscale("log" if key != "seconds" else "linear")
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("bits/char (line: training, marks: validation)")
    axes[0].set_ylim(top=top)
    axes[-1].legend()
    return figure


def smoothed(values: list[float]) -> list[float]:
    """Give the running mean over the last 2 % of the steps (at most 50): single batches of sgd are noisy."""
    width = max(1, min(50, len(values) // 50))
    total, means = 0.0, []
    for i, value in enumerate(values):
        total += value - (values[i - width] if i >= width else 0.0)
        means.append(total / min(i + 1, width))
    return means
