"""Where a rank runs: its node, its cores, and how many threads it may use."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import reduce
from operator import or_
from typing import NamedTuple

from threadpoolctl import ThreadpoolController, threadpool_info, threadpool_limits

from hfmpi.errors import UserError
from hfmpi.measure import control_groups
from hfmpi.measure.machine import cores, free_memory
from hfmpi.parallel.communicator import Communicator

__all__ = ["Place", "Placement", "place", "single_threaded", "threads_kept"]

# The first that is set to a number is the user's choice.
_THREAD_VARIABLES = ("OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "OMP_NUM_THREADS")


@dataclass(frozen=True)
class Placement:
    """One rank's place.

    Attributes
    ----------
    host : str
        Name of the node.
    rank, size, local_rank, local_size : int
        As in `Communicator`.
    cores : int
        Logical cores that this process may run on, or fewer by the quota of its control groups.
    threads : int
        Threads that this rank's BLAS uses.
    memory : int
        Bytes that fall to this rank of what is free on its node, or in its job.
    """

    host: str
    rank: int
    size: int
    local_rank: int
    local_size: int
    cores: int
    threads: int
    memory: int


class Place(NamedTuple):
    """Where a rank computes, and how its vectors reach the others."""

    host: str
    local_rank: int
    device: str
    device_id: str | None
    transport: str


def place(comm: Communicator, threads: int | None = None) -> Placement:
    """Find this rank's place and set the threads of its BLAS; collective.

    Ranks that leave their BLAS at one thread per core slow each other down, by 1.7 to 2 times at 2 to 4
    ranks on 2 cores (measured with OpenBLAS). So the cores of a node are shared out: a rank bound to
    cores of its own uses these, ranks on common cores an equal part, at least one. A quota of processor time
    is shared out alike.

    Parameters
    ----------
    comm : Communicator
        All its ranks call this.
    threads : int, optional
        The user's choice, or as many as the BLAS can have. Next come OPENBLAS_NUM_THREADS, MKL_NUM_THREADS
        and OMP_NUM_THREADS, then the share described above.

    Raises
    ------
    UserError
        If fewer than one thread is asked for.
    """
    if threads is not None and threads < 1:
        raise UserError(f"a rank needs at least one thread, not {threads}")
    own = sum(1 << core for core in os.sched_getaffinity(0))
    everyone = comm.agree(comm.gather((comm.host, own)))
    masks = [mask for host, mask in everyone or () if host == comm.host]
    chosen = threads or _environment() or _share(own, masks, control_groups.processors())
    return Placement(
        comm.host,
        comm.rank,
        comm.size,
        comm.local_rank,
        comm.local_size,
        cores(),
        _set_threads(chosen),
        free_memory(comm.local_size),
    )


@contextmanager
def threads_kept() -> Iterator[None]:
    """Give the BLAS the threads back that it had before."""
    before = [(pool, pool.num_threads) for pool in ThreadpoolController().lib_controllers]
    try:
        yield
    finally:
        for pool, threads in before:
            if pool.user_api == "blas":
                pool.set_num_threads(threads)


def single_threaded(placement: Placement) -> Placement:
    """Set the BLAS to one thread, so that its sums do not depend on how many cores a rank has."""
    return replace(placement, threads=_set_threads(1))


def _set_threads(threads: int) -> int:
    """Set the threads of the BLAS; give those that it has now: it may be built for fewer, such as 64."""
    threadpool_limits(limits=min(threads, 2**31 - 1), user_api="blas")  # a C int
    found = [pool["num_threads"] for pool in threadpool_info() if pool["user_api"] == "blas"]
    return max(found, default=threads)


def _share(own: int, masks: list[int], quota: float | None = None) -> int:
    """Threads of a rank with core mask `own` on a node whose ranks have these masks and share a quota."""
    union = reduce(or_, masks)
    threads = own.bit_count()
    if union.bit_count() != sum(mask.bit_count() for mask in masks):  # not each rank has its own cores
        threads = union.bit_count() // len(masks)
    return max(1, threads if quota is None else min(threads, int(quota / len(masks))))


def _environment() -> int | None:
    for name in _THREAD_VARIABLES:
        first = os.environ.get(name, "").partition(",")[0].strip()  # OMP takes a list, one a nesting level
        if first.isdecimal() and int(first) > 0:
            return int(first)
    return None
