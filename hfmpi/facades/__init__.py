"""The optimizers in the shape of torch.optim (`hfmpi.torch`) and optax (`hfmpi.jax`), for existing loops."""
