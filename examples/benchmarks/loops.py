"""Loops over time on a GPU: single launches, graphs, persistent kernels and clusters, for several batches.

    python examples/benchmarks/loops.py [--model lstm] [--batch 1 32 256] [--loops graph clusters-16]

Gauss-Newton products and gradients of the gated cells at the paper's size. The kinds of loops take turns
within one run, and ratios are medians of the ratios to the graph within each repetition. All must compute the
same numbers. `clusters-16` and `clusters-8` run on clusters of this many thread blocks, on GPUs that have
them. A product and a gradient have two loops each: microseconds a step are the time of the pass over twice
the length. The batch up to which the persistent kernel is faster in both passes is
`CupyBackend.persistent_batch`; that of clusters is `CupyBackend.cluster_batch`.
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
PASSES = "product", "gradient"
LOOPS = ("launches", "graph", "persistent", "clusters-16", "clusters-8")


def passes(loops, about, text, batch, dtype):
    """Return a backend, and a product and a gradient over a batch on it."""
    backend = create("cupy", dtype)
    backend.captures = loops != "launches"
    backend.persistent_batch = batch if loops == "persistent" else 0
    if loops.startswith("clusters"):
        backend.cluster_batch, backend.cluster_blocks = batch, int(loops.partition("-")[2])
    owner = DataParallel(Network(about, backend), Communicator(), micro_batch=batch)
    theta = backend.to_device(about.initial(0).astype(backend.dtype))
    risk = owner.on(text, np.arange(batch))
    apply = risk.gauss_newton(theta)
    return backend, {"product": lambda: apply(theta), "gradient": lambda: risk.gradient(theta).vector}


def measure(about, length, batch, repeats, dtype, kinds):
    """Return the seconds of every pass in every kind of loop that the GPU can run."""
    text = np.random.default_rng(0).integers(0, VOCABULARY, length * batch).astype(np.uint8)
    found, expected = {}, {}
    for loops in kinds:
        backend, own = passes(loops, about, Sequences(text, length), batch, dtype)
        if loops.startswith("clusters") and not backend.clusters.fit(about.hidden, about.cell.multiplicative):
            print(f"{loops} is left out: {about.hidden} units do not fit, or the GPU has no clusters")
            continue
        for kind, run in own.items():
            vector = backend.to_host(run()).astype(np.float64)
            reference = expected.setdefault(kind, vector)
            error = np.linalg.norm(vector - reference) / np.linalg.norm(reference)
            if not error < 1e-4:
                raise SystemExit(f"{loops}: the {kind} differs from that of {kinds[0]} by {error:.1e}")
            found[kind, loops] = run
        if loops == "persistent" and not backend.persistent_batch:
            raise SystemExit("CUDA refuses the cooperative launch")
        if loops.startswith("clusters") and not backend.cluster_batch:
            print(f"{loops} is left out: CUDA refuses the launch")
            del found["product", loops], found["gradient", loops]
    contestants = [Contestant(run, 1, 1) for run in found.values()]
    return dict(zip(found, contest(Communicator(), contestants, repeats), strict=True))


def main():
    """Print a table, and a verdict for each network and batch."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", nargs="+", default=["lstm", "mlstm"], choices=("lstm", "mlstm"))
    parser.add_argument("--hidden", type=int, default=0, help="units; default: the paper's size")
    parser.add_argument("--length", type=int, default=200)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 32, 64, 128, 256])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--loops", nargs="+", default=LOOPS, choices=LOOPS, help="must have graph")
    parser.add_argument("--dtype", default="float32", choices=("float32", "float64"))
    given = parser.parse_args()
    if "graph" not in given.loops:
        parser.error("--loops must have graph, to which the others are compared")
    print(create("cupy").device, given.dtype, machine.versions("hfmpi", "numpy"), machine.cupy())
    print("| model | units | batch | pass | loops | seconds | times graph | microseconds a step |")
    print("|" + " --- |" * 8)
    verdicts = []
    for model in given.model:
        about = Config(model=model, hidden=given.hidden).architecture(VOCABULARY)
        for batch in given.batch:
            seconds = measure(about, given.length, batch, given.repeats, given.dtype, given.loops)
            for (kind, loops), own in sorted(seconds.items(), key=lambda row: row[0][0], reverse=True):
                ratio = np.median(own / seconds[kind, "graph"])
                print(
                    f"| {model} | {about.hidden} | {batch} | {kind} | {loops} "
                    f"| {np.median(own):.5f} | {ratio:.2f} | {np.median(own) / given.length * 5e5:.2f} |",
                    flush=True,
                )
            verdicts += [f"{model}, batch {batch}, {kind}: {verdict(seconds, kind)}" for kind in PASSES]
    for line in verdicts:
        print(f"Verdict: {line}")


def verdict(seconds, kind):
    """Return which kind of loop is the fastest, and by how much."""
    own = {loops: times for (each, loops), times in seconds.items() if each == kind}
    first, *others = sorted(own, key=lambda loops: np.median(own[loops]))
    ratios = (f"{loops} takes {np.median(own[loops] / own[first]):.2f} times as long" for loops in others)
    return ", ".join([f"{first} is the fastest", *ratios])


if __name__ == "__main__":
    with guard():
        main()
