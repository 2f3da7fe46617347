"""Compare hfmpi with JAX and PyTorch on one core or one GPU: Gauss-Newton products, and loss with gradient.

    pip install -e ".[peers]"
    python examples/benchmarks/compare.py [--model lstm|mlstm] [--batch 32] [--repeats 7] [--json] [--gpu]

All use the same network, text and direction, in turn within this process, which is bound to one core; first
it is checked that their results agree. Ratios are medians of the ratios to hfmpi within each repetition.
`products alone` is the bound: only the matrix products of hfmpi's pass. With --gpu all use the first GPU, in
float32 without TF32: hfmpi through CuPy, JAX and PyTorch in their CUDA builds (PyTorch with cuDNN off for
products, because cuDNN's networks have no second derivative).
"""

import argparse
import json
import os
import sys

GPU = "--gpu" in sys.argv
CORE = max(os.sched_getaffinity(0))
if GPU:
    os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"  # the GPU is shared with the other libraries
else:
    os.sched_setaffinity(0, {CORE})  # before the libraries count the cores
    os.environ["XLA_FLAGS"] = "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"

import numpy as np  # noqa: E402

from hfmpi.backends import create  # noqa: E402
from hfmpi.bench.bound import Recording  # noqa: E402
from hfmpi.bench.contest import Contestant, contest  # noqa: E402
from hfmpi.data.batches import Sequences  # noqa: E402
from hfmpi.measure import machine  # noqa: E402
from hfmpi.networks.network import Network  # noqa: E402
from hfmpi.objective.data_parallel import DataParallel  # noqa: E402
from hfmpi.parallel.communicator import Communicator  # noqa: E402
from hfmpi.runs.config import Config  # noqa: E402

LENGTH, VOCABULARY = 200, 50


def peers(about, theta, batch):
    """Create the contestants that are installed and have this cell: name -> (object, products, gradient)."""
    found = {}
    try:
        import with_jax

        if with_jax.has_gpu() == GPU:
            jax = with_jax.Contestant(about, theta, batch.inputs.T, batch.targets.T)
            found[with_jax.NAME] = jax, jax.product, jax.gradient
        else:
            print(f"JAX {'has no' if GPU else 'would use the'} GPU: left out")
    except ImportError:
        print("JAX is not installed")
    try:
        import with_torch

        if about.name == "lstm":
            torch = with_torch.Contestant(
                about, theta, batch.inputs.T, batch.targets.T, "cuda" if GPU else "cpu"
            )
            found[with_torch.NAME] = torch, torch.product, torch.gradient
            found[f"{with_torch.NAME}, graph kept"] = torch, torch.product_on_kept_graph, None
    except ImportError:
        print("PyTorch is not installed")
    return found


def same(name, found, expected, tolerance):
    """Exit unless two vectors agree: a contestant must compute the same."""
    error = np.linalg.norm(found - expected) / np.linalg.norm(expected)
    if not error < tolerance:
        raise SystemExit(f"{name} computes a different result: relative difference {error:.1e}")


def measure(model, batch_size, repeats):
    """Return one row per contestant and pass."""
    about = Config(model=model).architecture(VOCABULARY)
    rng = np.random.default_rng(0)
    text = Sequences(rng.integers(0, VOCABULARY, LENGTH * batch_size).astype(np.uint8), LENGTH)
    theta = about.initial(0).astype(np.float32)
    v = rng.standard_normal(theta.size).astype(np.float32)
    backend = create("cupy" if GPU else "numba", mixin=Recording)
    network, own_theta, own_v = Network(about, backend), backend.to_device(theta), backend.to_device(v)
    micro_batch = batch_size if GPU else None  # the others process the full batch at once
    risk = DataParallel(network, Communicator(), micro_batch=micro_batch).on(text, np.arange(batch_size))
    apply = risk.gauss_newton(own_theta)
    passes = {"product": lambda: apply(own_v), "gradient": lambda: risk.gradient(own_theta)}
    expected = {"product": passes["product"](), "gradient": passes["gradient"]().vector}
    expected = {kind: backend.to_host(vector) for kind, vector in expected.items()}
    contestants, names = [], []
    for kind, run in passes.items():
        with backend.recorded() as alone:
            run()
        contestants += [run, alone.repeat]
        names += [(kind, "hfmpi"), (kind, "products alone")]
    for name, (peer, product, gradient) in peers(about, theta, text.take(np.arange(batch_size))).items():
        w = peer.vector(v)
        try:
            same(name, peer.flat(product(w)), expected["product"], 1e-3)
            if gradient:
                same(name, peer.flat(gradient()[1]), expected["gradient"], 1e-3)
        except RuntimeError as error:  # raised by both libraries on a GPU
            if "out of memory" not in str(error).lower():
                raise
            print(f"{name}: out of memory with {batch_size} sequences, left out", file=sys.stderr)
            continue
        contestants.append(lambda product=product, w=w: product(w))
        names.append(("product", name))
        if gradient:
            contestants.append(gradient)
            names.append(("gradient", name))
    seconds = contest(Communicator(), [Contestant(run, 1, 1) for run in contestants], repeats)
    rows = []
    for (kind, name), own in sorted(
        zip(names, seconds, strict=True), key=lambda row: row[0][0], reverse=True
    ):
        ours = seconds[names.index((kind, "hfmpi"))]
        rows.append(
            {"pass": kind, "contestant": name, "model": model, "hidden": about.hidden, "batch": batch_size}
            | {"seconds": float(np.median(own)), "times_hfmpi": float(np.median(own / ours))}
        )
    return rows


def main():
    """Print a table, or one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", action="append", choices=("lstm", "mlstm"))
    parser.add_argument("--batch", action="append", type=int)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--gpu", action="store_true", help="use the first GPU instead of one core")
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    about = {"processor": machine.processor(), "blas": machine.blas(), "core": CORE}
    about |= {"versions": machine.versions("hfmpi", "numpy", "numba", "jax", "torch")}
    if GPU:
        about |= {"device": create("cupy").device, "cupy": machine.cupy()}
    rows = (
        row
        for model in given.model or ["lstm", "mlstm"]
        for batch in given.batch or [32, 320]
        for row in measure(model, batch, given.repeats)
    )
    if given.json:
        print(json.dumps({"machine": about, "rows": [*rows]}))
        return
    print(about)
    print("| pass | model | batch | contestant | seconds | times hfmpi |")
    print("| --- | --- | --- | --- | --- | --- |")
    for row in rows:
        print(
            f"| {row['pass']} | {row['model']} | {row['batch']} | {row['contestant']} "
            f"| {row['seconds']:.4f} | {row['times_hfmpi']:.2f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
