"""Text to an HDF5 corpus, and deterministic global batches of it."""
