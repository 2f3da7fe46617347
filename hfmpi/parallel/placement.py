"""The placement of a rank: its node, its cores and its number of threads."""

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

# The first of these variables that is set to a number is the user's choice.
_THREAD_VARIABLES = ("OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "OMP_NUM_THREADS")


@dataclass(frozen=True)
class Placement:
    """The placement of a rank on a node.

    Attributes
    ----------
    host : str
        The name of the node.
    rank, size, local_rank, local_size : int
        As in `Communicator`.
    cores : int
        The number of logical cores that this process may use, limited by the quota of its control groups.
    threads : int
        The number of threads of this rank's BLAS.
    memory : int
        This rank's share, in bytes, of the free memory of its node or job.
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
    """The device of a rank, the transport of its vectors to other ranks, and its number of visible GPUs."""

    host: str
    local_rank: int
    device: str
    device_id: str | None
    transport: str
    gpus: int = 0


def place(comm: Communicator, threads: int | None = None) -> Placement:
    """Determine this rank's placement and set the threads of its BLAS; collective.

    If every rank's BLAS has one thread per core, the ranks slow each other down, by a factor of 1.7 to 2 with
    2 to 4 ranks on 2 cores (measured with OpenBLAS). So the cores of a node are divided among its ranks: a
    rank that is bound to separate cores uses these cores; ranks on shared cores use equal parts of them, at
    least one core each. A quota of processor time is divided in the same way.

    Parameters
    ----------
    comm : Communicator
        All its ranks call this.
    threads : int, optional
        The user's choice, limited by the BLAS. Default: the value of OPENBLAS_NUM_THREADS, MKL_NUM_THREADS or
        OMP_NUM_THREADS, or else the share described above.

    Raises
    ------
    UserError
        If `threads` is less than one.
    """
    if threads is not None and threads < 1:
        raise UserError(f"the number of threads of a rank must be at least 1, not {threads}")
    core_mask = sum(1 << core for core in os.sched_getaffinity(0))
    everyone = comm.agree(comm.gather((comm.host, core_mask)))
    masks = [mask for host, mask in everyone or () if host == comm.host]
    chosen = threads or _environment() or _share(core_mask, masks, control_groups.processors())
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
    """Restore the number of threads of the BLAS at the end of the `with` block."""
    before = [(pool, pool.num_threads) for pool in ThreadpoolController().lib_controllers]
    try:
        yield
    finally:
        for pool, threads in before:
            if pool.user_api == "blas":
                pool.set_num_threads(threads)


def single_threaded(placement: Placement) -> Placement:
    """Set the BLAS to one thread, so that its sums do not depend on the number of cores."""
    return replace(placement, threads=_set_threads(1))


def _set_threads(threads: int) -> int:
    """Set the number of threads of the BLAS, and return the actual number, which the BLAS may limit."""
    threadpool_limits(limits=min(threads, 2**31 - 1), user_api="blas")  # the largest C int
    counts = [pool["num_threads"] for pool in threadpool_info() if pool["user_api"] == "blas"]
    return max(counts, default=threads)


def _share(core_mask: int, masks: list[int], quota: float | None = None) -> int:
    """Return the number of threads of a rank from its core mask, the masks of its node, and a quota."""
    union = reduce(or_, masks)
    threads = core_mask.bit_count()
    if union.bit_count() != sum(mask.bit_count() for mask in masks):  # some ranks share cores
        threads = union.bit_count() // len(masks)
    return max(1, threads if quota is None else min(threads, int(quota / len(masks))))


def _environment() -> int | None:
    for name in _THREAD_VARIABLES:
        first = os.environ.get(name, "").partition(",")[0].strip()  # OpenMP allows a list, one per level
        if first.isdecimal() and int(first) > 0:
            return int(first)
    return None
