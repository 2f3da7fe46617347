"""Measure the cost of a run: by the paper's counts and by the clock."""
