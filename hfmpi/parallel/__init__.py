"""Ranks: the communicator, placement on cores, and the launch."""
