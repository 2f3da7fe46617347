"""Compare hfmpi with other libraries on least squares: relative errors after equal seconds of one core.

PYTHONPATH=. PYTHON examples/least_squares/run.py FOLDER [--tasks T,...] [--methods M,...]
    [--seconds S] [--tuning S] [--seeds N] [--ranks N] [--core N]

PYTHON is the interpreter of an environment with the other libraries (docs/results/least-squares.md); methods
whose library is not installed are left out. Every run is a separate process on one core, with one thread. The
candidates of a method's settings are tried with seed 0, `--tuning` seconds each; the one with the lowest
error is used for the runs of all seeds. A run is stored in FOLDER/TASK-METHOD-SETTING-SEED-SECONDS.json; runs
that have such a file are not repeated. Seconds are processor time, from the first step after compilation,
without the evaluations of the error. With `--ranks`, hfmpi's methods run under mpirun, in wall-clock time.
Functions compiled by JAX are cached in FOLDER/compiled, so that later runs of a method start sooner.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

TASKS = (
    "poisson", "helmholtz", "burgers", "allen-cahn", "regression", "neural-ode", "factorisation", "curves",
)  # fmt: skip
OURS = "lm", "lbfgs", "bhf-squares", "subspace", "soap"
OTHERS = "dense-lm", "adam-lbfgs", "adam-bfgs", "deepxde"
MORE = "subspace-whole", "adam-optax", "optimistix-lm", "bhf", "bhf-short", "adam"
"""Methods that are known to be slower, and not run by default."""

THREADS = {
    "OPENBLAS_NUM_THREADS": "1",
    "OMP_NUM_THREADS": "1",
    "JAX_PLATFORMS": "cpu",
    "XLA_FLAGS": "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1",
}


def installed(method: str) -> str:
    """Return an empty string if a method can be run, or the reason why it cannot."""
    from single import OWN, RIVALS

    if method in RIVALS:
        missing = [name for name in RIVALS[method].needs if importlib.util.find_spec(name) is None]
        return f"{', '.join(missing)} not installed" if missing else ""
    from hfmpi.optim.presets import PRESETS

    return "" if OWN[method].optimizer in PRESETS else "hfmpi does not have this optimizer"


def name_of(task: str, method: str, setting: int, seed: int, seconds: float, ranks: int, tuning: bool) -> str:
    """Return the name of a run's file."""
    what = "tuning" if tuning else f"seed{seed}"
    several = f"-{ranks}ranks" if ranks > 1 else ""
    return f"{task}-{method}-{setting}-{what}-{seconds:g}s{several}.json"


def make(folder: Path, core: int, run: dict[str, Any]) -> dict[str, Any]:
    """Run in a separate process unless the run's file exists; return the run's record."""
    path = folder / name_of(**run)
    if not path.exists():
        command = [sys.executable, str(Path(__file__).with_name("single.py")), str(path), json.dumps(run)]
        if run["ranks"] > 1:
            launcher = Path(sys.executable).with_name("mpirun")
            mpirun = str(launcher) if launcher.exists() else shutil.which("mpirun")
            command = [mpirun or "mpirun", "-n", str(run["ranks"]), *command]
        env = {key: value for key, value in os.environ.items() if key != "OPENBLAS_CORETYPE"} | THREADS
        compiled = {
            "JAX_COMPILATION_CACHE_DIR": str(folder / "compiled"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1",
        }
        env |= compiled | {"LEAST_SQUARES_CORE": str(core)}
        done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
        if done.returncode or not path.exists():
            raise SystemExit(f"{path.name} failed:\n{done.stdout[-2000:]}{done.stderr[-4000:]}")
        record = json.loads(path.read_text())
        print(f"{path.stem}: {words(record)}", flush=True)
    found: dict[str, Any] = json.loads(path.read_text())
    return found


def words(record: dict[str, Any]) -> str:
    """Return a sentence that describes a record."""
    if record["left_out"]:
        return f"left out: {record['left_out']}"
    seconds, steps, _, error = record["trace"][-1]
    return (
        f"error {error:.3g} after {seconds:.1f} s and {steps:,} steps; compiled in {record['compile']:.1f} s"
    )


def final(record: dict[str, Any]) -> float:
    """Return the error at the end, infinity if it is not finite or the method was left out."""
    error = record["trace"][-1][-1] if record["trace"] else None
    return float("inf") if error is None or error != error else float(error)


def listed(known: tuple[str, ...]) -> Any:
    """Return the parser of an option that selects some of the `known` names, separated by commas."""

    def read(given: str) -> list[str]:
        names = given.split(",")
        for name in names:
            if name not in known:
                raise argparse.ArgumentTypeError(f"{name!r} is not one of {', '.join(known)}")
        return names

    return read


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("folder", type=Path, metavar="FOLDER")
    parser.add_argument("--tasks", type=listed(TASKS), default=TASKS, help="separated by commas [all]")
    parser.add_argument(
        "--methods", type=listed(OURS + OTHERS + MORE), default=OURS + OTHERS,
        help=f"separated by commas [all but {', '.join(MORE)}]",
    )  # fmt: skip
    parser.add_argument("--seconds", type=float, default=15.0, help="seconds per run [15]")
    parser.add_argument("--tuning", type=float, default=4.0, help="seconds per candidate [4]")
    parser.add_argument("--seeds", type=int, default=3, help="seeds per method, from 0 on [3]")
    parser.add_argument("--ranks", type=int, default=1, help="ranks; only hfmpi's methods run on several [1]")
    parser.add_argument("--core", type=int, default=0, help="the first core [0]")
    given = parser.parse_args()
    given.folder.mkdir(parents=True, exist_ok=True)
    from single import RIVALS, candidates

    methods = [name for name in given.methods if given.ranks == 1 or name not in RIVALS]
    for method in list(methods):
        if missing := installed(method):
            print(f"{method} is left out: {missing}", flush=True)
            methods.remove(method)
    for task in given.tasks:
        for method in methods:
            run = {"task": task, "method": method, "ranks": given.ranks}
            tried = []
            for setting in range(len(candidates(method))):
                one = {"setting": setting, "seed": 0, "seconds": given.tuning, "ranks": 1, "tuning": True}
                tried.append(make(given.folder, given.core, run | one))
                if tried[-1]["left_out"]:
                    break
            if tried[-1]["left_out"]:
                continue
            best = min(range(len(tried)), key=lambda k: final(tried[k]))
            for seed in range(given.seeds):
                one = {"setting": best, "seed": seed, "seconds": given.seconds, "tuning": False}
                make(given.folder, given.core, run | one)


if __name__ == "__main__":
    main()
