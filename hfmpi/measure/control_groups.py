"""What control groups leave this process: memory and processor time, in versions 1 and 2 of Linux's cgroups.

A limit holds for all groups below the one that it is set on. Slurm sets the memory of a job on a parent of
the process's own group, containers and systemd on any: so every group on the way up is looked at.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path

__all__ = ["free_memory", "processors"]


def free_memory(root: Path = Path("/")) -> int | None:
    """Give the bytes that the tightest group still has, or None where no group has a limit.

    File pages count as free, because the kernel drops them when memory is asked for.

    Parameters
    ----------
    root : Path
        The folder that has `proc` and `sys`.
    """
    found = []
    for group in _groups(root, "memory"):
        used = _first_number(group, "memory.current", "memory.usage_in_bytes")
        for name in ("memory.max", "memory.high", "memory.limit_in_bytes"):
            limit = _first_number(group, name)
            if limit is not None and used is not None:
                found.append(max(0, limit - max(0, used - _droppable(group))))
    return min(found, default=None)


def processors(root: Path = Path("/")) -> float | None:
    """Give the processors whose time the tightest group may use, or None where no group has a limit.

    Parameters
    ----------
    root : Path
        As in `free_memory`.
    """
    found = []
    for group in _groups(root, "cpu"):
        with contextlib.suppress(OSError, ValueError):
            quota, period = map(int, (group / "cpu.max").read_text().split())  # "max" is no number: no limit
            found.append(quota / period)
        quota, period = (_first_number(group, f"cpu.cfs_{name}_us") or 0 for name in ("quota", "period"))
        if quota > 0 and period > 0:
            found.append(quota / period)
    return min(found, default=None)


def _groups(root: Path, controller: str) -> Iterator[Path]:
    """Give the folders of the process's group and of its parents, as far as they are mounted."""
    own: dict[str, str] = {}
    with contextlib.suppress(OSError, ValueError):
        for line in (root / "proc/self/cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            own |= dict.fromkeys(controllers.split(","), path)  # version 2 names none
    with contextlib.suppress(OSError, ValueError, IndexError):
        for line in (root / "proc/self/mountinfo").read_text().splitlines():
            mount, _, system = line.partition(" - ")
            top, point = (_unescaped(field) for field in mount.split()[3:5])
            kind, options = system.split()[0], system.split()[-1].split(",")
            name = {"cgroup2": "", "cgroup": controller if controller in options else None}.get(kind)
            if name in own:
                highest = root / point.lstrip("/")
                group = highest / _below(own[name], top)
                yield from (group, *(parent for parent in group.parents if parent.is_relative_to(highest)))


def _below(path: str, top: str) -> str:
    """Give a group's path below the group `top` that is mounted; where it is not below, `top` itself."""
    inside = path == top or path.startswith(f"{top.rstrip('/')}/")
    return path[len(top) :].lstrip("/") if inside and ".." not in path.split("/") else ""


def _unescaped(field: str) -> str:
    return re.sub(r"\\([0-7]{3})", lambda found: chr(int(found[1], 8)), field)


def _first_number(group: Path, *names: str) -> int | None:
    for name in names:
        with contextlib.suppress(OSError, ValueError):
            return int((group / name).read_text())  # "max" is no number: no limit
    return None


def _droppable(group: Path) -> int:
    numbers = {}
    with contextlib.suppress(OSError, ValueError):
        for line in (group / "memory.stat").read_text().splitlines():
            name, number = line.split()
            numbers[name] = int(number)
    # Version 1 has two of each: of the group itself and, in total, with those below it.
    return sum(
        numbers.get(f"total_{name}", numbers.get(name, 0)) for name in ("inactive_file", "active_file")
    )
