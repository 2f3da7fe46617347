"""What a user sees of a run: a live line on a terminal, plain lines in a log, nothing on other ranks."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import click

from hfmpi.backends.compilation import listening
from hfmpi.files.history import BITS, Record, loss_keys
from hfmpi.parallel.placement import Place
from hfmpi.runs.live import COMPILING, LiveLine, Patience
from hfmpi.runs.record import Facts, Reporter

__all__ = ["make_reporter"]


class Silent:
    """Of the ranks that say nothing."""

    def start(self, facts: Facts) -> None:
        """Say nothing."""

    def step(self, record: Record) -> None:
        """Say nothing."""

    def note(self, sentence: str) -> None:
        """Say nothing."""


class Quiet(Silent):
    """What needs attention alone."""

    def note(self, sentence: str) -> None:
        """Say it where errors are said."""
        click.echo(f"Note: {sentence}.", err=True)


class Log(Quiet):
    """Plain lines, at most about one a second; the history has every step."""

    due = 0.0

    def start(self, facts: Facts) -> None:
        """Say what is trained, on what, and what the columns of the lines are."""
        batches = f"B_g = {facts.gradient_batch:,}"
        if facts.curvature_batch:
            batches += f", B_c = {facts.curvature_batch:,}"
        click.echo(facts.title)
        click.echo(f"{facts.config.optimizer}, {batches} of {facts.cases:,} {facts.noun}")
        click.echo(
            f"{facts.ranks} rank(s) of {facts.threads} thread(s), {facts.backend}, {facts.dtype}"
            + (f"; going on from step {facts.step:,}" if facts.step else "")
        )
        if any(place.device_id for place in facts.places):
            where(facts.places, facts.config.matmul_precision)
        if facts.linearisation_bytes > facts.memory_budget:
            whole, kept = facts.linearisation_bytes / 2**30, facts.memory_budget / 2**30
            click.echo(
                f"A rank's linearisation takes {whole:.2f} GiB, its memory budget is {kept:.2f} GiB: "
                "what does not fit is computed anew for every product."
            )
        if not facts.config.max_steps and not facts.config.max_seconds:
            click.echo("No limit (max-steps, max-seconds): training goes on until it is stopped (Ctrl-C).")

    def step(self, record: Record) -> None:
        """Say how a step went; of many in a second the first, and all that were evaluated or rejected."""
        notable = is_evaluated(record) or not record["accepted"]
        if notable or record["seconds"] >= self.due:
            click.echo(line(record))
            self.due = record["seconds"] + 1


class Live(Log):
    """A line that shows how far the run is, and one more for each evaluation."""

    def __init__(self, display: Any) -> None:
        self.display = display
        self.line: LiveLine | None = None

    def start(self, facts: Facts) -> None:
        """Say what is trained, then show the line."""
        super().start(facts)
        self.line = LiveLine(facts.step, facts.config.max_steps, facts.config.max_seconds)
        self.display.update(self.line)

    def step(self, record: Record) -> None:
        """Show the step."""
        if self.line is not None:
            losses = loss_keys(record).of(record)
            metric, more = record.get("valid_metric"), model_parts(record)
            self.line.update(record["step"], record["seconds"], *losses, metric, more, form_of(record))
        if is_evaluated(record) or not record["accepted"]:
            self.display.console.print(line(record), highlight=False, markup=False)

    def compiling(self, now: bool) -> None:
        """Show whether kernels are being compiled; `hfmpi.train` tries a model before there is a line."""
        if self.line is not None:
            self.line.compiling(now)
        else:
            self.display.update(COMPILING if now else "", refresh=True)


def where(places: Sequence[Place], precision: str) -> None:
    """Say on which device each rank computes, and warn of devices that ranks share."""
    if precision != "float32":
        click.echo(f"matrix products in {precision}")
    for rank, place in enumerate(places):
        at = f"{place.host}, local rank {place.local_rank}, {place.device}"
        click.echo(f"rank {rank}: {at}, transport {place.transport}")
    for host, device in sorted({(p.host, p.device_id) for p in places if p.device_id}):
        ranks = [str(rank) for rank, p in enumerate(places) if (p.host, p.device_id) == (host, device)]
        if len(ranks) > 1:
            click.echo(f"Warning: ranks {', '.join(ranks)} share one GPU of {host} and slow each other down.")


def is_evaluated(record: Record) -> bool:
    """Whether a record has a validation loss."""
    return loss_keys(record).of(record)[1] is not None


def form_of(record: Record) -> str:
    """Give how the losses of a record are written: bits per character alike, others are of any size."""
    return ".4f" if loss_keys(record) == BITS else ".5g"


def line(record: Record) -> str:
    """Give one step as text; the numbers are those of the history."""
    (loss, valid), form = loss_keys(record).of(record), form_of(record)
    parts = [f"step {record['step']:>6,}", f"{record['seconds']:>8.1f} s", f"train {loss:{form}}"]
    if valid is not None:
        parts.append(f"valid {valid:{form}}")
    if (metric := record.get("valid_metric")) is not None:
        parts.append(f"metric {metric:{form}}")
    parts += model_parts(record)
    if not record["accepted"]:
        parts.append(record["message"])
    return "  ".join(parts)


def model_parts(record: Record) -> list[str]:
    """Give what the step of a quadratic model tells of itself."""
    if "rho" not in record:
        return []
    rho = "  nan" if record["rho"] is None else f"{record['rho']:5.2f}"
    parts = [f"lambda {record['damping']:.2e}", f"rho {rho}"]
    if "line_search_rate" in record:
        parts += [f"cg {record['cg_steps']}", f"rate {record['line_search_rate']:.2f}"]
    return parts


@contextmanager
def make_reporter(rank: int, quiet: bool = False) -> Iterator[Reporter]:
    """Give the reporter of a rank for the duration of a run; a quiet one says only what needs attention."""
    if rank:
        yield Silent()
        return
    if quiet:
        yield Quiet()
        return
    console = None
    if sys.stdout.isatty():
        from rich.console import Console

        console = Console()
    if console is None or not console.is_terminal or console.is_dumb_terminal:
        with listening(Patience(click.echo)):
            yield Log()
        return
    from rich.live import Live as Display

    with Display(console=console, transient=True, vertical_overflow="crop") as display:
        live = Live(display)
        with listening(live.compiling):
            yield live
