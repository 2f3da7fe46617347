"""Sums of vectors over NVIDIA GPUs by NCCL, if CuPy provides it."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

from hfmpi.backends.base import Array, Backend

__all__ = ["available", "new_name", "summing"]


def _nccl() -> Any:
    """Return CuPy's module for NCCL, or None if NCCL is not available."""
    try:
        with warnings.catch_warnings(action="ignore"):  # CuPy warns if the library is absent
            from cupy.cuda import nccl
    except ImportError:
        return None
    return nccl if nccl.available else None


def available(backend: Backend) -> bool:
    """Return whether the backend is a GPU that can sum vectors with other GPUs."""
    return backend.device_id is not None and _nccl() is not None


def new_name() -> Any:
    """Create an identifier, by which the ranks join one communicator."""
    return _nccl().get_unique_id()


def summing(backend: Backend, size: int, rank: int, name: Any) -> Callable[[Array], None]:
    """Join the communicator `name`, and return a function that sums a vector over it in place."""
    nccl = _nccl()
    communicator = nccl.NcclCommunicator(size, name, rank)
    kind = nccl.NCCL_FLOAT32 if backend.dtype.itemsize == 4 else nccl.NCCL_FLOAT64

    def total(vector: Array) -> None:
        address = backend.address(vector)
        communicator.allReduce(address, address, vector.size, kind, nccl.NCCL_SUM, backend.stream)
        backend.synchronize()

    return total
