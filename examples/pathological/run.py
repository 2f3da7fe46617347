"""The pathological tasks: which methods solve them, and with how many sequential passes.

python examples/pathological/run.py [--tasks T,...] [--lengths N,...] [--cells C,...] [--methods M,...]
    [--hidden N] [--seeds N] [--seconds S] [--tuning S] [--passes N] [--jobs N] OUT

Each method has one setting. It is tuned with the first seed after those of the study at T = 30, on addition
(for the three tasks with numbers) and on memory-5 (for those with symbols). Three candidates are tried,
`--tuning` seconds each; while the best is at the edge of those tried, the next one is tried too. The best
candidate solves the task with the lowest P_I, or, if none does, has the lowest training loss. Finished runs
are not repeated; a run that reached a limit continues if the limit is raised. OUT/results.json contains the
results of all runs.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from itertools import product
from multiprocessing import get_context
from pathlib import Path

import results
from tasks import KINDS
from training import CELLS, METHODS, Run, best, train, tuning_runs, untried

from hfmpi.parallel import guard


def part(known: Iterable[str]) -> Callable[[str], tuple[str, ...]]:
    """Return the parser of an option that selects some of the `known` names, separated by commas."""
    every = tuple(known)

    def read(words: str) -> tuple[str, ...]:
        found = words.split(",")
        for word in found:
            if word not in every:
                raise argparse.ArgumentTypeError(f"{word!r} is not one of {', '.join(every)}")
        return tuple(one for one in every if one in found)

    return read


def lengths(words: str) -> tuple[int, ...]:
    """Parse lengths that are separated by commas."""
    found = tuple(int(word) for word in words.split(","))
    if min(found) < 10:
        raise argparse.ArgumentTypeError("lengths must be at least 10")
    return found


def one(run: Run, out: Path, seconds: float, passes: int) -> results.Record:
    """Train a run, print its result and return its record."""
    record = train(run, out / run.name, seconds, passes)
    words = "solved" if record["solved"] else f"{record['wrong']:.1%} wrong"
    cost = f"P_I {record['P_I_full']:,} in {record['step']:,} steps, {record['seconds']:.0f} s"
    print(f"{run.name}: {words}, {cost}, loss {record['loss']:.4g}", flush=True)
    return record


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("out", type=Path, metavar="OUT")
    parser.add_argument("--tasks", type=part(KINDS), default=tuple(KINDS), help="separated by commas [all]")
    parser.add_argument("--lengths", type=lengths, default=(30,), help="T, separated by commas [30]")
    parser.add_argument("--cells", type=part(CELLS), default=("rnn",), help="rnn, lstm [rnn]")
    parser.add_argument("--methods", type=part(METHODS), default=tuple(METHODS), help="[all]")
    parser.add_argument("--hidden", type=int, default=50, help="units; the tuning uses 50 [50]")
    parser.add_argument("--seeds", type=int, default=results.SEEDS, help="seeds per run, from 0 on [4]")
    parser.add_argument("--seconds", type=float, default=10.0, help="seconds of processor time per run [10]")
    parser.add_argument(
        "--tuning", type=float, default=5.0, help="seconds of processor time per candidate [5]"
    )
    parser.add_argument("--passes", type=int, default=150_000, help="maximum P_I of a run [150000]")
    parser.add_argument("--jobs", type=int, default=1, help="number of simultaneous runs [1]")
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)

    def all_of(runs: list[Run], seconds: float) -> list[results.Record]:
        work = partial(one, out=given.out, seconds=seconds, passes=given.passes)
        if given.jobs == 1:
            return [work(run) for run in runs]
        with ProcessPoolExecutor(given.jobs, get_context("spawn")) as pool:
            return list(pool.map(work, runs))

    every = list(product(given.tasks, given.cells, given.methods))
    tuned, chosen = dict[Run, results.Record](), {}
    for key in every:
        runs = tuning_runs(*key, seed=results.SEEDS)
        while tries := untried(runs, tuned):
            tuned |= zip(tries, all_of(tries, given.tuning), strict=True)
        chosen[key] = best([tuned[run] for run in runs if run in tuned])
    for length, seed in product(given.lengths, range(given.seeds)):  # short ones first
        each = [Run(t, length, c, m, chosen[t, c, m], seed, given.hidden) for t, c, m in every]
        all_of(each, given.seconds)
        results.write(given.out)
    print(given.out / results.NAME)


if __name__ == "__main__":
    with guard():
        main()
