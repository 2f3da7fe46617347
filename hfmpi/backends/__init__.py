"""Arrays and the few fused recurrent kernels, for NumPy, Numba and (later) CuPy."""

from __future__ import annotations

from hfmpi.backends.base import Backend
from hfmpi.errors import UserError

__all__ = ["BACKENDS", "create"]

BACKENDS = ("auto", "numpy", "numba")


def create(name: str = "auto", dtype: str = "float32") -> Backend:
    """Make the backend of this name; `auto` is the fastest that this machine has.

    Raises
    ------
    UserError
        If no backend has this name.
    """
    if name in ("auto", "numba"):
        from hfmpi.backends.numba import NumbaBackend

        return NumbaBackend(dtype)
    if name == "numpy":
        from hfmpi.backends.numpy import NumpyBackend

        return NumpyBackend(dtype)
    if name == "cupy":
        raise UserError("the cupy backend is not part of this release; choose numba or numpy")
    raise UserError(f"there is no backend {name!r}; choose one of {', '.join(BACKENDS)}")
