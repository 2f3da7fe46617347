"""`hfmpi.torch`: the optimizers of hfmpi in the shape of torch.optim."""

from hfmpi.facades.torch import Optimizer

__all__ = ["Optimizer"]
