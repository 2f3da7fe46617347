"""`hfmpi bench`: measure passes and steps on this machine, and compare them with matrix products alone."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from hfmpi.cli.options import chosen, option, options, settings
from hfmpi.cli.values import MOST, PATH, Number, parse_settings

if TYPE_CHECKING:
    from hfmpi.bench.measurements import Bench, Row
    from hfmpi.networks.architecture import Architecture

__all__ = ["bench"]

POSITIVE = Number(int, 1, MOST)


@click.group(invoke_without_command=True)
@click.pass_context
def bench(context: click.Context) -> None:
    """Time products, gradients, the Allreduce and complete steps on this machine.

    Each time is a median over repetitions, in seconds. Its bound is the time of the matrix products alone,
    computed by the same BLAS and measured alternately (for the Allreduce: of a copy of the vector). Under
    mpirun, rank 0 also does the same work alone, with one thread and with as many threads as there are ranks.
    """
    if context.invoked_subcommand is None:
        click.echo(context.get_help())


def common(command: Callable[..., None]) -> Callable[..., None]:
    """Add the options that all measurements share."""
    shared = (
        option("model", "models", multiple=True, without="lstm and mlstm"),
        option("hidden", without="the paper's size"),
        click.option("--vocabulary", type=Number(int, 1, 256), default=50, show_default=True),
        click.option(
            "--length", type=POSITIVE, default=200, show_default=True, help="Characters per sequence."
        ),
        click.option(
            "--data",
            type=PATH,
            metavar="DATA.h5",
            help="Corpus with the text; its symbols replace --vocabulary  [default: random symbols]",
        ),
        options("dtype", "backend", "matmul_precision", "slices", "transport", "micro_batch"),
        click.option("--threads", type=POSITIVE, default=1, show_default=True, help="Threads per rank."),
        click.option("--repeats", type=POSITIVE, default=7, show_default=True),
        click.option("--json", "as_json", is_flag=True, help="Print one JSON object."),
    )
    for decorate in reversed(shared):
        command = decorate(command)
    return command


batches = click.option(
    "--batch",
    "sizes",
    type=POSITIVE,
    multiple=True,
    default=(32, 320),
    show_default=True,
    help="Number of sequences of all ranks together; repeatable.",
)


@bench.command()
@batches
@click.option(
    "--columns",
    type=Number(int, 2, 1024),
    help="Also time V G V' along one and along this many directions: from J V alone, and from a sketch.",
)
@common
def products(sizes: tuple[int, ...], columns: int | None, **options: Any) -> None:
    """Time Gauss-Newton products of one linearisation."""
    from hfmpi.bench import measurements

    def measure(bench: Bench, about: Architecture, batch: int) -> list[Row]:
        return measurements.products(bench, about, batch, columns or 0)

    run(measure, sizes, **options)


@bench.command()
@batches
@common
def gradients(sizes: tuple[int, ...], **options: Any) -> None:
    """Time the gradient with the loss, and the loss alone."""
    from hfmpi.bench import measurements

    run(measurements.gradients, sizes, **options)


@bench.command()
@common
def allreduce(**options: Any) -> None:
    """Time the sums of a loss, a product and a gradient with squares; start it under mpirun."""
    from hfmpi.bench import measurements

    run(lambda bench, about, _: measurements.allreduce(bench, about), **options)


@bench.command()
@options("optimizer", "gradient_batch", "curvature_batch")
@settings
@common
def step(settings: tuple[str, ...], **options: Any) -> None:
    """Time complete steps of an optimizer, from the start of a run."""
    from hfmpi.bench import measurements

    of_step = {name: options.pop(name) for name in ("optimizer", "gradient_batch", "curvature_batch")}

    def measure(bench: Bench, about: Architecture, _: None) -> list[Row]:
        config = chosen(of_step | {"settings": parse_settings(settings)})
        preset = config.preset()
        head = {"optimizer": config.optimizer, "curvature_batch": preset.curvature_batch}
        return [head | row for row in measurements.step(bench, about, preset)]

    run(measure, **options)


def run(
    measure: Callable[[Bench, Architecture, Any], list[Row]],
    sizes: tuple[int | None, ...] = (None,),
    *,
    models: tuple[str, ...],
    vocabulary: int,
    length: int,
    data: Path | None,
    threads: int,
    repeats: int,
    as_json: bool,
    **options: Any,
) -> None:
    """Measure every model at every batch size, and print the rows on rank 0."""
    import numpy as np

    from hfmpi.bench.measurements import Bench
    from hfmpi.bench.table import describe, doubts, table
    from hfmpi.data.corpus import Corpus
    from hfmpi.parallel.failure import together
    from hfmpi.parallel.launch import connect
    from hfmpi.parallel.placement import place
    from hfmpi.runs.checks import enough_memory
    from hfmpi.runs.live import announced

    comm = connect()
    placement = place(comm, threads)
    click.get_current_context().with_resource(np.errstate(all="ignore"))

    def build() -> tuple[Bench, list[Architecture], str]:
        config = chosen(options)
        device = config.make_backend(placement.local_rank).device
        corpus = Corpus.read(data) if data is not None else None
        symbols = corpus.vocabulary if corpus is not None else vocabulary
        networks = [
            replace(config, model=model).architecture(symbols) for model in models or ("lstm", "mlstm")
        ]
        for network in networks:
            enough_memory(network)
        bench = Bench(
            comm,
            corpus.train if corpus else None,
            length,
            config.dtype,
            config.backend,
            config.matmul_precision,
            config.transport,
            config.slices,
            config.micro_batch,
            placement.threads,
            repeats,
            placement.local_rank,
        )
        return bench, networks, device

    bench, networks, device = together(comm, build)
    with announced(comm.rank):
        rows = together(
            comm, lambda: [row for one in networks for size in sizes for row in measure(bench, one, size)]
        )
    if comm.rank == 0:
        if note := doubts(rows):
            click.echo(note, err=True)
        about = describe(device, comm.size, placement.threads)
        click.echo(json.dumps({"machine": about, "rows": rows}) if as_json else table(about, rows))
    comm.close()
