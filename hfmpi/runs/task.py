"""The task of a run: what it trains, on which data, with which options. `Run` is the same for all tasks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from math import prod
from typing import Any

import numpy as np

from hfmpi.backends.base import Array
from hfmpi.data.batches import Cases
from hfmpi.errors import UserError
from hfmpi.files.checkpoint import Checkpoint
from hfmpi.files.history import LossKeys
from hfmpi.measure.cost import ForwardPass
from hfmpi.models.base import Blocks, Costed, Model
from hfmpi.models.batch import burn_in_of
from hfmpi.objective.data_parallel import DataParallel
from hfmpi.parallel.communicator import digest
from hfmpi.runs.best import LOSS, Watch
from hfmpi.runs.config import Config
from hfmpi.runs.metric import Metric

__all__ = ["DifferentRun", "Task"]


class DifferentRun(UserError):
    """A checkpoint belongs to a different run; the caller adds the subject of the sentence."""


@dataclass(frozen=True, kw_only=True)
class Task:
    """A model, its data and the options of its training.

    Attributes
    ----------
    config : Config
        All options; the user of a resumed run need not repeat them.
    model : Model
    train_set : Cases
    valid_set : Cases or None
    keys : LossKeys
        Names and unit of the loss in a record.
    title : str
        A description of the model for a log.
    noun : str
        The name of examples in a log, in the plural.
    unit : str
        Unit of the loss in messages; without it, the loss is called "loss".
    identity : mapping
        What a checkpoint stores about the model and the data, as JSON.
    metrics : mapping of str to Metric
        User-defined metrics by name; computed on the validation examples in addition to the loss.
    watch : Watch
        The value by which validations are compared.
    notes : tuple of str
        What the user should know before the first step.
    """

    config: Config
    model: Model
    train_set: Cases
    valid_set: Cases | None
    keys: LossKeys
    title: str
    noun: str
    identity: Mapping[str, Any]
    unit: str = ""
    metrics: Mapping[str, Metric] = field(default_factory=dict)
    watch: Watch = LOSS
    notes: tuple[str, ...] = ()

    def check(self, checkpoint: Checkpoint | None) -> None:
        """Check that a run can start, new or from a checkpoint.

        Called before memory is allocated for what the checkpoint describes.
        """

    def compare(self, checkpoint: Checkpoint, resumes: bool) -> str:
        """Return how the training data of the checkpoint's run differ, as "was trained on ...", or "".

        If this run resumes that run, no difference is allowed.

        Raises
        ------
        DifferentRun
            If the checkpoint does not fit the model or, for a resumed run, the data.
        """
        raise NotImplementedError

    def continuing(self, checkpoint: Checkpoint) -> Task:
        """Return the task of a resumed run, whose checkpoints describe the data as this checkpoint does."""
        return self

    def compared(self, theta: np.ndarray, step: int) -> dict[str, Any]:
        """Return what must be equal on all ranks at the start, by the error sentence for ranks {}."""
        sentence = "rank {} has different data, options or checkpoint files than the other ranks"
        return {sentence: [digest(theta), asdict(self.config), dict(self.identity), step]}

    def try_out(self, owner: DataParallel, theta: Array) -> None:
        """Check on all ranks that training can start from theta; collective."""

    def cases(self, step: int) -> Cases:
        """Return the training examples that step `step`, counted from 0, uses."""
        return self.train_set

    def forward_pass(self) -> ForwardPass:
        """Return the cost of the forward pass of one example.

        If the model does not report it, each parameter is assumed to be used once for each output of the
        first example, and the matrices sequentially.
        """
        model, batch = self.model, self.train_set.take(np.arange(1))
        shape = _steps(batch)
        if shape:
            shape = shape[0] + burn_in_of(batch), *shape[1:]
        if isinstance(model, Costed):
            return model.forward_pass(max(1, prod(shape)))
        matrices = [b for b in model.blocks if b.rows > 1] if isinstance(model, Blocks) else []
        return ForwardPass(2 * model.size * max(1, prod(shape)), max(1, len(matrices)))

    @property
    def options(self) -> dict[str, Any]:
        """Return the options that the files of a run contain."""
        return asdict(self.config)

    def segments(self, wanted: int) -> int:
        """Return the number of segments of an example, which is at most its number of steps with targets."""
        return min(wanted, max(1, prod(_steps(self.train_set.take(np.arange(1))))))

    def linearisation_bytes(self, cases: int) -> int:
        """Return the size of a linearisation on this many examples, or 0 if it is not known."""
        return 0

    def meta(self, theta: Array) -> dict[str, Any]:
        """Return what a checkpoint of theta stores about the model and the data."""
        return dict(self.identity)


def _steps(batch: Any) -> tuple[int, ...]:
    """Return the shape of the steps of an example that have targets, () if it has one target."""
    targets = np.asarray(getattr(batch, "targets", None))
    return targets.shape[1:] if targets.dtype.kind in "iu" else targets.shape[1:-1]
