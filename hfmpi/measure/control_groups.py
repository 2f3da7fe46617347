"""Read the limits of this process's control groups on memory and processor time (Linux cgroups, v1 and v2).

A limit of a group holds for all groups below it. Slurm sets the memory limit of a job on a parent of the
process's group; containers and systemd set limits on any group. Therefore the process's group and all its
parents are read.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path

__all__ = ["free_memory", "processors"]


def free_memory(root: Path = Path("/")) -> int | None:
    """Return the free bytes of the group with the tightest limit, or None if no group has a limit.

    File pages count as free, because the kernel drops them when memory is needed.

    Parameters
    ----------
    root : Path
        The folder that contains `proc` and `sys`.
    """
    free = []
    for group in _groups(root, "memory"):
        used = _first_number(group, "memory.current", "memory.usage_in_bytes")
        for name in ("memory.max", "memory.high", "memory.limit_in_bytes"):
            limit = _first_number(group, name)
            if limit is not None and used is not None:
                free.append(max(0, limit - max(0, used - _droppable(group))))
    return min(free, default=None)


def processors(root: Path = Path("/")) -> float | None:
    """Return the number of processors that the tightest limit allows, or None if no group has a limit.

    Parameters
    ----------
    root : Path
        As in `free_memory`.
    """
    quotas = []
    for group in _groups(root, "cpu"):
        with contextlib.suppress(OSError, ValueError):
            quota, period = map(int, (group / "cpu.max").read_text().split())  # "max": a ValueError
            quotas.append(quota / period)
        quota, period = (_first_number(group, f"cpu.cfs_{name}_us") or 0 for name in ("quota", "period"))
        if quota > 0 and period > 0:
            quotas.append(quota / period)
    return min(quotas, default=None)


def _groups(root: Path, controller: str) -> Iterator[Path]:
    """Yield the folders of the process's group and of its parents, if they are mounted."""
    paths: dict[str, str] = {}  # by controller
    with contextlib.suppress(OSError, ValueError):
        for line in (root / "proc/self/cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            paths |= dict.fromkeys(controllers.split(","), path)  # version 2: the controller ""
    with contextlib.suppress(OSError, ValueError, IndexError):
        for line in (root / "proc/self/mountinfo").read_text().splitlines():
            mount, _, system = line.partition(" - ")
            top, point = (_unescaped(field) for field in mount.split()[3:5])
            kind, options = system.split()[0], system.split()[-1].split(",")
            name = {"cgroup2": "", "cgroup": controller if controller in options else None}.get(kind)
            if name in paths:
                highest = root / point.lstrip("/")
                group = highest / _below(paths[name], top)
                yield from (group, *(parent for parent in group.parents if parent.is_relative_to(highest)))


def _below(path: str, top: str) -> str:
    """Return the path of a group relative to the mounted group `top`; empty if it is not below `top`."""
    inside = path == top or path.startswith(f"{top.rstrip('/')}/")
    return path[len(top) :].lstrip("/") if inside and ".." not in path.split("/") else ""


def _unescaped(field: str) -> str:
    return re.sub(r"\\([0-7]{3})", lambda found: chr(int(found[1], 8)), field)


def _first_number(group: Path, *names: str) -> int | None:
    for name in names:
        with contextlib.suppress(OSError, ValueError):
            return int((group / name).read_text())  # "max", no limit, is a ValueError
    return None


def _droppable(group: Path) -> int:
    numbers = {}
    with contextlib.suppress(OSError, ValueError):
        for line in (group / "memory.stat").read_text().splitlines():
            name, number = line.split()
            numbers[name] = int(number)
    # Version 1 has two numbers of each kind: for the group alone and, as total, with the groups below it.
    return sum(
        numbers.get(f"total_{name}", numbers.get(name, 0)) for name in ("inactive_file", "active_file")
    )
