"""`hfmpi speedup`: compare measured and predicted speedup, and explain the difference."""

from __future__ import annotations

import json
from pathlib import Path

import click

from hfmpi.cli.options import runs_and_figure
from hfmpi.cli.values import BANDWIDTH, LATENCY, PATH
from hfmpi.display import need_matplotlib, save
from hfmpi.errors import UserError

__all__ = ["speedup"]


@click.command()
@runs_and_figure("Also draw a figure: PNG, SVG or PDF, by its extension.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@click.option("--model", is_flag=True, help="Predict the time of a step on 1 to 16,384 ranks.")
@click.option(
    "--bench",
    "benches",
    multiple=True,
    type=PATH,
    metavar="FILE.json",
    help="Output of `hfmpi bench products|gradients|allreduce --json`, with the times of passes over small "
    "batches and of messages; repeatable.",
)
@click.option("--latency", type=LATENCY, help="Latency of the network to predict for, such as 2us.")
@click.option("--bandwidth", type=BANDWIDTH, help="Bandwidth of that network, such as 10GB/s.")
def speedup(
    runs: tuple[Path, ...],
    out: Path | None,
    as_json: bool,
    model: bool,
    benches: tuple[Path, ...],
    latency: float | None,
    bandwidth: float | None,
) -> None:
    """Compare RUN..., the same job on 1, 2, 4 ... ranks; runs on the same number of ranks are repeats.

    The measured speedup is compared with P_D / P_P and its limit P_D / P_I, and the efficiency that is lost
    is attributed to its causes (docs/speedup.md). `bin/sweep` makes such runs.
    """
    from hfmpi.speedup.bench_file import read_bench
    from hfmpi.speedup.compare import study
    from hfmpi.speedup.figure import draw
    from hfmpi.speedup.runs import read_runs
    from hfmpi.speedup.scaling import Link
    from hfmpi.speedup.tables import tables

    if (latency is None) != (bandwidth is None):
        raise UserError(
            "a prediction for a network needs both --latency and --bandwidth: add the missing one"
        )
    if out is not None:
        need_matplotlib()
    job, steps = read_runs(runs)
    shapes, link = read_bench(benches, job) if benches else ({}, None)
    if latency is not None and bandwidth is not None:
        link, model = Link(latency, bandwidth), True
    result = study(job, steps, link, shapes, model)
    click.echo(json.dumps(result) if as_json else "\n".join(tables(result)))
    if out is not None:
        written = save(draw(result), out)
        if not as_json:
            click.echo(f"{click.format_filename(written)}: {len(runs)} run(s)")
