"""The files that rank 0 writes to the folder of a run, under a lock; a removed folder is created again."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping
from pathlib import Path
from time import monotonic
from typing import Any

import numpy as np

from hfmpi.errors import UserError
from hfmpi.files import checkpoint
from hfmpi.files.atomic import remove_leftovers, replace
from hfmpi.files.checkpoint import Entry
from hfmpi.files.history import HISTORY, History, Record
from hfmpi.files.lock import Lock
from hfmpi.files.run_folder import find_checkpoint, make

__all__ = ["Writer"]

CONFIG, TIMING, DONE = "config.toml", "timing.json", "DONE"

REST = 20.0
"""The minimum time between two writes of best.h5, in units of the time that a write takes.

A checkpoint writes best.h5 in any case.
"""


class Writer:
    """The files of a run; every method raises a UserError if a file cannot be written.

    Parameters
    ----------
    folder : Path
        The folder, which is created if it does not exist.
    step : int
        The step from which the run continues; later lines of the history are removed. The attribute is the
        step of the last checkpoint.
    config : str
        The content of config.toml.

    Attributes
    ----------
    notes : list of str
        Notes that have not been shown to the user yet.
    """

    def __init__(self, folder: Path, step: int, config: str) -> None:
        self.folder, self.config, self.step = folder, config, step
        self._best: tuple[np.ndarray, Mapping[str, Any]] | None = None
        self._best_waits = False  # whether best.h5 has not been written yet
        self._best_due = 0.0  # the earliest time of its next write
        make(folder)
        self.lock = self._take()
        try:
            self.notes = [self.lock.note] if self.lock.note else []
            for name in checkpoint.NEWEST, checkpoint.BEST, CONFIG, TIMING, DONE, HISTORY:
                if not self.lock.note:  # without a lock the leftovers may belong to another job
                    remove_leftovers(folder / name)
            self.history = History(folder)
            self.notes += self.history.truncate(step)
            replace(folder / CONFIG, config.encode())
            self._remove(DONE)
        except BaseException:
            self.close()
            raise

    def record(self, record: Record) -> None:
        """Append a line to the history; a line that cannot be written is buffered."""
        self.history.add(record)
        self._keep_folder()
        self.history.flush()

    def checkpoint(self, theta: np.ndarray, state: Mapping[str, Entry], meta: Mapping[str, Any]) -> None:
        """Write the history up to this step, and then the checkpoint."""
        self._keep_folder()
        with contextlib.suppress(UserError):  # the lines remain buffered
            self.history.flush(sync=True)
        checkpoint.save(self.folder / checkpoint.NEWEST, theta, state, meta)
        self.step = meta["step"]

    def start_best(self, theta: np.ndarray | None, meta: Mapping[str, Any]) -> None:
        """Restore best.h5 as of the checkpoint from which the run continues; if theta is None, remove it.

        A job that was killed may have written a later best.h5, whose steps will be recomputed.
        """
        if theta is None:
            self._remove(checkpoint.BEST)
            return
        path = self.folder / checkpoint.BEST
        self._best = theta, meta
        try:
            found = checkpoint.load(path)
            self._best_waits = found.meta["step"] != meta["step"] or not np.array_equal(found.theta, theta)
        except (UserError, KeyError) as error:
            self._best_waits = True
            reason = f"{path} is missing" if not os.path.lexists(path) else str(error)
            self.notes.append(f"{reason}; it is written again from the checkpoint")
        self.flush_best()

    def best(self, theta: np.ndarray, meta: Mapping[str, Any]) -> None:
        """Write best.h5, unless the last write was too recent; `flush_best` then writes it later."""
        self._best, self._best_waits = (theta, meta), True
        if monotonic() >= self._best_due:
            self.flush_best()

    def flush_best(self) -> None:
        """Write best.h5 if its content is out of date."""
        self._keep_folder()
        if self._best is not None and self._best_waits:
            theta, meta = self._best
            self._best_due, begun = 0.0, monotonic()  # after a failure the next write is tried at once
            checkpoint.save(self.folder / checkpoint.BEST, theta, {}, meta, previous=None)
            self._best_waits, now = False, monotonic()
            self._best_due = now + REST * (now - begun)

    def timing(self, content: str) -> None:
        """Replace the content of timing.json."""
        self._keep_folder()
        replace(self.folder / TIMING, content.encode())

    def finish(self, done: str) -> None:
        """Write all pending files, and write `done` to the file DONE unless it is empty."""
        self._keep_folder()
        self.history.flush()
        self.flush_best()
        if done:
            replace(self.folder / DONE, done.encode())

    def close(self) -> None:
        """Write best.h5 if it is pending, and allow other jobs to write to the folder."""
        if self._best_waits and self.lock.stands():
            with contextlib.suppress(UserError):  # it has been reported, or another error ends the run
                self.flush_best()
        self.lock.release()

    def _take(self) -> Lock:
        """Lock the folder, unless another job has written a checkpoint since this one read or wrote it."""
        lock = Lock(self.folder)
        try:
            newest = find_checkpoint(self.folder, "auto")
            if newest is not None and newest.meta.get("step") != self.step:
                raise UserError(
                    f"another job has written to {self.folder} since this run read it: start again to "
                    "continue from there"
                )
        except UserError:
            lock.release()
            raise
        return lock

    def _keep_folder(self) -> None:
        """Create the folder again if it was removed, unless another job uses the new one."""
        if self.lock.stands():
            return
        make(self.folder)
        old_lock, self.lock = self.lock, self._take()
        old_lock.release()
        replace(self.folder / CONFIG, self.config.encode())
        self._best_waits = True
        self.notes.append(f"{self.folder} was removed and created again: its earlier history is lost")

    def _remove(self, name: str) -> None:
        try:
            (self.folder / name).unlink(missing_ok=True)
        except OSError as error:
            raise UserError(f"cannot remove {self.folder / name}: {error.strerror or error}") from None
