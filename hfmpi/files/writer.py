"""What rank 0 writes into the folder of a run, under a lock, also when the folder vanishes meanwhile."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from pathlib import Path
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


class Writer:
    """The files of a run; every method raises a UserError if the file system does not take them.

    Parameters
    ----------
    folder : Path
        Made if it is not there.
    step : int
        Where the run goes on; later lines of the history are dropped. Then that of the last checkpoint.
    config : str
        Content of config.toml.

    Attributes
    ----------
    notes : list of str
        What the user should know and has not been told.
    """

    def __init__(self, folder: Path, step: int, config: str) -> None:
        self.folder, self.config, self.step = folder, config, step
        make(folder)
        self.lock = self._take()
        try:
            self.notes = [self.lock.note] if self.lock.note else []
            for name in checkpoint.NEWEST, CONFIG, TIMING, DONE, HISTORY:
                if not self.lock.note:  # else they may be another job's
                    remove_leftovers(folder / name)
            self.history = History(folder)
            self.notes += self.history.truncate(step)
            replace(folder / CONFIG, config.encode())
            try:
                (folder / DONE).unlink(missing_ok=True)
            except OSError as error:
                raise UserError(f"cannot remove {folder / DONE}: {error.strerror or error}") from None
        except BaseException:
            self.close()
            raise

    def record(self, record: Record) -> None:
        """Add a line to the history; if it cannot be written now, it waits there."""
        self.history.add(record)
        self._keep_folder()
        self.history.flush()

    def checkpoint(self, theta: np.ndarray, state: Mapping[str, Entry], meta: Mapping[str, Any]) -> None:
        """Write the checkpoint, with the lines of the history before it."""
        self._keep_folder()
        with contextlib.suppress(UserError):  # the lines wait on
            self.history.flush(sync=True)
        checkpoint.save(self.folder / checkpoint.NEWEST, theta, state, meta)
        self.step = meta["step"]

    def timing(self, content: str) -> None:
        """Write timing.json."""
        self._keep_folder()
        replace(self.folder / TIMING, content.encode())

    def finish(self, done: str) -> None:
        """Write the lines of the history that wait, and what DONE says, if a limit was reached."""
        self._keep_folder()
        self.history.flush()
        if done:
            replace(self.folder / DONE, done.encode())

    def close(self) -> None:
        """Let other jobs write into the folder."""
        self.lock.release()

    def _take(self) -> Lock:
        """Lock the folder, unless another job has gone on in it since this one read or wrote it."""
        lock = Lock(self.folder)
        try:
            found = find_checkpoint(self.folder, "auto")
            if found is not None and found.meta.get("step") != self.step:
                raise UserError(
                    f"another job has written into {self.folder} meanwhile; start again to go on from there"
                )
        except UserError:
            lock.release()
            raise
        return lock

    def _keep_folder(self) -> None:
        """Make the folder again if somebody has removed it, unless another job has taken its place."""
        if self.lock.stands():
            return
        make(self.folder)
        taken, self.lock = self.lock, self._take()
        taken.release()
        replace(self.folder / CONFIG, self.config.encode())
        self.notes.append(f"{self.folder} was removed and is made again; its history begins anew")
