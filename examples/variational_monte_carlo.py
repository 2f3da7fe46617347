"""Variational Monte Carlo of two coupled harmonic oscillators, by stochastic reconfiguration (MinSR).

    python examples/variational_monte_carlo.py
    mpirun -n 2 python examples/variational_monte_carlo.py

The network is log psi. Its rows are the scores d log psi / d theta of all walkers, which `hfmpi.curvature`
computes and multiplies on all ranks; with fewer walkers than parameters the step only needs the Gram matrix
(Chen and Heyl 2024, arXiv:2302.01941). H = -laplace/2 + x'Ax/2.
"""

import sys

import jax
import jax.numpy as jnp
import numpy as np

import hfmpi

jax.config.update("jax_enable_x64", True)
STEPS = int(sys.argv[1]) if len(sys.argv) > 1 else 60
A = np.array([[1.0, 0.4], [0.4, 2.0]])
EXACT = np.sqrt(np.linalg.eigvalsh(A)).sum() / 2  # half the sum of the frequencies
WALKERS, MOVES, DAMPING, RATE = 300, 40, 1e-3, 0.1


def log_psi(params, x):
    """Compute the logarithm of the wave function at one point x (2,)."""
    h = jnp.tanh(x @ params["hidden"] + params["bias"])
    return h @ params["top"] - x @ x / 4


def energy(params, x):
    """Compute the local energy H psi / psi at one point."""
    slope, curvature = jax.grad(log_psi, 1)(params, x), jax.hessian(log_psi, 1)(params, x)
    return -(jnp.trace(curvature) + slope @ slope) / 2 + x @ A @ x / 2


energies, values = (jax.jit(jax.vmap(f, (None, 0))) for f in (energy, log_psi))
rng = np.random.default_rng(0)  # the same on all ranks, which hold the same walkers and share the rows
normal = rng.standard_normal
params = {"hidden": normal((2, 80)) / 2, "bias": normal(80) / 2, "top": normal(80) / 80}
model = hfmpi.JaxModel(lambda p, x: jax.vmap(log_psi, (None, 0))(p, x)[:, None], params, "squares")
theta, x, comm, history = model.initial(0), normal((WALKERS, 2)), hfmpi.connect(), []
for _step in range(STEPS):
    params = model.params(theta)
    for _ in range(MOVES):  # Metropolis
        moved = x + 0.7 * normal(x.shape)
        accept = rng.random(WALKERS) < np.exp(2 * np.asarray(values(params, moved) - values(params, x)))
        x = np.where(accept[:, None], moved, x)
    local = np.asarray(energies(params, x))
    history.append(local.mean())
    rows = hfmpi.curvature(model, theta, (x, np.zeros((WALKERS, 1))), communicator=comm).rows("residuals")
    gram = rows.gram()
    gram = gram - gram.mean(axis=0) - gram.mean(axis=1)[:, None] + gram.mean()  # for centred rows
    a = np.linalg.solve(gram + DAMPING * WALKERS * np.eye(WALKERS), 2 * (local - local.mean()))
    theta = comm.agree(theta - RATE * rows.transposed(a - a.mean()))
last = np.array(history[-20:])
if comm.rank == 0:
    print(f"energy: {last.mean():.4f} +- {last.std() / len(last) ** 0.5:.4f}, exact {EXACT:.4f}")
