"""Measurements on this machine: the time of passes and steps, and that of their matrix products alone."""
