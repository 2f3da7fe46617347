"""The reports of a run: the facts at its start, its progress, the record of each step, and its end."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import TYPE_CHECKING, NamedTuple, Protocol, cast

from hfmpi.files.history import LossKeys, Record
from hfmpi.measure import cost
from hfmpi.measure.cost import COUNTS, Counts, ForwardPass
from hfmpi.optim.base import StepReport
from hfmpi.parallel.placement import Place

if TYPE_CHECKING:
    from hfmpi.runs.task import Task

__all__ = [
    "NO_UNIT",
    "Ending",
    "Facts",
    "Progress",
    "Reporter",
    "Spent",
    "Validation",
    "counted",
    "step_record",
    "validated",
]


@dataclass(frozen=True)
class Facts:
    """The facts that the first lines of a log report.

    `threads` is the number of threads of a rank, and `linearisation_bytes` the size of the linearisation of
    the largest shard. `rows` is the number of rows of examples that all ranks store in a step, and `sketch`
    the number of rows of a sketch from which a step estimates the curvature; 0 means that there are none. The
    run continues from `step`.
    """

    task: Task
    gradient_batch: int
    curvature_batch: int
    ranks: int
    threads: int
    places: Sequence[Place]
    linearisation_bytes: int
    memory_budget: float
    rows: int
    sketch: int
    step: int


class Validation(NamedTuple):
    """Means over the validation examples: the loss in the unit of the run, and custom metrics by name."""

    loss: float
    metrics: Mapping[str, float] = MappingProxyType({})


@dataclass(frozen=True)
class Ending:
    """The end of a run: the reason, whether it was a limit, the step, and the validation of the result.

    `unit` is that of the task, `remedy` explains how the user continues the run, and `kept_step` is the step
    of the best validation if the run returns its parameters.
    """

    reason: str
    done: bool
    step: int
    valid: Validation | None
    unit: str = ""
    remedy: str = ""
    kept_step: int | None = None


NO_UNIT = ForwardPass(1, 1)
"""The unit of work without linear algebra."""


@dataclass(frozen=True)
class Spent:
    """Work on batches of one size, and the unit of its linear algebra."""

    counts: Counts
    gradient_batch: int
    curvature_batch: int
    unit: ForwardPass = NO_UNIT


@dataclass(frozen=True)
class Progress:
    """Progress of a run.

    Attributes
    ----------
    step : int
    seconds : float
        Training time since the first start.
    rejections : int
        Number of consecutive rejected steps up to now.
    counts : Counts
        Work on batches of the current sizes: since the first start, or since the run started from a different
        run with different batches.
    unit : ForwardPass
        The cost of the forward pass of one of the current examples.
    before : tuple of Spent
        Work on earlier batches.
    origin : str
        Run or checkpoint from which this run started; empty if there is none.
    """

    step: int = 0
    seconds: float = 0.0
    rejections: int = 0
    counts: Counts = field(default_factory=Counts)
    unit: ForwardPass = NO_UNIT
    before: tuple[Spent, ...] = ()
    origin: str = ""

    def after(self, report: StepReport) -> Progress:
        """Return the progress after one more step."""
        counts = self.counts + replace(report.work, steps=1)
        rejections = 0 if report.accepted else self.rejections + 1
        return replace(self, step=self.step + 1, rejections=rejections, counts=counts)

    def spent(self, gradient_batch: int, curvature_batch: int) -> tuple[Spent, ...]:
        """Return all work so far; the arguments are the current batch sizes."""
        return *self.before, Spent(self.counts, gradient_batch, curvature_batch, self.unit)


ALWAYS = "gradients", "losses", "linearisations", "products", "cg_steps"
"""Counts that every record contains; a record contains the other counts if they are not 0."""

OTHERS = tuple(name for name in COUNTS if name not in ALWAYS)


class Reporter(Protocol):
    """The interface through which a run reports to the user; on ranks other than 0 it shows nothing."""

    def start(self, facts: Facts) -> None:
        """Report what will be trained."""

    def step(self, record: Record) -> None:
        """Report a step; the record is its entry in the history."""

    def note(self, sentence: str) -> None:
        """Report something that may need attention; the sentence has no full stop."""

    def end(self, ending: Ending) -> None:
        """Report how the run ended."""


def step_record(
    progress: Progress,
    report: StepReport,
    valid: Validation | None,
    keys: LossKeys,
    metrics: Sequence[str],
    step_seconds: float,
    batches: tuple[int, int],
    ranks: int,
) -> Record:
    """Return the object of a step in the history (docs/file-formats.md).

    `progress` is the progress after the step, `metrics` are the names of the run's metrics, and `batches` are
    B_g and B_c.
    """
    parts = progress.spent(*batches)
    spent = [(part.counts, part.gradient_batch, part.curvature_batch) for part in parts]
    p_d, p_i = map(sum, zip(*(cost.paper(*part) for part in spent), strict=True))
    everything = (cost.full(*passes, part.unit) for passes, part in zip(spent, parts, strict=True))
    full_d, full_i = map(sum, zip(*everything, strict=True))
    work = report.work
    measured = {keys.train: report.loss * keys.per_nat, **validated(valid, keys, metrics)}
    record = {
        "step": progress.step,
        "seconds": round(progress.seconds, 4),
        "step_seconds": round(step_seconds, 6),
        **measured,
        "P_I": p_i,
        "P_D": p_d,
        "P_P": sum(cost.ranks(*part, ranks) for part in spent),
        "P_I_full": full_i,
        "P_D_full": full_d,
        "accepted": report.accepted,
        "message": report.message,
        **{name: work[name] for name in ALWAYS},
        **{name: work[name] for name in OTHERS if work[name]},
        **report.details,
    }
    return cast(Record, record)


def validated(valid: Validation | None, keys: LossKeys, metrics: Sequence[str]) -> dict[str, float | None]:
    """Return the entries of a record for a validation; they are None if the step was not validated."""
    values = {f"valid_{name}": valid.metrics[name] if valid else None for name in metrics}
    return {keys.valid: valid.loss if valid else None, **values}


def counted(record: Record) -> Counts:
    """Return the counts of one step from its record."""
    numbers = cast("dict[str, int]", record)
    others = {name: numbers.get(name, 0) for name in OTHERS}
    return Counts(steps=1, **{name: numbers[name] for name in ALWAYS}, **others)
