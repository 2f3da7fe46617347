"""A physics-informed network in JAX: -laplace(u) = f on the unit square, u = 0 on its boundary.

    python examples/pinn_jax.py
    mpirun -n 2 python examples/pinn_jax.py

Every example is a point with one residual; the Levenberg-Marquardt step uses the exact Gauss-Newton matrix.
"""

import sys
from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np

import hfmpi

jax.config.update("jax_enable_x64", True)
STEPS = int(sys.argv[1]) if len(sys.argv) > 1 else 150
SIZES = 2, 32, 32, 1


def u(params, x):
    """Compute the network at one point x (2,)."""
    for w, b in params[:-1]:
        x = jnp.tanh(x @ w + b)
    w, b = params[-1]
    return (x @ w + b)[0]


def exact(x):
    return jnp.sin(jnp.pi * x[..., 0]) * jnp.sin(jnp.pi * x[..., 1])


def residual(params, point):
    """Compute the residual at a point (x, y, flag), of the boundary condition if the flag is 1."""
    x, boundary = point[:2], point[2]
    laplacian = jnp.trace(jax.hessian(u, argnums=1)(params, x))
    return jnp.where(boundary == 1, 10 * u(params, x), laplacian + 2 * jnp.pi**2 * exact(x))


def apply(params, points):
    return jax.vmap(residual, (None, 0))(params, points)[:, None]


rng = np.random.default_rng(0)  # the same on all ranks
params = [(rng.standard_normal((m, n)) * (2 / (m + n)) ** 0.5, np.zeros(n)) for m, n in pairwise(SIZES)]
inside, edge = rng.random((900, 2)), rng.random((120, 2))
edge[np.arange(120), np.arange(120) % 2] = np.arange(120) // 2 % 2
points = np.concatenate([np.c_[inside, np.zeros(900)], np.c_[edge, np.ones(120)]])

model = hfmpi.JaxModel(apply, params, "squares")
result = hfmpi.train(model, (points, np.zeros((len(points), 1))), optimizer="lm", max_steps=STEPS)

grid = np.stack(np.meshgrid(*[np.linspace(0, 1, 101)] * 2), axis=-1).reshape(-1, 2)
values = jax.vmap(u, (None, 0))(model.params(result.theta), grid)
error = float(jnp.linalg.norm(values - exact(grid)) / jnp.linalg.norm(exact(grid)))
if hfmpi.connect().rank == 0:
    print(f"relative error of u after {result.step} steps: {error:.1e}")
