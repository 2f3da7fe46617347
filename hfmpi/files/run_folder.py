"""The folder of a run: its creation, and the checkpoint in it from which the run continues."""

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
        'auto': continue from the checkpoint in the folder, if there is one. 'never': start a new run.
        Otherwise the folder of a run, or a checkpoint file, from which to continue.
    names : tuple of str
        The options that select a folder and that continue a run, for messages.

    Raises
    ------
    UserError
        If a checkpoint cannot be read, or if 'never' or a path would overwrite a run.
    """
    # os.path.lexists does not raise an error for a name that is too long or in an unreadable folder; `make`
    # reports these. A broken symbolic link counts as a run whose file is temporarily missing.
    has_run = folder is not None and any(
        os.path.lexists(folder / name) for name in (checkpoint.NEWEST, checkpoint.PREVIOUS)
    )
    if resume != "auto" and has_run:
        another, go_on = names
        raise UserError(
            f"{folder} already contains a run: use a different {another}, or {go_on} to continue the run"
        )
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
        raise UserError(f"cannot create the folder {folder}: {error.strerror or error}") from None
    if not os.access(folder, os.W_OK | os.X_OK):
        raise UserError(f"cannot write to the folder {folder}")
