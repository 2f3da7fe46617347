"""Signals that ask a run to stop after the step it is in."""

from __future__ import annotations

import signal
from types import FrameType, TracebackType
from typing import Any

__all__ = ["StopSignals"]

# SIGUSR1 is the one that the mpirun of MPICH and of Open MPI both forward to the ranks, and that batch
# systems can be told to send some time before the limit; SIGTERM is what they send at the limit.
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


class StopSignals:
    """Notes SIGINT, SIGTERM and SIGUSR1 inside a `with` block instead of dying from them.

    A second SIGINT raises KeyboardInterrupt at once. Only the main thread can enter the block. Each rank
    notes its own signals; whether to stop is for the ranks to agree.

    Attributes
    ----------
    requested : str or None
        Name of the first signal that came, such as "SIGTERM".
    """

    def __init__(self) -> None:
        self.requested: str | None = None
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopSignals:
        for number in _SIGNALS:
            self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.requested = self.requested or signal.Signals(number).name
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)
