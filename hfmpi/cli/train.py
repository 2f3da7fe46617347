"""`hfmpi train`: one run, on as many ranks as the launcher started."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any, ClassVar

import click

from hfmpi.errors import UserError

__all__ = ["train"]

BATCH = click.IntRange(min=1)


class MemorySize(click.ParamType):
    """Bytes, or a number with a unit: 1500MB, 2GiB, 2.5G (= GiB)."""

    name = "size"
    units: ClassVar = {"": 1, "B": 1} | {
        f"{letter}{ending}": (1000 if ending == "B" else 1024) ** power
        for power, letter in enumerate("KMGT", start=1)
        for ending in ("", "iB", "B")
    }

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Give the bytes, at least 1."""
        number = str(value).rstrip("KMGTkmgtiIbB ")
        unit = str(value)[len(number) :].strip().upper().replace("I", "i")
        with contextlib.suppress(ValueError, OverflowError):
            size = int(float(number) * self.units.get(unit, 0))
            if size >= 1:
                return size
        return self.fail(f"{value!r} is no memory size such as 1500MB or 2GiB", param, ctx)


@click.command()
@click.argument("data", type=click.Path(path_type=Path), metavar="DATA.h5")
@click.option(
    "--out", type=click.Path(path_type=Path), metavar="RUN", help="Folder of the run [default: DATA.run]."
)
@click.option("--model", help="rnn, mrnn, lstm or mlstm [default: mlstm].")
@click.option("--variant", help="Gated cells: standard or krause [default: standard].")
@click.option("--hidden", type=BATCH, help="Hidden units.")
@click.option("--parameters", type=BATCH, help="Budget; picks the nearest size [default: the paper's].")
@click.option("--initialisation", help="krause or sparse [default: krause].")
@click.option("--forget-bias", type=float, help="Of gated cells at the start [default: 0].")
@click.option("--optimizer", help="sgd, bgd, shf, bhf, bhf-short or adam [default: shf].")
@click.option("--gradient-batch", type=BATCH, help="Sequences per gradient [default: the preset's].")
@click.option(
    "--curvature-batch", type=BATCH, help="Sequences per curvature product [default: the preset's]."
)
@click.option("--sequence-length", type=BATCH, help="Scored characters of a sequence [default: 200].")
@click.option("--warmup", type=click.IntRange(min=0), help="Characters read before those [default: 0].")
@click.option(
    "--max-steps", type=click.IntRange(min=0), help="Done after so many steps in all [default: no limit]."
)
@click.option("--max-seconds", type=click.FloatRange(min=0), help="Done after so much training time in all.")
@click.option("--checkpoint-every", type=click.IntRange(min=0), metavar="STEPS", help="[default: an epoch]")
@click.option("--evaluate-every", type=click.IntRange(min=0), metavar="STEPS", help="[default: an epoch]")
@click.option(
    "--check-every",
    type=click.IntRange(min=0),
    metavar="STEPS",
    help="Compare theta across ranks [default: at checkpoints].",
)
@click.option(
    "--max-rejections",
    type=click.IntRange(min=0),
    metavar="STEPS",
    help="Stop after so many rejected steps in a row; 0: never [default: 20].",
)
@click.option("--seed", type=click.IntRange(min=0), help="Of initialisation and batches [default: 0].")
@click.option("--backend", help="auto, numpy, numba or cupy [default: auto].")
@click.option("--dtype", help="float32 or float64 [default: float32].")
@click.option("--matmul-precision", help="Of float32 products on a GPU: float32 or tf32 [default: float32].")
@click.option(
    "--transport",
    help="Vectors between GPUs: auto, host, cuda (a CUDA-aware MPI) or nccl [default: auto].",
)
@click.option(
    "--micro-batch", type=BATCH, help="Most sequences at a time on a rank [default: 32; 1024 on a GPU]."
)
@click.option(
    "--memory-budget",
    type=MemorySize(),
    metavar="SIZE",
    help="What a rank may keep of a linearisation, such as 2GiB; the rest is computed anew for every product "
    "[default: half of its share of the free memory].",
)
@click.option(
    "--slices",
    type=click.IntRange(min=0),
    help="Sum every batch in so many fixed parts, a power of two: the same bits on any number of ranks that "
    "divides it, more slowly [default: off].",
)
@click.option("--threads", type=BATCH, help="Threads of a rank [default: its share of the cores].")
@click.option(
    "--stall-timeout",
    type=click.FloatRange(min=0),
    default=600.0,
    show_default=True,
    metavar="SECONDS",
    help="All ranks end when none has finished a collective for so long; 0: never. A pass over a rank's "
    "share of the batch must take less.",
)
@click.option(
    "--set",
    "settings",
    multiple=True,
    metavar="NAME=VALUE",
    help="A setting of the optimizer, such as cg_max_steps=20; repeatable.",
)
@click.option("--config", type=click.Path(path_type=Path), metavar="FILE.toml", help="Options from a file.")
@click.option(
    "--resume",
    default="auto",
    show_default=True,
    metavar="auto|never|PATH",
    help="auto: go on if RUN has a checkpoint; never: refuse to; PATH: start from that run or checkpoint.",
)
def train(
    data: Path,
    out: Path | None,
    config: Path | None,
    resume: str,
    threads: int | None,
    stall_timeout: float,
    **options: Any,
) -> None:
    """Train on DATA.h5 (from `hfmpi prepare`). Without options: an mLSTM of the paper's size with shf.

    Options given here win over --config. A run that is started again goes on where it was.
    """
    import numpy as np

    from hfmpi.cli.progress import make_reporter
    from hfmpi.files.run_folder import find_checkpoint
    from hfmpi.parallel.failure import together
    from hfmpi.parallel.launch import connect
    from hfmpi.parallel.placement import place
    from hfmpi.runs import config as configuration
    from hfmpi.runs.stop import StopSignals, job_end
    from hfmpi.runs.train import Run

    comm = connect(stall_timeout)
    signals = click.get_current_context().with_resource(StopSignals(job_end()))  # before the slow start
    np.seterr(
        over="ignore", invalid="ignore", under="ignore", divide="ignore"
    )  # steps that overflow are rejected
    if not data.name:
        raise UserError(f"{data} is not a corpus file")
    folder = out if out is not None else data.with_suffix(".run")
    placement = place(comm, threads)  # collective, and so not inside `build`, which may fail on some ranks

    def build() -> Run:
        given = configuration.from_toml(config) if config else {}
        file_settings = given.pop("settings", {})
        if not isinstance(file_settings, dict):
            raise UserError("settings in a configuration file must be a table")
        changes = file_settings | parse_settings(options.pop("settings"))
        given |= {name: value for name, value in options.items() if value is not None}
        if changes:
            given["settings"] = changes
        found = find_checkpoint(folder, resume)
        merged = configuration.merge(given, found.meta.get("config") if found else None)
        run = Run(folder, merged, data, comm, placement, found)
        if found is not None and resume == "auto" and found.meta.get("corpus") != run.corpus.digest:
            raise UserError(f"{folder} was trained on other data than {data}; give another --out")
        if found is not None and found.message and comm.rank == 0:
            click.echo(f"Note: {found.message}.", err=True)
        return run

    run = together(comm, build)
    with make_reporter(comm.rank) as reporter:
        result = run.train(reporter, signals)
    if comm.rank == 0:
        valid = "" if result.valid_bpc is None else f", {result.valid_bpc:.4f} bits/char on validation"
        click.echo(f"Stopped at step {result.step:,}: {result.reason}{valid}.")
        if not result.done:
            click.echo(f"Start again with the same command to go on; the checkpoint is in {folder}.")
    comm.close()


def parse_settings(pairs: tuple[str, ...]) -> dict[str, Any]:
    """Read NAME=VALUE pairs: whole numbers, numbers, true and false, else words.

    Raises
    ------
    UserError
        If a pair has no equals sign.
    """
    settings: dict[str, Any] = {}
    for pair in pairs:
        name, equals, text = pair.partition("=")
        if not equals or not name:
            raise UserError(f"--set needs NAME=VALUE, not {pair!r}")
        settings[name] = parse_value(text)
    return settings


def parse_value(text: str) -> Any:
    """Give a value in the type that it is written in."""
    if text in ("true", "false"):
        return text == "true"
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text
