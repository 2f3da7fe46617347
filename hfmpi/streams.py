"""Standard output and error that survive failures: a full disk, a closed pipe, a lost terminal."""

from __future__ import annotations

import codecs
import contextlib
import errno
import io
import os
import select
import sys
from collections.abc import Iterator
from typing import Any

from hfmpi.errors import UserError

__all__ = ["lasting", "protect", "reserve"]

_NAMES = {1: "standard output", 2: "standard error"}


class _Stream(io.FileIO):
    """Standard output or error, whose failure does not break the program.

    Data that cannot be written are dropped. The first failure of standard output ends the command: with a
    BrokenPipeError if the pipe is closed, as by `| head`, otherwise with a UserError. A run continues
    (`lasting`): it reports the failure on the other stream and still tries to write every later line, because
    space on the disk may become available.
    """

    goes_on = lost = False
    other: _Stream

    def write(self, data: Any, /) -> int:
        """Write all of the data, or drop the rest."""
        rest = memoryview(data).cast("B")
        try:
            while rest:
                written = super().write(rest)
                if written is None:  # another program may have made a shared terminal non-blocking
                    select.select([], [self], [])
                rest = rest[written or 0 :]
        except OSError as error:
            if not self.lost:
                self.lost = True
                self._report(error)
        return len(data)

    def _report(self, error: OSError) -> None:
        sentence = f"cannot write to {_NAMES[self.fileno()]}: {error.strerror}"
        if self.goes_on:
            if not self.other.lost:
                self.other.write(
                    f"Note: {sentence}; training continues, and the history contains every step.\n".encode()
                )
        elif self.fileno() == 1:
            if error.errno == errno.EPIPE:
                raise error  # click exits quietly with code 1
            raise UserError(sentence) from None


def reserve() -> None:
    """Open the null device for every closed descriptor among 0, 1 and 2.

    Otherwise the next file or socket, for example of MPI, would get the number of a closed descriptor and
    receive what is written to standard output or error.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDONLY)  # for reading only: writing fails as on a closed descriptor


def protect() -> None:
    """Replace sys.stdout and sys.stderr by streams that survive failures, if they are descriptors 1 and 2.

    Characters that the encoding cannot represent are printed as question marks.
    """
    reserve()
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
            if not replaced:  # a stream of a test, or of a program that calls this one
                return
        streams[name] = _Stream(number, "w", closefd=False)
    stdout, stderr = streams["stdout"], streams["stderr"]
    stdout.other, stderr.other = stderr, stdout
    for name, stream in streams.items():
        encoding = codecs.lookup(getattr(getattr(sys, name), "encoding", None) or "utf-8").name
        # File names may contain bytes that are not UTF-8; these are printed unchanged.
        errors = {1: "surrogateescape" if encoding == "utf-8" else "replace", 2: "backslashreplace"}
        text = io.TextIOWrapper(
            io.BufferedWriter(stream), encoding, errors[stream.fileno()], line_buffering=True
        )
        setattr(sys, name, text)


@contextlib.contextmanager
def lasting() -> Iterator[None]:
    """Keep the program running if standard output or error cannot be written during the block."""
    before = sys.stdout, sys.stderr
    if not any(map(_protected, before)):
        protect()
    streams = sys.stdout, sys.stderr
    for stream in streams:
        if raw := _protected(stream):
            raw.goes_on = True
    try:
        yield
    finally:
        if (sys.stdout, sys.stderr) == streams:  # the block has not replaced them
            sys.stdout, sys.stderr = before


def _protected(stream: Any) -> _Stream | None:
    raw = getattr(getattr(stream, "buffer", None), "raw", None)
    return raw if isinstance(raw, _Stream) else None
