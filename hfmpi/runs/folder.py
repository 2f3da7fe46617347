"""The folder of a run: made, or found with something to go on from."""

from __future__ import annotations

import os
from pathlib import Path

from hfmpi.errors import UserError
from hfmpi.runs import checkpoint
from hfmpi.runs.checkpoint import Checkpoint

__all__ = ["open_run"]


def open_run(folder: Path, resume: str, writer: bool = True) -> Checkpoint | None:
    """Give the checkpoint to go on from, or None for a new run; make the folder.

    Parameters
    ----------
    folder : Path
        Of the run.
    resume : str
        'auto': its own checkpoint, if there is one. 'never': None. Else a run's folder or a checkpoint
        file to start from.
    writer : bool
        Whether this process makes the folder (rank 0).

    Raises
    ------
    UserError
        If the folder cannot be written, a checkpoint cannot be read, or `never` or a path is asked for
        where a run would be overwritten.
    """
    has_run = any((folder / name).exists() for name in (checkpoint.NEWEST, checkpoint.PREVIOUS))
    if resume != "auto" and has_run:
        raise UserError(
            f"{folder} holds a run already; give another --out, or --resume auto to go on with it"
        )
    if writer:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"cannot make the folder {folder}: {error.strerror or error}") from None
        if not os.access(folder, os.W_OK | os.X_OK):
            raise UserError(f"cannot write into the folder {folder}")
    if resume == "never" or (resume == "auto" and not has_run):
        return None
    source = folder if resume == "auto" else Path(resume)
    return checkpoint.latest(source) if source.is_dir() else checkpoint.load(source)
