"""A run from Python: `hfmpi.train`."""

from __future__ import annotations

import contextlib
import threading
from dataclasses import dataclass, replace
from os import PathLike
from pathlib import Path
from typing import Any, cast

import click
import numpy as np

from hfmpi.errors import UserError, shown
from hfmpi.files.history import History, Record, plain
from hfmpi.frameworks.framework import FrameworkModel
from hfmpi.models.base import Model
from hfmpi.parallel import library, watchdog
from hfmpi.parallel.communicator import Communicator
from hfmpi.parallel.failure import joint, together
from hfmpi.parallel.launch import connect
from hfmpi.parallel.placement import Placement, place, threads_kept
from hfmpi.runs.config import merge, started
from hfmpi.runs.metric import Metric
from hfmpi.runs.model_task import AnotherRun, ModelTask, config_of
from hfmpi.runs.record import Facts, Reporter
from hfmpi.runs.reporter import make_reporter
from hfmpi.runs.start import Names, begin, find
from hfmpi.runs.stop import StopSignals, job_end
from hfmpi.runs.train import Ending, Run

__all__ = ["Result", "train"]

NAMES = Names("out", 'resume="auto"', "max_steps", "max_seconds")


@dataclass(frozen=True)
class Result:
    """What a run gives, the same on every rank.

    Attributes
    ----------
    theta : ndarray (D,)
        The parameters, on the host; the mean of the iterates where the optimizer makes one.
    history : list of dict
        One a step since the first start, as in history.jsonl; not those of another run that it started from.
    step : int
        Steps that were taken, since the first start.
    done : bool
        Whether a limit was reached; else something asked the run to stop.
    reason : str
        Which of them.
    valid_loss, valid_metric : float or None
        On the validation cases, at theta.
    """

    theta: np.ndarray
    history: list[Record]
    step: int
    done: bool
    reason: str
    valid_loss: float | None
    valid_metric: float | None


def train(
    model: Model,
    train: Any,
    valid: Any = None,
    *,
    out: str | PathLike[str] | None = None,
    resume: str | PathLike[str] = "auto",
    metric: Metric | None = None,
    quiet: bool = False,
    threads: int | None = None,
    stall_timeout: float = 600.0,
    **options: Any,
) -> Result:
    """Train a model on data, alone or on all ranks of a program that runs under mpirun.

    Every rank calls it, with the same model, data and options. A run that is called again with the same
    `out` goes on where it was. SIGINT, SIGTERM and the other signals that stop `hfmpi train` stop this too:
    the call returns, with what it has. What fails on all ranks is raised on all; what fails on one ends all.

    Parameters
    ----------
    model : Model
        Such as TorchModel, JaxModel and Network make.
    train, valid : tuple, data set or Cases
        (x, y) or (x, y, mask): arrays or tensors whose first axis counts the cases; a map-style data set of
        pairs (x, y), which is read into memory; or cases such as `Examples` and `Arrays`.
    out : path, optional
        The folder of the run: config.toml, history.jsonl, checkpoint.h5, timing.json and DONE
        (docs/file-formats.md). Without it nothing is written.
    resume : {'auto', 'never'} or path
        'auto': go on if `out` has a checkpoint; 'never': refuse to. The path of a run's folder or of a
        checkpoint: start from that run, with its options but for those that are given, its model, and
        perhaps other data. Its steps and costs go on, its files stay as they are. Called again with the same
        `resume`, a run goes on where it was itself.
    metric : callable, optional
        metric(outputs (N, O), targets (N,) or (N, O)) gives a number for each row; the mean over all scored
        rows of the validation cases is valid_metric in the history.
    quiet : bool
        Say only what needs attention.
    threads : int, optional
        Of a rank's BLAS; without it its share of the cores.
    stall_timeout : float
        All ranks end when none has finished a collective for so many seconds; 0: never.
    **options
        Those of `hfmpi train`, with underscores: optimizer, gradient_batch, curvature_batch, max_steps,
        max_seconds, checkpoint_every, evaluate_every, check_every, max_rejections, seed, micro_batch,
        memory_budget, slices, transport; and settings, a dict for the optimizer's.

    Returns
    -------
    Result

    Raises
    ------
    UserError
        On all ranks alike, with a sentence that says what to do; then nothing is written that was not.
    """
    if (
        isinstance(stall_timeout, bool)
        or not isinstance(stall_timeout, (int, float))
        or not stall_timeout >= 0
    ):
        raise UserError(
            f"stall_timeout must be a number of seconds, or 0 for never, not {shown(stall_timeout)}"
        )
    with contextlib.ExitStack() as stack:
        before = watchdog.stall_timeout()
        stack.callback(watchdog.allow, before)
        # Where MPI runs already, another rank may come late from what the program did before.
        comm = connect(stall_timeout if library.world() is None else 0.0)
        watchdog.allow(stall_timeout)
        stack.callback(comm.close)  # not when one rank fails: `joint` ends all of them then
        stack.enter_context(joint())
        if threading.current_thread() is threading.main_thread():
            signals = stack.enter_context(StopSignals(job_end()))
        else:  # signals reach the main thread alone
            signals = StopSignals(job_end())
        stack.enter_context(np.errstate(all="ignore"))  # steps that overflow are rejected
        stack.enter_context(threads_kept())
        placement = place(comm, threads)
        if isinstance(model, FrameworkModel):
            stack.enter_context(model.threads(placement.threads))
        with make_reporter(comm.rank, quiet) as reporter:
            run = together(
                comm, lambda: _build(model, train, valid, out, resume, metric, options, comm, placement)
            )
            told = _Told(reporter)
            ending = run.train(told, signals)
        if comm.rank == 0 and not quiet:
            _tell(run, ending)
        records = _history(run, told, comm)
        return Result(
            run.backend.to_host(run.evaluated),
            records,
            ending.step,
            ending.done,
            ending.reason,
            ending.valid.loss if ending.valid else None,
            ending.valid.metric if ending.valid else None,
        )


class _Told:
    """Keeps the records that a reporter is told."""

    def __init__(self, reporter: Reporter) -> None:
        self.reporter, self.records = reporter, list[Record]()

    def start(self, facts: Facts) -> None:
        """Pass it on."""
        self.reporter.start(facts)

    def step(self, record: Record) -> None:
        """Keep it, and pass it on."""
        self.records.append(cast(Record, plain(record)))
        self.reporter.step(record)

    def note(self, sentence: str) -> None:
        """Pass it on."""
        self.reporter.note(sentence)


def _build(
    model: Any,
    train: Any,
    valid: Any,
    out: Any,
    resume: Any,
    metric: Any,
    options: dict[str, Any],
    comm: Communicator,
    placement: Placement,
) -> Run:
    """Make the run of what a user gave, anew or from a checkpoint; UserError if that cannot be."""
    if out is not None and not isinstance(out, (str, PathLike)):
        raise UserError(f"out must be the path of a folder, not {shown(out)}")
    if not isinstance(resume, (str, PathLike)) or not str(resume):
        raise UserError(f"resume must be 'auto', 'never', or the path of a run, not {shown(resume)}")
    folder, source = None if out is None else Path(out), str(resume)
    found, own = find(folder, source, NAMES)
    wanted = config_of(options)
    if found is None:
        task = ModelTask.of(model, train, valid, metric, merge(wanted))
        return Run(folder, task, comm, placement)
    name, remedy = (folder, "give another out") if own else (source, "a run starts from one of its model")
    if "cases" not in found.meta:
        raise UserError(f"{name} is a run of `hfmpi train` on a text; {remedy}")
    had = found.meta.get("config")
    config = merge(wanted, had, NAMES.out) if own else started(wanted, had)
    task = ModelTask.of(model, train, valid, metric, config)
    notes = [found.message] if found.message else []
    try:
        same = task.compare(found, own)
        if own:
            run = Run(folder, task, comm, placement, found)
        else:
            run, why = begin(folder, task, comm, placement, found, source, same, NAMES)
            notes += [] if same else [f"{source} was trained on other cases"]
            notes += [why] if why else []
    except AnotherRun as error:
        raise UserError(f"{name} {error}; {remedy}") from None
    run.task = replace(task, notes=(*task.notes, *notes))
    return run


def _history(run: Run, told: _Told, comm: Communicator) -> list[Record]:
    """Give all records since the first start, on every rank."""
    records = told.records
    if comm.rank == 0 and run.folder is not None and run.first_step:
        with contextlib.suppress(UserError):  # it could not be written, or somebody has removed it
            records = History.read(run.folder)
    return comm.agree(records)


def _tell(run: Run, ending: Ending) -> None:
    """Say how a run ended."""
    valid = ""
    if ending.valid is not None:
        loss, metric = ending.valid
        valid = f", loss {loss:.5g}{'' if metric is None else f', metric {metric:.5g}'} on validation"
    click.echo(f"Stopped at step {ending.step:,}: {ending.reason}{valid}.")
    if not ending.done and run.folder is not None:
        click.echo(f"Call it again with the same out to go on; the checkpoint is in {run.folder}.")
