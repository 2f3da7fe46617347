"""A watchdog that ends all ranks if one of them dies, is stopped or exits early, or if all of them hang.

With MPI alone the other ranks would wait forever, and launchers differ in the failures that they detect. So a
daemon thread on every rank, which makes no MPI calls, holds a TCP connection to rank 0. No decision depends
on wall-clock time, which a busy or sleeping machine could distort: a rank is dead when its connection closes,
and stopped when the kernel reports so at several consecutive polls. Polls are counted, so that a job
continues after all of its processes were suspended.

Messages are lines: `at PULSE` at each poll, `bye PULSE` from a rank at its end, `all` from rank 0 after the
`bye` of every rank, `end CODE` from a rank that has printed an error.
"""

from __future__ import annotations

import atexit
import contextlib
import faulthandler
import os
import selectors
import signal
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

from hfmpi.parallel.communicator import MPICommunicator
from hfmpi.parallel.sockets import link_up

__all__ = ["Watchdog", "allow", "joining", "quiet_end", "stall_timeout", "watch"]

_POLL = 1.0  # seconds between polls
_STOPPED = 6  # consecutive polls after which a stopped process of this node is an error
_SILENT = 30  # polls without a message from a rank of another node after which this is an error
_LATER = 5  # polls for which the others wait for rank 0, which has more information, if all ranks hang
_SILENCE = 1.0  # seconds within which another rank may print the error
_DRAIN = 0.2  # seconds for the launcher to forward the error before it kills the ranks
_CODE = 1  # the exit code of ranks that end because of another rank

_watchdog: Watchdog | None = None  # the watchdog of this process, once `watch` has been called


class Watchdog:
    """The watchdog of one rank.

    Parameters
    ----------
    comm : MPICommunicator
        The communicator whose `pulse` shows the progress of this rank.
    stall_timeout : float
        Seconds without a collective after which all ranks end; 0: never.
    links : dict
        Sockets by rank, from `link_up`.
    places : list of (str, str, int)
        Host, process-id namespace and process id of every rank.
    """

    def __init__(
        self,
        comm: MPICommunicator,
        stall_timeout: float,
        links: dict[int, socket.socket],
        places: list[tuple[str, str, int]],
    ) -> None:
        self.comm = comm
        self.stall_timeout = stall_timeout
        self.links = links
        self.places = places
        here = places[comm.rank][:2]
        node = [rank for rank, place in enumerate(places) if place[:2] == here]
        # Each process of a node watches the next one, in a ring.
        after = node[(node.index(comm.rank) + 1) % len(node)]
        self.neighbour = after if after != comm.rank and here[1] and _state(places[after][2]) else None
        # Rank 0 prints errors and, in case it cannot, so does one rank of each node.
        self.speaks = comm.rank in (0, min(rank for rank in node if rank or len(node) == 1))
        self.far = {rank for rank in links if places[rank][:2] != here}
        self.hosts = {place[0] for place in places}
        self.buffers = dict.fromkeys(links, b"")
        self.silent = dict.fromkeys(links, 0)
        self.pulses = dict.fromkeys(links, 0)
        self.left: set[int] = set()  # linked ranks that have sent `bye`
        self.leaving = False
        self.finished = threading.Event()
        self.stopped, self.still, self.seen = 0, 0.0, -1
        self.bell, self.ear = socket.socketpair()
        self.process = os.getpid()
        self.thread = threading.Thread(target=self._run, name="hfmpi watchdog", daemon=True)
        self.thread.start()

    # For the main thread -----------------------------------------------------------------------

    def goodbye(self) -> None:
        """Wait until all ranks have called this method; afterwards closed connections are not errors."""
        if os.getpid() == self.process and self.links:  # not in a forked child
            self.leaving = True
            self.bell.send(b"!")
            while self.thread.is_alive() and not self.finished.wait(1):
                pass

    def quiet_end(self, code: int) -> None:
        """End all other ranks at once, because of an error that has been printed."""
        for link in self.links.values():
            _send(link, f"end {code}")

    # The thread --------------------------------------------------------------------------------

    def _run(self) -> None:
        """Receive messages, and poll once a second, until all ranks have sent `bye`."""
        with selectors.DefaultSelector() as selector:
            selector.register(self.ear, selectors.EVENT_READ)
            for rank, link in self.links.items():
                selector.register(link, selectors.EVENT_READ, rank)
            last = time.monotonic()
            while not self.finished.is_set():
                for key, _ in selector.select(max(0.0, last + _POLL - time.monotonic())):
                    if key.data is None:
                        self.ear.recv(1)
                        self._send_pulse()
                    else:
                        self._hear(key.data)
                now = time.monotonic()
                if now >= last + _POLL:
                    self._poll(min(now - last, 2 * _POLL))  # excludes the time for which a rank was suspended
                    last = now
                self._all_left()

    def _send_pulse(self) -> None:
        word = "bye" if self.leaving else "at"
        for link in self.links.values():
            _send(link, f"{word} {self.comm.pulse}")

    def _hear(self, rank: int) -> None:
        try:
            content = self.links[rank].recv(4096)
        except BlockingIOError:
            return
        except OSError:
            content = b""
        if not content:
            self._end(f"{self._name(rank)} has died", self.speaks)
        self.silent[rank] = 0
        *lines, self.buffers[rank] = (self.buffers[rank] + content).split(b"\n")
        for line in lines:
            word, _, number = line.decode().partition(" ")
            if word == "end":
                self._pass_on(int(number))
                # The rank that sent the message causes the launcher to end all nodes, but only if no other
                # rank of its node exits before it.
                time.sleep(_SILENCE if len(self.hosts) > 1 else 0)
                os._exit(int(number))
            elif word == "all":
                self.finished.set()
            else:
                self.pulses[rank] = int(number)
                self.left |= {rank} if word == "bye" else set()

    def _poll(self, seconds: float) -> None:
        self._send_pulse()
        for rank in self.links:
            self.silent[rank] += 1
        if any(self.silent[rank] >= _SILENT + (_LATER if self.comm.rank else 0) for rank in self.far):
            self._end(self._cut_off(_SILENT, _SILENT - _LATER), self.speaks)
        if self.neighbour is not None:
            state = _state(self.places[self.neighbour][2])
            self.stopped = self.stopped + 1 if state in ("T", "Z", "X", "") else 0
            if self.stopped >= _STOPPED:
                what = "is stopped (SIGSTOP)" if state == "T" else "has died"
                self._end(f"{self._name(self.neighbour)} {what}")
        if self.comm.rank == 0:
            self._end_if_left_early()
        self._stall(seconds)

    def _cut_off(self, polls: int, least: int) -> str:
        """Return a clause that names the ranks that were silent for at least `least` polls, or ""."""
        silent = [rank for rank in sorted(self.far) if self.silent[rank] >= least]
        since = f"been silent for {polls} s"
        if not silent:
            return ""
        if self.comm.rank:
            return f"{self._name(0)} has {since}, or rank {self.comm.rank} on {self.comm.host} is cut off"
        if len(silent) == len(self.far) and len(self.hosts) > 2:
            return f"{self._name(0)} is cut off: the ranks of all other nodes have {since}"
        return f"{self._names(silent)} {'has' if len(silent) == 1 else 'have'} {since}"

    def _end_if_left_early(self) -> None:
        """End all ranks if one of them has exited while others are in a collective that it never entered."""
        at = self.pulses | {0: self.comm.pulse}
        gone = self.left | ({0} if self.leaving else set())
        early = [rank for rank in sorted(gone) if at[rank] < max(at.values())]
        if early:
            self._end(f"{self._name(early[0])} has exited while other ranks continue")

    def _stall(self, seconds: float) -> None:
        if not self.stall_timeout:
            return
        moved, self.seen = self.comm.pulse != self.seen, self.comm.pulse
        self.still = 0.0 if moved else self.still + seconds
        if self.still < self.stall_timeout + (_LATER if self.comm.rank and self.links else 0):
            return
        sentence = f"no collective has finished for {self.stall_timeout:g} s (--stall-timeout)"
        if self.comm.rank == 0:
            at = {rank: (pulse, rank in self.left) for rank, pulse in self.pulses.items()}
            at[0] = self.comm.pulse, self.leaving
            late = [rank for rank in sorted(at) if at[rank] < max(at.values())]
            if cut_off := self._cut_off(_STOPPED, _STOPPED):  # late ranks may be waiting for these
                sentence += f"; {cut_off}"
            elif late:
                sentence += f"; the others wait for {self._names(late)}"
        self._end(sentence, self.speaks)

    def _all_left(self) -> None:
        if self.comm.rank == 0 and self.leaving and len(self.left) == len(self.links):
            self._end_if_left_early()
            for link in self.links.values():
                _send(link, "all")
            self.finished.set()

    def _name(self, rank: int) -> str:
        host, _, process = self.places[rank]
        return f"rank {rank} (process {process} on {host})"

    def _names(self, ranks: list[int]) -> str:
        return ", ".join(map(self._name, ranks[:3])) + ", ..." * (len(ranks) > 3)

    def _end(self, sentence: str, speaks: bool = True) -> NoReturn:
        """Print the error or wait until another rank has printed it, and exit, even if MPI hangs."""
        if speaks:
            _say(f"Error: {sentence}, so all ranks end.")
        else:
            time.sleep(_SILENCE)  # the launcher may kill all ranks as soon as one exits
        self._exit()

    def _exit(self) -> NoReturn:
        self._pass_on(_CODE)
        if len(self.hosts) > 1:
            # After an exit with any code, MPICH's mpirun ends only this node and waits for the others. It
            # would wait forever for a stopped rank that is the only one on its node.
            _leave()
        os._exit(_CODE)

    def _pass_on(self, code: int) -> None:
        self.quiet_end(code)
        if self.stopped >= _STOPPED and self.neighbour is not None:
            with contextlib.suppress(OSError):  # some launchers do not kill stopped processes
                os.kill(self.places[self.neighbour][2], signal.SIGKILL)


def watch(comm: MPICommunicator, stall_timeout: float) -> None:
    """Start the watchdog of this process, unless it is running; collective. It ends with the program."""
    global _watchdog
    if _watchdog is not None:
        return
    namespace = ""
    with contextlib.suppress(OSError):
        namespace = os.readlink("/proc/self/ns/pid")
    places = comm.agree(comm.gather((comm.host, namespace, os.getpid()))) or []
    links, missing = link_up(comm, places[comm.rank][:2] == places[0][:2])
    if missing and comm.rank == 0:
        names = ", ".join(map(str, missing[:8])) + ", ..." * (len(missing) > 8)
        sentence = f"Note: rank 0 has no TCP connection to rank {names}; if one of them dies, "
        _say(f"{sentence}only the launcher or --stall-timeout can end the other ranks.")
    _watchdog = Watchdog(comm, stall_timeout, links, places)
    atexit.register(_watchdog.goodbye)


def quiet_end(code: int) -> None:
    """End all other ranks at once, because of an error that has been printed."""
    if _watchdog is not None:
        _watchdog.quiet_end(code)


def stall_timeout() -> float:
    """Return the time in seconds without a collective after which the watchdog ends all ranks; 0: never."""
    return 0.0 if _watchdog is None else _watchdog.stall_timeout


def allow(seconds: float) -> None:
    """Set the time in seconds without a collective that is allowed from now on; 0: no limit."""
    if _watchdog is not None:
        _watchdog.still, _watchdog.stall_timeout = 0.0, seconds


@contextlib.contextmanager
def joining(rank: int, patience: float) -> Iterator[None]:
    """End this rank if the `with` block takes longer than `patience` seconds; 0: never.

    While ranks join, they are not connected, so that only a timeout can detect a rank that never arrives. A
    Python thread does not run inside MPI_Init, which holds the interpreter lock. There the thread of
    faulthandler prints, and a timer of the kernel ends the process. Both end it by a signal, as
    `Watchdog._exit` does.
    """

    def give_up() -> None:
        time.sleep(_SILENCE if rank else 0)
        _say(f"Error: not all ranks have joined within {patience:g} s (--stall-timeout).")
        _leave()

    if not patience:
        yield
        return
    timer = threading.Timer(patience, give_up)
    timer.daemon = True
    timer.start()
    last = patience + 2 * _SILENCE + bool(rank)
    alarm = signal.getsignal(signal.SIGALRM) == signal.SIG_DFL  # do not replace the timer of a program
    faulthandler.dump_traceback_later(last, exit=not alarm, file=2)
    before, _ = signal.setitimer(signal.ITIMER_REAL, last + _DRAIN) if alarm else (0.0, 0.0)
    try:
        yield
    finally:
        timer.cancel()
        faulthandler.cancel_dump_traceback_later()
        if alarm:
            signal.setitimer(signal.ITIMER_REAL, before)


def _leave() -> NoReturn:
    """End this process by a signal, after its error has been forwarded."""
    time.sleep(_DRAIN)
    os.kill(os.getpid(), signal.SIGKILL)
    os._exit(_CODE)  # the first process of a container ignores the signal


def _say(sentence: str) -> None:
    with contextlib.suppress(OSError):  # the rank ends in any case
        os.write(2, f"{sentence}\n".encode())  # print could wait for a lock of the main thread


def _send(link: socket.socket, line: str) -> None:
    with contextlib.suppress(OSError):  # `_hear` detects a closed connection; a full one: a stopped rank
        link.send(f"{line}\n".encode())


def _state(process: int) -> str:
    """Return the kernel's letter for the state of a process on this node, or "" if it does not exist."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except (OSError, IndexError):
        return ""
