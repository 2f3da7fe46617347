"""Which method is the lowest in validation after minutes on this machine, and which is soonest at a level.

python examples/kjv/clock.py [--seconds S] [--launch COMMAND] [--rounds N] [--runs A,B] DATA.h5 OUT

King James Bible, the paper's sizes, lengths of a step as tried before (docs/results/clock.md).
Runs take their turns: in every round each of them goes on for its share of the seconds, so that what else a
shared machine does falls on all alike. A study that was stopped goes on when it is started again. DATA.h5 is
that of `hfmpi prepare --corpus kjv`.
"""

from __future__ import annotations

import argparse
import shlex
import subprocess
from itertools import product
from pathlib import Path
from typing import Any

from hfmpi.errors import UserError
from hfmpi.files.history import History
from hfmpi.parallel import guard

RUNS = {
    "lstm-sgd": ("--model lstm --optimizer sgd", 100),
    "mlstm-sgd": ("--model mlstm --optimizer sgd --set rate=4", 100),
    "mlstm-adam": (
        "--model mlstm --optimizer adam --set rate=0.01 --set schedule=inverse-root --set schedule_steps=200 "
        "--set averaging=0.999",
        100,
    ),
    "mlstm-soap": (
        "--model mlstm --optimizer soap --gradient-batch 32 --set rate=0.03 --set refresh=10 "
        "--set averaging=0.999",
        100,
    ),
    "lstm-muon-small": ("--model lstm --optimizer muon-small", 100),
    "mlstm-muon-small": ("--model mlstm --optimizer muon-small", 100),
    "mlstm-shf": ("--model mlstm --optimizer shf", 10),
}
"""Options of a run, and the steps from one validation to the next."""

TIMES = 30, 60, 120, 180, 300
LEVELS = 1.6, 1.55, 1.5, 1.474


def train(launch: str, data: Path, out: Path, name: str, seconds: float) -> None:
    """Let a run go on until it has had so many seconds."""
    options, every = RUNS[name]
    words = [
        *shlex.split(launch),
        "hfmpi",
        "train",
        str(data),
        "--out",
        str(out / name),
        *shlex.split(options),
    ]
    words += [
        "--evaluate-every",
        str(every),
        "--checkpoint-every",
        "1000000",
        "--max-seconds",
        f"{seconds:g}",
    ]
    with (out / f"{name}.log").open("a") as log:
        if subprocess.run(words, stdout=log, stderr=subprocess.STDOUT).returncode:
            raise UserError(f"{shlex.join(words)} failed, see {out / name}.log")


def lowest(records: list[dict[str, Any]], seconds: float) -> str:
    """Return the lowest validation loss up to so many seconds."""
    known = [r["valid_bpc"] for r in records if r["valid_bpc"] is not None and r["seconds"] <= seconds]
    return f"{min(known):.3f}" if known else "–"


def first(records: list[dict[str, Any]], level: float) -> str:
    """Return the seconds after which the validation loss first was at a level."""
    found = (r["seconds"] for r in records if r["valid_bpc"] is not None and r["valid_bpc"] <= level)
    seconds = next(found, None)
    return "–" if seconds is None else f"{seconds:.0f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("data", type=Path, metavar="DATA.h5")
    parser.add_argument("out", type=Path, metavar="OUT")
    parser.add_argument("--seconds", type=float, default=300, help="of each run [300]")
    parser.add_argument("--rounds", type=int, default=3, help="turns that each run has [3]")
    parser.add_argument("--runs", default=",".join(RUNS), help="some of them, with commas between [all]")
    parser.add_argument("--launch", default="mpirun -n 2", help="what starts the ranks [mpirun -n 2]")
    given = parser.parse_args()
    names = given.runs.split(",")
    if unknown := [name for name in names if name not in RUNS]:
        raise UserError(f"there is no run {unknown[0]!r}; choose some of {', '.join(RUNS)}")
    given.out.mkdir(parents=True, exist_ok=True)
    for turn, name in product(range(1, given.rounds + 1), names):
        train(given.launch, given.data, given.out, name, given.seconds * turn / given.rounds)
    histories = {name: History.read(given.out / name) for name in names}
    times = [seconds for seconds in TIMES if seconds <= given.seconds]
    print("| run |", " | ".join(f"{t} s" for t in times), "| steps/s |", " | ".join(map(str, LEVELS)), "|")
    print("|---" * (2 + len(times) + len(LEVELS)) + "|")
    for name, records in histories.items():
        # What a step takes is its own time: validations and starts are left out of it.
        pace = len(records) / sum(r["step_seconds"] for r in records)
        cells = [*(lowest(records, t) for t in times), f"{pace:.1f}", *(first(records, at) for at in LEVELS)]
        print(f"| {name} |", " | ".join(cells), "|")


if __name__ == "__main__":
    with guard():
        main()
