"""The time of a Gauss-Newton product by batch size: flat while the machine is not full, then linear.

    python examples/benchmarks/batches.py [--backend cupy] [--most 16384] [--repeats 7] [--out batches.png]

The paper's P_I assumes that the cost of a product does not depend on its batch (the flat part), P_D that it
is proportional to the batch (the linear part). The knee is the batch at which both lines meet: the time of
one sequence, divided by the additional time per sequence at the largest batches. `fraction` is the share of
the time that the matrix products alone would take.
"""

import argparse
import json

from hfmpi.backends import create
from hfmpi.bench.measurements import Bench, products
from hfmpi.measure import machine
from hfmpi.parallel.communicator import Communicator
from hfmpi.parallel.placement import place
from hfmpi.runs.config import Config

VOCABULARY = 50


def sweep(model, most, repeats, backend, precision):
    """Return a row for every batch 1, 2, 4, ... up to the maximum, each processed as one micro-batch."""
    about = Config(model=model).architecture(VOCABULARY)
    batch, rows = 1, []
    while batch <= most:
        bench = Bench(
            Communicator(), backend=backend, precision=precision, micro_batch=batch, repeats=repeats
        )
        rows += products(bench, about, batch)
        batch *= 2
    return rows


def knee(rows):
    """Return the batch at which the flat and the linear part meet."""
    a, b = rows[-2:]
    return rows[0]["seconds"] / ((b["seconds"] - a["seconds"]) / (b["batch"] - a["batch"]))


def draw(models, title, path):
    """Draw the time, the bound and the knee of each model."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 4), layout="constrained")
    for (model, rows), marker in zip(models.items(), "os", strict=False):
        sizes = [row["batch"] for row in rows]
        (line,) = axes.loglog(sizes, [row["seconds"] for row in rows], marker=marker, label=model)
        axes.loglog(
            sizes,
            [row["bound_seconds"] for row in rows],
            linestyle="--",
            color=line.get_color(),
            label=f"{model}, matrix products alone",
        )
        axes.axvline(knee(rows), linestyle=":", color=line.get_color(), label=f"knee {knee(rows):,.0f}")
    axes.set(xlabel="sequences", ylabel="seconds per product", title=title)
    axes.legend()
    figure.savefig(path, dpi=150)


def main():
    """Print a table, or one JSON object; draw the figure if --out is set."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", action="append", choices=("lstm", "mlstm"))
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--matmul-precision", default="float32")
    parser.add_argument("--most", type=int, default=16384)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--out", help="file name of the figure")
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    place(Communicator(), 1)
    backend, precision = given.backend, given.matmul_precision
    device = create(backend, precision=precision).device
    where = machine.processor() if device == "CPU" else device
    models = {
        model: sweep(model, given.most, given.repeats, backend, precision)
        for model in given.model or ["lstm", "mlstm"]
    }
    if given.out:
        draw(models, where, given.out)
    if given.json:
        print(json.dumps({"device": where, "models": models}))
        return
    print(where, machine.versions("hfmpi", "numpy", "numba"), machine.cupy() if device != "CPU" else "")
    for model, rows in models.items():
        print(f"\n{model}, {rows[0]['hidden']} units, {precision}: knee at {knee(rows):,.0f} sequences")
        print("| batch | seconds | seconds a sequence | products alone | fraction |")
        print("| --- | --- | --- | --- | --- |")
        for row in rows:
            print(
                f"| {row['batch']} | {row['seconds']:.5f} | {row['seconds'] / row['batch']:.6f} "
                f"| {row['bound_seconds']:.5f} | {1 / row['ratio']:.2f} |"
            )


if __name__ == "__main__":
    main()
