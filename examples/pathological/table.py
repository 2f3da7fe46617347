"""Print the results of the study: passes until success, errors at the end, and the settings.

python examples/pathological/table.py OUT

OUT is a folder of run.py, or the file that it writes to the folder; docs/results/pathological.json is one.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import median

import results
from results import Record
from tasks import KINDS
from training import CELLS, METHODS, NUMBERS, Run, best, tuning_runs

from hfmpi.parallel import guard

NOTHING = "–"


def passes(runs: Sequence[Record]) -> str:
    """Return the median P_I (full) to success if most seeds succeeded, else that of the failed runs."""
    good = [run["P_I_full"] for run in runs if run["solved"]]
    share = "" if len(good) == results.SEEDS else f" ({len(good)} of {len(runs)})"
    if 2 * len(good) > len(runs):
        return f"{median(good + [math.inf] * (len(runs) - len(good))):,.0f}{share}"
    return f"> {median(run['P_I_full'] for run in runs if not run['solved']):,.0f}{share}"


def errors(runs: Sequence[Record]) -> str:
    """Return the median number of wrong outputs per sequence in the test at the end."""
    return f"{median(run['outputs'] for run in runs):.2g}"


def rows(records: Sequence[Record], show: Callable[[Sequence[Record]], str]) -> list[list[str]]:
    """Return a row for each task, with a column for each method, of the runs of one network and length."""
    methods = [method for method in METHODS if any(r["method"] == method for r in records)]
    found = [["task", *methods]]
    for task in KINDS:
        each = [[r for r in records if (r["task"], r["method"]) == (task, method)] for method in methods]
        if any(each):
            found.append([task, *(show(runs) if runs else NOTHING for runs in each)])
    return found


def chosen(records: Sequence[Record], task: str, cell: str, method: str) -> float | None:
    """Return the value that the tuning chose for a task; None if the tuning has not started."""
    runs = tuning_runs(task, cell, method, results.SEEDS)
    tried = [record for record in records if any(is_of(record, run) for run in runs)]
    return best(tried) if tried else None


def is_of(record: Record, run: Run) -> bool:
    """Return whether a record belongs to a run."""
    return all(record[key] == value for key, value in asdict(run).items())


def settings(records: Sequence[Record]) -> list[list[str]]:
    """Return a row for each method: its preset, its candidates, and the value that the runs use."""
    found = [["method", "preset", "batches", "changed", "candidates", "for numbers", "for symbols"]]
    for name, method in METHODS.items():
        own = [record for record in records if record["method"] == name]
        if not own:
            continue
        batches = [str(size) for size in (method.gradient_batch, method.curvature_batch) if size]
        changed = [
            f"{key} = {value:.3g}" if isinstance(value, float) else f"{key} = {value}"
            for key, value in method.changes.items()
        ]
        tried = f"{method.setting} = {', '.join(f'{value:g}' for value in method.values)}"
        values = [{r["value"] for r in own if (r["task"] in NUMBERS) == numbers} for numbers in (True, False)]
        words = [", ".join(f"{value:g}" for value in sorted(each)) or NOTHING for each in values]
        found.append([name, method.preset, ", ".join(batches), ", ".join(changed) or NOTHING, tried, *words])
    return found


def show(table: Sequence[Sequence[str]]) -> None:
    """Print a table in Markdown."""
    for row in [table[0], ["---"] * len(table[0]), *table[1:]]:
        print("| " + " | ".join(row) + " |")
    print()


def write(records: Sequence[Record]) -> None:
    """Print all tables."""
    study = [record for record in records if record["seed"] < results.SEEDS]
    value = {key: chosen(records, *key) for key in {(r["task"], r["cell"], r["method"]) for r in study}}
    study = [r for r in study if value[r["task"], r["cell"], r["method"]] in (None, r["value"])]
    for cell in CELLS:
        groups = sorted({(r["length"], r["hidden"]) for r in study if r["cell"] == cell})
        for length, hidden in groups:
            same = [r for r in study if (r["cell"], r["length"], r["hidden"]) == (cell, length, hidden)]
            for what, each in ("P_I full to success", passes), ("wrong outputs a sequence", errors):
                print(f"{cell} of {hidden} units, T = {length}, {what}:\n")
                show(rows(same, each))
        if groups:
            print(f"Settings, {cell}:\n")
            show(settings([record for record in study if record["cell"] == cell]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("out", type=Path, metavar="OUT")
    out = parser.parse_args().out
    write(results.collect(out) if out.is_dir() else results.read(out))


if __name__ == "__main__":
    with guard():
        main()
