"""A check of the working folder, which may be removed while a shell uses it."""

from __future__ import annotations

import os

from hfmpi.errors import UserError

__all__ = ["check_working_folder"]


def check_working_folder() -> None:
    """Raise a UserError if the working folder was removed, because relative paths are then meaningless."""
    try:
        os.getcwd()
    except OSError:
        raise UserError(
            "the working folder has been removed: change to another folder, for example by cd ~"
        ) from None
