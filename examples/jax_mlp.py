"""An MLP in JAX that classifies the points of two spirals.

    python examples/jax_mlp.py
    mpirun -n 2 python examples/jax_mlp.py

The spirals are wound around each other (Lang and Witbrock 1988), here with one and a half turns each.
"""

from itertools import pairwise

import jax.numpy as jnp
import numpy as np

import hfmpi

SIZES = 2, 24, 24, 1


def apply(params, x):
    """Return outputs (examples, 1) for points x (examples, 2): positive for the second spiral."""
    for w, b in params[:-1]:
        x = jnp.tanh(x @ w + b)
    w, b = params[-1]
    return x @ w + b


def start(seed):
    """Return weight matrices and biases that preserve the scale of their inputs."""
    rng = np.random.default_rng(seed)
    return [(rng.normal(0, n**-0.5, (n, m)).astype("f"), np.zeros(m, "f")) for n, m in pairwise(SIZES)]


def spirals(cases, seed):
    """Return noisy points (examples, 2), and the spiral that each belongs to (examples, 1)."""
    rng = np.random.default_rng(seed)
    which, along = rng.integers(0, 2, cases), np.sqrt(rng.uniform(0.02, 1, cases))
    angle = 3 * np.pi * along + np.pi * which
    points = 3 * along[:, None] * np.stack([np.cos(angle), np.sin(angle)], axis=1)
    return points + rng.normal(0, 0.03, points.shape), which[:, None].astype(float)


def main():
    model = hfmpi.JaxModel(apply, start(seed=0), "bernoulli")
    result = hfmpi.train(
        model,
        spirals(1000, seed=1),
        valid=spirals(1000, seed=2),
        metric=lambda outputs, targets: (outputs > 0)[:, 0] == targets[:, 0],
        optimizer="bhf-short",
        max_steps=40,
    )
    comm, right, loss = hfmpi.connect(), result.valid_metric, result.valid_loss
    if comm.rank == 0:
        print(f"{comm.size} rank(s): accuracy on new points: {right:.4f}, loss {loss:.4f}")


if __name__ == "__main__":
    with hfmpi.guard():
        main()
