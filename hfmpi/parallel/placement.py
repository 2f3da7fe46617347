"""Where a rank runs: its node, its cores, and how many threads it may use."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from functools import reduce
from operator import or_
from typing import NamedTuple

from threadpoolctl import threadpool_limits

from hfmpi.errors import UserError
from hfmpi.measure.machine import free_memory
from hfmpi.parallel.communicator import Communicator

__all__ = ["Place", "Placement", "place", "single_threaded"]

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
        Logical cores that this process may run on.
    threads : int
        Threads that this rank's BLAS uses.
    memory : int
        Bytes of the node's free memory that fall to this rank.
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
    cores of its own uses these, ranks on common cores an equal part, at least one.

    Parameters
    ----------
    comm : Communicator
        All its ranks call this.
    threads : int, optional
        The user's choice. Next come OPENBLAS_NUM_THREADS, MKL_NUM_THREADS and OMP_NUM_THREADS, then the
        share described above.

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
    chosen = threads or _environment() or _share(own, masks)
    threadpool_limits(limits=chosen, user_api="blas")
    return Placement(
        comm.host,
        comm.rank,
        comm.size,
        comm.local_rank,
        comm.local_size,
        own.bit_count(),
        chosen,
        free_memory() // comm.local_size,
    )


def single_threaded(placement: Placement) -> Placement:
    """Set the BLAS to one thread, so that its sums do not depend on how many cores a rank has."""
    threadpool_limits(limits=1, user_api="blas")
    return replace(placement, threads=1)


def _share(own: int, masks: list[int]) -> int:
    """Threads of a rank with core mask `own` on a node whose ranks have these masks."""
    union = reduce(or_, masks)
    if union.bit_count() == sum(mask.bit_count() for mask in masks):  # each rank has its own cores
        return own.bit_count()
    return max(1, union.bit_count() // len(masks))


def _environment() -> int | None:
    for name in _THREAD_VARIABLES:
        first = os.environ.get(name, "").partition(",")[0].strip()  # OMP takes a list, one a nesting level
        if first.isdecimal() and int(first) > 0:
            return int(first)
    return None
