"""The optimizers with the interfaces of torch.optim (`hfmpi.torch`) and optax (`hfmpi.jax`)."""
