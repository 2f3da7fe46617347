"""Which method is the fastest on how many ranks? From a study's runs and the model of docs/speedup.md.

python examples/figure1/clock.py [--size small|medium|paper] [--level BITS] [--bench FILE]...
       [--timed FOLDER] [--beside FOLDER]... [--latency S --bandwidth B] OUT

Every pass that a run of seed 0 executed until it first reached a level of the training loss, or else the
lowest that the paper's methods all reach, is given the seconds that it would take on P ranks. --bench takes
files of `hfmpi bench products` and `gradients --json` of the same networks on the same machine; without them
a pass over few sequences is promised to be quicker than it is. Without a network the ranks' sums take no
time. --pass-floor divides the time below which a pass does not fall, however few its sequences are.
Where the study ran on another machine, --timed names a folder of runs of a few steps with the same names and
options on this one: their steps are what is timed. --beside names a folder of runs with the same names but
other options, which are shown beside those of the study, under its name.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np
from curves import followed, reached, share
from figure import common, shown
from study import MODELS, PAPER, SIZES, arguments, chosen, history
from table import show

from hfmpi.errors import UserError
from hfmpi.files.history import Record
from hfmpi.measure.cost import Counts
from hfmpi.parallel import guard
from hfmpi.runs.record import counted
from hfmpi.speedup.bench_file import read_bench
from hfmpi.speedup.prediction import KINDS, fit
from hfmpi.speedup.runs import read_runs
from hfmpi.speedup.scaling import Curve, Job, Link

RANKS = np.arange(1, 2**14 + 1)
SHOWN = 2 ** np.arange(15) - 1


def whole(folder: Path, done: list[Record], bench: list[Path], link: Link, floor: float) -> Job:
    """Give the model of some steps, all of them taken for one, of which the run in a folder measured some."""
    run, steps = read_runs([folder])
    shapes = read_bench(bench, run)[0] if bench else {}
    shapes = {kind: lowered(shape, floor) for kind, shape in shapes.items()}
    kinds = [kind for kind in KINDS.values() if kind.count(steps[0].counts)]
    job = fit(steps, run.messages, link, shapes)
    counts = sum(map(counted, done), Counts())
    passes = [replace(each, count=kind.count(counts)) for kind, each in zip(kinds, job.passes, strict=True)]
    taken = len(done)
    matrices = tuple(taken * seconds for seconds in job.matrices)
    return replace(job, passes=tuple(passes), redundant=taken * job.redundant, matrices=matrices)


def lowered(shape: Curve, floor: float) -> Curve:
    """Divide the floor of a curve, where the line through its first and last point meets b = 0."""
    (b, *_, c), (s, *_, t) = shape.batches, shape.seconds
    off = max(s - b * (t - s) / (c - b), 0.0) * (1 - 1 / floor)
    return Curve(shape.batches, tuple(value - off for value in shape.seconds))


def clock(value: float) -> str:
    """Give three digits of seconds."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def intervals(times: dict[str, np.ndarray]) -> str:
    """Say which of them is the fastest from which number of ranks on."""
    names = list(times)
    fastest = np.argmin(list(times.values()), axis=0)
    begins = [0, *(1 + np.flatnonzero(np.diff(fastest)))]
    return ", ".join(f"from {RANKS[i]:,} rank(s) on {names[fastest[i]]}" for i in begins)


def main() -> None:
    parser = arguments(__doc__, "OUT", sized=True)
    parser.add_argument(
        "--level", type=float, help="bits/char of training [the lowest of the paper's methods]"
    )
    parser.add_argument("--bench", type=Path, action="append", default=[], metavar="FILE")
    parser.add_argument("--timed", type=Path, metavar="FOLDER", help="[OUT]")
    parser.add_argument("--beside", type=Path, action="append", default=[], metavar="FOLDER")
    parser.add_argument("--latency", type=float, default=0.0, help="seconds of a message [0]")
    parser.add_argument("--bandwidth", type=float, default=np.inf, help="bytes a second [no limit]")
    parser.add_argument("--pass-floor", type=float, default=1.0, help="divisor [1]")
    given = parser.parse_args()
    size = SIZES[given.size]
    picked = [
        (folder, c)
        for folder in (given.out, *given.beside)
        for c in chosen(folder, given.seconds or size.seconds)
        if not c.seed
    ]
    link = Link(given.latency, given.bandwidth)
    for cell in MODELS:
        runs = [(folder, c, history(folder / c.name)) for folder, c in picked if c.model == cell]
        if not runs:
            continue
        curves = [followed(records, share(c.method, size)) for _, c, records in runs]
        of_paper = [curve for curve, (_, c, _) in zip(curves, runs, strict=True) if c.method in PAPER]
        level = given.level or common(of_paper)
        if level is None:
            raise UserError(f"{given.out} has no run of the paper's methods with {cell}: name a --level")
        times, missing = {}, []
        for curve, (folder, c, records) in zip(curves, runs, strict=True):
            of_study = folder == given.out
            name = shown(c.method) if of_study else f"{folder.name} {shown(c.method)}"
            steps = reached(curve, "train_bpc", "step", level)
            if steps is None:
                missing.append(f"{name} did not reach {level:g} bits/char.")
                continue
            done = [record for record in records if record["step"] <= steps]
            timed = (given.timed if of_study and given.timed else folder) / c.name
            job = whole(timed, done, given.bench, link, given.pass_floor)
            times[name] = job.seconds(RANKS)
        print(f"\n{cell}: seconds to {level:g} bits/char\n")
        if times:
            rows = [(f"{RANKS[i]:,}", *(clock(each[i]) for each in times.values())) for i in SHOWN]
            show(("ranks", *times), rows)
            print(f"\nThe fastest is {intervals(times)}.")
        print(*missing, sep="\n")
        for quick, slow in product(map(shown, ("bhf", "bhf-short", "subspace")), ("SGD", "BGD")):
            if {quick, slow} <= times.keys():
                ahead = RANKS[times[quick] < times[slow]]
                words = f"from {ahead[0]:,} ranks on" if len(ahead) else "on no number of ranks"
                print(f"{quick} is ahead of {slow} {words}.")


if __name__ == "__main__":
    with guard():
        main()
