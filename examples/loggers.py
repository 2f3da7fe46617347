"""Log a run of hfmpi.train to TensorBoard or Weights & Biases: each logger is a callback of ten lines.

    result = hfmpi.train(model, (x, y), valid=valid, callback=tensorboard("logs/first", hfmpi.connect().rank))

Rank 0 logs all numbers of each step. `python examples/loggers.py` (which needs tensorboard) logs a small run.
"""

import numpy as np

import hfmpi


def numbers(record):
    return {name: value for name, value in record.items() if isinstance(value, (int, float))}


def tensorboard(folder, rank):
    if rank:
        return lambda record, theta: None
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(folder)

    def log(record, theta):
        for name, value in numbers(record).items():
            writer.add_scalar(name, value, record["step"])

    return log


def wandb(project, rank):
    if rank:
        return lambda record, theta: None
    import wandb

    run = wandb.init(project=project)
    return lambda record, theta: run.log(numbers(record), step=record["step"])


if __name__ == "__main__":
    x = np.random.default_rng(0).integers(0, 2, (600, 12))
    y = np.cumsum(x, axis=1) % 2
    model = hfmpi.Network(cell="lstm", inputs=2, outputs=2, hidden=10)
    with hfmpi.guard():
        logger = tensorboard("logs", hfmpi.connect().rank)
        valid = x[500:], y[500:]
        result = hfmpi.train(
            model, (x[:500], y[:500]), valid, optimizer="subspace", max_steps=15, callback=logger
        )
        if result.rank == 0:
            print(result)
