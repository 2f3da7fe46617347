"""How many gradients the steps of optimizers take, in wall-clock time, on a GPU or a CPU.

    python examples/benchmarks/steps.py [--backend cupy] [--network lstm] [--methods muon subspace ...]

Networks: a built-in LSTM or mLSTM of the paper's size on random symbols, or a multilayer perceptron (mlp) of
a million parameters in PyTorch, on the GPU if there is one. A method has the batches of its preset, at most
--examples. The first --warm-up steps are not timed: until then the subspace step has fewer directions.
Gradients and steps take turns, and the ratio is the median over turns. Times are wall-clock times, and a step
ends when its parameters are on the host.
"""

import argparse
from time import perf_counter

import numpy as np
from directions import INPUTS, OUTPUTS, VOCABULARY, built_in, perceptron

import hfmpi
from hfmpi.backends import create
from hfmpi.cli.values import parse_settings
from hfmpi.data.batches import Sequences
from hfmpi.measure import machine
from hfmpi.objective.data_parallel import step_objectives
from hfmpi.optim.presets import PRESETS, preset
from hfmpi.parallel import guard
from hfmpi.parallel.communicator import Communicator

METHODS = "sgd", "muon", "soap", "subspace", "subspace-whole"


def problem(name, given):
    """Return a model, and random data of --examples examples."""
    rng, count = np.random.default_rng(0), given.examples
    if name == "mlp":
        model, _ = perceptron(given.width, 2)
        x = rng.standard_normal((count, INPUTS)).astype(np.float32)
        return model, hfmpi.Examples(x, rng.integers(0, OUTPUTS, count))
    model, _ = built_in(name, given.hidden, given.length, 2, create(given.backend, "float32"))
    symbols = rng.integers(0, VOCABULARY, count * given.length).astype(np.uint8)
    return model, Sequences(symbols, given.length)


def measure(model, data, chosen, warm_up, repeats):
    """Return the seconds of a gradient and of a step in each turn, and the reports of the steps."""
    optimizer, backend = chosen.optimizer, model.backend
    batch = min(chosen.gradient_batch, data.count)
    curvature = min(chosen.curvature_batch, batch)
    owner = hfmpi.DataParallel(model, Communicator())
    theta = backend.to_device(model.initial(0).astype(np.float32))
    state = optimizer.init(theta, model.blocks)
    turns, reports = [], []

    def timed(work):
        start = perf_counter()
        found = work()
        backend.to_host(found)
        return perf_counter() - start

    def gradient():
        return step_objectives(owner, data, 0, 0, batch, 0).gradient.gradient(theta).vector

    def step():
        nonlocal theta, state
        objectives = step_objectives(owner, data, 0, len(reports), batch, curvature)
        theta, state, report = optimizer.step(theta, state, objectives)
        reports.append(report)
        return theta

    for turn in range(warm_up + repeats):
        both = timed(gradient), timed(step)
        if turn >= warm_up:
            turns.append(both)
    return np.array(turns).T, reports[warm_up:], batch


def main():
    """Print a table, and a verdict for each network."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--backend", default="auto", help="of the built-in networks")
    parser.add_argument("--network", nargs="+", default=["lstm", "mlstm"], choices=("lstm", "mlstm", "mlp"))
    parser.add_argument("--methods", nargs="+", default=METHODS, choices=PRESETS)
    parser.add_argument(
        "--set", action="append", default=[], metavar="NAME=VALUE", help="setting of all methods"
    )
    parser.add_argument("--examples", type=int, default=14_000)
    parser.add_argument("--hidden", type=int, default=0, help="units; default: those of the paper's size")
    parser.add_argument("--width", type=int, default=700, help="units of a layer of mlp")
    parser.add_argument("--length", type=int, default=200)
    parser.add_argument("--warm-up", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=5)
    given = parser.parse_args()
    device = create(given.backend, "float32").device
    print(device, machine.versions("hfmpi", "numpy", "torch"), machine.cupy())
    heads = "network", "parameters", "method", "batch", "directions", "gradient, s", "step, s", "gradients"
    print(f"| {' | '.join(heads)} | accepted |")
    print("|" + " --- |" * 9)
    verdicts = []
    for name in given.network:
        model, data = problem(name, given)
        ratios = {}
        for method in given.methods:
            chosen = preset(method, **parse_settings(given.set))
            (gradient, step), reports, batch = measure(model, data, chosen, given.warm_up, given.repeats)
            ratios[method] = float(np.median(step / gradient))
            directions = max(report.work.directions for report in reports)
            accepted = sum(report.accepted for report in reports)
            print(
                f"| {name} | {model.size:,} | {method} | {batch:,} | {directions} "
                f"| {np.median(gradient):.5f} | {np.median(step):.5f} | {ratios[method]:.2f} "
                f"| {accepted} of {len(reports)} |",
                flush=True,
            )
        parts = ", ".join(
            f"{method} {ratio:.1f}" for method, ratio in sorted(ratios.items(), key=lambda r: r[1])
        )
        verdicts.append(f"{name}: gradients that a step takes: {parts}")
    for verdict in verdicts:
        print(f"Verdict: {verdict}")


if __name__ == "__main__":
    with guard():
        main()
