"""The folder of a run: made, or found with something to go on from."""

from __future__ import annotations

import os
from pathlib import Path

from hfmpi.errors import UserError
from hfmpi.files import checkpoint
from hfmpi.files.checkpoint import Checkpoint

__all__ = ["find_checkpoint", "make"]


def find_checkpoint(folder: Path, resume: str) -> Checkpoint | None:
    """Give the checkpoint to go on from, or None for a new run; nothing is written.

    Parameters
    ----------
    folder : Path
        Of the run; it need not exist.
    resume : str
        'auto': its own checkpoint, if there is one. 'never': None. Else a run's folder or a checkpoint
        file to start from.

    Raises
    ------
    UserError
        If a checkpoint cannot be read, or `never` or a path is asked for where a run would be overwritten.
    """
    # os.path: a name that is too long or lies in a closed folder holds no run; `make` will say why. A link
    # that leads nowhere is one, whose file is away.
    has_run = any(os.path.lexists(folder / name) for name in (checkpoint.NEWEST, checkpoint.PREVIOUS))
    if resume != "auto" and has_run:
        raise UserError(
            f"{folder} holds a run already; give another --out, or --resume auto to go on with it"
        )
    if resume == "never" or (resume == "auto" and not has_run):
        return None
    source = folder if resume == "auto" else Path(resume)
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
