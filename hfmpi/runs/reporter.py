"""Report a run to the user: by a live line on a terminal, by plain lines in a log."""

from __future__ import annotations

import logging
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import click

from hfmpi.backends.compilation import listening
from hfmpi.files.history import BITS, Record, loss_keys
from hfmpi.parallel.placement import Place
from hfmpi.runs.live import COMPILING, LiveLine, Patience, in_notebook, interactive
from hfmpi.runs.record import Ending, Facts, Reporter
from hfmpi.streams import lasting

__all__ = ["make_reporter"]

NOTEBOOK_WIDTH = 110  # characters that the output of a cell shows without a line break
NOTEBOOK_SECONDS = 0.2  # minimum time between two updates of the line


class _Silent:
    """A reporter that shows nothing, for all ranks except rank 0."""

    def start(self, facts: Facts) -> None: ...
    def step(self, record: Record) -> None: ...
    def note(self, sentence: str) -> None: ...
    def end(self, ending: Ending) -> None: ...


class Quiet(_Silent):
    """A reporter that shows only what needs attention."""

    def note(self, sentence: str) -> None:
        """Print a note on standard error."""
        click.echo(f"Note: {sentence}.", err=True)


class Log(Quiet):
    """A reporter that prints plain lines, at most about one per second; the history contains every step."""

    due = 0.0

    def start(self, facts: Facts) -> None:
        """Print what is trained, with which optimizer, and where."""
        task, config, backend = facts.task, facts.task.config, facts.task.model.backend
        batches = f"B_g = {facts.gradient_batch:,}"
        if facts.curvature_batch:
            batches += f", B_c = {facts.curvature_batch:,}"
        click.echo(task.title)
        click.echo(f"{config.optimizer}, {batches} of {task.train_set.count:,} {task.noun}")
        click.echo(
            f"{facts.ranks} rank(s) of {facts.threads} thread(s), {backend.name}, {backend.dtype.name}"
            + (f"; continuing from step {facts.step:,}" if facts.step else "")
        )
        if facts.rows:
            size = facts.rows * task.model.size * backend.dtype.itemsize / 2**30
            click.echo(
                f"{facts.rows:,} rows of per-example gradients per step, {size:.2f} GiB on all ranks together"
            )
        if facts.sketch:
            click.echo(f"curvature along the directions estimated from {facts.sketch:,} random rows per step")
        if any(place.device_id for place in facts.places):
            print_devices(facts.places, config.matmul_precision)
        if facts.linearisation_bytes > facts.memory_budget:
            size, budget = facts.linearisation_bytes / 2**30, facts.memory_budget / 2**30
            click.echo(
                f"A rank's linearisation needs {size:.2f} GiB, but its memory budget is {budget:.2f} GiB: "
                "the part that does not fit is recomputed for every product."
            )
        if not config.max_steps and not config.max_seconds:
            click.echo("No limit (max-steps, max-seconds): training continues until it is stopped (Ctrl-C).")

    def step(self, record: Record) -> None:
        """Print a step if it was evaluated or rejected, or if it is the first in a second."""
        notable = is_evaluated(record) or not record["accepted"]
        if notable or record["seconds"] >= self.due:
            click.echo(line(record))
            self.due = record["seconds"] + 1

    def end(self, ending: Ending) -> None:
        """Print why the run ended, what was measured, and how to continue."""
        click.echo(sentence_of(ending))
        if ending.remedy:
            click.echo(f"{ending.remedy}.")


class Live(Log):
    """A reporter that shows the progress in one live line, and prints a line for each evaluation."""

    def __init__(self, display: Any) -> None:
        self.display = display
        self.line: LiveLine | None = None

    def start(self, facts: Facts) -> None:
        """Print what is trained, then show the live line."""
        super().start(facts)
        self.line = LiveLine(facts.step, facts.task.config.max_steps, facts.task.config.max_seconds)
        self.display.update(self.line)

    def step(self, record: Record) -> None:
        """Update the live line; print a step that was evaluated or rejected."""
        if self.line is not None:
            update(self.line, record)
        if is_evaluated(record) or not record["accepted"]:
            self.display.console.print(line(record), highlight=False, markup=False)

    def end(self, ending: Ending) -> None:
        """Remove the live line, then print how the run ended."""
        self.display.stop()
        super().end(ending)

    def compiling(self, now: bool) -> None:
        """Show whether kernels are being compiled; this can happen before the live line exists."""
        if self.line is not None:
            self.line.compiling(now)
        else:
            self.display.update(COMPILING if now else "", refresh=True)


class Notebook(Quiet):
    """A reporter that shows the progress in one line, which it overwrites, and otherwise only notes."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.clock = clock
        self.line: LiveLine | None = None
        self.due, self.shown = -math.inf, 0  # time of the next update; length of the text that is shown

    def start(self, facts: Facts) -> None:
        """Show the line before the first step."""
        self.line = LiveLine(facts.step, facts.task.config.max_steps, facts.task.config.max_seconds)
        self.show(self.line.text(NOTEBOOK_WIDTH))

    def step(self, record: Record) -> None:
        """Update the line, at most a few times per second."""
        if self.line is None:
            return
        update(self.line, record)
        if self.clock() >= self.due:
            self.show(self.line.text(NOTEBOOK_WIDTH))

    def note(self, sentence: str) -> None:
        """Print a note on standard error, after which the line starts again."""
        super().note(sentence)
        self.shown = 0

    def end(self, ending: Ending) -> None:
        """Replace the line with how the run ended."""
        self.show(sentence_of(ending))
        click.echo(f"\n{ending.remedy}." if ending.remedy else "")

    def show(self, text: str) -> None:
        """Overwrite the line."""
        click.echo(f"\r{text:{self.shown}}" if self.shown else f"\r{text}", nl=False)
        self.shown, self.due = len(text), self.clock() + NOTEBOOK_SECONDS

    def compiling(self, now: bool) -> None:
        """Show whether kernels are being compiled."""
        if self.line is not None:
            self.line.compiling(now)
        if now:
            self.show(COMPILING)


def print_devices(places: Sequence[Place], precision: str) -> None:
    """Print the device of each rank, and a warning for devices that ranks share."""
    if precision != "float32":
        click.echo(f"matrix products in {precision}")
    for rank, place in enumerate(places):
        location = f"{place.host}, local rank {place.local_rank}, {place.device}"
        click.echo(f"rank {rank}: {location}, transport {place.transport}")
    for host, device in sorted({(p.host, p.device_id) for p in places if p.device_id}):
        ranks = [str(rank) for rank, p in enumerate(places) if (p.host, p.device_id) == (host, device)]
        if len(ranks) > 1:
            on_host = [place for place in places if place.host == host]
            free = max(place.gpus for place in on_host) - len({place.device_id for place in on_host} - {None})
            hint = f"; {free} of its GPUs are free: move the model to hfmpi.device()" if free > 0 else ""
            shared = f"ranks {', '.join(ranks)} share one GPU of {host} and slow each other down"
            click.echo(f"Warning: {shared}{hint}.")


def sentence_of(ending: Ending) -> str:
    """Return why a run ended, and the validation of its result."""
    valid = ""
    if ending.valid is not None:
        loss, metrics = ending.valid
        valid = f", {loss:.4f} {ending.unit}" if ending.unit else f", loss {loss:.5g}"
        valid += "".join(f", {name} {value:.5g}" for name, value in metrics.items()) + " on validation"
        if ending.kept_step is not None and ending.kept_step != ending.step:
            valid += f" at step {ending.kept_step:,}, the best one"
    return f"Stopped at step {ending.step:,}: {ending.reason}{valid}."


def update(line: LiveLine, record: Record) -> None:
    """Show a step in a live line."""
    losses, metrics, details = loss_keys(record).of(record), metric_parts(record), model_parts(record)
    line.update(record["step"], record["seconds"], *losses, metrics, details, loss_format(record))


def is_evaluated(record: Record) -> bool:
    """Return whether a record has a validation loss."""
    return loss_keys(record).of(record)[1] is not None


def loss_format(record: Record) -> str:
    """Return the number format of losses; bits per character have a known magnitude, other losses do not."""
    return ".4f" if loss_keys(record) == BITS else ".5g"


def line(record: Record) -> str:
    """Return one step as text."""
    (loss, valid), form = loss_keys(record).of(record), loss_format(record)
    parts = [f"step {record['step']:>6,}", f"{record['seconds']:>8.1f} s", f"train {loss:{form}}"]
    if valid is not None:
        parts.append(f"valid {valid:{form}}")
    parts += metric_parts(record)
    parts += model_parts(record)
    if not record["accepted"]:
        parts.append(record["message"])
    return "  ".join(parts)


def metric_parts(record: Record) -> list[str]:
    """Return the parts of the text for the metrics of a step, if it was evaluated."""
    form, keys = loss_format(record), loss_keys(record)
    return [
        f"{name.removeprefix('valid_')} {value:{form}}"
        for name, value in record.items()
        if name.startswith("valid_") and name != keys.valid and isinstance(value, float)
    ]


def model_parts(record: Record) -> list[str]:
    """Return the parts of the text that describe the step of a quadratic model."""
    if "rho" not in record:
        return []
    rho = "  nan" if record["rho"] is None else f"{record['rho']:5.2f}"
    parts = [f"lambda {record['damping']:.2e}", f"rho {rho}"]
    if "line_search_rate" in record:
        parts += [f"cg {record['cg_steps']}", f"rate {record['line_search_rate']:.2f}"]
    return parts


class NoteHandler(logging.Handler):
    """A handler that forwards the warnings of hfmpi's logger, such as one on memory, to the user as notes."""

    def __init__(self, note: Callable[[str], None]) -> None:
        super().__init__(logging.WARNING)
        self.note = note

    def emit(self, record: logging.LogRecord) -> None:
        """Forward a warning, without the words that a note adds."""
        try:
            self.note(record.getMessage().removeprefix("Note: ").removesuffix("."))
        except OSError:  # standard error is broken
            self.handleError(record)


@contextmanager
def make_reporter(rank: int, quiet: bool = False) -> Iterator[Reporter]:
    """Create the reporter of a rank for the duration of a run; a quiet one reports only what needs attention.

    During the run, it also reports the warnings that hfmpi logs. The warnings of every rank are shown,
    because a warning may concern one rank alone.
    """
    with ExitStack() as stack:
        stack.enter_context(lasting())
        reporter = _Silent() if rank else Quiet() if quiet else _make_log(stack)
        handler, logger = NoteHandler(Quiet().note if rank else reporter.note), logging.getLogger("hfmpi")
        logger.addHandler(handler)
        stack.callback(logger.removeHandler, handler)
        yield reporter


def _make_log(stack: ExitStack) -> Quiet:
    """Create the reporter for a notebook, a terminal, or an output on which the cursor cannot be moved."""
    if in_notebook():
        notebook = Notebook()
        stack.enter_context(listening(notebook.compiling))
        return notebook
    console = None
    if interactive(sys.stdout):
        from rich.console import Console

        console = Console()
    if console is None or not console.is_terminal or console.is_dumb_terminal:
        stack.enter_context(listening(Patience(click.echo)))
        return Log()
    from rich.live import Live as Display

    live = Live(stack.enter_context(Display(console=console, transient=True, vertical_overflow="crop")))
    stack.enter_context(listening(live.compiling))
    return live
