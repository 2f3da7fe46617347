"""Write the files and messages of a run on rank 0, and inform all ranks whether that succeeded."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np

from hfmpi.errors import UserError
from hfmpi.files.checkpoint import BEST, Entry
from hfmpi.files.history import Record
from hfmpi.files.writer import Writer
from hfmpi.parallel.communicator import Communicator
from hfmpi.parallel.failure import together
from hfmpi.runs.record import Facts, Reporter

__all__ = ["Output"]

RETRY = 60.0
"""Seconds after which a checkpoint that could not be written is retried, unless one is due earlier."""


class Output:
    """Files and messages of a run.

    A file that cannot be written does not end the training: the user is notified once, and the file is
    retried.

    Parameters
    ----------
    communicator : Communicator
    reporter : Reporter
    last_saved : int or None
        Step of the newest checkpoint, if there is one.

    Attributes
    ----------
    retry_at : float
        Seconds of the run at which a checkpoint that could not be written is due again.
    failures : dict of str to str
        Error of the last attempt to write each file, if it failed. All ranks have that of the checkpoint.
    """

    def __init__(self, communicator: Communicator, reporter: Reporter, last_saved: int | None) -> None:
        self.communicator, self.reporter, self.last_saved = communicator, reporter, last_saved
        self.retry_at = math.inf
        self.failures: dict[str, str] = {}
        self._writes = False  # whether there is a folder
        self._writer: Writer | None = None  # on rank 0, once it is open
        self._record: Record | None = None  # the last one

    def open(self, folder: Path | None, config: str, facts: Facts, notes: Sequence[str] = ()) -> None:
        """Open the folder, if there is one, and report what will be trained.

        Raises
        ------
        UserError
            On all ranks, if it cannot be opened.
        """

        def make() -> Writer | None:
            if folder is None or self.communicator.rank:
                return None
            return Writer(folder, facts.step, config)

        self._writer = together(self.communicator, make)
        self._writes = folder is not None
        if self.communicator.rank == 0:
            self.reporter.start(facts)
            for note in notes:
                self.reporter.note(note)
        self._report_notes()

    def step(self, record: Record) -> None:
        """Add a line to the history, and report it."""
        self._record = record
        if self._writer is not None:
            self._attempt("the history", partial(self._writer.record, record))
        if self.communicator.rank == 0:
            self.reporter.step(record)

    def amend(self, step: int, values: Mapping[str, float | None]) -> None:
        """Change values of the last step in its record and in the history."""
        if self._record is not None:
            cast("dict[str, Any]", self._record).update(values)
        if self._writer is not None:
            self._attempt("the history", partial(self._writer.history.amend, step, dict(values)))

    def start_best(self, theta: np.ndarray | None, meta: Mapping[str, Any]) -> None:
        """Restore the best.h5 of the step from which the run continues; see `Writer.start_best`."""
        if self._writer is not None:
            self._attempt(BEST, partial(self._writer.start_best, theta, meta))
        self._report_notes()

    def best(self, theta: np.ndarray | None, meta: Mapping[str, Any]) -> None:
        """Write best.h5 if there is a folder."""
        if self._writer is not None and theta is not None:
            self._attempt(BEST, partial(self._writer.best, theta, meta))

    def checkpoint(self, theta: np.ndarray, state: Mapping[str, Entry], meta: Mapping[str, Any]) -> bool:
        """Write the checkpoint if there is a folder; return False on all ranks if that failed."""
        if not self._writes:
            return True
        if self._writer is not None:
            self._attempt(BEST, self._writer.flush_best)
        saved = self._attempt(
            "the checkpoint", lambda: self._write(lambda writer: writer.checkpoint(theta, state, meta))
        )
        self.retry_at = math.inf if saved else meta["seconds"] + RETRY
        self.last_saved = meta["step"] if saved else self.last_saved
        return saved

    def rescue(self, theta: np.ndarray, state: Mapping[str, Entry], meta: Mapping[str, Any]) -> None:
        """Write a last checkpoint, if possible, before an error ends the run; not collective."""
        if self._writer is None:
            return
        try:
            self._writer.checkpoint(theta, state, meta)
        except UserError as error:
            if "the checkpoint" not in self.failures:  # otherwise the user has been notified
                self.reporter.note(f"{error}; the steps after the last checkpoint are not saved")
        else:
            self.reporter.note(f"an error ends the run; the checkpoint of step {meta['step']:,} is written")

    @property
    def last_good(self) -> str:
        """Return a clause that names the newest valid checkpoint."""
        if self.last_saved is None:
            return "there is no checkpoint yet"
        return f"the last checkpoint, of step {self.last_saved:,}, is valid"

    def timing(self, content: str) -> None:
        """Write timing.json, and report the notes of the writer."""
        if self._writer is not None:
            self._attempt("timing.json", partial(self._writer.timing, content))
        self._report_notes()

    def finish(self, done: str) -> None:
        """Write pending data, and `done` into DONE unless it is empty; raise a UserError if that fails."""
        self._write(lambda writer: writer.finish(done))

    def close(self) -> None:
        """Release the folder for other jobs."""
        if self._writer is not None:
            self._writer.close()

    def _write(self, action: Callable[[Writer], object]) -> None:
        together(self.communicator, lambda: None if self._writer is None else action(self._writer))

    def _attempt(self, what: str, write: Callable[[], object]) -> bool:
        """Write a file; report the first of several failures, and the first success after them."""
        try:
            write()
        except UserError as error:
            if what not in self.failures:
                self.reporter.note(f"{error}; training continues, and hfmpi will try again")
            self.failures[what] = str(error)
            return False
        if self.failures.pop(what, None):
            self.reporter.note(f"{what} can be written again")
        return True

    def _report_notes(self) -> None:
        while self._writer is not None and self._writer.notes:
            self.reporter.note(self._writer.notes.pop(0))
