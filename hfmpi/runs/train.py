"""One training run: the same loop on every rank; rank 0 writes the files."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np

from hfmpi.backends.base import Array
from hfmpi.errors import UserError
from hfmpi.files.checkpoint import Checkpoint
from hfmpi.measure.spans import EVALUATE, FILES
from hfmpi.measure.timer import Timer
from hfmpi.models.base import Blocks
from hfmpi.objective.data_parallel import DataParallel, Stopped, step_objectives
from hfmpi.objective.transport import choose
from hfmpi.optim.base import StepReport
from hfmpi.optim.first_order import evaluated
from hfmpi.parallel.communicator import Communicator
from hfmpi.parallel.placement import Place, Placement, single_threaded
from hfmpi.runs import checks, metric
from hfmpi.runs.config import to_toml
from hfmpi.runs.output import Output
from hfmpi.runs.record import Facts, Progress, Reporter, Validation, step_record
from hfmpi.runs.restore import entries, progress, restored
from hfmpi.runs.stop import StopSignals
from hfmpi.runs.task import Task
from hfmpi.runs.timing import Timing
from hfmpi.version import __version__

__all__ = ["Ending", "Run"]


@dataclass(frozen=True)
class Ending:
    """How a run ended: why, whether at a limit, at which step, and what validation found there."""

    reason: str
    done: bool
    step: int
    valid: Validation | None


class Run:
    """A run in its folder.

    Parameters
    ----------
    folder : Path or None
        None: nothing is written.
    task : Task
        What is trained on what; the same on every rank.
    communicator, placement
    resume : Checkpoint or None
        Where to go on; None starts anew.
    clock : callable
        Gives the time in seconds.
    """

    def __init__(
        self,
        folder: Path | None,
        task: Task,
        communicator: Communicator,
        placement: Placement,
        resume: Checkpoint | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.folder = folder
        self.communicator = communicator
        self.task, self.config, self.model = task, task.config, task.model
        config, model = self.config, self.model
        self.placement = single_threaded(placement) if config.slices else placement
        self.preset = preset = config.preset()
        self.batches = preset.gradient_batch, preset.curvature_batch
        self.epoch_steps = max(1, task.train_set.count // preset.gradient_batch)
        self.backend = model.backend
        self.timer = Timer(clock)
        self.memory_budget = config.memory_budget or (self.backend.free_memory() or placement.memory) // 2
        self.risk: DataParallel  # from the start of `train` on

        task.check(resume)
        initial = model.initial(config.seed)
        self.theta: Array = self.backend.to_device(initial.astype(self.backend.dtype))
        blocks = model.blocks if isinstance(model, Blocks) else ()
        self.progress = Progress()
        if resume is not None:
            self.theta, self.progress = self.backend.to_device(resume.theta), progress(resume)
        self.state = preset.optimizer.init(self.theta, blocks)
        if resume is not None and resume.state:
            self.state = restored(resume, self.state, self.backend, config.optimizer)
        self.first_step = self.step
        self._resumed = resume is not None
        self.timing = Timing(self.timer, communicator, placement, self.step, self.backend.device)

    @property
    def step(self) -> int:
        """The steps that were taken, since the first start."""
        return self.progress.step

    @property
    def evaluated(self) -> Array:
        """The parameters that are evaluated: the mean of the iterates where the optimizer makes one."""
        return evaluated(self.theta, self.state)

    def train(self, reporter: Reporter, signals: StopSignals) -> Ending:
        """Train until a limit or a signal; on return the checkpoint is written.

        A signal drops the step in progress: theta and the optimizer's state are those before it, and a
        resumed run takes it anew, bit for bit.

        Raises
        ------
        UserError
            On all ranks alike: a file could not be written at the start or in the end, the ranks no longer
            hold the same theta, or the numbers have gone wrong for good.
        """
        self.output = Output(self.communicator, reporter, self.first_step if self._resumed else None)
        try:
            return self._train(signals)
        finally:
            self.output.close()

    def _train(self, signals: StopSignals) -> Ending:
        config, comm, output, task = self.config, self.communicator, self.output, self.task
        theta = self.backend.to_host(self.theta)
        checks.same_start(comm, task.compared(theta, self.step))
        transport = choose(config.transport, comm, self.backend, config.slices > 0)
        self.leaving = True  # what is left to do is done, whoever wants to stop
        self.risk = DataParallel(
            self.model,
            comm,
            self.timer,
            config.micro_batch,
            self.memory_budget,
            transport,
            config.slices,
            stop=lambda: not self.leaving and signals.wanted(),
        )
        place, backend = self.placement, self.backend
        own = Place(place.host, place.local_rank, backend.device, backend.device_id, transport.name)
        if not self._resumed:
            task.try_out(self.risk, self.theta)
        self.leaving = False
        output.open(self.folder, to_toml(task.options), self.facts(comm.gather(own) or ()), task.notes)
        self.timing.start()
        self._started = self.timer.clock() - self.progress.seconds
        checkpoint_every = config.checkpoint_every or self.epoch_steps
        evaluate_every = config.evaluate_every or self.epoch_steps
        valid, saved, said = None, Progress(-1), set[str]()
        try:
            while True:
                self._look_at_the_clock()
                reason = self._limit(self.progress)
                if reason:
                    break
                if comm.any(signals.wanted()):
                    raise Stopped
                report, valid = self._one_step(evaluate_every)
                self._look_at_the_clock()
                seconds = self.timing.step_seconds
                if report.accepted and report.message and report.message not in said:
                    said.add(report.message)
                    output.reporter.note(f"step {self.step:,}: {report.message}; this is said once")
                output.step(
                    step_record(
                        self.progress, report, valid, task.keys, task.metric is not None, seconds,
                        self.batches, comm.size,
                    )
                )  # fmt: skip
                if self.step % checkpoint_every == 0 or self.progress.seconds >= output.retry_at:
                    saved = self.progress if self.save(valid) else saved
                elif config.check_every and self.step % config.check_every == 0:
                    self.check_ranks()
                checks.not_stuck(self.progress, config.max_rejections, report.message, output.last_good)
            if valid is None:
                valid = self.validate(self.evaluated)
            done = True
        except Stopped:
            reason, done = self._who_stopped(signals), False
            self.leaving = True
        # A limit of seconds that passed while the checkpoint was written must stand in it, too: else the next
        # start would take one more step.
        stands = saved.step == self.step and (not done or self._limit(saved))
        if not stands and not self.save(valid):
            unsaved = self.first_step if output.last_saved is None else output.last_saved
            failure = output.failures["the checkpoint"]
            raise UserError(f"{failure}; the steps after step {unsaved:,} are not saved")
        output.finish(f"{reason}\n" if done else "")
        return Ending(reason, done, self.step, valid)

    def _one_step(self, evaluate_every: int) -> tuple[StepReport, Validation | None]:
        """Take a step and evaluate where it is due; only when both are there does the run move on."""
        with self.timing.step():
            task, steps = self.task, self.progress.counts.steps
            cases = task.cases(steps)
            objectives = step_objectives(
                self.risk, cases, self.config.seed, steps, *self.batches, redrawn=cases is not task.train_set
            )
            theta, state, report = self.preset.optimizer.step(self.theta, self.state, objectives)
        due = (self.step + 1) % evaluate_every == 0 or self.step + 1 == self.config.max_steps
        valid = self.validate(evaluated(theta, state)) if due else None
        self.theta, self.state, self.progress = theta, state, self.progress.after(report)
        return report, valid

    def validate(self, theta: Array) -> Validation | None:
        """Measure theta on the validation cases, if there are any."""
        task = self.task
        if task.valid_set is None:
            return None
        loss = self.evaluate(theta)
        if task.metric is None:
            return Validation(loss)
        with self.timer.span(EVALUATE):
            return Validation(loss, metric.mean(task.metric, self.risk, task.valid_set, theta))

    def evaluate(self, theta: Array, most: int | None = None) -> float:
        """Give the loss on all validation cases, or so many, in the run's unit; without any, on others."""
        cases = self.task.valid_set or self.task.train_set
        with self.timer.span(EVALUATE):
            indices = np.arange(cases.count)[:most]
            return self.risk.on(cases, indices, span=EVALUATE).loss(theta) * self.task.keys.per_nat

    def save(self, valid: Validation | None) -> bool:
        """Check that all ranks agree and theta is sound; write the checkpoint, and say if it is written."""
        self.check_ranks()
        # Where the validation loss of this step is not known, that of a few cases will do.
        known = valid.loss if valid else self.evaluate(self.theta, self.risk.local.micro_batch)
        checks.finite(self.communicator.agree(known), self.step, self.output.last_good)
        with self.timer.span(FILES):
            meta = {
                "hfmpi": __version__,
                "config": self.task.options,
                **self.task.meta(self.theta),
                **asdict(self.progress),
                self.task.keys.valid: valid.loss if valid else None,
                "ranks": self.communicator.size,
            }
            theta = self.backend.to_host(self.theta)
            saved = self.output.checkpoint(theta, entries(self.state, self.backend), meta)
        self.output.timing(self.timing.collect(self.step))
        return saved

    def check_ranks(self) -> None:
        """Raise a UserError on all ranks unless all hold the same theta and optimizer state, bit for bit."""
        values = [self.backend.to_host(self.theta), *entries(self.state, self.backend).values()]
        checks.same_vectors(self.communicator, values, self.step, self.output.last_good)

    def facts(self, places: Sequence[Place]) -> Facts:
        """Give what the first lines of a log should say, with the places of all ranks."""
        config, size, (_, curvature) = self.config, self.communicator.size, self.batches
        return Facts(
            self.task.title,
            config,
            self.task.train_set.count,
            self.task.noun,
            *self.batches,
            size,
            self.placement.threads,
            self.backend.name,
            self.backend.dtype.name,
            places,
            self.task.linearisation_bytes(-(-curvature // size)),
            self.memory_budget,
            self.step,
        )

    def _look_at_the_clock(self) -> None:
        """Set the seconds, the same on all ranks."""
        seconds = self.communicator.agree(self.timer.clock() - self._started)
        self.progress = replace(self.progress, seconds=seconds)

    def _limit(self, progress: Progress) -> str:
        """Give the limit that is reached, or nothing."""
        config = self.config
        if config.max_steps and progress.step >= config.max_steps:
            return f"{progress.step:,} steps were taken"
        if config.max_seconds and progress.seconds >= config.max_seconds:
            return f"{config.max_seconds:g} seconds are over"
        return ""

    def _who_stopped(self, signals: StopSignals) -> str:
        """Give the wish of the lowest rank that has one."""
        wishes = self.communicator.gather(signals.requested) or []
        return self.communicator.agree(next((wish for wish in wishes if wish), "a rank asked for it"))
