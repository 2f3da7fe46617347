"""Requests to stop before a limit: signals, and the approaching end of the batch job."""

from __future__ import annotations

import math
import os
import signal
import time
from types import FrameType, TracebackType
from typing import Any

__all__ = ["StopSignals", "job_end"]

# The mpirun of both MPICH and Open MPI forwards SIGUSR1 to the ranks, and batch systems can send it some time
# before the limit; at the limit they send SIGTERM. A dropped connection sends SIGHUP; submitit, LSF, OAR and
# Grid Engine (-notify) send SIGUSR2; Grid Engine and the kernel (ulimit -t) send SIGXCPU.
_SIGNALS = tuple(signal.Signals[f"SIG{name}"] for name in ("INT", "TERM", "HUP", "USR1", "USR2", "XCPU"))
_MARGIN = 30.0  # seconds before the end of the job, in addition to those that the run needs


def job_end() -> float | None:
    """Return the time at which Slurm will end the job (seconds since 1970), or None outside a job.

    A time in the past does not count: the variable was inherited from a job that has ended.
    """
    end = os.environ.get("SLURM_JOB_END_TIME", "")
    return float(end) if end.isdecimal() and float(end) > time.time() else None


class StopSignals:
    """A context that records SIGINT, SIGTERM, SIGHUP, SIGUSR1, SIGUSR2 and SIGXCPU, so that they do not kill.

    A second SIGINT raises KeyboardInterrupt at once; a SIGHUP that is ignored (nohup) stays ignored. Only
    the main thread can enter the block. Each rank records the signals that it receives; the ranks have to
    agree on whether to stop.

    Parameters
    ----------
    end : float, optional
        Time at which the job ends, from `job_end`. `wanted` returns True early enough before it.

    Attributes
    ----------
    requested : str or None
        The first request, such as "received SIGTERM".
    """

    def __init__(self, end: float | None = None) -> None:
        self.requested: str | None = None
        self._previous: dict[signal.Signals, Any] = {}
        self._end = None if end is None else time.monotonic() + end - time.time()
        self._asked = math.inf  # `wanted` has not been called yet
        self._longest = 0.0

    def wanted(self) -> bool:
        """Return whether this rank wants to stop; called at every sum over the ranks and before every step.

        After that, the run works up to the next sum and then writes its checkpoint. Neither has taken longer
        than the longest time between two calls so far. Therefore twice this time and half a minute are
        reserved before the end of the job.
        """
        now = time.monotonic()
        self._longest = max(self._longest, now - self._asked)
        self._asked = now
        if self._end is not None and now > self._end - _MARGIN - 2 * self._longest:
            self.requested = self.requested or "the job is about to reach its time limit"
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
        self.requested = self.requested or f"received {signal.Signals(number).name}"
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)
