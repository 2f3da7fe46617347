"""A lock that allows one job per run folder; the operating system releases it when the process ends."""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
from pathlib import Path

from hfmpi.errors import UserError

__all__ = ["Lock"]

NAME = ".lock"


class Lock:
    """A lock on a folder, held until `release` or the end of the process, even if the process is killed.

    The lock file remains afterwards and names the last process that held the lock. On NFS the server manages
    the lock, so that it works between nodes.

    Attributes
    ----------
    note : str or None
        A note for the user if the file system has no locks, so that the folder is not locked.

    Raises
    ------
    UserError
        If another process holds the lock, or the file cannot be created.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / NAME
        self.note: str | None = None
        flags = os.O_RDWR | os.O_CREAT | os.O_NONBLOCK | os.O_NOFOLLOW
        try:
            self._file = os.open(self.path, flags, 0o666)
        except OSError as error:
            raise UserError(f"cannot write {self.path}: {error.strerror or error}") from None
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = self._holder()
            self.release()
            raise UserError(f"another job is writing to {folder}{holder}: wait for it or stop it") from None
        except OSError as error:
            self.note = (
                f"{folder} cannot be locked ({error.strerror}): make sure that no other job writes to it"
            )
        with contextlib.suppress(OSError):  # on a full disk the lock works without the name of its holder
            os.ftruncate(self._file, 0)
            os.pwrite(self._file, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)

    def stands(self) -> bool:
        """Return whether the locked file is still in the folder, which may have been removed."""
        try:
            return os.path.samestat(os.stat(self.path, follow_symlinks=False), os.fstat(self._file))
        except OSError:
            return False

    def release(self) -> None:
        """Close the lock file, so that another job can lock the folder."""
        os.close(self._file)

    def _holder(self) -> str:
        with contextlib.suppress(OSError):
            words = os.pread(self._file, 200, 0).decode("ascii", "replace").splitlines()
            if words and words[0].isprintable():
                return f" ({words[0]})"
        return ""
