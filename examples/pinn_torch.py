"""A physics-informed network in PyTorch: Burgers' equation u_t + u u_x = nu u_xx, u(x, 0) = -sin(pi x).

Run it with `python examples/pinn_torch.py` or `mpirun -n 2 python examples/pinn_torch.py`. The module
computes the derivatives that its residual needs.
"""

import sys
from itertools import chain, pairwise

import numpy as np
import torch

import hfmpi

STEPS = int(sys.argv[1]) if len(sys.argv) > 1 else 150
NU = 0.05 / np.pi  # with a lower viscosity, 2000 points do not resolve the shock


class Residual(torch.nn.Module):
    """The residual of the equation at points (x, t, flag), or 10 (u + sin(pi x)) where the flag is 1."""

    def __init__(self):
        super().__init__()
        layers = [(torch.nn.Linear(a, b), torch.nn.Tanh()) for a, b in pairwise((2, 20, 20, 20, 1))]
        self.network = torch.nn.Sequential(*chain(*layers))[:-1].double()

    def u(self, x, t):
        return (1 - x**2) * self.network(torch.stack([x, t], dim=-1))[..., 0]  # 0 at x = -1 and x = 1

    def forward(self, points):
        with torch.enable_grad():
            x, t, start = points.clone().requires_grad_().T
            u = self.u(x, t)
            u_x, u_t = torch.autograd.grad(u.sum(), (x, t), create_graph=True)
            (u_xx,) = torch.autograd.grad(u_x.sum(), x, create_graph=True)
        return torch.where(start == 1, 10 * (u + torch.sin(torch.pi * x)), u_t + u * u_x - NU * u_xx)[:, None]


def reference(x, t):
    """Compute the solution by Gauss-Hermite quadrature of the Cole-Hopf formula (Basdevant et al. 1986)."""
    nodes, weights = np.polynomial.hermite.hermgauss(100)
    at = x[..., None] - nodes * np.sqrt(4 * NU * t[..., None])
    weights = weights * np.exp(-np.cos(np.pi * at) / (2 * np.pi * NU))
    return -(weights * np.sin(np.pi * at)).sum(-1) / weights.sum(-1)


torch.manual_seed(0)  # the same initial parameters on all ranks
rng = np.random.default_rng(0)
inside, start = rng.uniform((-1, 0), (1, 1), (2000, 2)), rng.uniform((-1, 0), (1, 0), (200, 2))
points = np.concatenate([np.c_[inside, np.zeros(2000)], np.c_[start, np.ones(200)]])
model = hfmpi.TorchModel(Residual(), "squares")
result = hfmpi.train(model, (points, np.zeros((len(points), 1))), optimizer="lm", max_steps=STEPS)
model.write_back(result.theta)

x, t = np.meshgrid(np.linspace(-0.98, 0.98, 50), np.linspace(0.05, 0.95, 19))
u = model.module.u(torch.from_numpy(x), torch.from_numpy(t)).detach().numpy()
error = np.linalg.norm(u - reference(x, t)) / np.linalg.norm(reference(x, t))
if hfmpi.connect().rank == 0:
    print(f"relative error of u after {result.step} steps: {error:.1e}")
