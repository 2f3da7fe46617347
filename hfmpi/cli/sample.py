"""`hfmpi sample`: generate text with a trained network."""

from __future__ import annotations

import os
from pathlib import Path

import click

from hfmpi.cli.options import checked_keep, option
from hfmpi.cli.values import MOST, PATH, Number

__all__ = ["sample"]


@click.command()
@click.argument("run", type=PATH)
@click.option(
    "--length",
    default=500,
    show_default=True,
    type=Number(int, 0, MOST),
    help="Characters (bytes) to generate.",
)
@click.option("--prime", default="", metavar="TEXT", help="Text that the network reads first.")
@click.option(
    "--temperature",
    default=1.0,
    show_default=True,
    type=Number(float, least=0),
    help="0: always the most probable character.",
)
@option("keep", without="as the run was trained")
@click.option("--seed", default=0, show_default=True, type=Number(int, least=0))
def sample(run: Path, length: int, prime: str, temperature: float, keep: str | None, seed: int) -> None:
    """Generate LENGTH characters with the network of RUN, after the prime.

    RUN is the folder of a run or a checkpoint file. From a folder, the command takes the parameters with the
    lowest validation loss (best.h5), unless the run was trained with --keep last. The output consists of
    bytes in the encoding of the text that the network was trained on.
    """
    from hfmpi.networks import sampling
    from hfmpi.runs.trained_model import Trained

    # The numpy backend, because compiled kernels take longer to load than they save for single characters.
    trained = Trained.read(run, backend="numpy", keep=checked_keep(keep))
    if trained.message:
        click.echo(f"Note: {trained.message}.", err=True)
    network, theta, symbols = trained.network, trained.theta, trained.symbols
    start = os.fsencode(prime)
    text = sampling.sample(network, theta, symbols, length, start, temperature, seed)
    if trained.source:
        click.echo(f"Note: the parameters are those of step {trained.step:,}, {trained.source}.", err=True)
    click.echo(start + text)  # bytes, independent of the encodings of text and terminal
