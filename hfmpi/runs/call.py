"""A run from Python: `hfmpi.train`."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from os import PathLike
from pathlib import Path
from typing import Any, cast

from hfmpi.backends.base import Array
from hfmpi.errors import UserError, shown
from hfmpi.files.history import History, Record, plain
from hfmpi.frameworks.framework import FrameworkModel
from hfmpi.models.base import Model
from hfmpi.parallel import library, watchdog
from hfmpi.parallel.failure import joint, together
from hfmpi.parallel.launch import connect
from hfmpi.parallel.placement import threads_kept
from hfmpi.runs.best import LOSS
from hfmpi.runs.checks import least
from hfmpi.runs.metric import Metric, single_or_all
from hfmpi.runs.model_task import ModelTask, checked_options
from hfmpi.runs.record import Reporter, Validation
from hfmpi.runs.result import Result
from hfmpi.runs.session import PROGRAM, Session, open_session
from hfmpi.runs.start import open_run
from hfmpi.runs.train import Callback, Run

__all__ = ["Result", "train"]


def train(
    model: Model,
    data: Any = None,
    valid: Any = None,
    *,
    out: str | PathLike[str] | None = None,
    resume: str | PathLike[str] = "auto",
    metric: Metric | dict[str, Metric] | None = None,
    callback: Callback | None = None,
    watch: str = LOSS.name,
    quiet: bool = False,
    threads: int | None = None,
    stall_timeout: float = 600.0,
    **options: Any,
) -> Result:
    """Train a model on data, alone or on all ranks of a program that runs under mpirun.

    Every rank calls it, with the same model, data and options. A run that is called again with the same
    `out` continues from its checkpoint. SIGINT, SIGTERM and the other signals that stop `hfmpi train` also
    stop this function, which then returns its result so far. An error that occurs on all ranks is raised on
    all of them; an error that occurs on some ranks ends all ranks.

    Parameters
    ----------
    model : Model
        Such as a TorchModel, JaxModel or Network.
    data, valid : tuple, data set or Cases
        (x, y) or (x, y, mask or weights): arrays or tensors whose first axis counts the examples; a map-style
        data set of pairs (x, y), or a DataLoader of one; or objects such as `Examples`, `Dataset` and, for
        data, `Augmented`.
    out : path, optional
        The folder of the run: config.toml, history.jsonl, checkpoint.h5, best.h5, timing.json and DONE
        (docs/file-formats.md). By default nothing is written.
    resume : {'auto', 'never'} or path
        'auto': continue if `out` has a checkpoint; 'never': refuse to. The path of a run's folder or of a
        checkpoint: start from that run, with its model and its options except those that are passed here,
        possibly on different data. The new run continues the steps and costs of that run, whose files stay
        unchanged. If the function is called again with the same `resume`, the new run continues from the
        checkpoint in `out`.
    metric : callable or dict of str to callable, optional
        metric(outputs (N, O), targets (N,) or (N, O)) returns a number for each row; the mean over all scored
        rows of the validation examples is valid_metric in the history. For a dict {NAME: metric}, the mean of
        each metric is valid_NAME.
    callback : callable, optional
        callback(record, theta) is called on every rank after each step, with the step's entry of the history
        and the current parameters (D,), or the mean of the iterates if the optimizer computes one, read-only.
        All ranks get the same values. If it returns True on any rank, the run ends as at a limit. An
        exception ends the run with `error.result`.
    watch : str
        What makes a validation the best one, for keep="best" and `patience`: "loss", the lowest validation
        loss; or "max NAME" or "min NAME", the highest or lowest value of a metric, such as "max accuracy"
        ("max metric" if `metric` is a single function).
    quiet : bool
        Report only what needs attention.
    threads : int, optional
        Number of BLAS threads of a rank; by default its share of the cores.
    stall_timeout : float
        All ranks end if none has finished a collective for this many seconds; 0: never.
    **options
        The options of `hfmpi train`, with underscores: optimizer, gradient_batch, curvature_batch, max_steps,
        max_seconds, checkpoint_every, evaluate_every, check_every, max_rejections, seed, micro_batch,
        memory_budget, slices, transport; keep="best" to return the parameters of the best validation
        (default: "last"); patience=N to stop after N validations in a row without a better one. `optimizer`
        is a name, with a dict of its settings in `settings`, or an object such as
        `hfmpi.Subspace(damping=0.01)`, which has the batch sizes of the preset of its class. `train` is the
        former name of `data`.

    Returns
    -------
    Result

    Raises
    ------
    UserError
        On all ranks, with a sentence that explains what to do. If training did not start, nothing is written.
    Exception
        An exception of the model, the data or the metric, on the rank where it occurs; the other ranks raise
        a UserError.

    Once training has started, an exception that ends it has the attribute `result`, a `Result` with the last
    good parameters and, on rank 0, the history. If there is a folder, the last complete step is saved there.
    """
    if data is None:
        data = options.pop("train", None)
    with _session(stall_timeout, threads, quiet, model) as session:
        collector = _Collector(session.reporter)
        session = replace(session, reporter=collector)

        memory = least(session.communicator, session.placement.memory)

        def build() -> Run:
            if out is not None and not isinstance(out, (str, PathLike)):
                raise UserError(f"out must be the path of a folder, not {shown(out)}")
            if not isinstance(resume, (str, PathLike)) or not str(resume):
                raise UserError(f"resume must be 'auto', 'never', or the path of a run, not {shown(resume)}")
            if callback is not None and not callable(callback):
                raise UserError(f"callback must be a function (record, theta) -> stop, not {shown(callback)}")
            return open_run(
                None if out is None else Path(out),
                str(resume),
                checked_options(options),
                lambda config, _: ModelTask.of(model, data, valid, metric, config, watch, memory),
                session,
                callback,
            )

        run = together(session.communicator, build)
        try:
            ending = run.train()
        except Exception as error:
            if run.partial is not None:
                records, valid = _history(run, collector.records), run.kept.valid if run.kept else None
                with contextlib.suppress(AttributeError):  # a user-defined exception may not allow attributes
                    error.result = _result(run, run.partial, records, False, str(error), valid)  # type: ignore[attr-defined]
            raise
        records = session.communicator.agree(_history(run, collector.records))
        return _result(run, run.evaluated, records, ending.done, ending.reason, ending.valid)


def _result(
    run: Run, theta: Array, records: list[Record], done: bool, reason: str, valid: Validation | None
) -> Result:
    loss, metric = (valid.loss, single_or_all(valid.metrics)) if valid else (None, None)
    best_step = run.best.step if run.best else None
    about = best_step, run.kept is not None, run.communicator.rank
    return Result(run.backend.to_host(theta), records, run.step, done, reason, loss, metric, *about)


@contextlib.contextmanager
def _session(stall_timeout: float, threads: int | None, quiet: bool, model: Any) -> Iterator[Session]:
    """Connect the ranks and prepare this process for a run; restore it afterwards."""
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
        # If MPI is already running, another rank may arrive late because of earlier work of the program.
        comm = connect(stall_timeout if library.world() is None else 0.0)
        watchdog.allow(stall_timeout)
        stack.callback(comm.close)  # not called if one rank fails, because `joint` then ends all ranks
        stack.enter_context(joint())
        stack.enter_context(threads_kept())
        session = stack.enter_context(open_session(comm, PROGRAM, threads, quiet))
        if isinstance(model, FrameworkModel):
            stack.enter_context(model.threads(session.placement.threads))
        yield session


class _Collector:
    """A reporter that collects the records of a run, and forwards all messages to another reporter."""

    def __init__(self, reporter: Reporter) -> None:
        self.reporter, self.records = reporter, list[Record]()
        self.start, self.note, self.end = reporter.start, reporter.note, reporter.end

    def step(self, record: Record) -> None:
        """Collect a record, to which the end of the run may add a validation, and forward it."""
        self.records.append(record)
        self.reporter.step(record)


def _history(run: Run, records: list[Record]) -> list[Record]:
    """Return the records of this call; on rank 0 all records since the first start of the run."""
    if run.communicator.rank == 0 and run.folder is not None and run.first_step:
        with contextlib.suppress(UserError):  # the file could not be written, or was removed
            return History.read(run.folder)
    return [cast(Record, plain(record)) for record in records]
