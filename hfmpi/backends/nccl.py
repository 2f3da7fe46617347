"""Sums of vectors among NVIDIA GPUs by NCCL, as far as CuPy brings it."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

from hfmpi.backends.base import Array, Backend

__all__ = ["available", "new_name", "summing"]


def _nccl() -> Any:
    """Give CuPy's module of NCCL, or None where there is no NCCL."""
    try:
        with warnings.catch_warnings(action="ignore"):  # CuPy warns of an absent library
            from cupy.cuda import nccl
    except ImportError:
        return None
    return nccl if nccl.available else None


def available(backend: Backend) -> bool:
    """Say whether this backend is a GPU that can sum vectors with others."""
    return backend.device_id is not None and _nccl() is not None


def new_name() -> Any:
    """Give a new name under which ranks can meet."""
    return _nccl().get_unique_id()


def summing(backend: Backend, size: int, rank: int, name: Any) -> Callable[[Array], None]:
    """Meet the other ranks under an agreed name; give the function that sums a vector over all, in place."""
    nccl = _nccl()
    joined = nccl.NcclCommunicator(size, name, rank)
    kind = nccl.NCCL_FLOAT32 if backend.dtype.itemsize == 4 else nccl.NCCL_FLOAT64

    def total(vector: Array) -> None:
        at = backend.address(vector)
        joined.allReduce(at, at, vector.size, kind, nccl.NCCL_SUM, backend.stream)
        backend.synchronize()

    return total
