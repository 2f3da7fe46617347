"""Convert text to an HDF5 corpus, and draw deterministic global batches from it."""
