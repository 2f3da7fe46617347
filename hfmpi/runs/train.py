"""One training run: the same loop on every rank; rank 0 writes the files."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

import hfmpi
from hfmpi.backends.base import Array
from hfmpi.data.batches import Sequences, check_batch
from hfmpi.data.corpus import Corpus
from hfmpi.errors import UserError
from hfmpi.files.checkpoint import Checkpoint
from hfmpi.files.writer import Writer
from hfmpi.measure import cost
from hfmpi.measure.timer import Timer
from hfmpi.models.network import Network
from hfmpi.objective.data_parallel import DataParallel, Stopped, step_objectives
from hfmpi.objective.transport import choose
from hfmpi.optim.base import StepReport
from hfmpi.parallel.communicator import Communicator, digest
from hfmpi.parallel.failure import together
from hfmpi.parallel.placement import Placement, single_threaded
from hfmpi.runs.config import Config, to_toml
from hfmpi.runs.record import BITS, facts, step_record
from hfmpi.runs.restore import check_model, progress, restored_state
from hfmpi.runs.stop import StopSignals
from hfmpi.runs.timing import Timing

__all__ = ["Place", "Reporter", "Result", "Run"]

RETRY = 60.0
"""Seconds after which a checkpoint that could not be written is tried again, if none is due before."""


class Reporter(Protocol):
    """What a run tells while it goes on; only rank 0's is asked."""

    def start(self, facts: dict[str, Any]) -> None:
        """Tell what is about to be trained."""

    def step(self, record: dict[str, Any]) -> None:
        """Tell of a step: the object that goes into the history."""

    def note(self, sentence: str) -> None:
        """Tell of something that the user may want to mend while the run goes on."""


class Place(NamedTuple):
    """Where a rank computes, and how its vectors reach the others."""

    host: str
    local_rank: int
    device: str
    device_id: str | None
    transport: str


@dataclass(frozen=True)
class Result:
    """How a run ended: why, at which step, and its last validation loss in bits per character."""

    reason: str
    done: bool
    step: int
    valid_bpc: float | None


class Run:
    """A run in its folder.

    Parameters
    ----------
    folder : Path
    config : Config
    data : Path
        The corpus file, read on every rank.
    communicator, placement
    resume : Checkpoint or None
        Where to go on; None starts anew.
    """

    def __init__(
        self,
        folder: Path,
        config: Config,
        data: Path,
        communicator: Communicator,
        placement: Placement,
        resume: Checkpoint | None = None,
    ) -> None:
        self.folder = folder
        self.communicator = communicator
        self.placement = single_threaded(placement) if config.slices else placement
        self.data = data.resolve()
        self.corpus = corpus = Corpus.read(data)
        cell = config.cell(corpus.vocabulary)
        # The size is settled now: the budget has served, and a resumed run must not ask again.
        self.config = replace(config, hidden=cell.hidden, parameters=0)
        self.preset = config.preset()
        self.train_set = Sequences(corpus.train, config.sequence_length, config.warmup)
        self.valid_set = Sequences(corpus.valid, config.sequence_length, config.warmup)
        check_batch(self.preset.gradient_batch, self.train_set.count)
        self.backend = config.make_backend(placement.local_rank)
        self.timer = Timer()
        self.network = Network(cell, self.backend)
        self.memory_budget = config.memory_budget or (self.backend.free_memory() or placement.memory) // 2
        self.risk: DataParallel  # from the start of `train` on
        self.places: list[Place] = []
        self.epoch_steps = max(1, self.train_set.count // self.preset.gradient_batch)

        if resume is not None:  # before memory is taken for what its options describe
            check_model(resume, corpus.symbols, self.network.size, self.backend.dtype)
        initial = cell.initial(config.seed, config.initialisation, config.forget_bias)
        self.theta: Array = self.backend.to_device(initial.astype(self.backend.dtype))
        self.state = self.preset.optimizer.init(self.theta)
        self.step, self.seconds, self.counts = 0, 0.0, cost.Counts()
        self.rejections = 0  # in a row, up to now
        if resume is not None:
            self._restore(resume)
        self.first_step = self.step
        self.last_saved = self.step if resume is not None else None  # the step of the newest checkpoint
        self.timing = Timing(self.timer, communicator, placement, self.step, self.backend.device)
        self.files: Any = None  # the Writer, on rank 0, while it trains
        self.failures: dict[str, str] = {}  # by file, what became of the last attempt to write it
        self.retry_at = math.inf  # seconds of the run

    # The loop ----------------------------------------------------------------------------------

    def train(self, reporter: Reporter, signals: StopSignals) -> Result:
        """Train until a limit or a signal; on return the checkpoint is written.

        A signal drops the step in progress: theta and the optimizer's state are those before it, and a
        resumed run takes it anew, bit for bit.

        A file that cannot be written does not end the training: the user is told once, and it is tried again.

        Raises
        ------
        UserError
            On all ranks alike: a file could not be written at the start or in the end, the ranks no longer
            hold the same theta, or the numbers have gone wrong for good.
        """
        try:
            return self._train(reporter, signals)
        finally:
            if self.files is not None:
                self.files.close()

    def _train(self, reporter: Reporter, signals: StopSignals) -> Result:
        config, comm = self.config, self.communicator
        self._check_start()
        transport = choose(config.transport, comm, self.backend, config.slices > 0)
        self.leaving = False  # what is left to do is done, whoever wants to stop
        self.risk = DataParallel(
            self.network,
            comm,
            self.timer,
            config.micro_batch,
            self.memory_budget,
            transport,
            config.slices,
            stop=lambda: not self.leaving and signals.wanted(),
        )
        place = self.placement
        own = Place(place.host, place.local_rank, self.backend.device, self.backend.device_id, transport.name)
        self.places = comm.gather(own) or []
        self._on_first_rank(self._open_files)
        if comm.rank == 0:
            reporter.start(facts(self))
        self.reporter = reporter
        self._tell()
        self.timing.start()
        started = time.perf_counter() - self.seconds
        checkpoint_every = config.checkpoint_every or self.epoch_steps
        evaluate_every = config.evaluate_every or self.epoch_steps
        valid, saved = None, -1
        try:
            while True:
                self.seconds = comm.agree(time.perf_counter() - started)
                reason = self._limit()
                if reason:
                    break
                if comm.any(signals.wanted()):
                    raise Stopped
                report, valid = self._one_step(evaluate_every)
                self.seconds = comm.agree(time.perf_counter() - started)
                record = step_record(self, report, valid)
                if self.files is not None:
                    self._try("the history", partial(self.files.record, record))
                    reporter.step(record)
                if self.step % checkpoint_every == 0 or self.seconds >= self.retry_at:
                    saved = self.step if self.save(valid) else saved
                elif config.check_every and self.step % config.check_every == 0:
                    self.check_ranks()
                self._check_rejections(report)
            if valid is None:
                valid = self.evaluate(self.theta)
            done = True
        except Stopped:
            reason, done = self._who_stopped(signals), False
            self.leaving = True
        if saved != self.step and not self.save(valid):
            unsaved = self.first_step if self.last_saved is None else self.last_saved
            failure = self.failures["the checkpoint"]
            raise UserError(f"{failure}; the steps after step {unsaved:,} are not saved")
        self._on_first_rank(lambda: self.files.finish(f"{reason}\n" if done else ""))
        return Result(reason, done, self.step, valid)

    def _one_step(self, evaluate_every: int) -> tuple[StepReport, float | None]:
        """Take a step and evaluate where it is due; only when both are there does the run move on."""
        with self.timing.step():
            sizes = self.preset.gradient_batch, self.preset.curvature_batch
            objectives = step_objectives(self.risk, self.train_set, self.config.seed, self.step, *sizes)
            theta, state, report = self.preset.optimizer.step(self.theta, self.state, objectives)
        due = (self.step + 1) % evaluate_every == 0 or self.step + 1 == self.config.max_steps
        valid = self.evaluate(theta) if due else None
        self.theta, self.state = theta, state
        self.step += 1
        self.counts += cost.Counts(steps=1, **asdict(report.work))
        self.rejections = 0 if report.accepted else self.rejections + 1
        return report, valid

    def evaluate(self, theta: Array) -> float:
        """Give the loss on the whole validation split in bits per character."""
        with self.timer.span("evaluate"):
            everything = np.arange(self.valid_set.count)
            return self.risk.on(self.valid_set, everything, span="evaluate").loss(theta) * BITS

    def _limit(self) -> str:
        """Give the limit that is reached, or nothing."""
        config = self.config
        if config.max_steps and self.step >= config.max_steps:
            return f"{self.step:,} steps were taken"
        if config.max_seconds and self.seconds >= config.max_seconds:
            return f"{config.max_seconds:g} seconds are over"
        return ""

    def _who_stopped(self, signals: StopSignals) -> str:
        """Give the wish of the lowest rank that has one."""
        wishes = self.communicator.gather(signals.requested) or []
        return self.communicator.agree(next((wish for wish in wishes if wish), "a rank asked for it"))

    # Files -------------------------------------------------------------------------------------

    def _open_files(self) -> None:
        self.files = Writer(self.folder, self.step, to_toml(self.config))

    def save(self, valid: float | None) -> bool:
        """Check that all ranks agree and theta is sound; write the checkpoint, and say if it is written."""
        self.check_ranks()
        self._check_loss(valid)
        with self.timer.span("files"):
            state = {
                f.name: self.backend.to_host(v) if hasattr(v := getattr(self.state, f.name), "shape") else v
                for f in fields(self.state)
            }
            meta = {
                "hfmpi": hfmpi.__version__,
                "config": asdict(self.config),
                "vocabulary": list(self.corpus.symbols),
                "data": str(self.data),
                "corpus": self.corpus.digest,
                "step": self.step,
                "seconds": self.seconds,
                "counts": asdict(self.counts),
                "rejections": self.rejections,
                "valid_bpc": valid,
                "ranks": self.communicator.size,
            }
            theta, files = self.backend.to_host(self.theta), self.files
            # Fails on all ranks alike, so that they go on in step.
            saved = self._try(
                "the checkpoint",
                lambda: self._on_first_rank(lambda: files.checkpoint(theta, state, meta)),
            )
            self.retry_at = math.inf if saved else self.seconds + RETRY
        if saved:
            self.last_saved = self.step
        timing = self.timing.collect(self.step)
        if files is not None:
            self._try("timing.json", lambda: files.timing(timing))
        self._tell()
        return saved

    def _tell(self) -> None:
        """Tell what the writer of the files found."""
        while self.files is not None and self.files.notes:
            self.reporter.note(self.files.notes.pop(0))

    def _try(self, what: str, write: Callable[[], object]) -> bool:
        """Write a file; tell of a failure once, and once when it is over."""
        try:
            write()
        except UserError as error:
            if what not in self.failures:
                self.reporter.note(f"{error}; training goes on, and it is tried again")
            self.failures[what] = str(error)
            return False
        if self.failures.pop(what, None):
            self.reporter.note(f"{what} is written again")
        return True

    def _restore(self, found: Checkpoint) -> None:
        """Take the place of what the checkpoint was written from."""
        state = restored_state(found, self.state, self.config.optimizer)
        self.step, self.seconds, self.rejections, self.counts = progress(found)
        place = self.backend.to_device
        self.theta = place(found.theta)
        entries = {k: place(v) if isinstance(v, np.ndarray) else v for k, v in state.items()}
        self.state = type(self.state)(**entries)

    def _check_start(self) -> None:
        """Raise a UserError on all ranks unless all start with the same data, options and checkpoint.

        Nodes that do not share their files would otherwise do different runs, and wait for one another.
        """
        theta = digest(self.backend.to_host(self.theta))
        start = json.dumps([asdict(self.config), self.corpus.digest, self.step, theta])
        strays = self.communicator.same(digest(np.frombuffer(start.encode(), np.uint8)))
        if strays:
            names = ", ".join(map(str, strays))
            raise UserError(f"rank {names} has other data, options or checkpoint files than the other ranks")

    def check_ranks(self) -> None:
        """Raise a UserError on all ranks unless all hold the same theta and optimizer state, bit for bit."""
        values = [self.theta, *(getattr(self.state, f.name) for f in fields(self.state))]
        digests = [digest(self.backend.to_host(v) if hasattr(v, "shape") else np.asarray(v)) for v in values]
        strays = self.communicator.same(digest(np.array(digests, np.uint64)))
        if strays:
            names = ", ".join(map(str, strays))
            raise UserError(
                f"rank {names} holds other parameters than the other ranks after step {self.step:,}: "
                f"{self._last_good()}"
            )

    def _check_rejections(self, report: StepReport) -> None:
        """Raise a UserError on all ranks if nothing but rejections goes on: the report is the same on all."""
        limit = self.config.max_rejections
        if limit and self.rejections >= limit:
            raise UserError(
                f"{self.rejections:,} steps in a row were rejected up to step {self.step:,}, "
                f"the last one with: {report.message} (--max-rejections {limit}); {self._last_good()}"
            )

    def _check_loss(self, valid: float | None) -> None:
        """Raise a UserError on all ranks if theta has no finite loss, as after an update that went too far.

        Where the validation loss of this step is not known, that of a few sequences will do.
        """
        if valid is None:
            some = np.arange(min(self.valid_set.count, self.risk.local.micro_batch))
            with self.timer.span("evaluate"):
                valid = self.risk.on(self.valid_set, some, span="evaluate").loss(self.theta)
        if not math.isfinite(self.communicator.agree(valid)):
            raise UserError(
                f"the validation loss is not finite after step {self.step:,}: {self._last_good()}"
            )

    def _last_good(self) -> str:
        """Say which checkpoint stands."""
        if self.last_saved is None:
            return "there is no checkpoint yet"
        return f"the last checkpoint, of step {self.last_saved:,}, is good"

    def _on_first_rank(self, write: Any) -> None:
        """Run a function on rank 0 alone; if a file cannot be written, all ranks raise the UserError."""
        together(self.communicator, lambda: write() if self.communicator.rank == 0 else None)
