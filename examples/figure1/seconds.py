"""Find the fastest method on this machine: repeat the runs of a study sequentially, in wall-clock time.

python examples/figure1/seconds.py [--size small|medium|paper] [--limit S] [--ranks N] [--levels BITS,...]
       [--methods M,...] DATA.h5 OUT FILE_OR_FOLDER...

FILE_OR_FOLDER are curves (`curves.py`). Each method runs with the setting that the study chose for it and its
lowest seed, for --limit seconds on --ranks ranks; the machine should be otherwise idle. There is no
validation. Existing runs are not repeated.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys

from curves import followed, load, reached, share
from figure import shown
from study import METHODS, MODELS, SIZES, Candidate, arguments, history, part
from table import show

from hfmpi.parallel import guard


def main() -> None:
    parser = arguments(__doc__, "DATA.h5", "OUT", sized=True)
    parser.formatter_class = argparse.RawTextHelpFormatter
    parser.add_argument("paths", nargs="+", metavar="FILE_OR_FOLDER")
    parser.add_argument("--limit", type=float, default=60.0, help="seconds per run [60]")
    parser.add_argument("--ranks", type=int, default=2, help="number of ranks [2]")
    parser.add_argument("--levels", default="2.0,1.8", help="training levels in bits/char [2.0,1.8]")
    parser.add_argument(
        "--methods", type=part(METHODS), default=METHODS, help="separated by commas [all in the curves]"
    )
    given = parser.parse_args()
    size, levels = SIZES[given.size], [*map(float, given.levels.split(","))]
    runs = load([*map(type(given.out), given.paths)], given.size, given.seconds).runs
    environment = {**os.environ, "OPENBLAS_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "1"}
    for cell in MODELS:
        rows = []
        for method in given.methods:
            seeds = [seed for name, other, seed in runs if (name, other) == (cell, method)]
            if not seeds:
                continue
            chosen = Candidate(cell, method, runs[cell, method, min(seeds)].setting, min(seeds))
            folder = given.out / chosen.name
            limits = ["--max-seconds", f"{given.limit:g}", "--evaluate-every", "0", "--threads", "1"]
            command = [sys.executable, "-m", "hfmpi", "train", str(given.data), "--out", str(folder)]
            subprocess.run(
                ["mpirun", "-n", str(given.ranks), *command, *chosen.options(size), *limits],
                env=environment,
                check=True,
                stdout=subprocess.DEVNULL,
            )
            points = followed(history(folder), share(method, size))
            found = [reached(points, "train_bpc", "seconds", level) for level in levels]
            cells = ["–" if seconds is None else f"{seconds:.3g}" for seconds in found]
            rows.append((shown(method), *cells, f"{points[-2]['train_bpc']:.3f}"))
        if not rows:
            continue
        print(f"\n{cell}: seconds on {given.ranks} rank(s)\n")
        show(("method", *(f"{level:g}" for level in levels), f"after {given.limit:g} s"), rows)


if __name__ == "__main__":
    with guard():
        main()
