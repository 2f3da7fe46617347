"""`hfmpi bench`: how fast this machine is, and how near to its matrix products."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from hfmpi.cli.options import chosen, option, options, settings
from hfmpi.cli.show import aligned
from hfmpi.cli.values import MOST, PATH, Number, parse_settings

if TYPE_CHECKING:
    from hfmpi.bench.measurements import Bench, Row
    from hfmpi.networks.architecture import Architecture

__all__ = ["bench"]

POSITIVE = Number(int, 1, MOST)
COLUMNS = {
    "pass": "pass",
    "model": "model",
    "hidden": "hidden",
    "batch": "batch",
    "bytes": "bytes",
    "ranks": "ranks",
    "threads": "threads",
    "seconds": "seconds",
    "seconds_least": "least",
    "seconds_most": "most",
    "bound_seconds": "bound",
    "ratio": "ratio",
    "speedup": "speedup",
    "efficiency": "efficiency",
    "other": "other",
}
"""Keys of the rows that the table shows, and the heads of their columns."""


@click.group(invoke_without_command=True)
@click.pass_context
def bench(context: click.Context) -> None:
    """Time products, gradients, the Allreduce and whole steps on this machine.

    Each figure is a median over repetitions, in seconds; its bound is the time of the matrix products alone,
    through the same BLAS, measured in turn with it (for the Allreduce: of a copy of the vector). Under mpirun
    rank 0 also does the same work alone, with one thread and with as many as there are ranks.
    """
    if context.invoked_subcommand is None:
        click.echo(context.get_help())


def common(command: Callable[..., None]) -> Callable[..., None]:
    """Add the options that all measurements have."""
    shared = (
        option("model", "models", multiple=True, without="lstm and mlstm"),
        option("hidden", without="the paper's size"),
        click.option("--vocabulary", type=Number(int, 1, 256), default=50, show_default=True),
        click.option(
            "--length", type=POSITIVE, default=200, show_default=True, help="Characters a sequence."
        ),
        click.option(
            "--data",
            type=PATH,
            metavar="DATA.h5",
            help="Text; its alphabet wins over --vocabulary  [default: symbols in random order]",
        ),
        options("dtype", "backend", "matmul_precision", "slices", "transport", "micro_batch"),
        click.option("--threads", type=POSITIVE, default=1, show_default=True, help="Threads of a rank."),
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
    help="Sequences in all; repeatable.",
)


@bench.command()
@batches
@click.option(
    "--columns",
    type=Number(int, 2, 1024),
    help="Time projections V G V' too, of one direction and of so many in one pass, from J V alone.",
)
@common
def products(sizes: tuple[int, ...], columns: int | None, **given: Any) -> None:
    """Gauss-Newton products, linearised once."""
    from hfmpi.bench import measurements

    def measure(bench: Bench, about: Architecture, batch: int) -> list[Row]:
        return measurements.products(bench, about, batch, columns or 0)

    run(measure, sizes, **given)


@bench.command()
@batches
@common
def gradients(sizes: tuple[int, ...], **given: Any) -> None:
    """Loss and gradient, and the loss alone."""
    from hfmpi.bench import measurements

    run(measurements.gradients, sizes, **given)


@bench.command()
@common
def allreduce(**given: Any) -> None:
    """Sum the messages of a loss, a product and a gradient with squares; start it under mpirun."""
    from hfmpi.bench import measurements

    run(lambda bench, about, _: measurements.allreduce(bench, about), **given)


@bench.command()
@options("optimizer", "gradient_batch", "curvature_batch")
@settings
@common
def step(settings: tuple[str, ...], **given: Any) -> None:
    """Take whole steps of an optimizer, from the start of a run."""
    from hfmpi.bench import measurements

    own = {name: given.pop(name) for name in ("optimizer", "gradient_batch", "curvature_batch")}

    def measure(bench: Bench, about: Architecture, _: None) -> list[Row]:
        config = chosen(own | {"settings": parse_settings(settings)})
        preset = config.preset()
        head = {"optimizer": config.optimizer, "curvature_batch": preset.curvature_batch}
        return [head | row for row in measurements.step(bench, about, preset)]

    run(measure, **given)


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
    **given: Any,
) -> None:
    """Measure every model at every batch size and print the rows on rank 0."""
    import numpy as np

    from hfmpi.bench.measurements import Bench
    from hfmpi.data.corpus import Corpus
    from hfmpi.measure import machine
    from hfmpi.parallel.failure import together
    from hfmpi.parallel.launch import connect
    from hfmpi.parallel.library import describe
    from hfmpi.parallel.placement import place
    from hfmpi.runs.checks import enough_memory
    from hfmpi.runs.live import announced

    comm = connect()
    placement = place(comm, threads)
    click.get_current_context().with_resource(np.errstate(all="ignore"))

    def build() -> tuple[Bench, list[Architecture], str]:
        config = chosen(given)
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
            comm, lambda: [row for own in networks for size in sizes for row in measure(bench, own, size)]
        )
    if comm.rank == 0:
        about = {
            "processor": machine.processor(),
            "device": device,
            "blas": machine.blas(),
            "mpi": describe()[0] if comm.size > 1 else None,
            "versions": machine.versions("hfmpi", "numpy", "numba")
            | (machine.cupy() if device != "CPU" else {}),
            "ranks": comm.size,
            "threads": placement.threads,
        }
        click.echo(json.dumps({"machine": about, "rows": rows}) if as_json else table(about, rows))
    comm.close()


def table(about: dict[str, Any], rows: list[dict[str, Any]]) -> str:
    """Give the rows as aligned columns, under what they were measured on."""
    columns = [key for key in COLUMNS if any(row.get(key) is not None for row in rows)]
    cells = [[COLUMNS[key] for key in columns]] + [
        [text(key, row.get(key)) for key in columns] for row in rows
    ]
    lines = [
        *([about["device"]] if about["device"] != "CPU" else []),
        about["processor"] + ", " + ", ".join(about["blas"]) + (f", {about['mpi']}" if about["mpi"] else ""),
        ", ".join(f"{name} {number}" for name, number in about["versions"].items())
        + f"; {about['ranks']} rank(s) of {about['threads']} thread(s)",
        "",
        *aligned(cells),
    ]
    for row in rows:
        if "spans" in row:
            whole = sum(row["spans"].values())
            shares = sorted(row["spans"].items(), key=lambda item: -item[1])
            lines += [
                "",
                f"{row['model']}, {row['ranks']} rank(s) of {row['threads']} thread(s): "
                + ", ".join(f"{name} {100 * value / whole:.1f} %" for name, value in shares),
            ]
    return "\n".join(lines)


def text(key: str, value: Any) -> str:
    """Give one cell of the table."""
    if value is None:
        return ""
    if key == "other":
        return f"{100 * value:.1f} %"
    if key in ("ratio", "speedup", "efficiency"):
        return f"{value:.2f}"
    if isinstance(value, float):
        return f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) else str(value)
