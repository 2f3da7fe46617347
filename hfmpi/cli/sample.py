"""`hfmpi sample`: let a trained network write."""

from __future__ import annotations

import os
from pathlib import Path

import click

from hfmpi.cli.values import MOST, PATH, Number

__all__ = ["sample"]


@click.command()
@click.argument("run", type=PATH)
@click.option(
    "--length",
    default=500,
    show_default=True,
    type=Number(int, 0, MOST),
    help="Characters (bytes) to write.",
)
@click.option("--prime", default="", metavar="TEXT", help="What the network reads first.")
@click.option(
    "--temperature",
    default=1.0,
    show_default=True,
    type=Number(float, least=0),
    help="0: always the likeliest.",
)
@click.option("--seed", default=0, show_default=True, type=Number(int, least=0))
def sample(run: Path, length: int, prime: str, temperature: float, seed: int) -> None:
    """Write LENGTH characters with the network of RUN, after the prime.

    What is written are the bytes of the text that it was trained on, in whatever encoding that was.
    """
    from hfmpi.networks import sampling
    from hfmpi.runs.trained_model import Trained

    # One character at a time: compiled kernels would cost more to load than they save.
    trained = Trained.read(run, backend="numpy")
    if trained.message:
        click.echo(f"Note: {trained.message}.", err=True)
    network, theta, symbols = trained.network, trained.theta, trained.symbols
    read = os.fsencode(prime)
    written = sampling.sample(network, theta, symbols, length, read, temperature, seed)
    click.echo(read + written)  # bytes as they are: of any encoding, on a terminal of any encoding
