"""Hessian-free optimization of a user-defined objective, on one rank or under mpirun.

    python examples/own_objective.py
    mpirun -n 2 python examples/own_objective.py

A small tanh network is fitted to a noisy sine. Each rank holds every P-th point. The three methods of the
objective sum over the points of the rank, and one Allreduce makes each sum global. Nothing else is needed:
the optimizers only call these methods, and all ranks take the same steps.
"""

import numpy as np

from hfmpi.optim import Gradient, HessianFree, Objective, Objectives
from hfmpi.parallel import connect, guard

POINTS, HIDDEN, STEPS = 2_000, 20, 30


class LeastSquares(Objective):
    """f(theta) = mean of (y_i - prediction_i)^2 / 2, so that H_L = 1 / POINTS and G = J'J / POINTS."""

    def __init__(self, comm):
        rng = np.random.default_rng(0)
        x = rng.uniform(-3, 3, POINTS)
        y = np.sin(2 * x) + 0.05 * rng.standard_normal(POINTS)
        self.comm = comm
        self.x, self.y = x[comm.rank :: comm.size], y[comm.rank :: comm.size]

    def _run(self, theta):
        """Return the predictions at this rank's points, and their Jacobian (points, D)."""
        a, b, c = theta.reshape(3, HIDDEN)
        h = np.tanh(np.outer(self.x, a) + b)
        slope = (1 - h * h) * c
        return h @ c, np.hstack([slope * self.x[:, None], slope, h])

    def loss(self, theta):
        total = np.array([np.sum((self._run(theta)[0] - self.y) ** 2)])
        self.comm.sum(total)
        return float(total[0]) / (2 * POINTS)

    def gradient(self, theta):
        prediction, jacobian = self._run(theta)
        error = prediction - self.y
        message = np.append(jacobian.T @ error, error @ error / 2) / POINTS
        self.comm.sum(message)
        return Gradient(float(message[-1]), message[:-1])

    def gauss_newton(self, theta):
        jacobian = self._run(theta)[1]

        def product(v):
            out = jacobian.T @ (jacobian @ v) / POINTS
            self.comm.sum(out)
            return out

        return product

    def agree(self, values):
        """Return rank 0's values of scalars that every rank computed, so that ranks agree on any hardware."""
        return self.comm.agree(values)


def main():
    comm = connect()
    objective = LeastSquares(comm)
    optimizer = HessianFree(damping=1e-2)
    theta = np.random.default_rng(1).standard_normal(3 * HIDDEN)
    state = optimizer.init(theta)
    for step in range(1, STEPS + 1):
        theta, state, report = optimizer.step(theta, state, Objectives(objective, objective))
        if comm.rank == 0:
            cg_steps, damping = report.details["cg_steps"], report.details["damping"]
            print(f"step {step:2d}  f = {report.loss:.6f}  cg {cg_steps:3d}  lambda {damping:.1e}")
    final = objective.loss(theta)
    if comm.rank == 0:
        print(f"f = {final:.6f} on {comm.size} rank(s); the noise alone is {0.05**2 / 2:.6f}")
    comm.close()


if __name__ == "__main__":
    with guard():
        main()
