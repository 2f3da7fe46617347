"""The paper's Figure 1 with its four methods and five current ones, LSTM and mLSTM; two figures and tables.

python examples/figure1/run.py [--size small|medium|paper] [--seeds N] [--methods A,B] [--cells A,B]
       [--jobs N] [--launch COMMAND] [--known FILE]... DATA.h5 OUT

For each cell and method three candidate settings are tried with seed 0, each for a fifth of a run's time.
While the best candidate is at the edge of those tried, the next one is tried too. The candidate with the
lowest training loss at equal cost is continued to the end, and is run with the other seeds. Runs of BHF and
of subspace have four times the time of the others, and runs of bhf-short twice. An interrupted study
continues when it is started again, and finished runs are not repeated; --methods and --cells run parts of it.
OUT/curves.json contains the chosen runs. With --known, the runs in such a file, for example from a different
machine, count as finished. DATA.h5 is created from the King James Bible if it does not exist.
"""

from __future__ import annotations

import shlex
import subprocess
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import product
from pathlib import Path

import curves
import figure
import table
from study import (
    METHODS,
    MODELS,
    SEQUENCES,
    SIZES,
    TIMES,
    TUNING,
    Candidate,
    Size,
    arguments,
    best,
    history,
    part,
    read_corpus,
    untried,
)

from hfmpi.errors import UserError
from hfmpi.parallel import guard


def prepare(data: Path, out: Path, size: Size) -> str:
    """Create the corpus, or check that it has this size and is that of existing runs; return its digest."""
    chars = ["--train-chars", str(size.train_chars), "--valid-chars", str(size.valid_chars)]
    if not data.exists():
        subprocess.run(["hfmpi", "prepare", "--corpus", "kjv", *chars, str(data)], check=True)
    corpus = read_corpus(data, out)
    found = len(corpus.train)
    if found != size.train_chars:
        raise UserError(f"{data} has {found:,} training characters, but this size needs {' '.join(chars)}")
    return corpus.digest


def call(words: list[str], log: Path, *fine: int) -> int:
    """Run a command and append its output to a log; return its exit code, which must be 0 or in `fine`."""
    with log.open("a") as file:
        code = subprocess.run(words, stdout=file, stderr=subprocess.STDOUT).returncode
    if code not in (0, *fine):
        raise UserError(f"{shlex.join(words)} ended with {code}, see {log}")
    return code


def train(c: Candidate, size: Size, data: Path, out: Path, seconds: float, launch: str) -> None:
    """Train a candidate for `seconds`, unless it has been trained for that time."""
    folder, log = out / c.name, out / f"{c.name}.log"
    records = history(folder)
    if (folder / "DONE").exists() and records and records[-1]["seconds"] >= seconds:
        return
    words = [*shlex.split(launch), "hfmpi", "train", str(data), "--out", str(folder), *c.options(size)]
    # Evaluation once per epoch is 1/42 of its work. Checkpoints of such a small model would cost more.
    words += ["--max-seconds", f"{seconds:g}", "--checkpoint-every", str(20 * c.epoch(size))]
    code = call(words, log, 2)  # exit code 2: an error message, such as that all steps are rejected
    records = history(folder)
    if not records:
        raise UserError(f"{shlex.join(words)} took no step, see {log}")
    last = records[-1]
    facts = f"{last['seconds']:8.1f} s  step {last['step']:7,}  {last['train_bpc']:.3f} bits/char"
    print(f"{c.name:34}{facts}{' (given up, see its log)' if code else ''}", flush=True)


def side_by_side(jobs: int, work: Callable[..., None], each: Iterable[tuple]) -> None:
    """Run several tasks at the same time; the first error cancels all that have not started."""
    with ThreadPoolExecutor(jobs) as pool:
        begun = [pool.submit(work, *arguments) for arguments in each]
        try:
            for one in begun:
                one.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def main() -> None:
    parser = arguments(__doc__, "DATA.h5", "OUT", sized=True)
    parser.add_argument("--seeds", type=int, default=3, help="seeds of each chosen run, from 0 on [3]")
    parser.add_argument("--methods", type=part(METHODS), default=METHODS, help="separated by commas [all]")
    parser.add_argument("--cells", type=part(MODELS), default=MODELS, help="separated by commas [all]")
    parser.add_argument("--launch", default="mpirun -n 2", help="command that starts the ranks [mpirun -n 2]")
    parser.add_argument("--jobs", type=int, default=1, help="number of simultaneous runs [1]")
    parser.add_argument("--known", type=Path, action="append", default=[], metavar="FILE")
    given = parser.parse_args()
    size, out = SIZES[given.size], given.out
    seconds = given.seconds or size.seconds
    out.mkdir(parents=True, exist_ok=True)
    corpus = prepare(given.data, out, size)
    known = curves.elsewhere(out, curves.Study(given.size, seconds, corpus, {}), given.known)
    settings = {run[:2]: each.setting for run, each in known.runs.items()}
    pairs = list(product(given.cells, given.methods))
    times = ", ".join(f"{method} {TIMES[method] * seconds:g} s" for method in given.methods)
    print(f"{size.sequences:,} of {SEQUENCES:,} sequences; {times}, {TUNING:g} of it a candidate", flush=True)

    def tune(model: str, method: str) -> None:
        while tries := untried(out, seconds, model, method):
            for c in tries:
                train(c, size, given.data, out, TUNING * c.seconds(seconds), given.launch)

    def finish(c: Candidate) -> None:
        train(c, size, given.data, out, c.seconds(seconds), given.launch)

    def chosen(model: str, method: str) -> Candidate:
        if (model, method) in settings:
            return Candidate(model, method, settings[model, method])
        return best(out, seconds, model, method)

    pairs.sort(key=lambda pair: -TIMES[pair[1]])  # the longest first, so that no job waits long for others
    side_by_side(given.jobs, tune, [pair for pair in pairs if pair not in settings])
    picked = [replace(chosen(*pair), seed=seed) for seed in range(given.seeds) for pair in pairs]
    left = [(c,) for c in picked if (c.model, c.method, c.seed) not in known.runs]
    side_by_side(given.jobs, finish, left)
    study = curves.together([known, curves.folders(out, given.size, seconds)])
    curves.write(study, out / curves.NAME)
    figure.write(study.runs, out)
    table.write(study)


if __name__ == "__main__":
    with guard():
        main()
