"""The folder of a run: made, or found with something to go on from."""

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
    """Give the checkpoint to go on from, or None for a new run; nothing is written.

    Parameters
    ----------
    folder : Path or None
        Of the run; it need not exist. None: nothing is to be written.
    resume : str
        'auto': its own checkpoint, if there is one. 'never': None. Else a run's folder or a checkpoint
        file to start from.
    names : tuple of str
        What a user calls the option for the folder, and going on.

    Raises
    ------
    UserError
        If a checkpoint cannot be read, or `never` or a path is asked for where a run would be overwritten.
    """
    # os.path: a name that is too long or lies in a closed folder holds no run; `make` will say why. A link
    # that leads nowhere is one, whose file is away.
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
    """Make the folder of a run, with its parents, if it is not there.

    Raises
    ------
    UserError
        If it cannot be made or written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make the folder {folder}: {error.strerror or error}") from None
    if not os.access(folder, os.W_OK | os.X_OK):
        raise UserError(f"cannot write into the folder {folder}")
