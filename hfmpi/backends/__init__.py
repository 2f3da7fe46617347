"""Arrays and a few fused recurrent kernels, for NumPy, Numba and CuPy."""

from __future__ import annotations

import os
from collections.abc import Callable
from itertools import takewhile
from pathlib import Path

from hfmpi.backends import cupy_cache
from hfmpi.backends.numpy import NumpyBackend
from hfmpi.errors import UserError, did_you_mean
from hfmpi.files.working_folder import check_working_folder

__all__ = ["BACKENDS", "DTYPES", "PRECISIONS", "create", "devices", "gpus"]

BACKENDS = ("auto", "numpy", "numba", "cupy")
DTYPES = ("float32", "float64")
PRECISIONS = ("float32", "tf32")


def create(
    name: str = "auto",
    dtype: str = "float32",
    local_rank: int = 0,
    precision: str = "float32",
    mixin: type[NumpyBackend] | None = None,
) -> NumpyBackend:
    """Create a backend; 'auto' selects the fastest one for this machine.

    Parameters
    ----------
    name : {'auto', 'numpy', 'numba', 'cupy'}
    dtype : {'float32', 'float64'}
    local_rank : int
        The index of this rank among the ranks of its node, to which the GPUs are assigned in turn.
    precision : {'float32', 'tf32'}
        The precision of float32 matrix products on a GPU.
    mixin : class, optional
        A class that overrides methods of the backend: the class of the result is derived from it and from the
        class of the backend.

    Raises
    ------
    UserError
        If no backend has this name, or this machine cannot run it.
    """
    if name not in BACKENDS:
        raise UserError(
            f"there is no backend {name!r}{did_you_mean(name, BACKENDS)}; choose one of {', '.join(BACKENDS)}"
        )
    if precision not in PRECISIONS:
        raise UserError(f"there is no matmul precision {precision!r}; choose one of {', '.join(PRECISIONS)}")
    if name == "auto":
        name = "cupy" if gpus() else "numba"
    if precision == "tf32" and (name != "cupy" or dtype != "float32"):
        raise UserError("matmul precision tf32 requires the cupy backend with float32")
    if name == "cupy":
        cupy_cache.choose()
        try:
            from hfmpi.backends.cupy import CupyBackend
        except ImportError as error:
            reason = " ".join(str(error).split())
            raise UserError(
                f"the cupy backend requires CuPy ({reason}): install cupy-cuda12x or cupy-cuda13x"
            ) from None
        return _extended(CupyBackend, mixin)(dtype, local_rank, precision)
    if name == "numba":
        check_working_folder()  # Numba fails if the working folder has been removed
        from hfmpi.backends.numba import NumbaBackend

        return _extended(NumbaBackend, mixin)(dtype)
    return _extended(NumpyBackend, mixin)(dtype)


def _extended(kind: type[NumpyBackend], mixin: type[NumpyBackend] | None) -> Callable[..., NumpyBackend]:
    return kind if mixin is None else type(mixin.__name__ + kind.__name__, (mixin, kind), {})


def devices() -> list[str]:
    """Return the names of the NVIDIA devices that CUDA would show this process, without loading CUDA."""
    names = (path.name.removeprefix("nvidia") for path in Path("/dev").glob("nvidia[0-9]*"))
    present = sorted((name for name in names if name.isdecimal()), key=int)
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is None or not present:
        return present
    # CUDA ignores all names after the first invalid one.
    return list(takewhile(lambda name: name not in ("", "-1"), map(str.strip, chosen.split(","))))


def gpus() -> list[str]:
    """Return the names of the NVIDIA GPUs that CuPy can use in this process.

    CuPy is imported only if the system has an NVIDIA device.
    """
    if not (devices() or Path("/dev/dxg").exists()):
        return []
    cupy_cache.choose()
    try:
        from hfmpi.backends.cupy import device_names

        return device_names()
    except (ImportError, RuntimeError):  # there is no CuPy, or no driver that it can use
        return []
