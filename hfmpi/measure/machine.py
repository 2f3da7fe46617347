"""What this machine is: processor, BLAS, versions, and the cores and the memory that a process may use."""

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
    """Name the processor as the system does."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def blas() -> list[str]:
    """Name the loaded BLAS libraries: kind, version, and the processor that their kernels are for."""
    found = [pool for pool in threadpool_info() if pool["user_api"] == "blas"]
    parts = ([pool["internal_api"], pool["version"], pool.get("architecture")] for pool in found)
    return sorted({" ".join(str(part) for part in each if part) for each in parts})


def versions(*packages: str) -> dict[str, str | None]:
    """Give the versions of Python and of installed packages; None for one that is absent."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    return found


def cupy() -> dict[str, str | None]:
    """Give the version of CuPy by the name of its package, which names its CUDA; empty without it."""
    return {
        name: number
        for name, number in versions("cupy", "cupy-cuda12x", "cupy-cuda13x").items()
        if number and name != "python"
    }


def cores(root: Path = Path("/")) -> int:
    """Give the logical cores that this process can keep busy: those it may run on, within its quota of time.

    Parameters
    ----------
    root : Path
        The folder that has `proc` and `sys`.
    """
    bound = len(os.sched_getaffinity(0))
    quota = control_groups.processors(root)
    return bound if quota is None else max(1, min(bound, int(quota)))


def free_memory(ranks: int = 1, root: Path = Path("/")) -> int:
    """Give the bytes that this process can still take.

    That is the least of the node's free memory, of what its control groups and its Slurm job leave on this
    node, and of the process's own limits (`ulimit -v` and `-d`). Where nothing can be found out it is a guess
    of 4 GiB.

    Parameters
    ----------
    ranks : int
        Processes of the node that share all but the last of these.
    root : Path
        The folder that has `proc` and `sys`.
    """
    shared = [control_groups.free_memory(root), _slurm_memory()]
    with contextlib.suppress(OSError, ValueError, IndexError):
        available = (root / "proc/meminfo").read_text().partition("MemAvailable:")[2]
        shared.append(1024 * int(available.split()[0]))
    known = [number for number in shared if number is not None]
    return min([min(known, default=4 * 2**30) // ranks, *_own_limits(root)])


def _slurm_memory() -> int | None:
    """Give the memory of this job on this node; 0 stands for all that there is."""
    for name, count in (
        ("SLURM_MEM_PER_NODE", None),
        ("SLURM_MEM_PER_CPU", "SLURM_CPUS_ON_NODE"),
        ("SLURM_MEM_PER_GPU", "SLURM_GPUS_ON_NODE"),
    ):
        megabytes, times = os.environ.get(name, ""), os.environ.get(count, "") if count else "1"
        if megabytes.isdecimal() and times.isdecimal() and int(megabytes) * int(times):
            return int(megabytes) * int(times) * 2**20
    return None


def _own_limits(root: Path) -> list[int]:
    found = []
    for kind, name in ((resource.RLIMIT_AS, "VmSize:"), (resource.RLIMIT_DATA, "VmData:")):
        limit = resource.getrlimit(kind)[0]
        with contextlib.suppress(OSError, ValueError, IndexError):
            used = 1024 * int((root / "proc/self/status").read_text().partition(name)[2].split()[0])
            if limit != resource.RLIM_INFINITY:
                found.append(max(0, limit - used))
    return found
