"""The sequential product h W for several numbers of rows: hfmpi's, with W packed once, and BLAS, on one core.

python examples/benchmarks/sequential.py [HIDDEN]

Billions of operations per second, medians of 60 calls in turn.
"""

import os
import sys

os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})

import numpy as np  # noqa: E402

from hfmpi.backends import create  # noqa: E402
from hfmpi.bench.contest import Contestant, contest  # noqa: E402
from hfmpi.measure import machine  # noqa: E402
from hfmpi.parallel.communicator import Communicator  # noqa: E402

CALLS = 20


def main():
    """Print a table: W_h of an LSTM (hidden, 4 hidden) and its transpose."""
    hidden = int(sys.argv[1]) if len(sys.argv) > 1 else 205
    backend, rng = create("numba"), np.random.default_rng(0)
    print(f"{machine.processor()}, {', '.join(machine.blas())}")
    print("| rows | h W, packed | h W, BLAS | a W', packed | a W', BLAS |")
    print("| --- | --- | --- | --- | --- |")
    for rows in (1, 2, 4, 8, 16, 32, 64, 160):
        speeds = []
        for depth, columns in ((hidden, 4 * hidden), (4 * hidden, hidden)):
            a = rng.standard_normal((rows, depth)).astype(np.float32)
            w = rng.standard_normal((depth, columns)).astype(np.float32)
            out = np.empty((rows, columns), np.float32)
            packed = backend.pack(w, backend.new_workspace(), "w")

            def ours(a=a, packed=packed, out=out):
                for _ in range(CALLS):
                    backend.multiply(a, packed, out)

            def blas(a=a, w=w, out=out):
                for _ in range(CALLS):
                    backend.matmul(a, w, out)

            seconds = contest(Communicator(), [Contestant(ours, 1, 1), Contestant(blas, 1, 1)], 60)
            speeds += [CALLS * 2 * rows * depth * columns / s / 1e9 for s in np.median(seconds, axis=1)]
        print(f"| {rows} | " + " | ".join(f"{speed:.0f}" for speed in speeds) + " |")


if __name__ == "__main__":
    main()
