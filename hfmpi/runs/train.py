"""One training run: all ranks execute the same loop, and rank 0 writes the files."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from hfmpi.backends import gpus
from hfmpi.backends.base import Array
from hfmpi.errors import UserError, shown
from hfmpi.files.checkpoint import Checkpoint
from hfmpi.files.history import Record, plain
from hfmpi.measure.cost import Counts
from hfmpi.measure.spans import EVALUATE, FILES
from hfmpi.measure.timer import Timer
from hfmpi.models.base import Blocks
from hfmpi.objective.data_parallel import DataParallel, Stopped, Unscored, step_objectives
from hfmpi.objective.transport import choose
from hfmpi.optim.base import StepReport
from hfmpi.optim.first_order import evaluated
from hfmpi.parallel.communicator import digest
from hfmpi.parallel.failure import announce
from hfmpi.parallel.placement import Place, single_threaded
from hfmpi.runs import checks, metric
from hfmpi.runs.best import Best, judged
from hfmpi.runs.merge import to_toml
from hfmpi.runs.output import Output
from hfmpi.runs.record import Ending, Facts, Progress, Validation, step_record, validated
from hfmpi.runs.restore import (
    Lowest,
    best,
    best_entries,
    entries,
    lowest,
    lowest_entries,
    progress,
    restored,
)
from hfmpi.runs.session import Session
from hfmpi.runs.task import Task
from hfmpi.runs.timing import Timing
from hfmpi.version import __version__

__all__ = ["Callback", "Run"]

Callback = Callable[[Record, np.ndarray], object]
"""(record of a step, parameters (D,) to evaluate after it) -> True to stop."""

ASKED = "the callback asked to stop"


class Run:
    """A training run, which writes its files into a folder.

    Parameters
    ----------
    folder : Path or None
        If it is None, nothing is written.
    task : Task
        What is trained, on which data; equal on all ranks.
    session : Session
    checkpoint : Checkpoint or None
        The checkpoint from which the run continues; None for a new run.
    callback : callable, optional
        Called on every rank after each step.

    Raises
    ------
    UserError
        On this rank alone, if the checkpoint does not fit the task, or the task cannot start.
    """

    def __init__(
        self,
        folder: Path | None,
        task: Task,
        session: Session,
        checkpoint: Checkpoint | None = None,
        callback: Callback | None = None,
    ) -> None:
        self.callback = callback
        config, model, placement = task.config, task.model, session.placement
        self.folder, self.task, self.session = folder, task, session
        self.communicator, self.reporter = session.communicator, session.reporter
        self.config, self.model, self.backend = config, model, model.backend
        self.placement = single_threaded(placement) if config.slices else placement
        self.preset = preset = config.preset()
        self.batches = preset.gradient_batch, preset.curvature_batch
        self.epoch_steps = max(1, task.train_set.count // preset.gradient_batch)
        self.timer = Timer(session.clock)
        self.memory_budget = config.memory_budget or (self.backend.free_memory() or placement.memory) // 2

        task.check(checkpoint)
        initial = model.initial(config.seed)
        self.theta: Array = self.backend.to_device(initial.astype(self.backend.dtype))
        self.progress = Progress()
        if checkpoint is not None:
            self.theta, self.progress = self.backend.to_device(checkpoint.theta), progress(checkpoint)
        self.progress = replace(self.progress, unit=task.forward_pass())
        self.state = preset.optimizer.init(self.theta, model.blocks if isinstance(model, Blocks) else ())
        if checkpoint is not None and checkpoint.state:
            self.state = restored(checkpoint, self.state, self.backend, config.optimizer)
        self.valid: Validation | None = None  # of the current step, if it was evaluated
        # If every step has the same batch, each step computes the risk of the parameters before it.
        self.repeated = preset.gradient_batch == task.train_set.count and task.cases(0) is task.train_set
        self.lowest: Lowest | None = None
        if checkpoint is not None and self.repeated and preset.optimizer.seeks_lowest_risk:
            self.lowest = self._on_device(lowest(checkpoint))
        self.best = None if checkpoint is None else self._best_of(checkpoint)
        self._told_stale = False  # whether the user was notified that the validations have stopped improving
        self.partial: Array = None  # the parameters of the partial result if an error ended the run
        self._safe = self.theta  # the last parameters that were saved
        self._finite = True  # whether the loss of the last step is finite
        self._recorded = 0  # the last step that is in the history

        self._resumed, self._saved = checkpoint is not None, Progress(-1)
        self.first_step, self._first_second = self.progress.step, self.progress.seconds
        self.timing = Timing(self.timer, self.communicator, placement, self.first_step, self.backend.device)
        self.output = Output(self.communicator, self.reporter, self.first_step if self._resumed else None)
        self._interruptible = False  # whether a request to stop interrupts the work
        self.risk = DataParallel(
            model,
            self.communicator,
            self.timer,
            config.micro_batch,
            self.memory_budget,
            slices=config.slices,
            stop=lambda: self._interruptible and session.signals.wanted(),
            overdue=lambda: self._interruptible and 0 < config.max_seconds <= self._seconds,
        )

    @property
    def step(self) -> int:
        """Return the number of steps since the first start."""
        return self.progress.step

    @property
    def evaluated(self) -> Array:
        """Return the result: the parameters of the best validation or the last ones, as `keep` selects.

        The last ones are theta, the mean of the iterates, or, at the end, those of the lowest risk.
        """
        if self.kept is not None:
            return self.kept.theta
        if self.lowest is not None and self.lowest.returned:
            return self.lowest.theta
        return evaluated(self.theta, self.state)

    @property
    def kept(self) -> Best | None:
        """Return the best validation, if the result of the run is its parameters."""
        return self.best if self.config.keep == "best" else None

    def train(self) -> Ending:
        """Train until a limit or a signal, and write the checkpoint.

        A signal discards the step in progress: theta and the optimizer's state are those before the step, and
        a resumed run repeats it, bit for bit. An error discards it too, and the last complete step is saved.

        Raises
        ------
        UserError
            On all ranks, if a file cannot be written at the start or at the end, if the ranks no longer hold
            the same theta, if the loss is not finite, or if too many steps in a row were rejected.
        """
        try:
            self._start()
            try:
                ending = self._train()
            except Exception as error:
                self._rescue(error)
                raise
        finally:
            self.output.close()
        self.reporter.end(ending)
        return ending

    def _start(self) -> None:
        """Check that all ranks start equally, choose the transport, and open the folder; collective."""
        config, comm, task, backend = self.config, self.communicator, self.task, self.backend
        checks.same_start(comm, task.compared(backend.to_host(self.theta), self.step))
        alike = "{} on all ranks or on none: rank {{}} differs from the others"
        folder, callback = alike.format(f"pass {self.session.names.out}"), alike.format("pass a callback")
        checks.same_start(comm, {folder: self.folder is not None, callback: self.callback is not None})
        if self._resumed:
            kept = None if self.best is None else digest(backend.to_host(self.best.theta))
            sentence = "rank {} has a different best validation in its checkpoint than the other ranks"
            checks.same_start(comm, {sentence: kept})
        self.risk.transport = choose(config.transport, comm, backend, config.slices > 0)
        if not self._resumed:
            checks.scored(task.train_set)
            with contextlib.suppress(Unscored):  # such a batch is skipped
                task.try_out(self.risk, self.theta)
        host, local_rank = self.placement.host, self.placement.local_rank
        transport, visible = self.risk.transport.name, len(gpus()) if backend.device_id else 0
        place = Place(host, local_rank, backend.device, backend.device_id, transport, visible)
        places = comm.gather(place) or ()
        self.output.open(self.folder, to_toml(task.options), self.facts(places), task.notes)
        if self.folder is not None:
            self.output.start_best(*self._best_content())
        self.timing.start()

    def _train(self) -> Ending:
        """Take steps, write what has not been written yet, and return how the run ended."""
        self._interruptible = True
        try:
            reason, done = self._take_steps(), True
            self._settle(done)
        except Stopped:
            reason, done = self._who_stopped()
            self._interruptible = False
            self._settle(done)
        self._interruptible = False
        # If the limit of seconds was reached while the checkpoint was written, it is written again with these
        # seconds: otherwise the next start would take one more step.
        saved = self._saved.step == self.step and (not done or self._limit(self._saved))
        saved = saved and not (self.lowest is not None and self.lowest.returned)
        if not saved and not self.save():
            unsaved = self.first_step if self.output.last_saved is None else self.output.last_saved
            failure = self.output.failures["the checkpoint"]
            raise UserError(f"{failure}; the steps after step {unsaved:,} are not saved")
        self.output.finish(f"{reason}\n" if done else "")
        again = f"{self.session.names.again} to continue; the checkpoint is in {self.folder}"
        remedy = "" if done or self.folder is None else again
        valid, kept_step = (self.kept.valid, self.kept.step) if self.kept else (self.valid, None)
        return Ending(reason, done, self.step, valid, self.task.unit, remedy, kept_step)

    def _settle(self, done: bool) -> None:
        """Determine which parameters are the result, and validate them at the end of the run; collective."""
        if self.lowest is not None:
            returned = False
            if self.config.keep != "best" and self.lowest.theta is not self.theta:
                cases = self.task.train_set
                with self.timer.span(EVALUATE):
                    risk = self.risk.on(cases, np.arange(cases.count), span=EVALUATE).loss(self.theta)
                returned = not self.communicator.agree(risk) <= self.lowest.risk
            self.lowest = self.lowest._replace(returned=returned)
            self.valid = None if returned else self.valid
        if done and self.valid is None:
            returned = self.lowest is not None and self.lowest.returned
            theta = self.evaluated if returned else evaluated(self.theta, self.state)
            self.valid = self.validate(theta)
            if self.valid is not None and not returned:
                self.output.amend(self.step, validated(self.valid, self.task.keys, [*self.task.metrics]))
                before = self.best
                self._judge(self.valid)
                self._write_best()
                self._saved = self._saved if self.best is before else Progress(-1)

    def _rescue(self, error: Exception) -> None:
        """Save the last complete step without a collective, because other ranks may not have failed."""
        self._interruptible = False
        finite = bool(np.isfinite(self.backend.to_host(self.theta)).all())
        if self._finite and finite and not isinstance(error, checks.Unsound):
            self._safe = evaluated(self.theta, self.state)
            if self._recorded == self.step > max(self.first_step, self._saved.step):
                self.output.rescue(*self._content(None, self._identity()))
        self.partial = self._safe if self.lowest is None else self.lowest.theta
        if self.kept is not None:
            self.partial = self.kept.theta

    def _take_steps(self) -> str:
        """Take steps until a limit is reached, and return it; Stopped is raised if a rank wants to stop."""
        config, comm, output, task = self.config, self.communicator, self.output, self.task
        checkpoint_every, reported = config.checkpoint_every or self.epoch_steps, set[str]()
        while True:
            self._update_seconds()
            if reason := self._limit(self.progress):
                return reason
            if comm.any(self.session.signals.wanted()):
                raise Stopped
            report = self._one_step()
            self._update_seconds()
            converged = report.converged and self.repeated
            if report.accepted and report.message and not converged and report.message not in reported:
                reported.add(report.message)
                self.reporter.note(f"step {self.step:,}: {report.message}; this note is not repeated")
            seconds, metrics = self.timing.step_seconds, [*task.metrics]
            record = step_record(
                self.progress, report, self.valid, task.keys, metrics, seconds, self.batches, comm.size
            )
            output.step(record)
            self._recorded = self.step
            if self.valid is not None:
                self._judge(self.valid)
                self._write_best()
            if self.callback is not None and self._asks(self.callback, record):
                return ASKED
            if converged:
                return f"converged at step {self.step:,}: {report.message}"
            if self.step % checkpoint_every == 0 or self.progress.seconds >= output.retry_at:
                self.save()
            elif config.check_every and self.step % config.check_every == 0:
                self.check_ranks()
            if self._finite and 0 < config.max_rejections <= self.progress.rejections:
                self.save()
            checks.not_stuck(self.progress, config.max_rejections, report.message, output.last_good)

    def _one_step(self) -> StepReport:
        """Take a step and evaluate it if that is due; the run advances only when both are complete."""
        with self.timing.step():
            task, steps = self.task, self.progress.counts.steps
            cases = task.cases(steps)
            try:
                objectives = step_objectives(
                    self.risk,
                    cases,
                    self.config.seed,
                    steps,
                    *self.batches,
                    redrawn=cases is not task.train_set,
                )
            except Unscored as error:
                theta, state, report = self.theta, self.state, _empty(error)
            else:
                theta, state, report = self.preset.optimizer.step(self.theta, self.state, objectives)
                self._finite = math.isfinite(report.loss)
        step, every = self.step + 1, self.config.evaluate_every or self.epoch_steps
        due = step % every == 0 or step == self.config.max_steps
        valid = self.validate(evaluated(theta, state)) if due else None
        if self.repeated and self.preset.optimizer.seeks_lowest_risk and math.isfinite(report.loss):
            found = Lowest(self.theta, report.loss)
            self.lowest = found if self.lowest is None or found.risk < self.lowest.risk else self.lowest
        self.theta, self.state, self.valid = theta, state, valid
        self.progress = self.progress.after(report)
        return report

    def validate(self, theta: Array) -> Validation | None:
        """Compute the loss and the metrics of theta on the validation examples, if there are any."""
        task = self.task
        if task.valid_set is None:
            return None
        loss = self.evaluate(theta)
        with self.timer.span(EVALUATE):
            valid = Validation(loss, metric.means(task.metrics, self.risk, task.valid_set, theta))
        return self.communicator.agree(valid)

    def _judge(self, valid: Validation) -> None:
        """Compare the validation of this step with the best one, and check the parameters of a better one.

        Raises
        ------
        Unsound
            On all ranks, unless all of them hold the same parameters, bit for bit.
        """
        before, watch = self.best, self.task.watch
        theta = evaluated(self.theta, self.state)
        self.best = judged(before, watch, theta, valid, self.step)
        if self.best is None or self.best is before:
            return
        if self.best.step == self.step:
            host = self.backend.to_host(theta)
            try:
                checks.same_vectors(self.communicator, [host], self.step, self.output.last_good)
            except checks.Unsound:
                self.best = before
                raise
        elif not self._told_stale and (sentence := self.best.stopped(watch, valid)):
            self._told_stale = True
            self.reporter.note(
                f"{sentence}; {self.session.names.patience} stops a run after N such validations"
            )

    def _write_best(self) -> None:
        """Write best.h5 if the best validation is that of this step."""
        if self.folder is not None and self.best is not None and self.best.step == self.step:
            theta, meta = self._best_content()
            with self.timer.span(FILES):
                self.output.best(theta, meta)

    def _asks(self, callback: Callback, record: Record) -> bool:
        """Call the callback on every rank with the same arguments; return whether any rank asks to stop."""
        told = self.communicator.agree(plain(record))
        theta = self.backend.to_host(evaluated(self.theta, self.state)).view()
        theta.flags.writeable = False

        def ask() -> np.ndarray:
            try:
                return np.array([_wish(callback(told, theta)), False], np.float64)
            except Exception as error:
                rank, size = self.communicator.rank, self.communicator.size
                if size > 1:  # the other ranks may wait for this one in a collective of their callback
                    announce(f"rank {rank}: the callback raised {type(error).__name__}: {error}")
                raise

        return bool(self.risk.total(ask, 2, np.float64, host=True)[0])

    def evaluate(self, theta: Array, count: int | None = None) -> float:
        """Return the loss on the validation examples, or the first `count`, in the unit of the run.

        Without validation examples, it is the loss on training examples.
        """
        cases = self.task.valid_set or self.task.train_set
        with self.timer.span(EVALUATE):
            try:
                risk = self.risk.on(cases, np.arange(cases.count)[:count], span=EVALUATE)
            except Unscored:  # the first examples may have no target
                risk = self.risk.on(cases, np.arange(cases.count), span=EVALUATE)
            return risk.loss(theta) * self.task.keys.per_nat

    def save(self) -> bool:
        """Write the checkpoint if all ranks agree and theta is finite; return whether it could be written."""
        self.check_ranks()
        valid = self.valid
        # If the validation loss of this step is not known, that of a few examples suffices.
        loss = valid.loss if valid else self.evaluate(self.theta, self.risk.local.micro_batch)
        checks.finite(self.communicator.agree(loss), self.step, self.output.last_good)
        with self.timer.span(FILES):
            saved = self.output.checkpoint(*self._content(valid, self.task.meta(self.theta)))
        self.output.timing(self.timing.collect(self.step))
        self._saved = self.progress if saved else self._saved
        self._safe = evaluated(self.theta, self.state)
        return saved

    def _identity(self) -> dict[str, Any]:
        """Return what a checkpoint stores about model and data, even if the model cannot be evaluated."""
        try:
            return self.task.meta(self.theta)
        except Exception:
            return {**self.task.identity, "title": self.task.title}

    def _content(
        self, valid: Validation | None, identity: dict[str, Any]
    ) -> tuple[np.ndarray, dict[str, Any], dict[str, Any]]:
        """Return theta, the state and the meta of a checkpoint."""
        entry, about = lowest_entries(self.lowest, self.backend)
        best_entry, best_about = best_entries(self.best, self.theta, self.task.watch)
        found = {name: self.backend.to_host(theta) for name, theta in best_entry.items()}
        meta = self._meta(valid, identity, self.progress) | about | best_about
        return self.backend.to_host(self.theta), entries(self.state, self.backend) | entry | found, meta

    def _meta(self, valid: Validation | None, identity: dict[str, Any], at: Progress) -> dict[str, Any]:
        """Return what a checkpoint stores about the run at this progress."""
        model = self.task.model
        return {
            "hfmpi": __version__,
            "config": self.task.options,
            "blocks": [list(block) for block in model.blocks] if isinstance(model, Blocks) else [],
            **identity,
            **asdict(at),
            self.task.keys.valid: valid.loss if valid else None,
            "ranks": self.communicator.size,
        }

    def _best_content(self) -> tuple[np.ndarray | None, dict[str, Any]]:
        """Return the parameters and the meta of best.h5: None and {} if there has been no validation."""
        if self.best is None:
            return None, {}
        theta, valid = self.best.theta, self.best.valid
        about = best_entries(self.best, theta, self.task.watch)[1]
        at = replace(self.progress, step=self.best.step)
        return self.backend.to_host(theta), self._meta(valid, self.task.meta(theta), at) | about

    def check_ranks(self) -> None:
        """Check on all ranks that all of them hold the same theta and optimizer state, bit for bit."""
        values = [self.backend.to_host(self.theta), *entries(self.state, self.backend).values()]
        checks.same_vectors(self.communicator, values, self.step, self.output.last_good)

    def facts(self, places: Sequence[Place]) -> Facts:
        """Return the facts for the first lines of a log, with the locations of all ranks."""
        ranks, threads, (gradient, curvature) = self.communicator.size, self.placement.threads, self.batches
        size = self.task.linearisation_bytes(-(-curvature // ranks))
        optimizer = self.preset.optimizer
        wanted = getattr(optimizer, "segments", 0) if optimizer.needs.rows else 0
        rows = gradient * self.task.segments(wanted) if wanted else 0
        sketched = getattr(optimizer, "sketch_segments", lambda examples: 0)(curvature)
        sketch = curvature * self.task.segments(sketched) if sketched else 0
        counts, budget = (ranks, threads, places, size), self.memory_budget
        return Facts(self.task, gradient, curvature, *counts, budget, rows, sketch, self.step)

    @property
    def _seconds(self) -> float:
        """Return the seconds since the first start, measured on this rank."""
        return self._first_second + self.timing.seconds

    def _update_seconds(self) -> None:
        """Set the seconds of the progress from the clock, to the same value on all ranks."""
        self.progress = replace(self.progress, seconds=self.communicator.agree(self._seconds))

    def _limit(self, progress: Progress) -> str:
        """Return the limit that is reached, or ""."""
        config = self.config
        if config.max_steps and progress.step >= config.max_steps:
            return "1 step was taken" if progress.step == 1 else f"{progress.step:,} steps were taken"
        if config.max_seconds and progress.seconds >= config.max_seconds:
            return f"{config.max_seconds:g} seconds have passed"
        if self.best is not None and 0 < config.patience <= self.best.stale:
            noun, step, stale = self.task.watch.noun, self.best.step, self.best.stale
            ago = f"{stale:,} validation{'s' * (stale != 1)} ago"
            return f"the {noun} is that of step {step:,}, {ago}"
        return ""

    def _who_stopped(self) -> tuple[str, bool]:
        """Return the reason of the lowest rank that wants to stop, and whether it is the limit of seconds."""
        self._update_seconds()
        wishes = self.communicator.gather(self.session.signals.requested) or []
        wish = self.communicator.agree(next((wish for wish in wishes if wish), ""))
        return (wish, False) if wish else (f"{self.config.max_seconds:g} seconds have passed", True)

    def _best_of(self, checkpoint: Checkpoint) -> Best | None:
        """Return the best validation that a checkpoint knows, with parameters on the device."""
        found = best(checkpoint, self.task.watch)
        if found is None:
            return None
        same = found.theta is checkpoint.theta
        return replace(found, theta=self.theta if same else self.backend.to_device(found.theta))

    def _on_device(self, found: Lowest | None) -> Lowest | None:
        return found and found._replace(theta=self.backend.to_device(found.theta), returned=False)


def _wish(answer: object) -> bool:
    """Return whether the answer of a callback asks to stop; raise a UserError if it is ambiguous."""
    if isinstance(answer, np.ndarray) and answer.size != 1:
        raise UserError(
            f"the callback must return True to stop, and False or None to continue, not {shown(answer)}"
        )
    return bool(answer)


def _empty(error: Unscored) -> StepReport:
    """Return the report of a step without a scored output."""
    return StepReport(math.nan, True, f"{error}; its step changes nothing", Counts())
