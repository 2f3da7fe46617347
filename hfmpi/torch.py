"""`hfmpi.torch`: the optimizers of hfmpi with the interface of torch.optim."""

from hfmpi.facades.torch import Optimizer

__all__ = ["Optimizer"]
