"""`hfmpi.jax`: the optimizers of hfmpi with the interface of optax."""

from hfmpi.facades.jax import Optimizer, State

__all__ = ["Optimizer", "State"]
