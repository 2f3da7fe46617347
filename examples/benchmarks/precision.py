"""Compare Hessian-free steps in float32 and with tf32 products with steps in float64.

    python examples/benchmarks/precision.py kjv.h5 [--model mlstm] [--optimizer bhf] [--backend cupy] ...

Three runs have the same start and batches. In addition, every step of the float32 run is repeated in float64
and in tf32, from the same theta, lambda and start of CG: the second table shows the difference of each from
float64. With `--backend cupy` the tf32 products are those of the GPU. Without it they are products on the CPU
with factors rounded as in the tensor cores: to 10 bits, sums in float32 (NVIDIA, PTX manual, cvt.rna.tf32).
This reproduces the rounding of the hardware, but not its speed or its order of sums.
"""

import argparse
import dataclasses
import math
import sys

import numpy as np

from hfmpi.backends import create
from hfmpi.backends.numba import NumbaBackend
from hfmpi.data.batches import Sequences, check_batch
from hfmpi.data.corpus import Corpus
from hfmpi.measure import machine
from hfmpi.networks.network import Network
from hfmpi.objective.data_parallel import DataParallel, step_objectives
from hfmpi.parallel import guard
from hfmpi.parallel.communicator import Communicator
from hfmpi.parallel.placement import place
from hfmpi.runs.config import Config

DROPPED = 23 - 10  # bits of a float32's mantissa that a factor loses


def to_tf32(array):
    """Round float32 to a mantissa of 10 bits, halves away from zero; infinity and NaN are unchanged."""
    bits = np.ascontiguousarray(array).view(np.uint32)
    rounded = (bits + np.uint32(1 << (DROPPED - 1))) & np.uint32(-1 << DROPPED & 0xFFFFFFFF)
    return np.where(np.isfinite(array), rounded.view(np.float32), array)


class RoundedFactors(NumbaBackend):
    """The Numba backend with the factors of all matrix products rounded."""

    def matmul(self, a, b, out):
        super().matmul(to_tf32(a), to_tf32(b), out)

    def pack(self, matrix, memory, name):
        return super().pack(to_tf32(matrix), memory, name)

    def multiply(self, a, b, out, add=False):
        super().multiply(to_tf32(a), b, out, add)


def make_backend(name, precision):
    """Return the backend of this name that computes in float64, float32 or tf32."""
    if precision == "tf32" and create(name).name != "cupy":
        return RoundedFactors("float32")
    dtype, products = ("float64", "float32") if precision == "float64" else ("float32", precision)
    return create(name, dtype, precision=products)


class Contestant:
    """A run in one precision."""

    def __init__(self, precision, given, config, corpus):
        self.seed, self.preset = config.seed, config.preset()
        self.backend = make_backend(given.backend, precision)
        about = config.architecture(corpus.vocabulary)
        self.risk = DataParallel(Network(about, self.backend), Communicator())
        self.sequences = Sequences(corpus.train, config.sequence_length)
        check_batch(self.preset.gradient_batch, self.sequences.count)
        initial = about.initial(config.seed, config.initialisation, config.forget_bias)
        self.theta = self.backend.to_device(initial.astype(self.backend.dtype))
        self.state = self.preset.optimizer.init(self.theta)

    def take(self, step, theta, state):
        """Compute a step without changing the run; return theta, state and report after it."""
        sizes = self.preset.gradient_batch, self.preset.curvature_batch
        objectives = step_objectives(self.risk, self.sequences, self.seed, step, *sizes)
        return self.preset.optimizer.step(theta, state, objectives)

    def go(self, step):
        """Take the next step; return its report and the change of theta, in float64 on the host."""
        before = self.theta
        self.theta, self.state, report = self.take(step, before, self.state)
        return report, self._moved(before, self.theta)

    def instead_of(self, other, step):
        """Compute the step that `other` takes next; return the report and the change of theta."""
        theta, state = self._own(other, other.theta), other.state
        state = dataclasses.replace(state, direction=self._own(other, state.direction))
        after, _, report = self.take(step, theta, state)
        return report, self._moved(theta, after)

    def _own(self, other, vector):
        return self.backend.to_device(other.backend.to_host(vector).astype(self.backend.dtype))

    def _moved(self, before, after):
        before, after = (self.backend.to_host(v).astype(np.float64) for v in (before, after))
        return after - before


def median(values):
    """Return the median of the values that are numbers."""
    values = [v for v in values if v is not None and math.isfinite(v)]
    return float(np.median(values)) if values else math.nan


def compare(reports, moved, references, reference_moved):
    """Compare steps with the same steps in float64: medians over the steps, and the largest angle."""
    both = list(zip(reports, references, strict=True))
    angles = [
        math.degrees(math.acos(min(1.0, a @ b / (np.linalg.norm(a) * np.linalg.norm(b)))))
        for a, b in zip(moved, reference_moved, strict=True)
        if a.any() and b.any()
    ]
    ratio = [a.work.cg_steps / b.work.cg_steps for a, b in both if b.work.cg_steps]
    rhos = [(a.details["rho"], b.details["rho"]) for a, b in both]
    rho = [abs(a - b) for a, b in rhos if a is not None and b is not None]
    return median(ratio), median(rho), max(rho), median(angles), max(angles)


def main():
    """Train, and print a line per step and both tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("data")
    parser.add_argument("--model", default="mlstm")
    parser.add_argument("--optimizer", default="bhf", choices=("shf", "bhf", "bhf-short"))
    parser.add_argument("--parameters", type=int, default=0, help="default: the paper's")
    parser.add_argument("--gradient-batch", type=int, default=0, help="default: the optimizer's")
    parser.add_argument("--curvature-batch", type=int, default=0, help="default: the optimizer's")
    parser.add_argument("--sequence-length", type=int, default=200)
    parser.add_argument("--damping", type=float, help="initial lambda; default: the optimizer's")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--backend", default="auto")
    given = parser.parse_args()
    place(Communicator(), 1)
    config = Config(
        model=given.model,
        optimizer=given.optimizer,
        parameters=given.parameters,
        gradient_batch=given.gradient_batch,
        curvature_batch=given.curvature_batch,
        sequence_length=given.sequence_length,
        settings={} if given.damping is None else {"damping": given.damping},
    )
    corpus = Corpus.read(given.data)
    runs = {p: Contestant(p, given, config, corpus) for p in ("float64", "float32", "tf32")}
    single = runs["float32"]
    own = {p: [] for p in runs}
    same = {p: [] for p in runs}
    for step in range(given.steps):
        for precision, run in runs.items():
            if run is not single:
                same[precision].append(run.instead_of(single, step))
        for precision, run in runs.items():
            report, moved = run.go(step)
            own[precision].append(report)
            if run is single:
                same[precision].append((report, moved))
            shown = report.details
            print(
                f"step {step + 1:3d} {precision:>7}  bits/char {report.loss / math.log(2):.4f}  "
                f"cg {shown['cg_steps']:3d}  rho {shown['rho']}  lambda {shown['damping']:.2e}",
                file=sys.stderr,
                flush=True,
            )

    device = single.backend.device
    print(machine.processor() if device == "CPU" else device, machine.versions("hfmpi", "numpy", "numba"))
    sizes = single.preset
    print(
        f"{given.model} of {single.theta.size:,} parameters, {given.optimizer}, batches of "
        f"{sizes.gradient_batch:,} and {sizes.curvature_batch:,} sequences of {given.sequence_length}\n"
    )
    print("| products in | bits/char | CG iterations | a step | median rho | last lambda | rejected |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for precision, reports in own.items():
        iterations = [r.work.cg_steps for r in reports]
        print(
            f"| {precision} | {reports[-1].loss / math.log(2):.4f} | {sum(iterations):,} "
            f"| {np.mean(iterations):.1f} | {median([r.details['rho'] for r in reports]):.3f} "
            f"| {reports[-1].details['damping']:.2e} | {sum(not r.accepted for r in reports)} |"
        )
    print(
        "\n| products in | iterations over float64's | rho off by | at most | angle to its step | at most |"
    )
    print("| --- | --- | --- | --- | --- | --- |")
    reference = [list(column) for column in zip(*same["float64"], strict=True)]
    for precision in ("float32", "tf32"):
        taken = [list(column) for column in zip(*same[precision], strict=True)]
        ratio, rho, most, angle, widest = compare(*taken, *reference)
        print(f"| {precision} | {ratio:.2f} | {rho:.1e} | {most:.1e} | {angle:.2g}° | {widest:.2g}° |")


if __name__ == "__main__":
    with guard():
        main()
