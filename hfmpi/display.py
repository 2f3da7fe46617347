"""Text tables and small charts for a terminal, and the conventions of figures that are saved to files."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hfmpi.errors import UserError

__all__ = ["HATCHES", "MARKERS", "STYLES", "aligned", "bar", "label", "need_matplotlib", "save", "sparkline"]

STYLES = ("-", "--", "-.", ":", (0, (9, 2)), (0, (6, 1.5, 1, 1.5, 1, 1.5)), (0, (3, 4)))
MARKERS = "os^Dv*P"
"""Line styles and markers that distinguish runs in black and white."""

HATCHES = ("", "///", "\\\\\\", "...", "xxx", "|||", "---", "+++", "ooo", "***")
BLOCKS = "▁▂▃▄▅▆▇█"


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Return the rows of a table as lines with right-aligned columns."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]


def bar(value: float, full: float, width: int = 40) -> str:
    """Return a bar of `width` characters, filled in proportion to `value / full` and padded with dots."""
    filled = round(width * min(max(value / full, 0.0), 1.0))
    return "█" * filled + "·" * (width - filled)


def sparkline(values: Sequence[float | None], width: int = 40, log: bool = False) -> str:
    """Return a line of blocks scaled from the smallest to the largest value.

    Each block is the mean of neighbouring values, or a blank if none of them is known. With `log` the heights
    are logarithmic; values that are not positive count as unknown.
    """
    heights = [None if v is None or (log and v <= 0) else math.log(v) if log else v for v in values]
    width = min(width, len(heights))
    edges = [len(heights) * i // width for i in range(width + 1)] if width else []
    groups = [[v for v in heights[a:b] if v is not None] for a, b in itertools.pairwise(edges)]
    means = [sum(group) / len(group) if group else None for group in groups]
    known = [mean for mean in means if mean is not None]
    if not known:
        return " " * width
    low, span = min(known), (max(known) - min(known)) or 1.0
    return "".join(" " if m is None else BLOCKS[min(7, int(8 * (m - low) / span))] for m in means)


def label(run: Path | str) -> str:
    """Return the name of a run in a form that a legend of matplotlib can show.

    Dollar signs, which would start a formula, and bytes that are not UTF-8 are escaped. A space precedes a
    leading underscore, because a legend hides labels that start with an underscore.
    """
    name = Path(run).name.encode("utf-8", "backslashreplace").decode()
    return (" " if name.startswith("_") else "") + name.replace("$", r"\$")


def need_matplotlib() -> None:
    """Select the backend of matplotlib that only writes files; raise a UserError if it is not installed."""
    try:
        import matplotlib
    except ImportError:
        raise UserError("drawing needs matplotlib: pip install matplotlib") from None
    matplotlib.use("agg")


def save(figure: Any, out: Path) -> Path:
    """Save a figure in the format of the file's extension, by default PNG; return the file with extension.

    Raises
    ------
    UserError
        If the file cannot be written.
    """
    if out.is_dir():
        raise UserError(f"cannot write {out}: it is a folder")
    file = out if out.suffix else Path(f"{out}.png")
    try:
        figure.savefig(file, dpi=150)
    except OSError as error:
        raise UserError(f"cannot write {file}: {error.strerror or error}") from None
    except (ValueError, RuntimeError) as error:  # unknown format, or the program for it is missing
        raise UserError(f"cannot write {file}: {' '.join(str(error).split())}") from None
    return file
