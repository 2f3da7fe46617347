"""Data sets in memory and on disk, corpora of texts, and deterministic global batches."""
