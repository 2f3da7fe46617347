"""Loops over time on a GPU: single launches, CUDA graphs and persistent kernels, for several batch sizes.

    python examples/benchmarks/loops.py [--model lstm] [--batch 1 32 256] [--repeats 7]

Gauss-Newton products and gradients of the gated cells at the paper's size, all in turn within one run. Ratios
are medians of the ratios to the graph within each repetition. All loops must return the same values.
`CupyBackend.persistent_batch` is the largest batch for which the persistent kernel is faster in both.
"""

import argparse

import numpy as np

from hfmpi.backends import create
from hfmpi.bench.contest import Contestant, contest
from hfmpi.data.batches import Sequences
from hfmpi.measure import machine
from hfmpi.networks.network import Network
from hfmpi.objective.data_parallel import DataParallel
from hfmpi.parallel import guard
from hfmpi.parallel.communicator import Communicator
from hfmpi.runs.config import Config

VOCABULARY = 50
LOOPS = ("launches", "graph", "persistent")


def passes(loops, about, text, batch, dtype):
    """Return a backend, and a product and a gradient over a batch on it."""
    backend = create("cupy", dtype)
    backend.captures = loops != "launches"
    backend.persistent_batch = batch if loops == "persistent" else 0
    owner = DataParallel(Network(about, backend), Communicator(), micro_batch=batch)
    theta = backend.to_device(about.initial(0).astype(backend.dtype))
    risk = owner.on(text, np.arange(batch))
    apply = risk.gauss_newton(theta)
    return backend, {"product": lambda: apply(theta), "gradient": lambda: risk.gradient(theta).vector}


def measure(about, length, batch, repeats, dtype):
    """Return the seconds of every pass in every kind of loop."""
    text = np.random.default_rng(0).integers(0, VOCABULARY, length * batch).astype(np.uint8)
    found, expected = {}, {}
    for loops in LOOPS:
        backend, own = passes(loops, about, Sequences(text, length), batch, dtype)
        for kind, run in own.items():
            vector = backend.to_host(run()).astype(np.float64)
            reference = expected.setdefault(kind, vector)
            error = np.linalg.norm(vector - reference) / np.linalg.norm(reference)
            if not error < 1e-4:
                raise SystemExit(f"{loops}: different {kind}, relative difference {error:.1e}")
            found[kind, loops] = run
        if loops == "persistent" and not backend.persistent_batch:
            raise SystemExit("CUDA refuses the cooperative launch")
    contestants = [Contestant(run, 1, 1) for run in found.values()]
    return dict(zip(found, contest(Communicator(), contestants, repeats), strict=True))


def main():
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", nargs="+", default=["lstm", "mlstm"], choices=("lstm", "mlstm"))
    parser.add_argument("--hidden", type=int, default=0, help="units; default: the paper's size")
    parser.add_argument("--length", type=int, default=200)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 32, 64, 128, 256])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--dtype", default="float32", choices=("float32", "float64"))
    given = parser.parse_args()
    print(create("cupy").device, given.dtype, machine.versions("hfmpi", "numpy"), machine.cupy())
    print("| model | units | batch | pass | loops | seconds | times the graph's |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for model in given.model:
        about = Config(model=model, hidden=given.hidden).architecture(VOCABULARY)
        for batch in given.batch:
            seconds = measure(about, given.length, batch, given.repeats, given.dtype)
            for (kind, loops), own in sorted(seconds.items(), key=lambda row: row[0][0], reverse=True):
                ratio = np.median(own / seconds[kind, "graph"])
                print(
                    f"| {model} | {about.hidden} | {batch} | {kind} | {loops} "
                    f"| {np.median(own):.5f} | {ratio:.2f} |",
                    flush=True,
                )


if __name__ == "__main__":
    with guard():
        main()
