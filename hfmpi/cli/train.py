"""`hfmpi train`: train a network on as many ranks as the launcher started."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path
from typing import Any

import click

from hfmpi.cli.options import current_name, options, settings
from hfmpi.cli.settings_help import settings_help
from hfmpi.cli.values import HELP, MOST, PATH, Number, PathName, parse_settings
from hfmpi.errors import UserError
from hfmpi.runs.config import OPTIONS, Config
from hfmpi.runs.merge import from_toml

__all__ = ["train"]


@click.command(context_settings={"token_normalize_func": current_name})
@click.argument("data", type=PATH, metavar="DATA.h5", required=False)
@click.option("--out", type=PATH, metavar="RUN", help="Folder of the run  [default: DATA.run]")
@options(*OPTIONS)
@click.option(
    "--threads", type=Number(int, 1, MOST), help="BLAS threads of a rank  [default: its share of the cores]"
)
@click.option(
    "--stall-timeout",
    type=Number(float, 0, MOST),  # timers take less than 300 years
    default=600.0,
    show_default=True,
    metavar="SECONDS",
    help="End all ranks if none of them has finished a collective for this long; 0: never. A pass over a "
    "rank's share of the batch must take less time.",
)
@settings
@click.option("--config", type=PATH, metavar="FILE.toml", help="File to read options from.")
@click.option(
    "--resume",
    type=PathName(str),
    default="auto",
    show_default=True,
    metavar="auto|never|PATH",
    help="auto: continue if RUN has a checkpoint; never: stop with an error if it has one; PATH: start RUN "
    "from that run or checkpoint, with its options except those on this command line.",
)
@click.pass_context
def train(
    context: click.Context,
    data: Path | None,
    out: Path | None,
    config: Path | None,
    resume: str,
    threads: int | None,
    stall_timeout: float,
    settings: tuple[str, ...],
    **options: Any,
) -> None:
    """Train on DATA.h5 (from `hfmpi prepare`), by default an mLSTM of the paper's size with muon-small.

    Options on the command line take precedence over --config. A run that is started again continues from its
    checkpoint.
    """
    if HELP in settings:
        click.echo(settings_help(_merged(config, options, ())), nl=False)
        return
    if data is None:
        raise click.MissingParameter(
            ctx=context, param=next(p for p in context.command.params if p.name == "data")
        )
    from hfmpi.parallel.failure import together
    from hfmpi.parallel.launch import connect
    from hfmpi.runs.choice import preferred
    from hfmpi.runs.session import COMMAND, open_session
    from hfmpi.runs.start import open_run
    from hfmpi.runs.text_task import TextTask
    from hfmpi.runs.train import Run

    comm = connect(stall_timeout)
    if not data.name:
        raise UserError(f"{data} is not a corpus file")
    folder = out if out is not None else data.with_suffix(".run")
    with open_session(comm, COMMAND, threads) as session:
        memory = comm.agree(session.placement.memory)

        def read(config: Config, resumes: bool) -> TextTask:
            if resumes and not os.path.exists(data):
                raise UserError(
                    f"cannot read {data}: No such file or directory; if the corpus of {folder} was moved, "
                    f"use its new path and --out {folder}"
                )
            choose = partial(preferred, ranks=comm.size, memory=memory)
            chooses = config.prefer != "none" and not resumes
            return TextTask.read(config, data, session.placement.local_rank, choose if chooses else None)

        def build() -> Run:
            return open_run(folder, resume, _merged(config, options, settings), read, session)

        together(comm, build).train()
        comm.close()


def _merged(config: Path | None, options: dict[str, Any], settings: tuple[str, ...]) -> dict[str, Any]:
    """Merge the options of the configuration file and of the command line, which take precedence."""
    merged = from_toml(config) if config else {}
    in_file = merged.pop("settings", {})
    if not isinstance(in_file, dict):
        raise UserError("settings in a configuration file must be a table")
    changes = in_file | parse_settings(settings)
    merged |= {name: value for name, value in options.items() if value is not None}
    return merged | ({"settings": changes} if changes else {})
