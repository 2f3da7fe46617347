"""`hfmpi speedup`: what more ranks brought, what was predicted, and what became of the difference."""

from __future__ import annotations

import json
from pathlib import Path

import click

from hfmpi.cli.show import need_matplotlib, runs_and_figure, save
from hfmpi.cli.values import BANDWIDTH, LATENCY, PATH
from hfmpi.errors import UserError

__all__ = ["speedup"]


@click.command()
@runs_and_figure("Draw too: PNG, SVG or PDF, by its ending.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@click.option("--model", is_flag=True, help="Predict the time of a step on 1 to 16,384 ranks.")
@click.option(
    "--bench",
    "benches",
    multiple=True,
    type=PATH,
    metavar="FILE.json",
    help="Output of `hfmpi bench products|gradients|allreduce --json`: passes over small batches, messages; "
    "repeatable.",
)
@click.option("--latency", type=LATENCY, help="Of the network to predict for, such as 2us.")
@click.option("--bandwidth", type=BANDWIDTH, help="Of the network to predict for, such as 10GB/s.")
def speedup(
    runs: tuple[Path, ...],
    out: Path | None,
    as_json: bool,
    model: bool,
    benches: tuple[Path, ...],
    latency: float | None,
    bandwidth: float | None,
) -> None:
    """Compare RUN..., the same job on 1, 2, 4 ... ranks; several runs on as many ranks are repeats.

    Measured speedup stands beside P_D / P_P and its limit P_D / P_I, and what is lost is named by its causes:
    docs/speedup.md. `bin/sweep` makes such runs.
    """
    from hfmpi.cli.speedup_report import report
    from hfmpi.speedup.bench_file import read_bench
    from hfmpi.speedup.compare import study
    from hfmpi.speedup.runs import read_runs
    from hfmpi.speedup.scaling import Link

    if (latency is None) != (bandwidth is None):
        raise UserError("a network to predict for needs both --latency and --bandwidth")
    if out is not None:
        need_matplotlib()
    job, steps = read_runs(runs)
    shapes, link = read_bench(benches, job) if benches else ({}, None)
    if latency is not None and bandwidth is not None:
        link, model = Link(latency, bandwidth), True
    found = study(job, steps, link, shapes, model)
    click.echo(json.dumps(found) if as_json else "\n".join(report(found)))
    if out is not None:
        from hfmpi.cli.speedup_figure import draw

        written = save(draw(found), out)
        if not as_json:
            click.echo(f"{click.format_filename(written)}: {len(runs)} run(s)")
