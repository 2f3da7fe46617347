"""The folder of a run: create it, or find the checkpoint from which the run continues."""

from __future__ import annotations

import os
from pathlib import Path

from hfmpi.errors import UserError
from hfmpi.files import checkpoint
from hfmpi.files.checkpoint import Checkpoint

__all__ = ["find_checkpoint", "make"]


def find_checkpoint(
    folder: Path | None, resume: str, names: tuple[str, str] = ("--out", "--resume auto")
) -> Checkpoint | None:
    """Return the checkpoint from which to continue, or None for a new run; nothing is written.

    Parameters
    ----------
    folder : Path or None
        The folder of the run; it need not exist. None: the run writes no files.
    resume : str
        'auto': the checkpoint in the folder, if there is one. 'never': None. Else the folder of a run or a
        checkpoint file to start from.
    names : tuple of str
        The names of the option for the folder, and of the option to continue.

    Raises
    ------
    UserError
        If a checkpoint cannot be read, or if `never` or a path would overwrite a run.
    """
    # os.path: a name that is too long or in an unreadable folder holds no run, and `make` reports why. A
    # broken symbolic link counts as a run whose file is temporarily missing.
    has_run = folder is not None and any(
        os.path.lexists(folder / name) for name in (checkpoint.NEWEST, checkpoint.PREVIOUS)
    )
    if resume != "auto" and has_run:
        another, go_on = names
        raise UserError(f"{folder} holds a run already; give another {another}, or {go_on} to go on with it")
    if resume == "never" or (resume == "auto" and not has_run):
        return None
    source = folder if folder is not None and resume == "auto" else Path(resume)
    return checkpoint.latest(source) if os.path.isdir(source) else checkpoint.load(source)


def make(folder: Path) -> None:
    """Create the folder of a run, with its parents, if it does not exist.

    Raises
    ------
    UserError
        If it cannot be created or is not writable.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make the folder {folder}: {error.strerror or error}") from None
    if not os.access(folder, os.W_OK | os.X_OK):
        raise UserError(f"cannot write into the folder {folder}")
