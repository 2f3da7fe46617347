"""`hfmpi train`: one run, on as many ranks as the launcher started."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import click

from hfmpi.cli.options import current_name, options, settings
from hfmpi.cli.values import MOST, PATH, Number, PathName, parse_settings
from hfmpi.errors import UserError
from hfmpi.runs.config import OPTIONS, from_toml, merge, started

__all__ = ["train"]


@click.command(context_settings={"token_normalize_func": current_name})
@click.argument("data", type=PATH, metavar="DATA.h5")
@click.option("--out", type=PATH, metavar="RUN", help="Folder of the run  [default: DATA.run]")
@options(*OPTIONS)
@click.option("--threads", type=Number(int, 1, MOST), help="Of a rank  [default: its share of the cores]")
@click.option(
    "--stall-timeout",
    type=Number(float, 0, MOST),  # timers take less than 300 years
    default=600.0,
    show_default=True,
    metavar="SECONDS",
    help="All ranks end when none has finished a collective for so long; 0: never. A pass over a rank's "
    "share of the batch must take less.",
)
@settings
@click.option("--config", type=PATH, metavar="FILE.toml", help="Options from a file.")
@click.option(
    "--resume",
    type=PathName(str),
    default="auto",
    show_default=True,
    metavar="auto|never|PATH",
    help="auto: go on if RUN has a checkpoint; never: refuse to; PATH: start RUN from that run or checkpoint "
    "with its options, but for those that are given.",
)
def train(
    data: Path,
    out: Path | None,
    config: Path | None,
    resume: str,
    threads: int | None,
    stall_timeout: float,
    settings: tuple[str, ...],
    **given: Any,
) -> None:
    """Train on DATA.h5 (from `hfmpi prepare`). Without options: an mLSTM of the paper's size with muon-small.

    Options given here win over --config. A run that is started again goes on where it was.
    """
    import numpy as np

    from hfmpi.cli.streams import go_on
    from hfmpi.data.corpus import loss_unit
    from hfmpi.parallel.failure import together
    from hfmpi.parallel.launch import connect
    from hfmpi.parallel.placement import place
    from hfmpi.runs.reporter import make_reporter
    from hfmpi.runs.start import COMMAND, begin, find
    from hfmpi.runs.stop import StopSignals, job_end
    from hfmpi.runs.text_task import TextTask
    from hfmpi.runs.train import Run

    go_on()
    comm = connect(stall_timeout)
    context = click.get_current_context()
    signals = context.with_resource(StopSignals(job_end()))  # before the slow start
    context.with_resource(np.errstate(all="ignore"))  # steps that overflow are rejected
    if not data.name:
        raise UserError(f"{data} is not a corpus file")
    folder = out if out is not None else data.with_suffix(".run")
    placement = place(comm, threads)  # collective, and so not inside `build`, which may fail on some ranks

    def build() -> tuple[TextTask, Run]:
        wanted = from_toml(config) if config else {}
        in_file = wanted.pop("settings", {})
        if not isinstance(in_file, dict):
            raise UserError("settings in a configuration file must be a table")
        changes = in_file | parse_settings(settings)
        wanted |= {name: value for name, value in given.items() if value is not None}
        if changes:
            wanted["settings"] = changes
        found, own = find(folder, resume, COMMAND)
        if found is not None and "cases" in found.meta:
            remedy = "give another --out" if own else "a run on a text starts from one on a text"
            raise UserError(
                f"{folder if own else resume} is a run of a Python program (hfmpi.train); {remedy}"
            )
        if found is not None and own and not os.path.exists(data):
            raise UserError(
                f"cannot read {data}: No such file or directory; if the corpus of {folder} is elsewhere "
                f"now, name it there, and --out {folder}"
            )
        notes = [found.message] if found and found.message else []
        if found is None or own:
            merged = merge(wanted, found.meta.get("config") if found else None)
        else:
            merged = started(wanted, found.meta.get("config"))
        task = TextTask.read(merged, data, placement.local_rank)
        same = found is None or found.meta.get("corpus") == task.corpus.digest
        if found is None or own:
            run = Run(folder, task, comm, placement, found)
            if not same:
                raise UserError(f"{folder} was trained on other data than {data}; give another --out")
        else:
            run, why = begin(folder, task, comm, placement, found, resume, same, COMMAND)
            notes += [] if same else [f"{resume} was trained on other data than {data}"]
            notes += [why] if why else []
        for note in notes if comm.rank == 0 else ():
            click.echo(f"Note: {note}.", err=True)
        return task, run

    task, run = together(comm, build)
    with make_reporter(comm.rank) as reporter:
        ending = run.train(reporter, signals)
    if comm.rank == 0:
        unit = loss_unit(task.corpus.symbols)
        valid = "" if ending.valid is None else f", {ending.valid.loss:.4f} {unit} on validation"
        click.echo(f"Stopped at step {ending.step:,}: {ending.reason}{valid}.")
        if not ending.done:
            click.echo(f"Start again with the same command to go on; the checkpoint is in {folder}.")
    comm.close()
