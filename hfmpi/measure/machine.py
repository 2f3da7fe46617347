"""Describe this machine: processor, BLAS, versions, and the cores and memory that a process may use."""

from __future__ import annotations

import contextlib
import os
import platform
import resource
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from threadpoolctl import threadpool_info

from hfmpi.measure import control_groups

__all__ = ["blas", "cores", "cupy", "free_memory", "processor", "versions"]


def processor() -> str:
    """Return the name of the processor that the system reports."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def blas() -> list[str]:
    """Return kind, version and processor type of the loaded BLAS libraries."""
    pools = [pool for pool in threadpool_info() if pool["user_api"] == "blas"]
    parts = ([pool["internal_api"], pool["version"], pool.get("architecture")] for pool in pools)
    return sorted({" ".join(str(part) for part in each if part) for each in parts})


def versions(*packages: str) -> dict[str, str | None]:
    """Return the versions of Python and of packages; None for a package that is not installed."""
    numbers: dict[str, str | None] = {"python": platform.python_version()}
    for package in packages:
        try:
            numbers[package] = version(package)
        except PackageNotFoundError:
            numbers[package] = None
    return numbers


def cupy() -> dict[str, str | None]:
    """Return the version of CuPy by the name of its package, which contains the version of CUDA."""
    return {
        name: number
        for name, number in versions("cupy", "cupy-cuda12x", "cupy-cuda13x").items()
        if number and name != "python"
    }


def cores(root: Path = Path("/")) -> int:
    """Return the number of logical cores that this process may run on, within its quota of processor time.

    Parameters
    ----------
    root : Path
        The folder that contains `proc` and `sys`.
    """
    bound = len(os.sched_getaffinity(0))
    quota = control_groups.processors(root)
    return bound if quota is None else max(1, min(bound, int(quota)))


def free_memory(ranks: int = 1, root: Path = Path("/")) -> int:
    """Return the bytes that this process can still allocate.

    That is the minimum of the node's free memory, the limits of the control groups and of the Slurm job on
    this node, and the limits of the process (`ulimit -v` and `-d`). If none of them is known, it is assumed
    to be 4 GiB.

    Parameters
    ----------
    ranks : int
        The number of processes on the node that share all of these except the limits of the process.
    root : Path
        The folder that contains `proc` and `sys`.
    """
    shared = [control_groups.free_memory(root), _slurm_memory()]
    with contextlib.suppress(OSError, ValueError, IndexError):
        available = (root / "proc/meminfo").read_text().partition("MemAvailable:")[2]
        shared.append(1024 * int(available.split()[0]))
    known = [number for number in shared if number is not None]
    return min([min(known, default=4 * 2**30) // ranks, *_process_limits(root)])


def _slurm_memory() -> int | None:
    """Return the bytes of this job on this node, or None if there is no limit, which Slurm writes as 0."""
    for name, count in (
        ("SLURM_MEM_PER_NODE", None),
        ("SLURM_MEM_PER_CPU", "SLURM_CPUS_ON_NODE"),
        ("SLURM_MEM_PER_GPU", "SLURM_GPUS_ON_NODE"),
    ):
        megabytes, times = os.environ.get(name, ""), os.environ.get(count, "") if count else "1"
        if megabytes.isdecimal() and times.isdecimal() and int(megabytes) * int(times):
            return int(megabytes) * int(times) * 2**20
    return None


def _process_limits(root: Path) -> list[int]:
    free = []
    for kind, name in ((resource.RLIMIT_AS, "VmSize:"), (resource.RLIMIT_DATA, "VmData:")):
        limit = resource.getrlimit(kind)[0]
        with contextlib.suppress(OSError, ValueError, IndexError):
            used = 1024 * int((root / "proc/self/status").read_text().partition(name)[2].split()[0])
            if limit != resource.RLIM_INFINITY:
                free.append(max(0, limit - used))
    return free
