"""Measure the cost of a run: the counts of the paper, and seconds."""
