"""`hfmpi evaluate`: the loss of a run on a split of a corpus."""

from __future__ import annotations

import json
import math
import shlex
from pathlib import Path
from typing import TYPE_CHECKING

import click

from hfmpi.cli.options import checked_keep, option
from hfmpi.cli.values import PATH
from hfmpi.data.batches import SPLITS
from hfmpi.errors import UserError
from hfmpi.runs.config import Config

if TYPE_CHECKING:
    from hfmpi.data.corpus import Corpus
    from hfmpi.runs.trained_model import Trained

__all__ = ["evaluate"]


@click.command()
@click.argument("run", type=PATH)
@click.option("--data", type=PATH, metavar="DATA.h5", help="Corpus  [default: that of the run]")
@click.option(
    "--split", type=click.Choice(list(SPLITS)), default="valid", show_default=True, help="Part of the corpus."
)
@option("keep", without="as the run was trained")
@option("backend", default=Config.backend)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def evaluate(run: Path, data: Path | None, split: str, keep: str | None, backend: str, as_json: bool) -> None:
    """Print the bits per character of RUN on its validation text or a different text, also under mpirun.

    RUN is the folder of a run or a checkpoint file. From a folder, the command takes the parameters with the
    lowest validation loss (best.h5), unless the run was trained with --keep last. For a text with non-ASCII
    bytes it prints bits per byte.
    """
    import numpy as np

    from hfmpi.data.batches import Sequences
    from hfmpi.data.corpus import loss_unit
    from hfmpi.objective.data_parallel import DataParallel
    from hfmpi.parallel.failure import together
    from hfmpi.parallel.launch import connect
    from hfmpi.parallel.placement import place
    from hfmpi.runs.live import announced
    from hfmpi.runs.trained_model import Trained

    comm = connect()
    placement = place(comm)

    def build() -> tuple[Trained, str, Sequences]:
        trained = Trained.read(run, backend, placement.local_rank, checked_keep(keep))
        corpus = read_corpus(trained, run, data)
        text = corpus.splits.get(split)
        if text is None:
            raise UserError(
                f"{data or trained.data} has no test text: prepare one with `hfmpi prepare --test-chars N`"
            )
        try:
            sequences = Sequences(text, trained.config.sequence_length, trained.config.burn_in)
        except UserError as error:
            raise UserError(f"the {SPLITS[split]} text of {data or trained.data}: {error}") from None
        return trained, corpus.digest, sequences

    trained, digest, sequences = together(comm, build)
    risk = DataParallel(trained.network, comm, micro_batch=trained.config.micro_batch)
    with announced(comm.rank), np.errstate(all="ignore"):  # an overflow shows in the loss
        bits = risk.on(sequences, np.arange(sequences.count)).loss(trained.theta) / math.log(2)
    if not math.isfinite(bits):
        raise UserError(f"the loss of {run} on this data is not finite")
    if comm.rank == 0:
        if trained.message:
            click.echo(f"Note: {trained.message}.", err=True)
        if digest != trained.corpus:
            click.echo(f"Note: {data} contains different data than {run} was trained on.", err=True)
        result = {
            "run": str(run),
            "step": trained.step,
            "split": split,
            f"{split}_bpc": bits,
            "sequences": sequences.count,
            "corpus": digest,
            "best": trained.best,
        }
        if as_json:
            click.echo(json.dumps(result))
        else:
            click.echo(
                f"step {trained.step:,}: {bits:.4f} {loss_unit(trained.symbols)} "
                f"on {sequences.count:,} {SPLITS[split]} sequences"
                + (f" ({trained.source})" if trained.source else "")
            )
    comm.close()


def read_corpus(trained: Trained, run: Path, data: Path | None) -> Corpus:
    """Read the corpus `data`, by default that of the run, and check that it has the symbols of the run."""
    from hfmpi.data.corpus import Corpus

    path = trained.data if data is None else data
    try:
        corpus = Corpus.read(path)
    except UserError as error:
        if data is not None:
            raise
        raise UserError(
            f"{error}; if the corpus of the run was moved, use --data with its new path"
        ) from None
    if data is None and corpus.digest != trained.corpus:
        raise UserError(
            f"{path} no longer contains the data that the run was trained on; "
            f"to evaluate on it anyway, use --data {path}"
        )
    if corpus.symbols != trained.symbols:
        raise UserError(
            f"{path} has a different vocabulary than {run}: prepare the text with "
            f"`hfmpi prepare --vocabulary {shlex.quote(str(run))}`"
        )
    return corpus
