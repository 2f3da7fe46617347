"""Measure the time of passes and steps on this machine, and that of their matrix products alone."""
