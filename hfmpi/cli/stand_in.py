"""A process between a rank and a launcher that kills its processes without warning.

The mpirun of MPICH ends on SIGHUP, SIGUSR2 and SIGXCPU, and when its output fails (a full disk, `| head`).
Its proxies then kill the process group of each rank immediately. Therefore the process that they started
only waits for the rank, which has a separate process group: when the waiting process is killed, the rank
receives SIGTERM and stops with a checkpoint.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
from pathlib import Path
from types import FrameType

__all__ = ["stand_in"]

_PROXY = "hydra_pmi_proxy"
_PASSED_ON = "SIGHUP", "SIGINT", "SIGQUIT", "SIGTERM", "SIGALRM", "SIGUSR1", "SIGUSR2", "SIGXCPU"
_PR_SET_PDEATHSIG = 1


def stand_in() -> None:
    """Continue in a child process if MPICH's mpirun started this one; call before threads and MPI start."""
    if sys.platform != "linux" or "mpi4py.MPI" in sys.modules or _name(os.getppid()) != _PROXY:
        return
    numbers = {signal.Signals[name] for name in _PASSED_ON}
    signal.pthread_sigmask(signal.SIG_BLOCK, numbers)  # signals wait until the rank can receive them
    parent, rank = os.getpid(), os.fork()
    if rank == 0:
        os.setpgid(0, 0)
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, numbers)
        if os.getppid() != parent:
            os._exit(1)
        return

    def pass_on(number: int, frame: FrameType | None) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(rank, number)

    for number in numbers:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, pass_on)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, numbers)
    code = os.waitstatus_to_exitcode(os.waitpid(rank, 0)[1])
    if code < 0:  # end by the same signal as the rank
        with contextlib.suppress(OSError):
            signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    os._exit(code)


def _name(process: int) -> str:
    try:
        return Path(f"/proc/{process}/comm").read_text().strip()
    except OSError:
        return ""
