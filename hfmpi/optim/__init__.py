"""Optimizers on vectors and objectives alone."""
