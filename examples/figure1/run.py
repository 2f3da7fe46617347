"""The paper's Figure 1 with its four methods and five of today, LSTM and mLSTM; two figures and tables.

python examples/figure1/run.py [--size small|medium|paper] [--seeds N] [--methods A,B] [--cells A,B]
       [--jobs N] [--launch COMMAND] [--known FILE]... DATA.h5 OUT

For each cell and method three candidate settings are tried for a fifth of a run's time each, and one further
as long as the best is the last of them on either side, all with seed 0; the one with the lowest training loss
at equal cost then goes on to the end, and is run with the other seeds. Runs of BHF have four times the time
of the others, as those of subspace, and those of bhf-short twice. A study that was stopped goes on when it is
started again, and what is done is not done twice; with --methods and --cells it can be made in parts.
OUT/curves.json has the chosen runs; with --known the runs of such a file, of another machine perhaps, are
taken as done.
DATA.h5 is made from the King James Bible if it does not exist.
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
    """Make the corpus, or check that it is of this size and that of the runs so far; give its digest."""
    chars = ["--train-chars", str(size.train_chars), "--valid-chars", str(size.valid_chars)]
    if not data.exists():
        subprocess.run(["hfmpi", "prepare", "--corpus", "kjv", *chars, str(data)], check=True)
    corpus = read_corpus(data, out)
    found = len(corpus.train)
    if found != size.train_chars:
        raise UserError(f"{data} has {found:,} training characters; this size wants {' '.join(chars)}")
    return corpus.digest


def call(words: list[str], log: Path, *fine: int) -> int:
    """Run a command with its output at the end of a log; give its exit code, 0 or one that is fine too."""
    with log.open("a") as file:
        code = subprocess.run(words, stdout=file, stderr=subprocess.STDOUT).returncode
    if code not in (0, *fine):
        raise UserError(f"{shlex.join(words)} ended with {code}, see {log}")
    return code


def train(c: Candidate, size: Size, data: Path, out: Path, seconds: float, launch: str) -> None:
    """Train a candidate until it has had `seconds`, unless it has had them."""
    folder, log = out / c.name, out / f"{c.name}.log"
    records = history(folder)
    if (folder / "DONE").exists() and records and records[-1]["seconds"] >= seconds:
        return
    words = [*shlex.split(launch), "hfmpi", "train", str(data), "--out", str(folder), *c.options(size)]
    # Evaluation is once per epoch, 1/42 of its work. Checkpoints of so small a model would cost more.
    words += ["--max-seconds", f"{seconds:g}", "--checkpoint-every", str(20 * c.epoch(size))]
    code = call(words, log, 2)  # 2: a sentence of hfmpi, such as that all steps are rejected
    records = history(folder)
    if not records:
        raise UserError(f"{shlex.join(words)} took no step, see {log}")
    last = records[-1]
    facts = f"{last['seconds']:8.1f} s  step {last['step']:7,}  {last['train_bpc']:.3f} bits/char"
    print(f"{c.name:34}{facts}{' (given up, see its log)' if code else ''}", flush=True)


def side_by_side(jobs: int, work: Callable[..., None], each: Iterable[tuple]) -> None:
    """Do so many works at once; the first error ends all that have not begun."""
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
    parser.add_argument("--methods", type=part(METHODS), default=METHODS, help="with commas between [all]")
    parser.add_argument("--cells", type=part(MODELS), default=MODELS, help="with commas between [all]")
    parser.add_argument("--launch", default="mpirun -n 2", help="what starts the ranks [mpirun -n 2]")
    parser.add_argument("--jobs", type=int, default=1, help="runs side by side [1]")
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

    pairs.sort(key=lambda pair: -TIMES[pair[1]])  # the longest first, so that no job waits long for another
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
