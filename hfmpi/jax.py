"""`hfmpi.jax`: the optimizers of hfmpi in the shape of optax."""

from hfmpi.facades.jax import Optimizer, State

__all__ = ["Optimizer", "State"]
