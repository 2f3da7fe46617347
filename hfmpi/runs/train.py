"""One training run: the same loop on every rank; rank 0 writes the files."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np

import hfmpi
from hfmpi.backends.base import Array
from hfmpi.data.batches import Sequences
from hfmpi.data.corpus import Corpus
from hfmpi.errors import UserError
from hfmpi.files.checkpoint import Checkpoint
from hfmpi.measure.spans import EVALUATE, FILES
from hfmpi.measure.timer import Timer
from hfmpi.models.network import Network
from hfmpi.objective.data_parallel import DataParallel, Stopped, step_objectives
from hfmpi.objective.transport import choose
from hfmpi.optim.base import StepReport
from hfmpi.optim.first_order import evaluated
from hfmpi.optim.hessian_free import HessianFree
from hfmpi.parallel.communicator import Communicator
from hfmpi.parallel.placement import Place, Placement, single_threaded
from hfmpi.runs import checks
from hfmpi.runs.config import Config, to_toml
from hfmpi.runs.output import Output
from hfmpi.runs.record import BITS, Facts, Progress, Reporter, step_record
from hfmpi.runs.restore import check_model, entries, progress, restored
from hfmpi.runs.stop import StopSignals
from hfmpi.runs.timing import Timing

__all__ = ["Result", "Run"]


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
    clock : callable
        Gives the time in seconds.
    """

    def __init__(
        self,
        folder: Path,
        config: Config,
        data: Path,
        communicator: Communicator,
        placement: Placement,
        resume: Checkpoint | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.folder = folder
        self.communicator = communicator
        self.placement = single_threaded(placement) if config.slices else placement
        self.data = data.resolve()
        self.corpus = corpus = Corpus.read(data)
        about = config.architecture(corpus.vocabulary)
        # The size is settled now: the budget has served, and a resumed run must not ask again.
        self.config = replace(config, hidden=about.hidden, parameters=0)
        self.preset = preset = config.preset()
        self.batches = preset.gradient_batch, preset.curvature_batch
        lengths = config.sequence_length, config.burn_in
        checks.enough_text(data, len(corpus.train), len(corpus.valid), *lengths, *self.batches)
        self.train_set, self.valid_set = Sequences(corpus.train, *lengths), Sequences(corpus.valid, *lengths)
        self.epoch_steps = max(1, self.train_set.count // preset.gradient_batch)
        self.backend = config.make_backend(placement.local_rank)
        self.timer = Timer(clock)
        self.network = Network(
            about, self.backend, initialisation=config.initialisation, forget_bias=config.forget_bias
        )
        self.memory_budget = config.memory_budget or (self.backend.free_memory() or placement.memory) // 2
        self.risk: DataParallel  # from the start of `train` on

        if resume is not None:  # before memory is taken for what its options describe
            check_model(resume, corpus.symbols, self.network.size, self.backend.dtype)
        checks.enough_memory(about)
        initial = self.network.initial(config.seed)
        self.theta: Array = self.backend.to_device(initial.astype(self.backend.dtype))
        self.state = preset.optimizer.init(self.theta, self.network.blocks)
        self.progress = Progress()
        if resume is not None:
            self.state = restored(resume, self.state, self.backend, config.optimizer)
            self.theta, self.progress = self.backend.to_device(resume.theta), progress(resume)
        self.first_step = self.step
        self._resumed = resume is not None
        self.timing = Timing(self.timer, communicator, placement, self.step, self.backend.device)

    @property
    def step(self) -> int:
        """The steps that were taken, since the first start."""
        return self.progress.step

    def train(self, reporter: Reporter, signals: StopSignals) -> Result:
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

    def _train(self, signals: StopSignals) -> Result:
        config, comm, output = self.config, self.communicator, self.output
        theta = self.backend.to_host(self.theta)
        checks.same_start(comm, theta, asdict(config), self.corpus.digest, self.step)
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
        place, backend = self.placement, self.backend
        own = Place(place.host, place.local_rank, backend.device, backend.device_id, transport.name)
        output.open(self.folder, to_toml(config), self.facts(comm.gather(own) or ()))
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
                output.step(step_record(self.progress, report, valid, seconds, self.batches, comm.size))
                if self.step % checkpoint_every == 0 or self.progress.seconds >= output.retry_at:
                    saved = self.progress if self.save(valid) else saved
                elif config.check_every and self.step % config.check_every == 0:
                    self.check_ranks()
                checks.not_stuck(self.progress, config.max_rejections, report.message, output.last_good)
            if valid is None:
                valid = self.evaluate(evaluated(self.theta, self.state))
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
        return Result(reason, done, self.step, valid)

    def _one_step(self, evaluate_every: int) -> tuple[StepReport, float | None]:
        """Take a step and evaluate where it is due; only when both are there does the run move on."""
        with self.timing.step():
            objectives = step_objectives(
                self.risk, self.train_set, self.config.seed, self.step, *self.batches
            )
            theta, state, report = self.preset.optimizer.step(self.theta, self.state, objectives)
        due = (self.step + 1) % evaluate_every == 0 or self.step + 1 == self.config.max_steps
        valid = self.evaluate(evaluated(theta, state)) if due else None
        self.theta, self.state, self.progress = theta, state, self.progress.after(report)
        return report, valid

    def evaluate(self, theta: Array, most: int | None = None) -> float:
        """Give the loss on the validation split, or so many sequences of it, in bits per character."""
        with self.timer.span(EVALUATE):
            sequences = np.arange(self.valid_set.count)[:most]
            return self.risk.on(self.valid_set, sequences, span=EVALUATE).loss(theta) * BITS

    def save(self, valid: float | None) -> bool:
        """Check that all ranks agree and theta is sound; write the checkpoint, and say if it is written."""
        self.check_ranks()
        # Where the validation loss of this step is not known, that of a few sequences will do.
        known = self.evaluate(self.theta, self.risk.local.micro_batch) if valid is None else valid
        checks.finite(self.communicator.agree(known), self.step, self.output.last_good)
        with self.timer.span(FILES):
            meta = {
                "hfmpi": hfmpi.__version__,
                "config": asdict(self.config),
                "vocabulary": list(self.corpus.symbols),
                "data": str(self.data),
                "corpus": self.corpus.digest,
                **asdict(self.progress),
                "valid_bpc": valid,
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
        optimizer = self.preset.optimizer
        structural = isinstance(optimizer, HessianFree) and optimizer.structural_damping > 0
        return Facts(
            config,
            self.network.size,
            self.train_set.count,
            *self.batches,
            size,
            self.placement.threads,
            self.backend.name,
            places,
            self.network.tape_bytes(
                config.burn_in + config.sequence_length, -(-curvature // size), structural
            ),
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
