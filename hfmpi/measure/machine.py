"""What this machine is: processor, BLAS, versions, and the memory that is free."""

from __future__ import annotations

import contextlib
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from threadpoolctl import threadpool_info

__all__ = ["blas", "cupy", "free_memory", "processor", "versions"]


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


def free_memory(proc: Path = Path("/proc"), cgroups: Path = Path("/sys/fs/cgroup")) -> int:
    """Give the bytes that processes of this node, or of its control group (version 2), can still take.

    Where nothing can be found out it is a guess of 4 GiB.
    """
    found = []
    with contextlib.suppress(OSError, ValueError, IndexError):
        available = (proc / "meminfo").read_text().partition("MemAvailable:")[2]
        found.append(1024 * int(available.split()[0]))
    with contextlib.suppress(OSError, ValueError, IndexError):
        own = (proc / "self/cgroup").read_text().partition("0::/")[2]
        group = cgroups / own.splitlines()[0]
        limit = int((group / "memory.max").read_text())  # "max" is no number: no limit
        found.append(max(0, limit - int((group / "memory.current").read_text())))
    return min(found, default=4 * 2**30)
