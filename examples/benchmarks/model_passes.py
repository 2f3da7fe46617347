"""The cost of each pass of a PyTorch or JAX model, relative to its forward pass and to a plain gradient.

    python examples/benchmarks/model_passes.py [--repeats 9] [--table forward|plain]

The first table contains the networks of peers.py on 500 images at once, and for PyTorch the network of
torch_transformer.py on 500 lists, as ratios to the loss. `first` is the total time of the first call of each
pass, which includes compilation and trials.

The second table contains the models of adapter_models.py as ratios to the plain gradient, which is one
forward and one backward pass of PyTorch, or a jitted `value_and_grad`. `micro-batches` is a gradient by
`hfmpi.DataParallel` with the default `micro_batch`, whose size is in the next column; the other columns
process all examples at once.

float32, one thread, CPU seconds. The passes take turns; each value is the median over the turns of the ratio.
"""

import argparse
import sys
import time
from functools import partial
from itertools import chain
from pathlib import Path

from peers import NETS  # before NumPy: it sets the number of threads

import numpy as np  # isort: skip

sys.path.append(str(Path(__file__).parents[1]))
from adapter_models import in_jax, in_torch
from torch_transformer import Sorter, lists

import hfmpi
from hfmpi.measure import machine
from hfmpi.parallel.communicator import Communicator

LOSS = "cross-entropy"


def passes(model, cases):
    """Return the passes of a model by name, as functions without arguments, and their linearisation."""
    owner = hfmpi.DataParallel(model, Communicator(), micro_batch=cases.count)
    risk, theta = owner.on(cases, np.arange(cases.count)), model.initial(0).astype(np.float32)
    directions = np.random.default_rng(0).standard_normal((10, theta.size)).astype(np.float32)
    v = directions[0].copy()
    at = model.linearise(theta, cases.take(np.arange(cases.count)))
    out = np.zeros_like(theta)
    u = at.jvp(v)
    return {
        "loss": lambda: risk.loss(theta),
        "loss and gradient": lambda: risk.gradient(theta),
        "with squared gradients": lambda: risk.squared_gradients(theta),
        "with factors": lambda: risk.factored_gradient(theta),
        "J v": lambda: at.jvp(v),
        "J' u": lambda: at.vjp(u, out),
        "G v": lambda: at.gauss_newton(v, 1.0, out),
        "V G V', ten directions": lambda: at.project(directions, 1.0, np.zeros((10, 10))),
    }, at


def seconds(run):
    start = time.process_time()
    run()
    return time.process_time() - start


def networks():
    """Yield for each network its name with the framework, the examples, and the model's constructor."""
    for name, net in NETS.items():
        problem = net()
        cases, weights = hfmpi.Examples(problem.x[:500], problem.y[:500]), problem.weights(0)
        yield f"{name}, PyTorch", cases, partial(hfmpi.TorchModel, problem.module(weights), LOSS)
        yield f"{name}, JAX", cases, partial(hfmpi.JaxModel, problem.function, weights, LOSS)
    yield (
        "transformer, PyTorch",
        hfmpi.Examples(*lists(500, seed=1)),
        partial(hfmpi.TorchModel, Sorter(), LOSS),
    )


def forward_table(repeats):
    """Return the rows of the first table."""
    rows, names = [], []
    for name, cases, make in networks():
        begun = time.process_time()
        model = make()
        runs, at = passes(model, cases)
        for run in runs.values():
            run()
        first = time.process_time() - begun
        found = turns(runs, repeats)
        ratios = np.median(found / found[:, :1], axis=0)
        forward = f"{1e3 * np.median(found[:, 0]):.1f} ms"
        rows.append([name, f"{model.size:,}", forward, *(f"{ratio:.1f}" for ratio in ratios[1:])])
        rows[-1] += [f"{at.nbytes / cases.count / 1024:.1f} KiB", f"{first:.1f} s"]
        names = [*runs]
    return [["network", "D", *names, "kept a case", "first"], *rows]


def plain_table(repeats):
    """Return the rows of the second table."""
    head = ["network", "D", "examples", "plain gradient", "loss and gradient", "with squared gradients"]
    every = [beside_plain(contestant, repeats) for contestant in chain(in_torch(), in_jax())]
    return [[*head, "with factors", "micro-batches", "size"], *every]


def beside_plain(contestant, repeats):
    """Return a row of the second table."""
    name, data, make, plain = contestant
    model, everything = make(), np.arange(data.count)
    theta = model.initial(0).astype(np.float32)
    risk = hfmpi.DataParallel(model, Communicator(), micro_batch=data.count).on(data, everything)
    owner = hfmpi.DataParallel(model, Communicator())
    in_parts = owner.on(data, everything)
    runs = {
        "plain": plain,
        "gradient": lambda: risk.gradient(theta),
        "squares": lambda: risk.squared_gradients(theta),
        "factors": lambda: risk.factored_gradient(theta),
        "micro-batches": lambda: in_parts.gradient(theta),
    }
    for run in runs.values():
        run()
    found = turns(runs, repeats)
    ratios = np.median(found / found[:, :1], axis=0)[1:]
    row = [name, f"{model.size:,}", str(data.count), f"{1e3 * np.median(found[:, 0]):.2f} ms"]
    return [*row, *(f"{ratio:.2f}" for ratio in ratios), str(owner.local.micro_batch)]


def turns(runs, repeats):
    """Return the seconds (repeats, runs) of runs that are executed in turn."""
    return np.array([[seconds(run) for run in runs.values()] for _ in range(repeats)])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--table", choices=["forward", "plain"])
    options = parser.parse_args()
    print(machine.processor(), machine.versions("numpy", "torch", "jax"))
    for name, table in ("forward", forward_table), ("plain", plain_table):
        if options.table in (None, name):
            head, *rows = table(options.repeats)
            for row in [head, ["---"] * len(head), *rows]:
                print("|", " | ".join(row), "|")
            print()


if __name__ == "__main__":
    main()
