"""A transformer with one block in PyTorch that sorts.

    python examples/torch_transformer.py
    mpirun -n 2 python examples/torch_transformer.py

Position i of its outputs is the i-th smallest of its inputs.
"""

import numpy as np
import torch

import hfmpi

SYMBOLS, LENGTH, WIDTH = 8, 8, 24


class Sorter(torch.nn.Module):
    """Maps symbols x (examples, LENGTH) to outputs (examples, LENGTH, SYMBOLS)."""

    def __init__(self):
        super().__init__()
        self.symbols = torch.nn.Embedding(SYMBOLS, WIDTH)
        self.places = torch.nn.Parameter(torch.randn(LENGTH, WIDTH))
        self.block = torch.nn.TransformerEncoderLayer(WIDTH, 2, 2 * WIDTH, dropout=0.0, batch_first=True)
        self.top = torch.nn.Linear(WIDTH, SYMBOLS)

    def forward(self, x):
        return self.top(self.block(self.symbols(x) + self.places))


def lists(cases, seed):
    """Return lists of symbols (examples, LENGTH), and the sorted lists."""
    x = np.random.default_rng(seed).integers(0, SYMBOLS, (cases, LENGTH))
    return x, np.sort(x, axis=1)


def main():
    torch.manual_seed(0)  # the same initial parameters on all ranks
    model = hfmpi.TorchModel(Sorter(), "cross-entropy")
    result = hfmpi.train(
        model,
        lists(1000, seed=1),
        valid=lists(1000, seed=2),
        metric=lambda outputs, targets: outputs.argmax(axis=1) == targets,
        optimizer="bhf-short",
        max_steps=12,
    )
    model.write_back(result.theta)
    comm, right, loss = hfmpi.connect(), result.valid_metric, result.valid_loss
    if comm.rank == 0:
        print(f"{comm.size} rank(s): accuracy on the positions of new lists: {right:.4f}, loss {loss:.4f}")


if __name__ == "__main__":
    with hfmpi.guard():
        main()
