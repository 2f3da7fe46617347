"""Two ranks that share a GPU train as one does: `python tests/gpu_ranks.py`, run by bin/test-gpu.

Skipped with a sentence where there is no MPI, or no mpirun of it.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from small import write_corpus

TRAIN = [sys.executable, "-c", "from hfmpi.cli.main import entry; entry()", "train"]
TINY = "--optimizer shf --hidden 9 --sequence-length 20 --gradient-batch 10 --curvature-batch 4"
TINY += " --max-steps 4 --check-every 1"


def run(data, out, transport, ranks):
    """Train with so many ranks; give the losses, or what was said instead."""
    start = ["mpirun", "-n", str(ranks)] if ranks > 1 else []
    words = [
        str(data),
        "--out",
        str(out),
        "--backend",
        "cupy",
        "--dtype",
        "float64",
        "--transport",
        transport,
    ]
    # Open MPI refuses root, as whom a container runs, and more ranks than cores, unless told otherwise.
    more = ("OMPI_ALLOW_RUN_AS_ROOT", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM", "OMPI_MCA_rmaps_base_oversubscribe")
    done = subprocess.run(
        [*start, *TRAIN, *words, *TINY.split()],
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | dict.fromkeys(more, "1"),
    )
    if done.returncode:  # mpirun has its own words around the program's
        said = done.stderr.strip().splitlines()
        return next((line for line in said if line.startswith("Error:")), said[-1])
    history = (out / "history.jsonl").read_text().splitlines()
    return np.array([json.loads(line)["train_bpc"] for line in history])


def main():
    """Compare; exit with 1 if something differs."""
    if not shutil.which("mpirun"):
        print("ranks: skipped, there is no mpirun on PATH")
        return 0
    probe = [*TRAIN[:2], "from hfmpi.parallel.library import load; load()"]
    if subprocess.run(probe, capture_output=True).returncode:
        print("ranks: skipped, mpi4py finds no MPI library")
        return 0
    failed = 0
    with tempfile.TemporaryDirectory() as folder:
        data = write_corpus(Path(folder) / "d.h5")
        alone = run(data, Path(folder) / "alone", "host", 1)
        assert not isinstance(alone, str), alone
        for transport in os.environ.get("HFMPI_TRANSPORTS", "host cuda").split():
            found = run(data, Path(folder) / transport, transport, 2)
            if isinstance(found, str):
                refused = "does not take GPU memory" in found
                failed += not refused
                print(f"ranks: transport {transport}: {'skipped' if refused else 'FAILED'}, {found}")
                continue
            error = np.abs(found / alone - 1).max()
            failed += not error < 1e-10
            print(f"ranks: transport {transport}: largest relative difference to one rank {error:.1e}")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
