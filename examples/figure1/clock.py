"""At how many ranks does BHF overtake SGD by the clock? From a study's runs and the model of docs/speedup.md.

python examples/figure1/clock.py [--size small|medium|paper] [--bench FILE]... [--latency S --bandwidth B] OUT

Every pass that a run executed until it first reached a level of the training loss, the lowest that all four
methods reach, is given the seconds that it would take on P ranks. --bench takes files of `hfmpi bench
products` and `gradients --json` of the same networks on the same machine; without them a pass over few
sequences is promised to be quicker than it is. Without a network the ranks' sums take no time. --pass-floor
divides the time below which a pass does not fall, however few its sequences are.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
from figure import reached
from study import METHODS, MODELS, SIZES, arguments, chosen, histories, history
from table import common, show

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
    """Give the model of some steps of a run, all of them taken for one."""
    run, steps = read_runs([folder])
    shapes = read_bench(bench, run)[0] if bench else {}
    shapes = {kind: lowered(shape, floor) for kind, shape in shapes.items()}
    kinds = [kind for kind in KINDS.values() if kind.count(steps[0].counts)]
    job = fit(steps, run.messages, link, shapes)
    counts = sum(map(counted, done), Counts())
    passes = [replace(each, count=kind.count(counts)) for kind, each in zip(kinds, job.passes, strict=True)]
    return replace(job, passes=tuple(passes), redundant=len(done) * job.redundant)


def lowered(shape: Curve, floor: float) -> Curve:
    """Divide the floor of a curve, where the line through its first and last point meets b = 0."""
    (b, *_, c), (s, *_, t) = shape.batches, shape.seconds
    off = max(s - b * (t - s) / (c - b), 0.0) * (1 - 1 / floor)
    return Curve(shape.batches, tuple(value - off for value in shape.seconds))


def clock(value: float) -> str:
    """Give three digits of seconds."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def main() -> None:
    parser = arguments(__doc__, "OUT", sized=True)
    parser.add_argument("--bench", type=Path, action="append", default=[], metavar="FILE")
    parser.add_argument("--latency", type=float, default=0.0, help="seconds of a message [0]")
    parser.add_argument("--bandwidth", type=float, default=np.inf, help="bytes a second [no limit]")
    parser.add_argument("--also", type=Path, metavar="RUN", help="one more run on the same data")
    parser.add_argument("--pass-floor", type=float, default=1.0, help="divisor [1]")
    given = parser.parse_args()
    picked = chosen(given.out, given.seconds or SIZES[given.size].seconds)
    found = histories(given.out, picked)
    also = given.also and read_runs([given.also])[0].config.model
    link = Link(given.latency, given.bandwidth)
    for cell in MODELS:
        level = common(found, cell, METHODS)
        runs = {m.upper(): (given.out / picked[cell, m].name, found[cell, m]) for m in METHODS}
        if also == cell:
            runs[given.also.name] = given.also, history(given.also)
        times = []
        for folder, records in runs.values():
            steps = reached(records, "train_bpc", "step", level)
            if steps is None:
                raise UserError(f"{folder} did not reach {level:.1f} bits/char")
            job = whole(folder, records[: int(steps)], given.bench, link, given.pass_floor)
            times.append(job.seconds(RANKS))
        print(f"\n{cell}: seconds to {level:.1f} bits/char\n")
        rows = [(f"{RANKS[i]:,}", *(clock(each[i]) for each in times)) for i in SHOWN]
        show(("ranks", *runs), rows)
        print()
        for i, name in enumerate(list(runs)[METHODS.index("bhf") :], METHODS.index("bhf")):
            for other in (0, 1):
                ahead = RANKS[times[i] < times[other]]
                words = f"from {ahead[0]:,} ranks on" if len(ahead) else "on no number of ranks"
                print(f"{name} is ahead of {list(runs)[other]} {words}.")


if __name__ == "__main__":
    with guard():
        main()
