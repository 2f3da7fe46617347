"""Collect the runs of the study, and print its tables.

python examples/least_squares/table.py FOLDER FILE.json    collects the runs of a folder into a file
python examples/least_squares/table.py FILE.json           prints the tables in Markdown

docs/results/least-squares.json is such a file.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Iterable
from pathlib import Path
from statistics import median
from typing import Any

from run import MORE, OTHERS, OURS, TASKS

METHODS = OURS + OTHERS + MORE
LEVELS = tuple(10.0**-k for k in range(1, 13))
NOTHING = "–"
Run = dict[str, Any]


def condensed(record: Run) -> Run:
    """Return a record with what the tables need of its trace: the end, and seconds to each level."""
    trace = record.pop("trace")
    reached = [next((at for at, _, _, error in trace if error <= level), None) for level in LEVELS]
    end = trace[-1] if trace else [None] * 4
    return record | dict(zip(("spent", "steps", "loss", "error"), end, strict=True)) | {"reached": reached}


def collect(folder: Path, file: Path) -> None:
    """Write the runs of a folder to a file with one line per run, and the versions once."""
    records = [condensed(json.loads(path.read_text())) for path in sorted(folder.glob("*.json"))]
    about = {key: records[0][key] for key in ("versions", "processor")}
    for record in records:
        if {key: record.pop(key) for key in about} != about:
            raise SystemExit(f"{folder} contains runs of several machines or versions: separate them")
    lines = ",\n".join(json.dumps(record) for record in records)
    file.write_text(f'{{"about": {json.dumps(about)},\n"runs": [\n{lines}\n]}}\n')


def shown(error: float) -> str:
    """Return a number with two digits as text."""
    return NOTHING if not math.isfinite(error) else f"{error:.1e}".replace("e-0", "e-").replace("e+00", "")


def finals(runs: Iterable[Run]) -> dict[tuple[str, str], list[Run]]:
    """Return the runs of all seeds with the chosen setting, by task and method."""
    found = dict[tuple[str, str], list[Run]]()
    for run in runs:
        found.setdefault((run["task"], run["method"]), []).append(run)
    return found


def number(value: float | None) -> float:
    """Return a value that can be sorted."""
    return math.inf if value is None or value != value else value


def headed(
    runs: list[Run], *before: str, after: str = ""
) -> tuple[dict[tuple[str, str], list[Run]], list[str]]:
    """Print the header of a table of all methods with runs; return runs by task and method, and methods."""
    every = finals(runs)
    methods = [m for m in METHODS if any((t, m) in every for t in TASKS)]
    names = [*before, *methods, *([after] if after else [])]
    print(f"| {' | '.join(names)} |\n" + "| --- " * len(names) + "|")
    return every, methods


def table(runs: list[Run], cell: Callable[[list[Run]], float], write: Callable[[float], str]) -> None:
    """Print a row for each task and a column for each method, with the minimum of a row in bold."""
    every, methods = headed(runs, "task", after="first")
    for task in TASKS:
        row = [cell(every[task, m]) if (task, m) in every else math.nan for m in methods]
        if not any(map(math.isfinite, row)):
            continue
        best = min(value for value in row if math.isfinite(value))
        cells = [f"**{write(v)}**" if v == best else write(v) for v in row]
        print(f"| {task} | " + " | ".join(cells) + f" | {methods[row.index(best)]} |")
    print()


def middle(key: str) -> Callable[[list[Run]], float]:
    """Return a function that computes the median of an entry over the seeds."""
    return lambda runs: median(number(run[key]) for run in runs)


def levels(runs: list[Run]) -> None:
    """Print the median seconds to the lowest level that at least two methods reach, for each task."""
    every, methods = headed(runs, "task", "error")
    for task in TASKS:
        for k, level in reversed(list(enumerate(LEVELS))):
            row = [
                median(number(run["reached"][k]) for run in every[task, m])
                if (task, m) in every
                else math.inf
                for m in methods
            ]
            if sum(map(math.isfinite, row)) >= 2:
                cells = [f"**{v:.2g}**" if v == min(row) else f"{v:.2g}" for v in row]
                cells = [text if math.isfinite(v) else NOTHING for text, v in zip(cells, row, strict=True)]
                print(f"| {task} | {level:.0e} | " + " | ".join(cells) + " |")
                break
    print()


def write(file: Path) -> None:
    """Print all tables."""
    content = json.loads(file.read_text())
    runs = [run for run in content["runs"] if not run["left_out"]]
    final = [run for run in runs if not run["tuning"]]
    for ranks, seconds in sorted({(run["ranks"], run["seconds"]) for run in final}):
        same = [run for run in final if (run["ranks"], run["seconds"]) == (ranks, seconds)]
        on = "one core" if ranks == 1 else f"{ranks} cores"
        print(f"Relative error after {seconds:g} s of {on}, medians over seeds:\n")
        table(same, middle("error"), shown)
        print(f"Largest error of a seed after {seconds:g} s of {on}:\n")
        table(same, lambda of: max(number(run["error"]) for run in of), shown)
        print(f"Seconds of {on} to the lowest error that two methods reach:\n")
        levels(same)
        print("Steps:\n")
        steps(same)
    print("Settings and seconds to compile:\n")
    settings(runs)
    for run in content["runs"]:
        if run["left_out"] and run["setting"] == 0:
            print(f"- {run['method']} on {run['task']}: {run['left_out']}")


def steps(runs: list[Run]) -> None:
    """Print the median number of steps."""
    every, methods = headed(runs, "task")
    for task in TASKS:
        found = [every.get((task, m)) for m in methods]
        if any(found):
            cells = [f"{median(run['steps'] for run in of):,.0f}" if of else NOTHING for of in found]
            print(f"| {task} | " + " | ".join(cells) + " |")
    print()


def settings(runs: list[Run]) -> None:
    """Print the candidates of each method, the tasks that chose them, and the compilation time."""
    print("| method | candidates, chosen by | seconds to compile |")
    print("| --- | --- | --- |")
    for method in METHODS:
        of = [run for run in runs if run["method"] == method]
        if not of:
            continue
        parts = []
        for setting in sorted({run["setting"] for run in of}):
            same = [run for run in of if run["setting"] == setting]
            values = ", ".join(f"{key} {value}" for key, value in same[0]["values"].items()) or "defaults"
            tasks = [task for task in TASKS if any(r["task"] == task and not r["tuning"] for r in same)]
            parts.append(f"{values}: {', '.join(tasks) or NOTHING}")
        seconds = [run["compile"] for run in of]
        print(f"| {method} | {'; '.join(parts)} | {min(seconds):.1f} to {max(seconds):.1f} |")
    print()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("source", type=Path, metavar="FOLDER or FILE.json")
    parser.add_argument("file", type=Path, nargs="?", metavar="FILE.json")
    given = parser.parse_args()
    if given.source.is_dir():
        if given.file is None:
            raise SystemExit("name the file for the runs: table.py FOLDER FILE.json")
        collect(given.source, given.file)
    write(given.file or given.source)


if __name__ == "__main__":
    main()
