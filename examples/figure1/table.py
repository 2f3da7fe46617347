"""Print a study's results, the paper's claims about its Figure 1, and a comparison with current methods.

python examples/figure1/table.py [--size small|medium|paper] FILE_OR_FOLDER...

FILE is a file of curves as in docs/results; a folder of runs gets such a file. Numbers are medians over
seeds. Ratios are computed for each seed, and shown with minimum and maximum. A dash stands for a run that
does not exist or did not get so far.

The paper's words are judged as follows: `very little difference` is a ratio between 2/3 and 3/2, `far more
efficient` a ratio above 2, and `stalls` a training loss more than 0.1 bits/char above that of SHF with the
mLSTM at equal P_I.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import chain
from pathlib import Path
from statistics import median

import curves
from curves import Curves, Point, Study, curve, reached, seeds
from figure import common, shown
from study import METHODS, MODELS, PAPER, arguments

from hfmpi.parallel import guard

Row = tuple[str, str, str, str]

FIRST_ORDER = ("sgd", "bgd", "adam", "soap", "muon")
LEVELS = (3.0, 2.5, 2.3, 2.1, 2.0, 1.9, 1.8, 1.7)
LOWER = {"small": (), "medium": (1.6, 1.5, 1.4), "paper": (1.6, 1.5, 1.4)}
"""Levels in the tables of current methods, in bits/char, and additional levels for larger networks."""


def costs(runs: Curves, model: str, method: str, key: str, axis: str, level: float) -> dict[int, float]:
    """Return the cost to reach a level, for each seed that reached it."""
    found = {seed: reached(points, key, axis, level) for seed, points in seeds(runs, model, method).items()}
    return {seed: cost for seed, cost in found.items() if cost is not None}


def typical(runs: Curves, model: str, method: str, key: str, axis: str, level: float) -> float | None:
    """Return the median cost to reach a level; None unless every seed reached it."""
    found = costs(runs, model, method, key, axis, level)
    return median(found.values()) if found and len(found) == len(seeds(runs, model, method)) else None


def number(value: float | None) -> str:
    """Return a cost as text, or a dash for None."""
    return "–" if value is None else f"{round(value):,}"


def spread(ratios: Sequence[float]) -> str:
    """Return the median of ratios, with minimum and maximum."""
    middle, least, most = (
        f"{x:.2g}" if x < 99.5 else f"{x:.0f}" for x in (median(ratios), min(ratios), max(ratios))
    )
    return middle if len(ratios) == 1 else f"{middle} ({least} to {most})"


def ratios(runs: Curves, model: str, slow: str, quick: str, key: str, axis: str, level: float) -> list[float]:
    """Return the ratios of costs of `slow` to `quick`, by seed; none unless all reached the level."""
    shared = seeds(runs, model, quick).keys() & seeds(runs, model, slow).keys()
    ours, theirs = (costs(runs, model, m, key, axis, level) for m in (quick, slow))
    if not shared <= ours.keys() & theirs.keys():
        return []  # the seeds that did reach it would be a biased choice
    return [theirs[seed] / ours[seed] for seed in sorted(shared)]


def ratio(runs: Curves, model: str, slow: str, quick: str) -> tuple[float, str] | None:
    """Return the ratio of P_I of `slow` to that of `quick` at their common level, and a sentence on it.

    The sentence also states the ratios at 0.5 and 1 bits/char above, because a ratio depends on the level.
    """
    both = [seeds(runs, model, m) for m in (slow, quick)]
    level = common(chain(*(each.values() for each in both)))
    if level is None or not both[0].keys() & both[1].keys():
        return None
    found, words = [], []
    for at in (level, level + 0.5, level + 1):
        each = ratios(runs, model, slow, quick, "train_bpc", "P_I", at)
        sides = (number(typical(runs, model, m, "train_bpc", "P_I", at)) for m in (slow, quick))
        found.append(median(each))
        words.append(f"{spread(each)} to {at:.1f} bits/char ({' against '.join(sides)})")
    return found[0], "; ".join(words)


def final(points: Sequence[Point], key: str) -> float:
    """Return the last training loss, or the lowest validation loss."""
    values = curve(points, key, "P_I")[1]
    return values[-1] if key == "train_bpc" else min(values)


def after(points: Sequence[Point], p_i: float) -> float:
    """Return the training loss at a cost P_I."""
    xs, ys = curve(points, "train_bpc", "P_I")
    return [y for x, y in zip(xs, ys, strict=True) if x <= p_i][-1]


def verdict(agrees: bool, partly: bool = False) -> str:
    """Return the judgement in words."""
    return "agrees" if agrees else "same direction" if partly else "differs"


def claims(runs: Curves) -> list[Row]:
    """Return a row for each claim: the subject, the paper, the result here, the judgement."""
    rows: list[Row] = []

    def compared(model: str, slow: str, quick: str, paper: str, *judged: tuple[float, float]) -> None:
        found = ratio(runs, model, slow, quick)
        what = f"{model}: P_I of {slow.upper()} over {quick.upper()}"
        words = "–" if found is None else found[1]
        word = "–" if found is None else verdict(*(low < found[0] < high for low, high in judged))
        rows.append((what, paper, words, word))

    above = float("inf")
    for model in MODELS:
        compared(model, "sgd", "bhf", "more than 10 times", (10, above), (1, above))
    for model in MODELS:
        compared(model, "bgd", "bhf", "BHF far more efficient", (2, above), (1, above))
    compared("lstm", "sgd", "bgd", "very little difference", (2 / 3, 3 / 2))
    compared("mlstm", "sgd", "bgd", "BGD faster, fairly early on", (1, above))

    rows += [stalling(runs), *best_of_all(runs)]
    for model in MODELS:
        for axis in ("P_I", "P_D"):
            rows.append(all_of_them(runs, model, axis))
    return rows


def stalling(runs: Curves) -> Row:
    """Return the row on SHF with the LSTM."""
    both = [[*seeds(runs, model, "shf").values()] for model in MODELS]
    if not all(both):
        return "SHF with LSTM", "stalls", "–", "–"
    shared = min(points[-1]["P_I"] for points in chain(*both))
    lstm, mlstm = (median(after(points, shared) for points in each) for each in both)
    words = f"after a P_I of {shared:,} LSTM {lstm:.3f} training bits/char, mLSTM {mlstm:.3f}"
    return "SHF with LSTM", "stalls", words, verdict(lstm > mlstm + 0.1)


def best_of_all(runs: Curves) -> Iterable[Row]:
    """Yield the two rows on SHF with the mLSTM, compared with the paper's other runs."""
    every = {(model, m): seeds(runs, model, m).values() for model in MODELS for m in PAPER}
    for key, name in (("train_bpc", "trains"), ("valid_bpc", "generalises")):
        paper = "best of all" + (": 1.82 against 1.89 to 1.93" if key == "valid_bpc" else "")
        ends = {
            run: median(final(points, key) for points in each)
            for run, each in every.items()
            if each and all(curve(points, key, "P_I")[0] for points in each)
        }
        order = sorted(ends, key=lambda run: ends[run])
        words = ", ".join(f"{model} {m.upper()} {ends[model, m]:.3f}" for model, m in order)
        judged = verdict(order[0] == ("mlstm", "shf")) if len(ends) == len(every) else "–"
        yield f"SHF with mLSTM {name}", paper, words or "–", judged


def all_of_them(runs: Curves, model: str, axis: str) -> Row:
    """Return the row on a cost of the paper's methods to reach their common level."""
    there = [m for m in PAPER if seeds(runs, model, m)]
    level = common(points for m in there for points in seeds(runs, model, m).values())
    if level is None:
        return f"{model}: {axis} of all", "only in its figure", "–", "–"
    found = sorted((typical(runs, model, m, "train_bpc", axis, level), m.upper()) for m in there)
    words = ", ".join(f"{m} {number(value)}" for value, m in found)
    return f"{model}: {axis} of all to {level:.1f} bits/char", "only in its figure", words, "–"


def ends(runs: Curves) -> list[tuple[str, ...]]:
    """Return a row for each method: its setting, the costs at the end, and the losses there; medians."""
    rows = []
    for model in MODELS:
        for method in METHODS:
            every = [*seeds(runs, model, method).values()]
            if not every:
                rows.append((f"{model} {method}", *["–"] * 11))
                continue
            setting = next(run.setting for key, run in runs.items() if key[:2] == (model, method))
            last = [number(median(p[-1][key] for p in every)) for key in ("seconds", *curves.COSTS)]
            losses = [[curve(points, key, "P_I")[1] for points in every] for key in curves.LOSSES]
            train, valid = ([values[-1] for values in each if values] for each in losses)
            lowest = [min(values) for values in losses[1] if values]
            values = (f"{median(each):.3f}" if each else "–" for each in (train, valid, lowest))
            rows.append((f"{model} {method}", setting, str(len(every)), *last, *values))
    return rows


def today(runs: Curves, model: str, key: str, level: float) -> list[str]:
    """Return the row of a level: P_I of everything executed, and by the paper's formulas if different."""
    there = [m for m in METHODS if seeds(runs, model, m)]
    full, paper = ([typical(runs, model, m, key, axis, level) for m in there] for axis in ("P_I_full", "P_I"))
    least, paper_least = (min((v for v in each if v is not None), default=None) for each in (full, paper))
    cells = []
    for ours, formula in zip(full, paper, strict=True):
        cell = marked(ours, least)
        cells.append(cell if ours == formula else f"{cell} ({marked(formula, paper_least)})")
    return [f"{level:.1f}", *cells]


def marked(value: float | None, least: float | None) -> str:
    """Return a cost as text, in bold if it is the minimum."""
    return f"**{number(value)}**" if value is not None and value == least else number(value)


def dependent(runs: Curves, model: str, key: str, level: float) -> list[str]:
    """Return the row of a level: P_D of everything executed."""
    there = [m for m in METHODS if seeds(runs, model, m)]
    found = [typical(runs, model, m, key, "P_D_full", level) for m in there]
    least = min((v for v in found if v is not None), default=None)
    return [f"{level:.1f}", *(marked(value, least) for value in found)]


def against(runs: Curves, model: str, key: str, level: float) -> list[str]:
    """Return the row of a level: P_I (full) of other methods divided by that of subspace."""
    known = {m: typical(runs, model, m, key, "P_I_full", level) for m in FIRST_ORDER}
    reaching = {m: value for m, value in known.items() if value is not None}
    best = min(reaching, key=lambda m: reaching[m], default=None)
    cells = [f"{level:.1f}"]
    for method in ("sgd", "bgd", "bhf", "bhf-short", best):
        each = method and ratios(runs, model, method, "subspace", key, "P_I_full", level)
        cells.append(spread(each) if each else "–")
    return [*cells[:-1], f"{cells[-1]}, {best}" if cells[-1] != "–" else "–"]


def write(study: Study) -> None:
    """Print all tables in Markdown."""
    runs = study.runs
    costs = ("seconds", "steps", "P_I", "P_I full", "P_D", "P_D full")
    print("\nWhere the runs ended\n")
    show(("run", "chosen", "seeds", *costs, "training", "validation", "its lowest"), ends(runs))
    print("\nThe paper's claims\n")
    show(("claim", "paper", "here", "verdict"), claims(runs))
    levels = LEVELS + LOWER[study.size]
    for model in MODELS:
        there = [m for m in METHODS if seeds(runs, model, m)]
        for key, name in zip(curves.LOSSES, ("training", "validation"), strict=True):
            heads = (f"{name} bits/char", *map(shown, there))
            print(f"\n{model}: P_I full, in brackets P_I by the paper's formulas where it differs\n")
            show(heads, [today(runs, model, key, level) for level in levels])
            print(f"\n{model}: P_D full\n")
            show(heads, [dependent(runs, model, key, level) for level in levels])
            if "subspace" in there:
                print(f"\n{model}: P_I full of others over that of subspace\n")
                others = ("SGD", "BGD", "BHF", "bhf-short", "the best of first order")
                show((heads[0], *others), [against(runs, model, key, level) for level in levels])


def show(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Print a table in Markdown, each row as soon as it is available."""
    for row in chain((heads, ["---"] * len(heads)), rows):
        print("| " + " | ".join(row) + " |", flush=True)


def main() -> None:
    parser = arguments(__doc__, sized=True)
    parser.add_argument("paths", nargs="+", type=Path, metavar="FILE_OR_FOLDER")
    given = parser.parse_args()
    write(curves.load(given.paths, given.size, given.seconds))


if __name__ == "__main__":
    with guard():
        main()
