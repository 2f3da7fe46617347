"""What `plot` and `speedup` share: tables and small charts for a terminal, and figures for files."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click

from hfmpi.cli.values import PATH
from hfmpi.errors import UserError

__all__ = [
    "HATCHES",
    "MARKERS",
    "STYLES",
    "aligned",
    "bar",
    "label",
    "need_matplotlib",
    "runs_and_figure",
    "save",
    "sparkline",
]

STYLES = ("-", "--", "-.", ":", (0, (9, 2)), (0, (6, 1.5, 1, 1.5, 1, 1.5)), (0, (3, 4)))
MARKERS = "os^Dv*P"
"""Line styles and markers that tell runs apart without colours."""

HATCHES = ("", "///", "\\\\\\", "...", "xxx", "|||", "---", "+++", "ooo", "***")
BLOCKS = "▁▂▃▄▅▆▇█"


def runs_and_figure(help: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command its argument RUN... and its option --out."""

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        command = click.option("--out", type=PATH, metavar="FIG.png", help=help)(command)
        return click.argument("runs", nargs=-1, required=True, type=PATH, metavar="RUN...")(command)

    return decorate


def label(run: Path | str) -> str:
    """Give the name of a run for a legend: no part of it is a formula, bytes that are no text have codes."""
    name = Path(run).name.encode("utf-8", "backslashreplace").decode()
    return (" " if name.startswith("_") else "") + name.replace("$", r"\$")  # a legend leaves _ out


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Give rows as lines with columns that end below one another."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]


def bar(value: float, most: float, width: int = 40) -> str:
    """Give a bar that is `width` long for the value `most`, with dots for what is missing."""
    full = round(width * min(max(value / most, 0.0), 1.0))
    return "█" * full + "·" * (width - full)


def sparkline(values: Sequence[float | None], width: int = 40, log: bool = False) -> str:
    """Give a line of blocks from the least to the largest value; each is the mean of neighbours.

    A gap is where nothing is known. With `log` heights are those of the logarithms, of positive values.
    """
    known = [None if v is None or (log and v <= 0) else math.log(v) if log else v for v in values]
    width = min(width, len(known))
    edges = [len(known) * i // width for i in range(width + 1)] if width else []
    parts = [[v for v in known[a:b] if v is not None] for a, b in itertools.pairwise(edges)]
    means = [sum(part) / len(part) if part else None for part in parts]
    seen = [mean for mean in means if mean is not None]
    if not seen:
        return " " * width
    low, span = min(seen), (max(seen) - min(seen)) or 1.0
    return "".join(" " if m is None else BLOCKS[min(7, int(8 * (m - low) / span))] for m in means)


def need_matplotlib() -> None:
    """Raise a UserError without matplotlib; with it, draw into files alone."""
    try:
        import matplotlib
    except ImportError:
        raise UserError("drawing needs matplotlib: pip install matplotlib") from None
    matplotlib.use("agg")


def save(figure: Any, out: Path) -> Path:
    """Write a figure as what its name ends in, as PNG without such an end; give its name, or a UserError."""
    if out.is_dir():
        raise UserError(f"cannot write {out}: it is a folder")
    written = out if out.suffix else Path(f"{out}.png")
    try:
        figure.savefig(written, dpi=150)
    except OSError as error:
        raise UserError(f"cannot write {written}: {error.strerror or error}") from None
    except (ValueError, RuntimeError) as error:  # no such kind of figure, or its program is missing
        raise UserError(f"cannot write {written}: {' '.join(str(error).split())}") from None
    return written
