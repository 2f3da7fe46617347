"""Check the model of a step on more ranks than the machine has cores, in process time.

    python examples/benchmarks/more_ranks.py DATA OUT [--ranks 1 2 4 8 16] [--columns 9] -- OPTIONS

OPTIONS are those of `hfmpi train`, with --max-steps. The same job runs on each number of ranks, and
`hfmpi bench` measures passes over 1 to 32 sequences. More ranks than cores take turns on them, so that
seconds say nothing; process time, which replaces the clock here, only counts while a rank computes. It
includes what ranks on the same cores take from one another: caches and, with two threads per core, the core.

The model has the run on one rank, and the benchmarks. For each part of a step the table shows what it
predicts for the rank that has most of it, and the maximum over ranks that was measured. "Ratio" is measured
over predicted. Collectives are left out, because a rank that waits for others computes as well. Runs and
benchmarks that exist are not repeated.
"""

import argparse
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np

from hfmpi.errors import UserError
from hfmpi.measure import machine
from hfmpi.parallel import guard
from hfmpi.speedup.bench_file import read_bench
from hfmpi.speedup.prediction import fit
from hfmpi.speedup.runs import TimedRun, read_runs
from hfmpi.speedup.scaling import Job
from hfmpi.speedup.steps import StepTimes

PROGRAM = "import time; time.perf_counter = time.process_time; from hfmpi.cli.main import entry; entry()"
BATCHES = 1, 2, 4, 8, 16, 32
PARTS = "passes", "matrices", "redundant", "together"


def call(words: list[str], ranks: int = 1) -> str:
    """Run hfmpi on a number of ranks, with process time as its time; return what it prints."""
    command = ["mpirun", "-n", str(ranks), sys.executable, "-c", PROGRAM, *words]
    one = {f"{library}_NUM_THREADS": "1" for library in ("OMP", "OPENBLAS", "NUMBA")}
    done = subprocess.run(command, env=os.environ | one, capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"hfmpi {' '.join(words)}: {done.stderr.strip()}")
    return done.stdout


def bench(data: Path, out: Path, run: TimedRun, columns: int) -> list[Path]:
    """Time the passes of a run over few sequences on one rank; return the files."""
    config, files = run.config, []
    network = ["--model", run.model, "--hidden", str(config.hidden), "--length", str(config.sequence_length)]
    network += ["--dtype", config.dtype, "--backend", config.backend]
    batches = [batch for batch in BATCHES if batch <= run.steps.gradient_batch]
    sizes = [word for batch in batches for word in ("--batch", str(batch))]
    for what, more in (("products", ["--columns", str(columns)]), ("gradients", [])):
        files.append(out / f"{what}.json")
        if not files[-1].exists():
            words = ["bench", what, "--data", str(data), "--repeats", "3", "--json"]
            files[-1].write_text(call([*words, *network, *sizes, *more]))
    return files


def measured(steps: StepTimes) -> np.ndarray:
    """Return the parts of a step in seconds of process time, each of the rank that has most of it."""
    ranks = []
    for spans in steps.spans:
        rank = replace(steps, spans=(spans,))
        passes, alone, redundant = rank.parts["compute"], rank.parts["redundant"], rank.most_redundant
        ranks.append((passes, alone - redundant, redundant, passes + alone))
    return np.max(ranks, axis=0)


def predicted(job: Job, ranks: int) -> np.ndarray:
    """Return what the model says about these parts."""
    number = np.array([float(ranks)])
    passes, alone = float(job.compute(number)[0]), float(job.alone(number)[0])
    return np.array([passes, alone - job.redundant, job.redundant, passes + alone])


def main():
    """Make the runs and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4, 8, 16])
    parser.add_argument("--columns", type=int, default=9, help="directions of a subspace step")
    parser.add_argument("options", nargs="+", metavar="OPTIONS", help="of `hfmpi train`, after --")
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    for ranks in given.ranks:
        folder = given.out / f"ranks-{ranks}"
        if not (folder / "DONE").exists():
            words = ["train", str(given.data), "--out", str(folder), "--evaluate-every", "0"]
            call([*words, "--threads", "1", *given.options], ranks)
    run, steps = read_runs([given.out / f"ranks-{ranks}" for ranks in given.ranks])
    shapes, _ = read_bench(bench(given.data, given.out, run, given.columns), run)
    job = fit(steps[:1], run.messages, None, shapes)
    print(f"{machine.processor()}, {os.cpu_count()} cores, {run.model}, {run.config.optimizer}")
    print("| ranks |" + "".join(f" {part}: predicted, ms | measured | ratio |" for part in PARTS))
    print("|" + " --- |" * (1 + 3 * len(PARTS)))
    for each in steps:
        pairs = zip(1e3 * predicted(job, each.ranks), 1e3 * measured(each), strict=True)
        cells = [f" {a:.1f} | {b:.1f} | {b / a if a else 1:.2f} |" for a, b in pairs]
        print(f"| {each.ranks} |" + "".join(cells))


if __name__ == "__main__":
    with guard():
        main()
