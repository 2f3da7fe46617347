"""`hfmpi plot`: draw losses on the axes of the paper's Figure 1, or the internals of steps."""

from __future__ import annotations

from pathlib import Path

import click

from hfmpi.cli.options import runs_and_figure
from hfmpi.display import need_matplotlib, save

__all__ = ["plot"]


@click.command()
@runs_and_figure("Figure: PNG, SVG or PDF, by its extension  [default: small charts on the terminal]")
@click.option(
    "--internals",
    is_flag=True,
    help="Draw damping, reduction ratio, CG iterations and other quantities of each step instead.",
)
def plot(runs: tuple[Path, ...], out: Path | None, internals: bool) -> None:
    """Draw training (lines) and validation (marks) bits/char of RUN... against P_I, P_D and seconds.

    The unit is bits/byte for a text with non-ASCII bytes, and that of the loss for a run of hfmpi.train. For
    several runs, the command also prints what each of them cost to reach the lowest training loss that all of
    them reached.
    """
    from hfmpi.report.figure import charts, draw, draw_internals
    from hfmpi.report.histories import read
    from hfmpi.report.levels import comparison

    if out is not None:
        need_matplotlib()
    histories, unit, note = read([(click.format_filename(run), run) for run in runs], internals)
    if note:
        click.echo(f"Note: {note}.", err=True)
    if out is None:
        click.echo("\n".join(charts(histories, internals)))
    else:
        figure = draw_internals(histories) if internals else draw(histories, unit)
        click.echo(f"{click.format_filename(save(figure, out))}: {len(runs)} run(s)")
    for line in [] if internals else comparison(histories, unit):
        click.echo(line)
