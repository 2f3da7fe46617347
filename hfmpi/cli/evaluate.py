"""`hfmpi evaluate`: the validation loss of a run."""

from __future__ import annotations

import json
import math
from pathlib import Path

import click

from hfmpi.cli.options import option
from hfmpi.errors import UserError
from hfmpi.runs.config import Config

__all__ = ["evaluate"]


@click.command()
@click.argument("run", type=click.Path(path_type=Path))
@click.option(
    "--data", type=click.Path(path_type=Path), metavar="DATA.h5", help="Corpus [default: the run's own]."
)
@option("backend", default=Config.backend)
@click.option("--json", "as_json", is_flag=True, help="One JSON object.")
def evaluate(run: Path, data: Path | None, backend: str, as_json: bool) -> None:
    """Print the validation bits per character of RUN; works under mpirun too."""
    import numpy as np

    from hfmpi.data.batches import Sequences
    from hfmpi.data.corpus import Corpus
    from hfmpi.objective.data_parallel import DataParallel
    from hfmpi.parallel.failure import together
    from hfmpi.parallel.launch import connect
    from hfmpi.parallel.placement import place
    from hfmpi.runs.trained_model import Trained

    comm = connect()
    rank_place = place(comm)

    def build() -> tuple[Trained, Sequences]:
        trained = Trained.read(run, backend, rank_place.local_rank)
        path = data if data is not None else trained.data
        corpus = Corpus.read(path)
        if corpus.symbols != trained.symbols:
            raise UserError(f"{path} has another vocabulary than the run")
        return trained, Sequences(corpus.valid, trained.config.sequence_length, trained.config.burn_in)

    trained, sequences = together(comm, build)
    risk = DataParallel(trained.network, comm, micro_batch=trained.config.micro_batch)
    bits = risk.on(sequences, np.arange(sequences.count)).loss(trained.theta) / math.log(2)
    if comm.rank == 0:
        if trained.message:
            click.echo(f"Note: {trained.message}.", err=True)
        found = {"run": str(run), "step": trained.step, "valid_bpc": bits, "sequences": sequences.count}
        if as_json:
            click.echo(json.dumps(found))
        else:
            click.echo(
                f"step {trained.step:,}: {bits:.4f} bits/char on {sequences.count:,} validation sequences"
            )
    comm.close()
