"""PyTorch modules and JAX functions as models."""
