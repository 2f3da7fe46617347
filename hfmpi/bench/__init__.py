"""Measurements on this machine: each contestant against the matrix products that it cannot do without."""
