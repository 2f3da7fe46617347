"""Eigenvectors of Kronecker factors, and Cholesky factors: on the host, one by one on the device, in batches.

    python examples/benchmarks/decompositions.py [--backend cupy] [--model lstm mlstm] [--repeats 7]

K-FAC decomposes the two factors of every block of theta. Here they are random matrices of the sides that the
factors of a built-in network have, and each contestant decomposes all of them in float32. A batch contains
all matrices of one side: with cuSOLVER's `syevjBatched`, which CuPy calls for stacks, and with
`XsyevBatched`, where the library has it (CUDA 12.6 and later). The Cholesky factors, in float64, are those of
one matrix plus several multiples of the identity, as the subspace step computes them for its dampings.

The host's times include the copies from the device and back. Contestants take turns; times are medians. Each
result is compared with its matrix first. Without a GPU the device is the CPU.
"""

import argparse
import ctypes
from collections import defaultdict

import numpy as np

import hfmpi
from hfmpi.backends import create
from hfmpi.backends.cublas import loaded
from hfmpi.bench.contest import Contestant, contest
from hfmpi.measure import machine
from hfmpi.optim.layout import kronecker_layout
from hfmpi.parallel import guard
from hfmpi.parallel.communicator import Communicator

SYMBOLS = 50


class XsyevBatched:
    """The batched eigendecomposition of cuSOLVER, which CuPy does not offer.

    Raises
    ------
    RuntimeError, AttributeError
        If the library is not loaded, or has no such function.
    """

    VECTORS, LOWER, FLOAT = 1, 0, 0  # cusolverEigMode_t, cublasFillMode_t, cudaDataType

    def __init__(self, backend):
        self.backend, self.library = backend, ctypes.CDLL(loaded("libcusolver"))
        self.work, self.sizes = self.library.cusolverDnXsyevBatched, {}
        self.handle, self.parameters = ctypes.c_void_p(), ctypes.c_void_p()
        self.call("cusolverDnCreate", ctypes.byref(self.handle))
        self.call("cusolverDnSetStream", self.handle, ctypes.c_void_p(backend.stream))
        self.call("cusolverDnCreateParams", ctypes.byref(self.parameters))

    def call(self, name, *arguments):
        """Call a function of the library, which returns 0 unless it fails."""
        status = getattr(self.library, name)(*arguments)
        if status:
            raise RuntimeError(f"{name} reports status {status}")

    def __call__(self, stack):
        """Return the eigenvalues (B, n) and eigenvectors (B, n, n) of symmetric matrices (B, n, n)."""
        xp, (count, n, _) = self.backend.xp, stack.shape
        vectors, values = stack.copy(), xp.empty((count, n), stack.dtype)
        failures = xp.empty(count, np.int32)
        side, kind = ctypes.c_int64(n), self.FLOAT
        problem = (
            self.handle,
            self.parameters,
            self.VECTORS,
            self.LOWER,
            side,
            kind,
            self.pointer(vectors),
            side,
        )
        problem = (*problem, kind, self.pointer(values), kind)
        if stack.shape not in self.sizes:
            sizes = ctypes.c_size_t(), ctypes.c_size_t()
            self.call(
                "cusolverDnXsyevBatched_bufferSize",
                *problem,
                *map(ctypes.byref, sizes),
                ctypes.c_int64(count),
            )
            self.sizes[stack.shape] = tuple(size.value for size in sizes)
        on_device, on_host = self.sizes[stack.shape]
        device, host = xp.empty(max(1, on_device), np.uint8), ctypes.create_string_buffer(max(1, on_host))
        self.call(
            "cusolverDnXsyevBatched", *problem, self.pointer(device), ctypes.c_size_t(on_device), host,
            ctypes.c_size_t(on_host), self.pointer(failures), ctypes.c_int64(count),
        )  # fmt: skip
        return values, vectors.swapaxes(1, 2)  # cuSOLVER stores by columns

    @staticmethod
    def pointer(array):
        """Return the address of an array of the device."""
        return ctypes.c_void_p(array.data.ptr)


def sides(model, parameters):
    """Return the number of Kronecker factors of each side of a network."""
    network = hfmpi.Network(hfmpi.Architecture(model, 1, SYMBOLS, SYMBOLS).of_size(parameters))
    counts = defaultdict(int)
    for views in kronecker_layout(network.blocks).views(np.zeros(kronecker_layout(network.blocks).size)):
        for factor in views.values():
            if factor.ndim > 1:  # a diagonal needs no decomposition
                counts[factor.shape[-1]] += factor.size // factor.shape[-1] ** 2
    return dict(counts)


def symmetric(count, n, dtype, shifts=None):
    """Return random positive definite matrices (count, n, n), or one plus multiples of the identity."""
    x = np.random.default_rng(n).standard_normal((count if shifts is None else 1, n, n + 8))
    matrices = x @ x.swapaxes(1, 2) / n
    if shifts is not None:
        matrices = matrices + np.multiply.outer(shifts, np.eye(n))
    return matrices.astype(dtype)


def eigenvectors(backend, stacks):
    """Return the contestants by name: each returns the eigenvalues and eigenvectors of all stacks."""
    eigh = backend.xp.linalg.eigh

    def of_stack(stack):
        return eigh(stack) if len(stack) > 1 else [part[None] for part in eigh(stack[0])]

    def on_host():
        pairs = [map(np.stack, zip(*map(np.linalg.eigh, backend.to_host(s)), strict=True)) for s in stacks]
        return [tuple(map(backend.to_device, pair)) for pair in pairs]

    def one_by_one():
        return [tuple(map(backend.xp.stack, zip(*(eigh(m) for m in s), strict=True))) for s in stacks]

    runs = {"host": on_host, "one by one": one_by_one, "batched": lambda: [of_stack(s) for s in stacks]}
    try:
        batched = XsyevBatched(backend)
        runs["XsyevBatched"] = lambda: [batched(s) for s in stacks]
    except (AttributeError, RuntimeError) as error:
        print(f"XsyevBatched is left out: {error}")
    for name, run in runs.items():
        for stack, (values, vectors) in zip(stacks, run(), strict=True):
            values, vectors, stack = (
                backend.to_host(part).astype(float) for part in (values, vectors, stack)
            )
            check(name, (vectors * values[:, None]) @ vectors.swapaxes(1, 2), stack, 1e-4)
    return runs


def cholesky(backend, stack):
    """Return the contestants by name: each returns the lower factors of the matrices of a stack."""
    factor = backend.xp.linalg.cholesky
    runs = {
        "host": lambda: backend.to_device(np.stack([np.linalg.cholesky(m) for m in backend.to_host(stack)])),
        "one by one": lambda: backend.xp.stack([factor(m) for m in stack]),
        "batched": lambda: factor(stack),
    }
    for name, run in runs.items():
        lower = np.tril(backend.to_host(run()))
        check(name, lower @ lower.swapaxes(1, 2), backend.to_host(stack), 1e-10)
    return runs


def check(name, product, matrices, tolerance):
    """Stop if the product of the factors is not the matrix."""
    error = np.abs(product - matrices).max() / np.abs(matrices).max()
    if not error < tolerance:
        raise SystemExit(f"{name}: the product of the factors differs from the matrix by {error:.1e}")


def compare(backend, what, runs, repeats):
    """Time the contestants in turn; print a row for each, and which is the fastest."""

    def finished(run):
        def work():
            run()
            backend.synchronize()

        return work

    contestants = [Contestant(finished(run), 1, 1) for run in runs.values()]
    seconds = dict(zip(runs, contest(Communicator(), contestants, repeats), strict=True))
    for name, own in seconds.items():
        ratio = np.median(own / seconds["one by one"])
        print(f"| {what} | {name} | {np.median(own):.6f} | {ratio:.2f} |", flush=True)
    best = min(seconds, key=lambda name: np.median(seconds[name]))
    gain = np.median(seconds["one by one"] / seconds[best])
    return f"{what}: {best} is the fastest, {gain:.2f} times as fast as one by one on the device"


def main():
    """Print a table and a verdict for each comparison."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--model", nargs="+", default=["lstm", "mlstm"], choices=("lstm", "mlstm"))
    parser.add_argument("--parameters", type=int, default=215_000)
    parser.add_argument("--side", nargs="+", type=int, default=[150, 768, 3072], help="of Cholesky factors")
    parser.add_argument("--shifts", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=7)
    given = parser.parse_args()
    backend = create(given.backend, "float32")
    print(backend.device, machine.versions("hfmpi", "numpy"), machine.cupy())
    print("| matrices | contestant | seconds | times one by one |")
    print("|" + " --- |" * 4)
    verdicts = []
    for model in given.model:
        counts = sides(model, given.parameters)
        stacks = [backend.to_device(symmetric(count, n, np.float32)) for n, count in counts.items()]
        what = f"{model}, eigenvectors, {', '.join(f'{count} x {n}' for n, count in counts.items())}"
        verdicts.append(compare(backend, what, eigenvectors(backend, stacks), given.repeats))
    for side in given.side:
        shifts = np.logspace(-4, -1, given.shifts)
        stack = backend.to_device(symmetric(1, side, np.float64, shifts))
        what = f"Cholesky factors, {given.shifts} x {side}"
        verdicts.append(compare(backend, what, cholesky(backend, stack), given.repeats))
    for verdict in verdicts:
        print(f"Verdict: {verdict}")


if __name__ == "__main__":
    with guard():
        main()
