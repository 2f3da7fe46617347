"""The paper's Figure 1: LSTM and mLSTM with SGD, BGD, SHF and BHF; two figures and a table of its claims.

python examples/figure1/run.py [--size small|medium|paper] [--jobs N] [--launch COMMAND] DATA.h5 OUT

Each of the eight runs begins with three candidate settings for a fifth of its time each, and one further as
long as the best is the last of them on either side; the one with the lowest training loss at equal cost then
goes on to the end. Runs of BHF have four times the time of the others. A study that was stopped goes on when
it is started again, and what is done is not done twice. DATA.h5 is made from the King James Bible if it does
not exist.
"""

from __future__ import annotations

import shlex
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import figure
import table
from study import (
    SEQUENCES,
    SIZES,
    TIMES,
    TUNING,
    Candidate,
    Size,
    arguments,
    best,
    chosen,
    histories,
    history,
    read_corpus,
    runs,
    untried,
)

from hfmpi.errors import UserError
from hfmpi.parallel import guard


def prepare(data: Path, out: Path, size: Size) -> None:
    """Make the corpus, or check that the one there is of this size and that of the runs so far."""
    chars = ["--train-chars", str(size.train_chars), "--valid-chars", str(size.valid_chars)]
    if not data.exists():
        subprocess.run(["hfmpi", "prepare", "--corpus", "kjv", *chars, str(data)], check=True)
    found = len(read_corpus(data, out).train)
    if found != size.train_chars:
        raise UserError(f"{data} has {found:,} training characters; this size wants {' '.join(chars)}")


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
    print(f"{c.name:28}{facts}{' (given up, see its log)' if code else ''}", flush=True)


def main() -> None:
    parser = arguments(__doc__, "DATA.h5", "OUT", sized=True)
    parser.add_argument("--launch", default="mpirun -n 2", help="what starts the ranks [mpirun -n 2]")
    parser.add_argument("--jobs", type=int, default=1, help="runs side by side [1]")
    given = parser.parse_args()
    size = SIZES[given.size]
    seconds = given.seconds or size.seconds
    given.out.mkdir(parents=True, exist_ok=True)
    prepare(given.data, given.out, size)
    times = ", ".join(f"{method.upper()} {n * seconds:g} s" for method, n in TIMES.items())
    print(f"{size.sequences:,} of {SEQUENCES:,} sequences; {times}, {TUNING:g} of it a candidate", flush=True)

    def tuned_run(model: str, method: str) -> None:
        while tries := untried(given.out, seconds, model, method):
            for c in tries:
                train(c, size, given.data, given.out, TUNING * c.seconds(seconds), given.launch)
        c = best(given.out, seconds, model, method)
        train(c, size, given.data, given.out, c.seconds(seconds), given.launch)

    with ThreadPoolExecutor(given.jobs) as pool:  # the longest first, so that no job waits long for another
        longest_first = sorted(runs(), key=lambda run: -TIMES[run[1]])
        for done in [pool.submit(tuned_run, *run) for run in longest_first]:
            done.result()
    picked = chosen(given.out, seconds)
    found = histories(given.out, picked)
    figure.write(found, given.out)
    table.write(picked, found)


if __name__ == "__main__":
    with guard():
        main()
