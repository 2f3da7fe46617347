"""The cost of `--slices`: the same bits on any number of ranks, compared with sums in any order.

    mpirun -n 2 python examples/benchmarks/slices.py [--model mlstm] [--batch 32 320] [--slices 2 8 32]

Gauss-Newton products and gradients, all in turn within one run; the ratio is the median of the ratios to the
pass without slices within each repetition. Small slices have fewer rows for each matrix product, and their
sums are vectors that must be added.
"""

import argparse

import numpy as np

from hfmpi.backends import create
from hfmpi.bench.contest import Contestant, contest
from hfmpi.data.batches import Sequences
from hfmpi.measure import machine
from hfmpi.networks.network import Network
from hfmpi.objective.data_parallel import DataParallel
from hfmpi.parallel import connect, guard
from hfmpi.parallel.placement import place
from hfmpi.runs.config import Config

LENGTH, VOCABULARY = 200, 50


def passes(comm, about, batch, slices):
    """Return a product and a gradient over a batch that is divided into this number of slices."""
    text = np.random.default_rng(0).integers(0, VOCABULARY, LENGTH * batch).astype(np.uint8)
    owner = DataParallel(Network(about, create("auto", local_rank=comm.local_rank)), comm, slices=slices)
    backend = owner.model.backend
    theta = backend.to_device(about.initial(0).astype(backend.dtype))
    risk = owner.on(Sequences(text, LENGTH), np.arange(batch))
    apply = risk.gauss_newton(theta)
    return {"product": lambda: apply(theta), "gradient": lambda: risk.gradient(theta)}


def main():
    """Print the table on rank 0."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", default="mlstm")
    parser.add_argument("--batch", type=int, nargs="+", default=[32, 320])
    parser.add_argument("--slices", type=int, nargs="+", default=[2, 8, 32])
    parser.add_argument("--repeats", type=int, default=7)
    given = parser.parse_args()
    comm = connect()
    place(comm, 1)
    about = Config(model=given.model).architecture(VOCABULARY)
    if comm.rank == 0:
        print(f"{machine.processor()}, {comm.size} rank(s), {given.model} of {about.hidden} units")
        print("| batch | pass | slices | seconds | ratio |\n| --- | --- | --- | --- | --- |")
    for batch in given.batch:
        runs = {
            (kind, slices): run
            for slices in (0, *given.slices)
            for kind, run in passes(comm, about, batch, slices).items()
        }
        contestants = [Contestant(run, comm.size, 1) for run in runs.values()]
        seconds = dict(zip(runs, contest(comm, contestants, given.repeats), strict=True))
        for (kind, slices), own in sorted(seconds.items()):
            if comm.rank == 0:
                ratio = np.median(own / seconds[kind, 0])
                print(f"| {batch} | {kind} | {slices or 'off'} | {np.median(own):.4f} | {ratio:.2f} |")
    comm.close()


if __name__ == "__main__":
    with guard():
        main()
