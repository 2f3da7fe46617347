"""The chosen runs of a study as curves, from which figures and tables are made, and a small file of them.

A file is a JSON object with `size`, `seconds` (the unit of the training times), `corpus` (digest of the data)
and `runs`. A run has a cell, method, seed and setting, and lists with one element per point, which is the
state after a step: `step`, the costs and seconds until then, and bits/char of the network.

`valid_bpc` is null where it is unknown. `train_bpc` is measured by the gradient batches of the next steps,
and null after the last step. If the batch is the full training set, it is not changed. Otherwise it is a
running mean over the last twentieth of the steps so far, so that it lags by at most a fortieth, but over at
most 50 steps and at least as many as contain a thirty-second of the training sequences. The mean is computed
before points are removed.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

from study import BATCHES, METHODS, MODELS, SIZES, Size, chosen, history

from hfmpi.errors import UserError
from hfmpi.files.atomic import open_regular, replace
from hfmpi.files.checkpoint import trained_on

NAME = "curves.json"
COSTS = ("step", "P_I", "P_I_full", "P_D", "P_D_full")
LOSSES = ("train_bpc", "valid_bpc")
COLUMNS = (*COSTS, "seconds", *LOSSES)

WHOLE, LATER = 100, 15
"""A thinned curve has every step up to this one, and this many points for every further factor of e."""

PER_BIT = 20
"""Levels per bit/char: the point where a curve first reaches a level is preserved."""

Point = dict[str, Any]


class Chosen(NamedTuple):
    """A chosen run: its setting and its points."""

    setting: str
    points: list[Point]


Curves = dict[tuple[str, str, int], Chosen]
"""Chosen runs by cell, method and seed."""


class Study(NamedTuple):
    """The contents of a file: the size's name, the unit of seconds, the data's digest if known, the runs."""

    size: str
    seconds: float
    corpus: str | None
    runs: Curves


def followed(records: Sequence[Point], share: float = 1.0) -> list[Point]:
    """Return the points of a history; `share` is the gradient batch divided by the training set."""
    losses = smoothed([r["train_bpc"] for r in records[1:]], share)
    return [
        {key: r[key] for key in COSTS}
        | {"seconds": float(f"{r['seconds']:.4g}"), "train_bpc": loss, "valid_bpc": rounded(r["valid_bpc"])}
        for r, loss in zip(records, [*map(rounded, losses), None], strict=True)
    ]


def smoothed(losses: Sequence[float], share: float) -> list[float]:
    """Return running means of the losses on gradient batches, as described above."""
    if share >= 1:
        return list(losses)
    least = math.ceil(1 / (32 * share))
    sums = [0.0, *accumulate(losses)]
    widths = [min(i, max(least, min(50, i // 20))) for i in range(1, len(sums))]
    return [(sums[i] - sums[i - width]) / width for i, width in enumerate(widths, start=1)]


def rounded(loss: float | None) -> float | None:
    """Return a loss as it is stored, because levels are compared with stored losses."""
    return None if loss is None else round(loss, 4)


def share(method: str, size: Size) -> float:
    """Return a method's gradient batch divided by the training set."""
    return round(BATCHES[method][0] / size.batches) / size.sequences


def evenly(points: Sequence[Point]) -> set[int]:
    """Return the indices of evenly spread points, which do not depend on losses, and of the last point."""
    kept, before = {len(points) - 1}, -1
    for i, point in enumerate(points):
        slot = i if point["step"] <= WHOLE else WHOLE + int(LATER * math.log(point["step"] / WHOLE))
        if slot > before:
            kept.add(i)
            before = slot
    return kept


def thinned(points: Sequence[Point]) -> list[Point]:
    """Remove points, except the last ones and those where a level is first reached."""
    kept = evenly(points)
    for key in LOSSES:
        known = [(i, point[key]) for i, point in enumerate(points) if point[key] is not None]
        kept |= {known[-1][0]} if known else set()
        least = math.inf
        for i, loss in known:
            level = math.ceil(loss * PER_BIT - 1e-6)  # the lowest level that this loss reaches
            if level < least:
                kept.add(i)
                least = level
        kept |= {min(known, key=lambda each: each[1])[0]} if known else set()
    return [points[i] for i in sorted(kept)]


def curve(points: Iterable[Point], key: str, axis: str) -> tuple[list[float], list[float]]:
    """Return costs and bits/char of the points where these are known."""
    known = [point for point in points if point[key] is not None]
    return [point[axis] for point in known], [point[key] for point in known]


def reached(points: Iterable[Point], key: str, axis: str, level: float) -> float | None:
    """Return the cost at which a curve first reaches `level`; None if it never does."""
    xs, ys = curve(points, key, axis)
    return next((x for x, y in zip(xs, ys, strict=True) if y <= level), None)


def seeds(runs: Curves, model: str, method: str) -> dict[int, list[Point]]:
    """Return the points of a method's runs by seed."""
    return {seed: run.points for (cell, name, seed), run in runs.items() if (cell, name) == (model, method)}


def folders(out: Path, size: str, seconds: float) -> Study:
    """Return the study in the folders of runs, including unfinished runs."""
    found, corpus = Curves(), None
    for c in chosen(out, seconds):
        corpus = corpus or trained_on(out / c.name)[0]
        points = followed(history(out / c.name), share(c.method, SIZES[size]))
        found[c.model, c.method, c.seed] = Chosen(c.setting, thinned(points))
    return Study(size, seconds, corpus, found)


def elsewhere(out: Path, study: Study, files: Sequence[Path] = ()) -> Study:
    """Add the runs of files to a study, and the runs of the folder's file that are not in the folder."""
    studies = [study, *map(read, files)]
    if (out / NAME).exists():
        filed, begun = read(out / NAME), folders(out, study.size, study.seconds).runs
        rest = {run: each for run, each in filed.runs.items() if run not in begun}
        studies.append(filed._replace(runs=rest))
    return together(studies)


def together(studies: Sequence[Study]) -> Study:
    """Return several studies as one; if a run is in more than one of them, the first counts.

    Raises
    ------
    UserError
        If they have different sizes or data.
    """
    first = studies[0]
    corpora = {study.corpus for study in studies} - {None}
    if len({study.size for study in studies}) > 1 or len(corpora) > 1:
        sizes = ", ".join(study.size for study in studies)
        raise UserError(f"these studies have different sizes or data ({sizes}): use studies of one size")
    runs: Curves = {}
    for study in reversed(studies):
        runs |= study.runs
    order = sorted(runs, key=lambda run: (MODELS.index(run[0]), METHODS.index(run[1]), run[2]))
    return Study(first.size, first.seconds, next(iter(corpora), None), {run: runs[run] for run in order})


def write(study: Study, path: Path) -> None:
    """Write a file, with one line per run."""
    head = {"size": study.size, "seconds": study.seconds, "corpus": study.corpus}
    lines = []
    for (model, method, seed), run in study.runs.items():
        names = {"cell": model, "method": method, "seed": seed, "setting": run.setting}
        columns = {key: [point[key] for point in run.points] for key in COLUMNS}
        lines.append(json.dumps(names | columns, separators=(",", ":")))
    text = json.dumps(head)[:-1] + ', "runs": [\n' + ",\n".join(lines) + "\n]}\n"
    replace(path, text.encode())


def read(path: Path) -> Study:
    """Read a file of curves.

    Raises
    ------
    UserError
        If it is not a file of curves.
    """
    with open_regular(path) as file:
        content = file.read()
    try:
        given, runs = json.loads(content), Curves()
        for run in given["runs"]:
            columns = zip(*(run[key] for key in COLUMNS), strict=True)
            points = [dict(zip(COLUMNS, values, strict=True)) for values in columns]
            key = str(run["cell"]), str(run["method"]), int(run["seed"])
            if key[0] not in MODELS or key[1] not in METHODS or not points:
                raise ValueError
            runs[key] = Chosen(str(run["setting"]), points)
        return Study(given["size"], given["seconds"], given["corpus"], runs)
    except (ValueError, KeyError, TypeError, RecursionError):
        raise UserError(f"{path} is not a file of curves of this study") from None


def load(paths: Sequence[Path], size: str, seconds: float | None) -> Study:
    """Read the study in files of curves and folders of runs, and write a file into each folder.

    Raises
    ------
    UserError
        If there are no runs, or runs of a different size.
    """
    found = []
    for path in paths:
        if path.is_dir():
            own = folders(path, size, seconds or SIZES[size].seconds)
            found.append(elsewhere(path, own))
            if found[-1].runs:
                write(found[-1], path / NAME)
        else:
            found.append(read(path))
        if found[-1].size != size:
            raise UserError(f"{path} has the size {found[-1].size}: use --size {found[-1].size}")
    study = together(found)
    if not study.runs:
        raise UserError(f"{paths[0]} has no run of the study")
    return study
