"""`hfmpi report`: write a page of runs for a browser, also while they are running."""

from __future__ import annotations

import os
from pathlib import Path

import click

from hfmpi.cli.values import MOST, PATH, Number
from hfmpi.errors import UserError

__all__ = ["report"]


@click.command()
@click.argument("runs", nargs=-1, required=True, type=PATH, metavar="RUN...")
@click.option("--out", required=True, type=PATH, metavar="PAGE.html", help="File of the page.")
@click.option("--follow", is_flag=True, help="Rewrite the page until all runs are done, or until Ctrl-C.")
@click.option(
    "--every",
    default=5.0,
    show_default=True,
    type=Number(float, 1, MOST),
    metavar="SECONDS",
    help="Interval of --follow.",
)
def report(runs: tuple[Path, ...], out: Path, follow: bool, every: float) -> None:
    """Write a page of RUN...: curves, times, costs, settings and samples in one self-contained file.

    Losses are drawn against P_I, P_D, steps or seconds. A page that follows its runs reloads itself in the
    browser.
    """
    from hfmpi.files.atomic import replace
    from hfmpi.report import follow as following
    from hfmpi.report.contents import read
    from hfmpi.report.page import is_page, page, plotly_js

    plotly_js()  # fails without plotly, before anything is read
    if os.path.lexists(out) and not is_page(out):
        raise UserError(f"{out} exists and is not a page of hfmpi report: use a different --out")
    if follow:
        click.echo(f"{click.format_filename(out)} follows {len(runs)} run(s); Ctrl-C ends it")
        done = following.follow(runs, out, every, lambda sentence: click.echo(f"Note: {sentence}.", err=True))
        click.echo("All runs are done." if done else "The page is no longer updated.")
    else:
        replace(out, page(read(runs)))
    click.echo(f"{click.format_filename(out)}: {len(runs)} run(s), {os.path.getsize(out) / 1e6:.1f} MB")
