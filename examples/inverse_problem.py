"""An inverse problem: the unknown diffusivity k of u_t = k u_xx, from 40 noisy measurements of u.

    python examples/inverse_problem.py
    mpirun -n 2 python examples/inverse_problem.py

The coefficient is an additional parameter of the model. An example is a point (x, t) with a flag: a residual
of the equation, or the difference from a measurement.
"""

import sys
from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np

import hfmpi

jax.config.update("jax_enable_x64", True)
STEPS = int(sys.argv[1]) if len(sys.argv) > 1 else 60
TRUE, NOISE, SIZES = 0.3, 1e-3, (2, 20, 20, 1)


def u(layers, x):
    """Compute the network at one point (x, t)."""
    for w, b in layers[:-1]:
        x = jnp.tanh(x @ w + b)
    w, b = layers[-1]
    return (x @ w + b)[0]


def residual(params, point):
    """Compute 10 u at measured points, where the flag is 1, and u_t - k u_xx at other points."""
    x, measured = point[:2], point[2]
    u_t = jax.grad(u, 1)(params["layers"], x)[1]
    u_xx = jax.hessian(u, 1)(params["layers"], x)[0, 0]
    return jnp.where(measured == 1, 10 * u(params["layers"], x), u_t - jnp.exp(params["log k"]) * u_xx)


def apply(params, points):
    return jax.vmap(residual, (None, 0))(params, points)[:, None]


rng = np.random.default_rng(0)  # the same on all ranks
layers = [(rng.standard_normal((m, n)) * (2 / (m + n)) ** 0.5, np.zeros(n)) for m, n in pairwise(SIZES)]
model = hfmpi.JaxModel(apply, {"layers": layers, "log k": np.zeros(())}, "squares")

measured, inside = rng.random((40, 2)), rng.random((400, 2))
values = np.exp(-TRUE * np.pi**2 * measured[:, 1]) * np.sin(np.pi * measured[:, 0])
points = np.concatenate([np.c_[measured, np.ones(40)], np.c_[inside, np.zeros(400)]])
targets = np.concatenate([10 * (values + NOISE * rng.standard_normal(40)), np.zeros(400)])[:, None]

result = hfmpi.train(model, (points, targets), optimizer="lm", max_steps=STEPS)
k = float(jnp.exp(model.params(result.theta)["log k"]))
if hfmpi.connect().rank == 0:
    print(f"k = {k:.4f} after {result.step} steps (true value {TRUE}, measurements with noise {NOISE:g})")
