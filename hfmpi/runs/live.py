"""Show progress on a terminal: the live line of a run, and the message that kernels are compiled."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TextIO

import click

from hfmpi.backends.compilation import listening
from hfmpi.parallel import library

__all__ = ["COMPILING", "LiveLine", "Patience", "announced", "in_notebook", "interactive"]

COMPILING = "compiling kernels, once for this machine ..."
PATIENCE = 1.0
"""Seconds of compilation after which a log mentions it."""
REPEAT = 3.0
"""Seconds of compilation from one message to the next."""

WINDOW = 60  # records at least half a second apart, over which the speed is measured
MIN_BAR, MAX_BAR = 10, 30  # columns


class LiveLine:
    """Progress, remaining time, speed and last losses of a run, in one line of any width.

    The package rich can render it.

    Parameters
    ----------
    step : int
        Step from which the run continues.
    max_steps, max_seconds
        Limits; 0: none.
    clock : callable
        Returns the time in seconds.
    """

    def __init__(
        self, step: int, max_steps: int, max_seconds: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.max_steps, self.max_seconds, self.clock = max_steps, max_seconds, clock
        self._step, self._seconds, self._at = step, 0.0, clock()
        self._train = self._valid = self._metrics = ""
        self._details: Sequence[str] = ()
        self._recent: deque[tuple[int, float]] = deque(maxlen=WINDOW)
        self._compiling = self._compiled = False

    def compiling(self, now: bool) -> None:
        """Set whether kernels are being compiled."""
        self._compiling = now
        self._compiled |= now

    def update(
        self,
        step: int,
        seconds: float,
        train: float | None,
        valid: float | None,
        metrics: Sequence[str] = (),
        details: Sequence[str] = (),
        form: str = ".4f",
    ) -> None:
        """Show a step: number, training time, losses, the user's metrics, and details if they fit.

        `form` is the format of the losses.
        """
        now = self.clock()
        if not self._recent and not self._compiled:  # a step that compiles takes longer than the next ones
            self._recent.append((self._step, seconds - (now - self._at)))
        if not self._recent or seconds - self._recent[-1][1] >= 0.5:
            self._recent.append((step, seconds))
        self._step, self._seconds, self._at, self._details = step, seconds, now, details
        self._train = "" if train is None else f"train {train:{form}}"
        self._valid = self._valid if valid is None else f"valid {valid:{form}}"
        self._metrics = "  ".join(metrics) or self._metrics

    def text(self, width: int) -> str:
        """Return the line: the most important parts that fit, in their order."""
        step = f"step {self._step:,}"
        seconds = _duration(self._seconds + self.clock() - self._at)
        if self._compiling:
            turning = "|/-\\"[int(8 * self.clock()) % 4]
            ranked = [(1, step), (2, seconds), (0, f"{turning} {COMPILING}")]
        else:
            ranked = [
                (0, step + (f"/{self.max_steps:,}" if self.max_steps else "")),
                (5, seconds),
                (2, self._left()),
                (4, self._speed()),
                (1, self._train),
                (3, self._valid),
                (6, self._metrics),
                *((7 + i, detail) for i, detail in enumerate(self._details)),
            ]
        room, least = width, 0
        for rank, part in sorted(ranked):
            room -= len(part) + 2 * (rank > 0) if part else 0
            if room < 0:
                break
            least = rank
        return "  ".join(part for rank, part in ranked if part and rank <= least)[:width]

    def part(self) -> float | None:
        """Return the completed part of the run, from 0 to 1, or None if it has no limit."""
        waited = self.clock() - self._at
        done = [self._step / self.max_steps] if self.max_steps else []
        done += [(self._seconds + waited) / self.max_seconds] if self.max_seconds else []
        return min(max(done), 1.0) if done else None

    def __rich_console__(self, console: Any, options: Any) -> Iterator[Any]:
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        width = options.max_width - 1  # some terminals start a new line after the last column
        line, part = Text(self.text(width), no_wrap=True, overflow="crop"), self.part()
        room = min(width - len(line) - 2, MAX_BAR)
        if part is None or room < MIN_BAR or self._compiling:
            yield line
            return
        row = Table.grid(padding=(0, 2, 0, 0), pad_edge=False)
        row.add_row(line, ProgressBar(1.0, part, width=room))
        yield row

    def _per_step(self) -> float:
        """Return the mean duration of the last steps in seconds; 0 if it is not known."""
        if len(self._recent) < 2:
            return 0.0
        (first, begin), (last, end) = self._recent[0], self._recent[-1]
        return (end - begin) / (last - first)

    def _speed(self) -> str:
        each = self._per_step()
        if not each:
            return ""
        number, unit = (1 / each, "steps/s") if each < 1 else (each, "s/step")
        return f"{number:.3g} {unit}" if number < 999.5 else f"{number:,.0f} {unit}"

    def _left(self) -> str:
        waited, each, left = self.clock() - self._at, self._per_step(), []
        if self.max_seconds:
            left.append(self.max_seconds - self._seconds - waited)
        if self.max_steps and each:
            left.append((self.max_steps - self._step) * each - waited)
        return f"{_duration(max(min(left), 0))} left" if left else ""


def _duration(seconds: float) -> str:
    minutes, whole = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours:,}:{minutes:02}:{whole:02}" if hours else f"{minutes}:{whole:02}"


class Patience:
    """A listener for `listening` that reports compilation if it takes a while, and then every few seconds."""

    def __init__(self, say: Callable[[str], object]) -> None:
        self._say, self._spent, self._due = say, 0.0, PATIENCE  # seconds of compilation: so far; next message
        self._begun = 0.0
        self._lock = threading.Lock()  # of the timer, which a message renews in a thread
        self._timer: threading.Timer | None = None

    def __call__(self, compiling: bool) -> None:
        """Start the timer when compilation starts, and stop it when compilation ends."""
        with self._lock:
            if compiling:
                self._begun = time.monotonic()
                self._wait(self._due - self._spent)
            elif self._timer is not None:
                self._timer.cancel()
                self._spent += time.monotonic() - self._begun
                self._timer = None

    def _wait(self, seconds: float) -> None:
        self._timer = threading.Timer(max(seconds, 0.0), self._tell)
        self._timer.daemon = True
        self._timer.start()

    def _tell(self) -> None:
        with self._lock:
            if self._timer is None:  # compilation has just ended
                return
            first = self._due == PATIENCE
            self._say(COMPILING if first else f"compiling kernels: {self._due:.0f} s so far ...")
            self._due += REPEAT
            self._wait(REPEAT)


def in_notebook() -> bool:
    """Return whether a notebook shows the output of this process; IPython is not imported."""
    shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    return getattr(shell, "kernel", None) is not None


def interactive(stream: TextIO | None) -> bool:
    """Return whether a stream is a terminal that someone may watch.

    Open MPI's mpirun gives each rank a pseudo-terminal and copies its output, often to a file. That terminal
    does not control the rank's session, as that of a user does.
    """
    if stream is None or not stream.isatty():
        return False
    try:
        return library.launched() is None or os.tcgetpgrp(stream.fileno()) >= 0
    except OSError:
        return False


@contextmanager
def announced(rank: int) -> Iterator[None]:
    """Report on rank 0 that kernels are compiled, on standard error: results are on standard output."""
    if rank:
        yield
    elif interactive(sys.stderr):
        from rich.console import Console

        status = Console(stderr=True).status(COMPILING)
        try:
            with listening(lambda compiling: status.start() if compiling else status.stop()):
                yield
        finally:
            status.stop()
    else:
        with listening(Patience(lambda sentence: click.echo(sentence, err=True))):
            yield
