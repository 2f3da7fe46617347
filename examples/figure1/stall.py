"""Why SHF stalls with the LSTM: short runs with one change each, and a table of their losses.

python examples/figure1/stall.py DATA.h5 OUT

DATA.h5 is created from the King James Bible if it does not exist. Runs have the paper's number of parameters
and sequences of 200, an eighth of its batches (40 sequences for the gradient, 4 for the curvature), and the
forget bias of 3 of Krause's code, except for three runs. Finished runs are not repeated.
"""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

from study import arguments, history, read_corpus
from table import show

from hfmpi.parallel import guard

SHOWN = range(10, 51, 10)
COMMON = ("--gradient-batch", "40", "--curvature-batch", "4", "--forget-bias", "3")

CHANGES = {
    "LSTM as it is": (),
    "curvature batch 40, as the gradient's": ("--curvature-batch", "40"),
    "at most 50 CG steps (15)": ("--set", "cg_max_steps=50"),
    "CG starts at zero": ("--set", "warm_start=0"),
    "structural damping, mu = 1": ("--set", "structural_damping=1"),
    "variant krause": ("--variant", "krause"),
    "sparse initialisation": ("--initialisation", "sparse"),
    "sequences of 100": ("--sequence-length", "100"),
    "30 units (195)": ("--hidden", "30"),
    "forget bias 1 (3)": ("--forget-bias", "1"),
    "forget bias 0 (3)": ("--forget-bias", "0"),
    "mLSTM as it is": ("--model", "mlstm"),
    "Krause's LSTM initialisation": ("--initialisation", "krause-lstm"),
    "Krause's LSTM initialisation, bias 0 (3)": ("--initialisation", "krause-lstm", "--forget-bias", "0"),
}


def main() -> None:
    parser = arguments(__doc__, "DATA.h5", "OUT")
    parser.add_argument("--steps", type=int, default=50, help="steps of a new run [50]")
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    data = given.data.resolve()
    if not data.exists():
        chars = ("--train-chars", "175000", "--valid-chars", "20000")
        subprocess.run(["hfmpi", "prepare", "--corpus", "kjv", *chars, str(data)], check=True)
    read_corpus(data, given.out)
    heads = ["change", *(f"step {step}" for step in SHOWN), "lambda", "rejected"]
    show(heads, rows(data, given.out, given.steps))


def rows(data: Path, out: Path, steps: int) -> Iterator[list[str]]:
    """Train the runs that are not finished, and yield the row of each."""
    for i, (change, options) in enumerate(CHANGES.items()):
        folder = out / f"{i:02d}"
        if not (folder / "DONE").exists():
            model = () if "--model" in options else ("--model", "lstm")
            words = ["hfmpi", "train", str(data), "--out", folder.name, *model, *COMMON, *options]
            words += ["--max-steps", str(steps), "--evaluate-every", "1000", "--checkpoint-every", "10"]
            with folder.with_suffix(".log").open("a") as log:
                subprocess.run(words, cwd=out, stdout=log, stderr=subprocess.STDOUT)
        records = {r["step"]: r for r in history(folder)}
        reached = [records.get(step) for step in SHOWN]
        last = records[max(records)]
        cells = [change, *(f"{r['train_bpc']:.2f}" if r else "–" for r in reached)]
        cells += [f"{last['damping']:.3g}", str(sum(not r["accepted"] for r in records.values()))]
        yield cells


if __name__ == "__main__":
    with guard():
        main()
