"""The linear algebra of a step in units of forward passes, for the networks of docs/results/fewest-passes.md.

python examples/benchmarks/linear_algebra.py

Each optimizer takes a few steps on short random sequences: its linear algebra depends only on the matrices of
theta and, in the subspace step, on the rows of the sketch, not on the machine. SOAP decomposes in every
second step, and has the mean of two steps; SOAP-Muon decomposes in every step. The second table contains
products that are not counted separately: the sums of K-FAC's factors within the gradient pass of the
subspace step.
"""

import numpy as np

import hfmpi
from hfmpi.measure.cost import executed
from hfmpi.objective.data_parallel import step_objectives
from hfmpi.optim.presets import preset
from hfmpi.parallel.communicator import Communicator

SYMBOLS = 65  # of the King James Bible
PARAMETERS = {"small": (13_535, 13_689), "medium": (54_928, 53_244), "paper": (220_000, 215_000)}
"""Parameters of LSTM and mLSTM."""

LENGTHS = {"small": 100, "medium": 200, "paper": 200}
BATCHES = {"small": (1_750, 438), "medium": (3_500, 875), "paper": (14_000, 3_500)}
"""Sequences in the gradient batches of the subspace step and of the first-order methods."""

CURVATURE_BATCH = 512  # that of the preset subspace


def main():
    """Print the tables."""
    print("| | D | method | operations | depth | P_D of passes | added | P_I of passes | added |")
    print("|" + " --- |" * 9)
    within = []
    for name, length in LENGTHS.items():
        for cell, parameters in zip(("lstm", "mlstm"), PARAMETERS[name], strict=True):
            network = hfmpi.Network(hfmpi.Architecture(cell, 1, SYMBOLS, SYMBOLS).of_size(parameters))
            unit = network.forward_pass(length)
            for method, batch in zip(("subspace", "soap", "soap-muon", "muon"), (0, 1, 1, 1), strict=True):
                works = usual_steps(network, method)
                p_d, p_i = executed(works[0], BATCHES[name][batch], CURVATURE_BATCH)
                operations, depth = (
                    np.mean([work[key] for work in works]) for key in ("operations", "depth")
                )
                print(
                    f"| {name} {cell} | {network.size:,} | {method} | {operations / 1e6:,.1f} million "
                    f"| {depth:,.0f} | {p_d:,} | {operations / unit.operations:,.1f} "
                    f"| {p_i} | {depth / unit.depth:,.2f} |"
                )
                if method == "subspace":
                    within.append(f"| {name} {cell} | {' | '.join(products(network, works[0], name))} |")
    print("\n| | factors, a sequence of B_g | a step | P_D of its passes |")
    print("|" + " --- |" * 4, *within, sep="\n")


def products(network, work, name):
    """Return the number of forward passes that equals the sums of the factors, and that of all passes."""
    batch = BATCHES[name][0]
    factors = sum(block.rows**2 + block.columns**2 for block in network.blocks) / (2 * network.size)
    return f"{factors:.2f}", f"{factors * batch:,.0f}", f"{executed(work, batch, CURVATURE_BATCH)[0]:,}"


def usual_steps(network, method):
    """Return the counts of a step of `subspace` with all directions, or of the last two steps of a method."""
    symbols = np.random.default_rng(0).integers(0, SYMBOLS, (CURVATURE_BATCH, 9))
    data, owner = hfmpi.Examples(symbols[:, :-1], symbols[:, 1:]), hfmpi.DataParallel(network, Communicator())
    optimizer, theta, works = preset(method).optimizer, network.initial(0).astype(np.float32), []
    state = optimizer.init(theta, network.blocks)
    for number in range(8):
        curvature = CURVATURE_BATCH if optimizer.needs.kronecker_factors else 0
        objectives = step_objectives(owner, data, 0, number, CURVATURE_BATCH, curvature)
        theta, state, report = optimizer.step(theta, state, objectives)
        works.append(report.work)
    if method != "subspace":
        return works[-2:]
    return [max((work for work in works if not work.losses), key=lambda work: work.directions)]


if __name__ == "__main__":
    main()
