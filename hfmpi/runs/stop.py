"""What asks a run to stop before its limit: signals, and the end of the batch job that it runs in."""

from __future__ import annotations

import math
import os
import signal
import time
from types import FrameType, TracebackType
from typing import Any

__all__ = ["StopSignals", "job_end"]

# SIGUSR1 is the one that the mpirun of MPICH and of Open MPI both forward to the ranks, and that batch
# systems can be told to send some time before the limit; SIGTERM is what they send at the limit. SIGHUP is
# that of a dropped connection; submitit, LSF, OAR and Grid Engine (-notify) send SIGUSR2; Grid Engine and
# the kernel (ulimit -t) send SIGXCPU.
_SIGNALS = tuple(signal.Signals[f"SIG{name}"] for name in ("INT", "TERM", "HUP", "USR1", "USR2", "XCPU"))
_MARGIN = 30.0  # seconds before the job's end, besides what the run itself needs


def job_end() -> float | None:
    """Give the time at which Slurm will end the job (seconds since 1970), or None outside a job.

    A time that is over is none: the variable was inherited from a job that is gone.
    """
    end = os.environ.get("SLURM_JOB_END_TIME", "")
    return float(end) if end.isdecimal() and float(end) > time.time() else None


class StopSignals:
    """Notes SIGINT, SIGTERM, SIGHUP, SIGUSR1, SIGUSR2 and SIGXCPU in a `with` block instead of dying of them.

    A second SIGINT raises KeyboardInterrupt at once; a SIGHUP that is ignored (nohup) stays ignored. Only
    the main thread can enter the block. Each rank notes its own signals; whether to stop is for the ranks
    to agree.

    Parameters
    ----------
    end : float, optional
        When the job ends, as `job_end` gives it. `wanted` says yes early enough to leave in good order.

    Attributes
    ----------
    requested : str or None
        What came first, such as "SIGTERM asked for it".
    """

    def __init__(self, end: float | None = None) -> None:
        self.requested: str | None = None
        self._previous: dict[signal.Signals, Any] = {}
        self._end = None if end is None else time.monotonic() + end - time.time()
        self._asked = math.inf  # not yet
        self._longest = 0.0

    def wanted(self) -> bool:
        """Say whether this rank wants to stop; asked at every sum over the ranks and before every step.

        Once it says yes, the run may work up to the next sum and then write its checkpoint. Neither took
        longer than the longest time between two calls so far, so that time is left twice before the job's
        end, and half a minute.
        """
        now = time.monotonic()
        self._longest = max(self._longest, now - self._asked)
        self._asked = now
        if self._end is not None and now > self._end - _MARGIN - 2 * self._longest:
            self.requested = self.requested or "the time of the job is nearly over"
        return self.requested is not None

    def __enter__(self) -> StopSignals:
        for number in _SIGNALS:
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
                self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.requested = self.requested or f"{signal.Signals(number).name} asked for it"
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)
