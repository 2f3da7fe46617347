"""Read the parts of the output of `hfmpi bench --json` that the scaling model uses."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from hfmpi.errors import UserError
from hfmpi.files.atomic import open_regular
from hfmpi.files.numbers import is_amount
from hfmpi.speedup.prediction import KINDS
from hfmpi.speedup.runs import TimedRun
from hfmpi.speedup.scaling import Curve, Link, fit_link

__all__ = ["read_bench"]

MOST_BYTES = 2**24


@dataclass(frozen=True)
class BenchRow:
    """The part of a row that is used: `kind` of pass (None: a complete step), and its sequences or bytes."""

    model: str
    ranks: int
    threads: int
    seconds_least: float
    kind: str | None
    batch: float | None
    bytes: float | None
    hidden: float | None

    def sound(self) -> bool:
        """Return whether all values are positive numbers."""
        numbers = [self.ranks, self.threads, self.seconds_least]
        numbers += [number for number in (self.batch, self.bytes, self.hidden) if number is not None]
        return all(is_amount(number) and number > 0 for number in numbers) and isinstance(self.model, str)


def read_bench(paths: Sequence[Path], run: TimedRun) -> tuple[dict[str, Curve], Link | None]:
    """Read the output of `hfmpi bench ... --json` on the machine of a run.

    The shortest time of each pass is used, because disturbances only add time, and the runs determine the
    level of the curves in any case.

    Returns
    -------
    shapes : dict of str to Curve
        Seconds for each kind of pass of the run's model at its size, on one rank with the threads of a rank.
    link : Link or None
        Link of the Allreduce on the smallest number of ranks on which it was timed.

    Raises
    ------
    UserError
        If a file is not an output of `hfmpi bench`, or no file has a row that matches the run.
    """
    rows = [row for path in paths for row in _read(path)]
    points: dict[str, dict[float, float]] = {}
    messages: dict[int, dict[float, float]] = {}
    for row in rows:
        if row.bytes is not None and row.ranks > 1:
            messages.setdefault(row.ranks, {})[row.bytes] = row.seconds_least
        matches = (row.model, row.ranks, row.threads) == (run.model, 1, run.threads)
        matches = matches and row.hidden in (None, run.config.hidden)
        if matches and row.batch is not None and row.kind in KINDS:
            points.setdefault(row.kind, {})[row.batch] = row.seconds_least
    shapes = {kind: Curve.through(seconds) for kind, seconds in points.items()}
    if "loss" in shapes:
        shapes["linearisation"] = shapes["loss"]  # both are a forward pass
    link = None
    if messages:
        ranks = min(messages)
        sizes = sorted(messages[ranks])
        if len(sizes) > 1:
            short, *_, long = ((size, messages[ranks][size]) for size in sizes)
            link = fit_link(ranks, short, long)
    if not shapes and link is None:
        units = f" of {run.config.hidden:,} units" if run.config.hidden else ""
        raise UserError(
            f"no --bench file has a row of {run.model}{units} on 1 rank of "
            f"{run.threads} thread(s), or of the Allreduce on several"
        )
    return shapes, link


def _read(path: Path) -> list[BenchRow]:
    """Return the rows of a file, and check their numbers."""
    with open_regular(path) as file:
        content = file.read(MOST_BYTES)
    try:
        rows = [
            BenchRow(
                *(row[key] for key in ("model", "ranks", "threads", "seconds_least")),
                *map(row.get, ("pass", "batch", "bytes", "hidden")),
            )
            for row in json.loads(content)["rows"]
        ]
        sound = all(row.sound() for row in rows)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        sound = False
    if not sound:
        raise UserError(f"{path} is not an output of hfmpi bench --json")
    return rows
