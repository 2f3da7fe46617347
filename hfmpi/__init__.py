"""Hessian-free optimization of recurrent networks, data-parallel under MPI."""

__version__ = "0.1.0"
