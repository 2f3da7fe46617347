"""`hfmpi sample`: let a trained network write."""

from __future__ import annotations

import os
from pathlib import Path

import click

__all__ = ["sample"]


@click.command()
@click.argument("run", type=click.Path(path_type=Path))
@click.option(
    "--length", default=500, show_default=True, type=click.IntRange(min=0), help="Characters to write."
)
@click.option("--prime", default="", metavar="TEXT", help="What the network reads first.")
@click.option(
    "--temperature",
    default=1.0,
    show_default=True,
    type=click.FloatRange(min=0),
    help="0: always the likeliest.",
)
@click.option("--seed", default=0, show_default=True, type=click.IntRange(min=0))
def sample(run: Path, length: int, prime: str, temperature: float, seed: int) -> None:
    """Write LENGTH characters with the network of RUN, after the prime."""
    from hfmpi.models import sampling
    from hfmpi.runs.trained_model import Trained

    # One character at a time: compiled kernels would cost more to load than they save.
    trained = Trained.read(run, backend="numpy")
    if trained.message:
        click.echo(f"Note: {trained.message}.", err=True)
    network, theta, symbols = trained.network, trained.theta, trained.symbols
    written = sampling.sample(network, theta, symbols, length, os.fsencode(prime), temperature, seed)
    click.echo(prime + written.decode("utf-8", "replace"))
