"""Accurate regression: a small tanh network through 100 points, by Levenberg-Marquardt in float64.

    python examples/regression.py
    mpirun -n 2 python examples/regression.py

There are more parameters than points, so the step only needs a matrix of 100 x 100 numbers.
"""

import sys

import numpy as np
import torch

import hfmpi

STEPS = int(sys.argv[1]) if len(sys.argv) > 1 else 40
torch.manual_seed(0)  # the same initial parameters on all ranks
module = torch.nn.Sequential(torch.nn.Linear(6, 40), torch.nn.Tanh(), torch.nn.Linear(40, 1)).double()
model = hfmpi.TorchModel(module, "squares")

x = np.random.default_rng(0).uniform(-1, 1, (100, 6))
y = np.sin(x.sum(axis=1, keepdims=True)) * np.exp(-x[:, :1])
result = hfmpi.train(model, (x, y), optimizer="lm", max_steps=STEPS)
model.write_back(result.theta)

error = module(torch.from_numpy(x)).detach().numpy() - y
if hfmpi.connect().rank == 0:
    print(f"relative error after {result.step} steps: {np.linalg.norm(error) / np.linalg.norm(y):.1e}")
