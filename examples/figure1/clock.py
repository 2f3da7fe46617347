"""Which method is the fastest on how many ranks? From the curves of a study and the model of docs/speedup.md.

python examples/figure1/clock.py [--size small|medium|paper] [--level BITS] --timed FOLDER [--bench FILE]...

The curves are those of `curves.py`, files or folders of runs; of a method that several of them have, the
first counts. They say how many steps a method takes, with its lowest seed, to a level of the training loss:
that of --level, or the lowest that the paper's methods all reach. --timed has a folder CELL-METHOD for each,
with a run of a few steps on this machine, perhaps on smaller batches: its steps are what is timed. A pass of
more or fewer sequences takes as long as --bench says (files of `hfmpi bench products --columns`, `gradients
--json` of the same networks on the same machine); without them a pass over few sequences is promised to be
quicker than it is. Without a network the sums of the ranks take no time.
"""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
from curves import Chosen, load, reached
from figure import common, shown
from study import BATCHES, METHODS, MODELS, PAPER, SIZES, Size, arguments
from table import show

from hfmpi.errors import UserError
from hfmpi.parallel import guard
from hfmpi.speedup.bench_file import read_bench
from hfmpi.speedup.prediction import KINDS, fit
from hfmpi.speedup.runs import read_runs
from hfmpi.speedup.scaling import Job, Link

RANKS = np.arange(1, 2**14 + 1)
SHOWN = 2 ** np.arange(15) - 1


def batches(method: str, run: Chosen, size: Size) -> tuple[int, int]:
    """Return the sequences of a method in the study: those of its setting, else those of its preset."""
    named = re.search(r"gradient_batch=(\d+)", run.setting)
    gradient, curvature = BATCHES[method]
    if not method.startswith("subspace"):  # whose rows have to be many, whatever the data
        curvature = round(curvature / size.batches)
    gradient = int(named[1]) if named else round(gradient / size.batches)
    return gradient, min(curvature, gradient)


def step(folder: Path, sizes: tuple[int, int], bench: list[Path], link: Link) -> Job:
    """Return the model of a step on batches of these sizes from a run on others."""
    run, steps = read_runs([folder])
    shapes = read_bench(bench, run)[0] if bench else {}
    kinds = [kind for kind in KINDS.values() if kind.count(steps[0].counts)]
    job = fit(steps, run.messages, link, shapes)
    passes = [
        replace(each, batch=sizes[not kind.on_gradient]) for kind, each in zip(kinds, job.passes, strict=True)
    ]
    return replace(job, passes=tuple(passes))


def clock(value: float) -> str:
    """Return three digits of seconds."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def intervals(times: dict[str, np.ndarray]) -> str:
    """Say which of them is the fastest from which number of ranks on."""
    names = list(times)
    fastest = np.argmin(list(times.values()), axis=0)
    begins = [0, *(1 + np.flatnonzero(np.diff(fastest)))]
    return ", ".join(f"from {RANKS[i]:,} rank(s) on {names[fastest[i]]}" for i in begins)


def main() -> None:
    parser = arguments(__doc__, sized=True)
    parser.add_argument("paths", nargs="+", type=Path, metavar="FILE_OR_FOLDER")
    parser.add_argument(
        "--level", type=float, help="bits/char of training [the lowest of the paper's methods]"
    )
    parser.add_argument("--timed", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--bench", type=Path, action="append", default=[], metavar="FILE")
    parser.add_argument("--latency", type=float, default=0.0, help="seconds of a message [0]")
    parser.add_argument("--bandwidth", type=float, default=np.inf, help="bytes a second [no limit]")
    given = parser.parse_args()
    size, link = SIZES[given.size], Link(given.latency, given.bandwidth)
    runs = load(given.paths, given.size, given.seconds).runs
    for cell in MODELS:
        first: dict[str, Chosen] = {}
        for method in METHODS:
            seeds = [seed for name, other, seed in runs if (name, other) == (cell, method)]
            if seeds:
                first[method] = runs[cell, method, min(seeds)]
        if not first:
            continue
        level = given.level or common([run.points for name, run in first.items() if name in PAPER])
        if level is None:
            raise UserError(f"the curves have no run of the paper's methods with {cell}: name a --level")
        times, taken, missing = {}, {}, []
        for method, run in first.items():
            steps, folder = reached(run.points, "train_bpc", "step", level), given.timed / f"{cell}-{method}"
            if steps is None:
                missing.append(f"{shown(method)} did not reach {level:g} bits/char.")
            elif not folder.is_dir():
                missing.append(f"{shown(method)} has no timed run {folder}.")
            else:
                job = step(folder, batches(method, run, size), given.bench, link)
                times[shown(method)], taken[shown(method)] = steps * job.seconds(RANKS), steps
        print(f"\n{cell}: seconds to {level:g} bits/char\n")
        if times:
            rows = [("steps", *(f"{steps:,.0f}" for steps in taken.values()))]
            rows += [(f"{RANKS[i]:,}", *(clock(each[i]) for each in times.values())) for i in SHOWN]
            show(("ranks", *times), rows)
            print(f"\nThe fastest is {intervals(times)}.")
        print(*missing, sep="\n")


if __name__ == "__main__":
    with guard():
        main()
