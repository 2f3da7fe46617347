"""An LSTM tagger in PyTorch that adds two binary numbers bit by bit, which requires a carry.

    python examples/torch_tagger.py
    mpirun -n 2 python examples/torch_tagger.py

Step i reads bit i of both numbers, the lowest bit first, and predicts bit i of their sum. Guessing predicts
half of the bits correctly.
"""

import numpy as np
import torch

import hfmpi

BITS = 12


class Tagger(torch.nn.Module):
    """Maps x (examples, steps, 2) to two outputs per step."""

    def __init__(self):
        super().__init__()
        self.lstm = torch.nn.LSTM(2, 12, batch_first=True)
        self.top = torch.nn.Linear(12, 2)

    def forward(self, x):
        return self.top(self.lstm(x)[0])


def sums(cases, seed):
    """Return the bits of pairs of numbers (examples, BITS, 2), and of their sums (examples, BITS)."""
    numbers = np.random.default_rng(seed).integers(0, 2 ** (BITS - 1), (cases, 3))
    numbers[:, 2] = numbers[:, 0] + numbers[:, 1]
    bits = numbers[:, None, :] >> np.arange(BITS)[:, None] & 1
    return bits[:, :, :2].astype(float), bits[:, :, 2]


def main():
    torch.manual_seed(0)  # the same initial parameters on all ranks
    model = hfmpi.TorchModel(Tagger(), "cross-entropy")
    result = hfmpi.train(
        model,
        sums(600, seed=1),
        valid=sums(1000, seed=2),
        metric=lambda outputs, targets: outputs.argmax(axis=1) == targets,
        optimizer="bhf-short",
        max_steps=20,
    )
    model.write_back(result.theta)
    comm, right, loss = hfmpi.connect(), result.valid_metric, result.valid_loss
    if comm.rank == 0:
        print(f"{comm.size} rank(s): accuracy on the bits of new sums: {right:.4f}, loss {loss:.4f}")


if __name__ == "__main__":
    with hfmpi.guard():
        main()
