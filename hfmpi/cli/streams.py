"""Standard output and error that break: the disk of a log fills, its reader leaves, a terminal goes away."""

from __future__ import annotations

import codecs
import contextlib
import errno
import io
import os
import select
import sys
from typing import Any

from hfmpi.errors import UserError

__all__ = ["go_on", "protect"]

_NAMES = {1: "standard output", 2: "standard error"}


class _Stream(io.FileIO):
    """The descriptor of standard output or error, whose end is not that of the program.

    What cannot be written is dropped. The first time standard output fails, the command ends: with a
    BrokenPipeError where nobody reads it, as under `| head`, else with a UserError. In a run that goes on
    the other stream is told instead, and every later line is tried anew: a disk may have room again.
    """

    goes_on = lost = False
    other: _Stream

    def write(self, data: Any, /) -> int:
        """Write all of the data, or drop it."""
        rest = memoryview(data).cast("B")
        try:
            while rest:
                written = super().write(rest)
                if written is None:  # others that share a terminal may have made it non-blocking
                    select.select([], [self], [])
                rest = rest[written or 0 :]
        except OSError as error:
            if not self.lost:
                self.lost = True
                self._tell(error)
        return len(data)

    def _tell(self, error: OSError) -> None:
        sentence = f"{_NAMES[self.fileno()]} cannot be written ({error.strerror})"
        if self.goes_on:
            if not self.other.lost:
                self.other.write(
                    f"Note: {sentence}; training goes on, and history.jsonl has every step.\n".encode()
                )
        elif self.fileno() == 1:
            if error.errno == errno.EPIPE:
                raise error  # click leaves quietly, with code 1
            raise UserError(sentence) from None


def protect() -> None:
    """Put streams that do not break in place of sys.stdout and sys.stderr, if they are descriptors 1 and 2.

    What the encoding has no letters for is printed as question marks.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            # Closed: the next file would get this number, and with it what MPI says on standard error. Not
            # open for writing, this one is to all that write as good as closed.
            os.open(os.devnull, os.O_RDONLY)
    streams = {}
    for number, name in ((1, "stdout"), (2, "stderr")):
        before = getattr(sys, name)
        if before is not None:
            with contextlib.suppress(OSError, ValueError, AttributeError):
                before.flush()
            try:
                replaced = before.fileno() == number
            except (OSError, ValueError, AttributeError):
                replaced = False
            if not replaced:  # a test's, or a program's that calls this one
                return
        streams[name] = _Stream(number, "w", closefd=False)
    stdout, stderr = streams["stdout"], streams["stderr"]
    stdout.other, stderr.other = stderr, stdout
    for name, stream in streams.items():
        encoding = codecs.lookup(getattr(getattr(sys, name), "encoding", None) or "utf-8").name
        # Names of files may hold bytes that are no UTF-8: these are printed as they are.
        errors = {1: "surrogateescape" if encoding == "utf-8" else "replace", 2: "backslashreplace"}
        text = io.TextIOWrapper(
            io.BufferedWriter(stream), encoding, errors[stream.fileno()], line_buffering=True
        )
        setattr(sys, name, text)


def go_on() -> None:
    """Let the program go on when standard output or error can no longer be written."""
    for stream in (sys.stdout, sys.stderr):
        raw = getattr(getattr(stream, "buffer", None), "raw", None)
        if isinstance(raw, _Stream):
            raw.goes_on = True
