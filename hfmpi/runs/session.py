"""The environment of a run: its ranks, the reporter, the stop signals, and the user's names for options."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from hfmpi.parallel.communicator import Communicator
from hfmpi.parallel.placement import Placement, place
from hfmpi.runs.record import Reporter
from hfmpi.runs.reporter import make_reporter
from hfmpi.runs.stop import StopSignals, job_end

__all__ = ["COMMAND", "PROGRAM", "Names", "Session", "open_session"]


class Names(NamedTuple):
    """Words of messages that differ between the command `hfmpi train` and the function `hfmpi.train`."""

    out: str
    resume: str  # including the value that continues a run
    max_steps: str
    max_seconds: str
    patience: str
    gradient_batch: str
    curvature_batch: str
    examples: str  # the training examples
    other_kind: str  # a run that was started in the other way
    origin: str  # from which runs a new run can start
    again: str  # how to continue a run that was stopped
    start_from: str  # the option that names the run from which a new run starts


COMMAND = Names(
    "--out",
    "--resume auto",
    "--max-steps",
    "--max-seconds",
    "--patience N",
    "--gradient-batch",
    "--curvature-batch",
    "training sequences",
    "a run of a Python program (hfmpi.train)",
    "a run on a text can only start from a run on a text",
    "Start again with the same command",
    "--resume",
)
PROGRAM = Names(
    "out",
    'resume="auto"',
    "max_steps",
    "max_seconds",
    "patience=N",
    "gradient_batch",
    "curvature_batch",
    "training examples",
    "a run of `hfmpi train` on a text",
    "a run can only start from a run of the same model",
    "Call it again with the same out",
    "resume",
)


@dataclass(frozen=True)
class Session:
    """The environment of a run on this rank; the clock returns seconds."""

    communicator: Communicator
    placement: Placement
    reporter: Reporter
    signals: StopSignals
    names: Names = COMMAND
    clock: Callable[[], float] = time.perf_counter


@contextmanager
def open_session(
    communicator: Communicator, names: Names, threads: int | None = None, quiet: bool = False
) -> Iterator[Session]:
    """Prepare this process for a run, and restore it afterwards; collective.

    `threads` is the number of BLAS threads of a rank, by default its share of the cores; a quiet session
    reports only what needs attention.
    """
    signals = StopSignals(job_end())
    with ExitStack() as stack:
        if threading.current_thread() is threading.main_thread():  # only the main thread receives signals
            stack.enter_context(signals)
        stack.enter_context(np.errstate(all="ignore"))  # steps that overflow are rejected
        placement = place(communicator, threads)
        reporter = stack.enter_context(make_reporter(communicator.rank, quiet))
        yield Session(communicator, placement, reporter, signals, names)
