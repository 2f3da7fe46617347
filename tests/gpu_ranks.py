"""Compare training on two ranks that share a GPU with one rank; run by bin/test-gpu.

A built-in network, and a module of PyTorch where its CUDA build is installed. Skipped with a sentence where
there is no MPI, or no mpirun of it.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path

import numpy as np
from small import write_corpus

TRAIN = [sys.executable, "-c", "from hfmpi.cli.main import entry; entry()", "train"]
TINY = "--optimizer shf --hidden 9 --sequence-length 20 --gradient-batch 10 --curvature-batch 4"
TINY += " --max-steps 4 --check-every 1"


MODULE = """
import sys
import torch
import hfmpi
from hfmpi.frameworks.torch_exchange import ThroughDevice

torch.manual_seed(0)
torch.set_default_dtype(torch.float64)
x = torch.randn(40, 3)
module = torch.nn.Sequential(torch.nn.Linear(3, 9), torch.nn.Tanh(), torch.nn.Linear(9, 2))
with hfmpi.guard():
    model = hfmpi.TorchModel(module.to(hfmpi.device()), "squares")
    assert isinstance(model.exchange, ThroughDevice), model.exchange
    options = {"gradient_batch": 40, "curvature_batch": 40, "max_steps": 4, "check_every": 1, "quiet": True}
    folder, transport = sys.argv[1:]
    options |= {"optimizer": "bhf-short", "out": folder, "transport": transport}
    hfmpi.train(model, (x, x[:, :2] * x[:, 1:]), **options)
"""


def module(out, transport, ranks):
    """Train a PyTorch module on this number of ranks; return the losses, or the error output."""
    return started([sys.executable, "-c", MODULE, str(out), transport], out, ranks, "loss")


def run(data, out, transport, ranks):
    """Train a network on this number of ranks; return the losses, or the error output."""
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
    return started([*TRAIN, *words, *TINY.split()], out, ranks, "train_bpc")


def started(command, out, ranks, key):
    """Start a command on this number of ranks; return the losses that it writes, or the error output."""
    start = ["mpirun", "-n", str(ranks)] if ranks > 1 else []
    # By default Open MPI does not run as root, as containers do, or more ranks than cores.
    more = ("OMPI_ALLOW_RUN_AS_ROOT", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM", "OMPI_MCA_rmaps_base_oversubscribe")
    done = subprocess.run(
        [*start, *command],
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | dict.fromkeys(more, "1"),
    )
    if done.returncode:  # mpirun adds lines to the output of the program
        said = done.stderr.strip().splitlines()
        return next((line for line in said if line.startswith("Error:")), said[-1])
    history = (out / "history.jsonl").read_text().splitlines()
    return np.array([json.loads(line)[key] for line in history])


def main():
    """Compare the runs; exit with code 1 if they differ."""
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
        failed += compared("network", Path(folder), partial(run, data))
        if has_torch():
            failed += compared("module", Path(folder), module)
        else:
            print("ranks: module: skipped, there is no PyTorch that finds a GPU")
    return int(failed > 0)


def has_torch():
    """Return whether PyTorch computes on a GPU."""
    try:
        import torch
    except ImportError:
        return False
    return torch.cuda.is_available()


def compared(name, folder, train):
    """Compare two ranks with one for every transport; return the number of failures."""
    failed, alone = 0, train(folder / f"{name} alone", "host", 1)
    assert not isinstance(alone, str), alone
    for transport in os.environ.get("HFMPI_TRANSPORTS", "host cuda").split():
        found = train(folder / f"{name} {transport}", transport, 2)
        if isinstance(found, str):
            refused = "does not accept GPU memory" in found
            failed += not refused
            print(f"ranks: {name}, transport {transport}: {'skipped' if refused else 'FAILED'}, {found}")
            continue
        error = np.abs(found / alone - 1).max()
        failed += not error < 1e-10
        print(f"ranks: {name}, transport {transport}: largest relative difference to one rank {error:.1e}")
    return failed


if __name__ == "__main__":
    sys.exit(main())
