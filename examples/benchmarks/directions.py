"""J V of many directions: as one pass, in parts, and as one pass for each direction.

    python examples/benchmarks/directions.py [--backend cupy] [--network lstm mlstm mlp] [--directions 100]

The subspace step needs J V of some 100 directions on a small batch. J has the derivatives of the outputs of a
network: a built-in LSTM or mLSTM of the paper's size, or a multilayer perceptron (mlp) in PyTorch, on the GPU
if there is one. Times are medians; the contestants take turns. All must compute the same numbers.
"""

import argparse

import numpy as np

import hfmpi
from hfmpi.backends import create
from hfmpi.bench.contest import Contestant, contest
from hfmpi.data.batches import Sequences
from hfmpi.measure import machine
from hfmpi.networks.network import Network
from hfmpi.parallel import guard
from hfmpi.parallel.communicator import Communicator
from hfmpi.runs.config import Config

VOCABULARY = 50
INPUTS, OUTPUTS = 64, 10  # of the multilayer perceptron


def built_in(model, hidden, length, batch, backend):
    """Return a built-in network of the paper's size, and a batch of random sequences."""
    about = Config(model=model, hidden=hidden).architecture(VOCABULARY)
    symbols = np.random.default_rng(0).integers(0, VOCABULARY, length * batch).astype(np.uint8)
    return Network(about, backend), Sequences(symbols, length).take(np.arange(batch))


def perceptron(width, batch):
    """Return a model of PyTorch with three hidden layers, and a batch of random examples."""
    import torch
    from torch import nn

    torch.manual_seed(0)
    layers = [(INPUTS, width), (width, width), (width, width)]
    modules = [module for pair in layers for module in (nn.Linear(*pair), nn.Tanh())]
    module = nn.Sequential(*modules, nn.Linear(width, OUTPUTS)).to(hfmpi.device())
    rng = np.random.default_rng(0)
    x = rng.standard_normal((batch, INPUTS)).astype(np.float32)
    data = hfmpi.Examples(x, rng.integers(0, OUTPUTS, batch))
    return hfmpi.TorchModel(module, "cross-entropy"), data.take(np.arange(batch))


def measure(model, batch, count, part, repeats):
    """Return the seconds of every way to compute J V, and the number of parameters."""
    backend = model.backend
    theta = backend.to_device(model.initial(0).astype(np.float32))
    rng = np.random.default_rng(1)
    directions = backend.to_device(rng.standard_normal((count, theta.size)).astype(np.float32))
    at = model.linearise(theta, batch)

    def in_parts(most):
        def run():
            at.directions = most
            tangents = at.jvp(directions)
            backend.synchronize()
            return tangents.reshape(-1, count, tangents.shape[1])

        return run

    def single():
        tangents = at.jvp(directions[0])
        backend.synchronize()
        return tangents[:, None]

    def one_by_one():
        for v in directions:
            at.jvp(v)
        backend.synchronize()

    ways = {"one direction": single, f"{count} as one pass": in_parts(count)}
    ways |= {f"{count} in parts of {part}": in_parts(part), f"{count} passes of one": one_by_one}
    expected = np.array(backend.to_host(single()))
    for name in list(ways)[1:3]:
        found = backend.to_host(ways[name]())[:, :1]
        error = np.linalg.norm(found - expected) / np.linalg.norm(expected)
        if not error < 1e-4:
            raise SystemExit(f"{name}: J V differs from J v by {error:.1e}")
    contestants = [Contestant(run, 1, 1) for run in ways.values()]
    return dict(zip(ways, contest(Communicator(), contestants, repeats), strict=True)), theta.size


def main():
    """Print a table, and a verdict for each network."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--backend", default="auto", help="of the built-in networks")
    parser.add_argument("--network", nargs="+", default=["lstm", "mlstm"], choices=("lstm", "mlstm", "mlp"))
    parser.add_argument("--directions", type=int, default=100)
    parser.add_argument("--part", type=int, default=16, help="directions of a part")
    parser.add_argument("--batch", nargs="+", type=int, default=[32, 128], help="sequences or examples")
    parser.add_argument("--hidden", type=int, default=0, help="units; default: those of the paper's size")
    parser.add_argument(
        "--width", type=int, default=700, help="units of a layer of mlp; 700: a million parameters"
    )
    parser.add_argument("--length", type=int, default=200)
    parser.add_argument("--repeats", type=int, default=7)
    given = parser.parse_args()
    backend = create(given.backend, "float32")
    print(backend.device, machine.versions("hfmpi", "numpy", "torch"), machine.cupy())
    print("| network | parameters | batch | J V | seconds | times one direction |")
    print("|" + " --- |" * 6)
    verdicts = []
    for name in given.network:
        for size in given.batch:
            model, batch = (
                perceptron(given.width, size)
                if name == "mlp"
                else built_in(name, given.hidden, given.length, size, backend)
            )
            seconds, parameters = measure(model, batch, given.directions, given.part, given.repeats)
            single, whole, parts, each = seconds.values()
            for way, own in seconds.items():
                print(
                    f"| {name} | {parameters:,} | {size} | {way} "
                    f"| {np.median(own):.6f} | {np.median(own / single):.2f} |",
                    flush=True,
                )
            verdicts.append(
                f"{name}, batch {size}: {given.directions} directions as one pass take "
                f"{np.median(whole / single):.1f} times the time of one direction, "
                f"{np.median(whole / parts):.2f} times that of parts of {given.part} and "
                f"{np.median(whole / each):.2f} times that of {given.directions} passes"
            )
    for verdict in verdicts:
        print(f"Verdict: {verdict}")


if __name__ == "__main__":
    with guard():
        main()
