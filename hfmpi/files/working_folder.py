"""The working folder, which may be removed while a shell stands in it."""

from __future__ import annotations

import os

from hfmpi.errors import UserError

__all__ = ["check_working_folder"]


def check_working_folder() -> None:
    """Raise a UserError if the working folder is gone: no relative path means anything then."""
    try:
        os.getcwd()
    except OSError:
        raise UserError(
            "the working folder has been removed: change into another one, as with cd ~"
        ) from None
