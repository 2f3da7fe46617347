"""Format the output of `hfmpi bench`: the machine, and a table of the measurements."""

from __future__ import annotations

from typing import Any

from hfmpi.bench.measurements import Row
from hfmpi.display import aligned
from hfmpi.measure import machine
from hfmpi.parallel import library

__all__ = ["describe", "doubts", "table"]

STEADY = 1.5
"""The largest ratio of the median to the minimum time that is expected on an idle machine."""

COLUMNS = (
    *("pass", "model", "hidden", "batch", "bytes", "ranks", "threads"),
    *("seconds", "seconds_least", "seconds_most", "bound_seconds", "ratio", "speedup", "efficiency", "other"),
)
"""Keys of the rows that have a column."""

HEADS = {"seconds_least": "least", "seconds_most": "most", "bound_seconds": "bound"}
"""Heads of the columns that differ from their keys."""


def describe(device: str, ranks: int, threads: int) -> dict[str, Any]:
    """Return processor, libraries and versions, and the ranks that measured."""
    return {
        "processor": machine.processor(),
        "device": device,
        "blas": machine.blas(),
        "mpi": library.describe()[0] if ranks > 1 else None,
        "versions": machine.versions("hfmpi", "numpy", "numba") | (machine.cupy() if device != "CPU" else {}),
        "ranks": ranks,
        "threads": threads,
    }


def table(about: dict[str, Any], rows: list[Row]) -> str:
    """Return the rows as aligned columns below a description of the machine, then the spans of steps."""
    columns = [key for key in COLUMNS if any(row.get(key) is not None for row in rows)]
    cells = [[_cell(key, row.get(key)) for key in columns] for row in rows]
    versions = ", ".join(f"{name} {number}" for name, number in about["versions"].items())
    lines = [
        *([about["device"]] if about["device"] != "CPU" else []),
        about["processor"] + ", " + ", ".join(about["blas"]) + (f", {about['mpi']}" if about["mpi"] else ""),
        f"{versions}; {about['ranks']} rank(s) of {about['threads']} thread(s)",
        "",
        *aligned([[HEADS.get(key, key) for key in columns], *cells]),
    ]
    for row in rows:
        if "spans" in row:
            total = sum(row["spans"].values())
            spans = sorted(row["spans"].items(), key=lambda item: -item[1])
            shares = ", ".join(f"{name} {100 * seconds / total:.1f} %" for name, seconds in spans)
            lines += ["", f"{row['model']}, {row['ranks']} rank(s) of {row['threads']} thread(s): {shares}"]
    return "\n".join(lines)


def doubts(rows: list[Row]) -> str | None:
    """Return a note if the repetitions of a measurement differ so much that its median is unreliable."""
    worst = max(
        (row["seconds"] / row["seconds_least"] for row in rows if row.get("seconds_least")), default=1.0
    )
    if worst <= STEADY:
        return None
    return (
        f"Note: a median is {worst:.1f} times the minimum time of the same work: do not rely on these times. "
        "Are other programs running, or more ranks than cores? Repeat the measurement on an idle machine."
    )


def _cell(key: str, value: Any) -> str:
    if value is None:
        return ""
    if key == "other":
        return f"{100 * value:.1f} %"
    if key in ("ratio", "speedup", "efficiency"):
        return f"{value:.2f}"
    if isinstance(value, float):
        return f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) else str(value)
