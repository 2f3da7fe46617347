"""What a run trains on what: all in which one run differs from another, for the one loop of `Run`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from hfmpi.backends.base import Array
from hfmpi.data.batches import Cases
from hfmpi.files.checkpoint import Checkpoint
from hfmpi.files.history import LossKeys
from hfmpi.models.base import Model
from hfmpi.objective.data_parallel import DataParallel
from hfmpi.parallel.communicator import digest
from hfmpi.runs.config import Config
from hfmpi.runs.metric import Metric

__all__ = ["Task"]


@dataclass(frozen=True, kw_only=True)
class Task:
    """A model, its cases and the options of its training.

    Attributes
    ----------
    config : Config
        With nothing open that a resumed run would have to ask for again.
    model : Model
    train_set : Cases
    valid_set : Cases or None
    keys : LossKeys
        Names and unit of the loss in a record.
    title : str
        What is trained, for a log.
    noun : str
        What the cases are called there.
    identity : mapping
        What a checkpoint says of model and data, as JSON has it, besides the options.
    metric : Metric or None
        What is measured on the validation cases besides the loss.
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
    metric: Metric | None = None
    notes: tuple[str, ...] = ()

    def check(self, found: Checkpoint | None) -> None:
        """Raise a UserError unless a run can start anew, or go on from a checkpoint.

        Before memory is taken for what its options describe.
        """

    def compared(self, theta: np.ndarray, step: int) -> dict[str, Any]:
        """Give what all ranks must have alike at the start, by the sentence on ranks {} that have not."""
        sentence = "rank {} has other data, options or checkpoint files than the other ranks"
        return {sentence: [digest(theta), asdict(self.config), dict(self.identity), step]}

    def try_out(self, owner: DataParallel, theta: Array) -> None:
        """Raise a UserError on all ranks if the first batch shows that theta is no start; collective."""

    def cases(self, step: int) -> Cases:
        """Give the training cases as step `step`, from 0 on, is to see them."""
        return self.train_set

    @property
    def options(self) -> dict[str, Any]:
        """The options as the files of a run have them."""
        return asdict(self.config)

    def linearisation_bytes(self, cases: int) -> int:
        """Give what the linearisation of so many cases takes, if that is known; else 0."""
        return 0

    def meta(self, theta: Array) -> dict[str, Any]:
        """Give what a checkpoint of theta says of model and data."""
        return dict(self.identity)
