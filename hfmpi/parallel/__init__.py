"""Ranks: the communicator, placement on cores, launch, and failure."""

from hfmpi.parallel.communicator import Communicator
from hfmpi.parallel.failure import guard
from hfmpi.parallel.launch import connect

__all__ = ["Communicator", "connect", "guard"]
