"""What a step costs as networks grow: seconds over those of one gradient, and memory in copies of theta.

    python examples/benchmarks/growth.py [--methods subspace soap muon] [--networks mlp lstm1 lstm2]
        [--parameters 1e4 1e5 1e6 1e7] [--examples 1000] [--seconds 600] [--json FILE]

Networks: `mlp` is 64 inputs, three hidden layers of equal width and 10 outputs in PyTorch; `lstm1` and
`lstm2` are the built-in LSTM of one and two layers on sequences of 50 of 65 symbols. A method has the batches
of its preset, at most all examples; the gradient is that of its gradient batch.

Each case runs in a child process with one thread. Seconds are process time. The first step is separate
because it may have more work than any other. Gradients and the steps after the warm-up take turns, whole
periods of the steps from one refresh of eigenvectors to the next; the ratio is the median over turns of the
mean step of a period over the gradient before it. Periods with a rejected step are left out, because going
back takes less work.

Memory is measured in copies of theta, in two ways. "Resident" is the peak resident set of the child after
these steps minus the peak after two gradients: the state, the temporary arrays of NumPy and PyTorch, and
memory that `malloc` keeps. What a step allocates in place of the arrays of a gradient is not seen. "NumPy" is
what NumPy holds at the peak of a further period (tracemalloc): theta, the states before and after a step, and
the arrays of a step, without PyTorch's, LAPACK's, and those that were allocated before and are kept. "Kept"
are the work arrays of built-in networks, which stay from pass to pass, and their part that is tapes: the
activations of all examples whose linearisation is stored.

A case that fails or takes longer than --seconds is a line with the reason. With --json FILE each row is also
appended to the file, and cases that the file has are printed from there and not repeated.
"""

import argparse
import copy
import gc
import json
import os
import resource
import subprocess
import sys
import tracemalloc
from itertools import product
from pathlib import Path
from statistics import median
from time import process_time

LEAST_TURNS, MOST_TURNS, LEAST_SECONDS, MOST_SECONDS = 3, 25, 1.0, 30.0
"""How many turns are measured: more where they are short, and fewer where they are long."""

INPUTS, OUTPUTS = 64, 10
LENGTH, SYMBOLS = 50, 65
METHODS = (
    "sgd",
    "adam",
    "muon",
    "soap",
    "soap-muon",
    "bhf-short",
    "subspace",
    "subspace-whole",
    "subspace-rows",
)
NETWORKS = "mlp", "lstm1", "lstm2"


def mlp(parameters, examples):
    """Return a model of PyTorch with about so many parameters, and random examples."""
    import numpy as np
    import torch
    from torch import nn

    import hfmpi

    torch.set_num_threads(1)
    torch.manual_seed(0)
    a, b = 2, INPUTS + OUTPUTS + 3  # a w^2 + b w + OUTPUTS = parameters
    width = round((-b + (b * b + 4 * a * (parameters - OUTPUTS)) ** 0.5) / (2 * a))
    layers = [(INPUTS, width), (width, width), (width, width)]
    modules = [module for sides in layers for module in (nn.Linear(*sides), nn.Tanh())]
    model = hfmpi.TorchModel(nn.Sequential(*modules, nn.Linear(width, OUTPUTS)), "cross-entropy")
    rng = np.random.default_rng(0)
    x = rng.standard_normal((examples, INPUTS)).astype(np.float32)
    return model, hfmpi.Examples(x, rng.integers(0, OUTPUTS, examples))


def lstm(layers, parameters, examples):
    """Return a built-in LSTM with about so many parameters, and random sequences of symbols."""
    import numpy as np

    import hfmpi

    model = hfmpi.Network(hfmpi.Architecture("lstm", layers, SYMBOLS, SYMBOLS).of_size(parameters))
    symbols = np.random.default_rng(0).integers(0, SYMBOLS, (examples, LENGTH + 1))
    return model, hfmpi.Examples(symbols[:, :-1], symbols[:, 1:])


def seconds(work):
    """Return the process time of a call."""
    start = process_time()
    work()
    return process_time() - start


def peak():
    """Return the peak resident set of this process so far, in bytes."""
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def kept():
    """Return the bytes of all work arrays of built-in networks, and those of tapes."""
    from hfmpi.backends.base import Scratch, Workspace

    memories = [each for each in gc.get_objects() if isinstance(each, Workspace)]
    sizes = [sum(array.nbytes for array in memory.flat.values()) for memory in memories]
    tapes = [size for memory, size in zip(memories, sizes, strict=True) if not isinstance(memory, Scratch)]
    return sum(sizes), sum(tapes)


def measure(method, network, parameters, examples):
    """Return the row of one case; for a process that has done nothing else."""
    import numpy as np

    import hfmpi
    from hfmpi.objective.data_parallel import step_objectives
    from hfmpi.optim.presets import preset
    from hfmpi.parallel.communicator import Communicator

    model, data = (
        mlp(parameters, examples) if network == "mlp" else lstm(int(network[4:]), parameters, examples)
    )
    owner, chosen = hfmpi.DataParallel(model, Communicator()), preset(method)
    optimizer, batch = chosen.optimizer, min(chosen.gradient_batch, examples)
    theta = model.initial(0).astype(np.float32)
    number = 0

    def objectives():
        return step_objectives(owner, data, 0, number, batch, min(chosen.curvature_batch, batch))

    def gradient():
        step_objectives(owner, data, 0, 0, batch, 0).gradient.gradient(theta)

    def step():
        nonlocal theta, state, number
        theta, state, report = optimizer.step(theta, state, objectives())
        number += 1
        return report.accepted

    for _ in range(2):
        gradient()
    before = peak()
    state = optimizer.init(theta, model.blocks)
    first = seconds(step)
    for _ in range(getattr(optimizer, "memory", 4) - 1):  # until there are all directions
        step()
    period = getattr(optimizer, "refresh", 1)
    period = period if isinstance(period, int) else 1
    turns, tried, began = [], 0, process_time()
    while len(turns) < LEAST_TURNS or (tried < MOST_TURNS and sum(map(sum, turns)) * period < LEAST_SECONDS):
        if turns and process_time() - began > MOST_SECONDS:
            break
        tried += 1
        one, start = seconds(gradient), process_time()
        accepted = [step() for _ in range(period)]
        if all(accepted) or tried > MOST_TURNS:  # a step that is taken back has less work
            turns.append((one, (process_time() - start) / period))
    resident, (arrays, tapes) = peak() - before, kept()
    tracemalloc.start()
    theta, state = theta.copy(), copy.deepcopy(state)  # so that they are counted
    for _ in range(period):
        step()
    return {
        "method": method,
        "network": network,
        "parameters": int(theta.size),
        "examples": batch,
        "gradient": median(one for one, _ in turns),
        "first": first / median(one for one, _ in turns),
        "step": median(step / one for one, step in turns),
        "resident": resident / theta.nbytes,
        "numpy": tracemalloc.get_traced_memory()[1] / theta.nbytes,
        "kept": arrays / theta.nbytes,
        "tapes": tapes / theta.nbytes,
    }


def child(case, limit):
    """Return the row of a case, measured in a separate process, or the reason why there is none."""
    environment = {
        **os.environ,
        "OPENBLAS_NUM_THREADS": "1",
        "OMP_NUM_THREADS": "1",
        "NUMBA_NUM_THREADS": "1",
    }
    command = [sys.executable, __file__, "--case", json.dumps(case)]
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=limit)
    except subprocess.TimeoutExpired:
        return {"wrong": f"more than {limit:g} s"}
    if done.returncode:
        return {"wrong": (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]}
    return json.loads(done.stdout.splitlines()[-1])


def line(case, row):
    """Return the line of the table for a case."""
    method, network, parameters, examples = case
    if "wrong" in row:
        cells = [f"{parameters:,}", f"{examples:,}", method, row["wrong"], *[""] * 6]
    else:
        cells = [f"{row['parameters']:,}", f"{examples:,}", method, f"{row['gradient']:.3g}"]
        cells += [f"{row[name]:.2f}" for name in ("first", "step")]
        cells += [f"{row[name]:.1f}" for name in ("resident", "numpy", "kept", "tapes")]
    return f"| {network} | {' | '.join(cells)} |"


def main():
    """Print a table, a line as soon as a case is done."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--methods", nargs="+", default=METHODS, help="names of presets")
    parser.add_argument("--networks", nargs="+", default=NETWORKS, choices=NETWORKS)
    parser.add_argument("--parameters", nargs="+", type=float, default=[1e4, 1e5, 1e6, 1e7])
    parser.add_argument("--examples", nargs="+", type=float, default=[1000])
    parser.add_argument("--seconds", type=float, default=600.0, help="limit of one case, wall-clock time")
    parser.add_argument("--json", type=Path, help="file with a line for each case, to which cases are added")
    parser.add_argument("--case", type=json.loads, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.case:
        print(json.dumps(measure(*chosen.case)))
        return
    known, file = {}, chosen.json
    if file and file.exists():
        rows = map(json.loads, file.read_text().splitlines())
        known = {tuple(row["case"]): row for row in rows if "case" in row}
    print(
        "| network | parameters | examples | method | gradient, s | first step | step | resident | NumPy "
        "| kept | tapes |"
    )
    print("|" + " --- |" * 11, flush=True)
    sizes, counts = (map(int, each) for each in (chosen.parameters, chosen.examples))
    for network, size, count, method in product(chosen.networks, sizes, counts, chosen.methods):
        case = method, network, size, count
        row = known.get(case)
        if row is None:
            row = {"case": case, **child(case, chosen.seconds)}
            if file:
                with file.open("a") as lines:
                    print(json.dumps(row), file=lines)
        print(line(case, row), flush=True)


if __name__ == "__main__":
    main()
