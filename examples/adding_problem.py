"""A network of two GRU layers for real-valued sequences, trained on user data on any number of ranks.

    mpirun -n 2 python examples/adding_problem.py

The adding problem (Hochreiter and Schmidhuber 1997): each step has a number and a mark. Two steps are marked,
and the mean of their numbers is the target of the last step. Always answering 0.5 has a loss of 1/48 = 0.021.
"""

import numpy as np

import hfmpi


def adding(cases, steps, seed):
    """Return examples as arrays: inputs (N, L, 2), and targets (N, 1, 1) of the last step only."""
    rng = np.random.default_rng(seed)
    inputs = np.zeros((cases, steps, 2))
    inputs[:, :, 0] = rng.random((cases, steps))
    for marks in inputs[:, :, 1]:
        marks[rng.choice(steps, 2, replace=False)] = 1
    targets = (inputs[:, :, :1] * inputs[:, :, 1:]).sum(axis=1, keepdims=True) / 2
    return hfmpi.Arrays(inputs, targets, burn_in=steps - 1)


def main():
    """Train on the full training set with the Hessian-free method, and test on other examples."""
    comm = hfmpi.connect()
    about = hfmpi.Architecture("gru", hidden=16, inputs=2, outputs=1, layers=2)
    network = hfmpi.Network(about, loss="squares")
    data = hfmpi.DataParallel(network, comm)
    train, test = adding(1000, 20, seed=0), adding(1000, 20, seed=1)
    risk, curvature = data.on(train, np.arange(train.count)), data.on(train, np.arange(250))
    optimizer = hfmpi.HessianFree(damping=0.1, cg_max_steps=40)
    theta = network.initial(seed=0).astype(network.backend.dtype)
    state = optimizer.init(theta)
    for step in range(1, 41):
        theta, state, report = optimizer.step(theta, state, hfmpi.Objectives(risk, curvature))
        if comm.rank == 0 and step % 10 == 0:
            print(f"step {step}: {report.loss:.6f}")
    error = data.on(test, np.arange(test.count)).loss(theta)
    if comm.rank == 0:
        print(f"{comm.size} rank(s): test loss {error:.6f}")
    comm.close()


if __name__ == "__main__":
    with hfmpi.guard():
        main()
