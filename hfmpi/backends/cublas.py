"""Matrix products by the cuBLAS library that CuPy has loaded, also while a CUDA graph is captured.

CuPy does not allow matrix products during a capture; cuBLAS allows them with a user-supplied workspace.
"""

from __future__ import annotations

import ctypes
import re
from pathlib import Path
from typing import Any

import numpy as np

from hfmpi.backends.base import Array

__all__ = ["WORKSPACE_BYTES", "Cublas", "loaded"]

WORKSPACE_BYTES = 32 * 2**20
"""NVIDIA recommends 32 MiB for Hopper and 4 MiB elsewhere (cuBLAS documentation, cublasSetWorkspace)."""

_NORMAL, _TRANSPOSED = 0, 1  # cublasOperation_t
_DEFAULT_MATH, _TF32_MATH = 0, 3  # cublasMath_t


def loaded(name: str = "libcublas") -> str:
    """Return the path of a library of CUDA that is loaded in this process.

    Raises
    ------
    RuntimeError
        If cuBLAS is not loaded.
    """
    path = re.search(rf"/\S*{name}\.so\S*", Path("/proc/self/maps").read_text())
    if not path:
        raise RuntimeError(f"CuPy has not loaded {name}")
    return path.group()


def _operand(array: Array) -> tuple[int, int]:
    """Return the layout of a matrix, by rows or transposed, and the distance between its rows or columns.

    Raises
    ------
    ValueError
        If neither rows nor columns are contiguous.
    """
    rows, columns = array.shape
    down, across = (stride // array.itemsize for stride in array.strides)
    if (columns == 1 or across == 1) and (rows == 1 or down >= columns):
        return _NORMAL, down if rows > 1 else columns
    if (rows == 1 or down == 1) and (columns == 1 or across >= rows):
        return _TRANSPOSED, across if columns > 1 else rows
    raise ValueError(
        f"cuBLAS does not accept a matrix of shape {array.shape} with strides {array.strides}: its rows or "
        "columns must be contiguous"
    )


class Cublas:
    """A cuBLAS handle for one type of numbers, on one stream.

    Parameters
    ----------
    dtype : dtype
        float32 or float64.
    stream : int
        The CUDA stream of all products.
    workspace : Array
        `WORKSPACE_BYTES` bytes of device memory for exclusive use.
    tf32 : bool
        Whether float32 products may round their factors to 10 bits, in order to use tensor cores.
    """

    def __init__(self, dtype: np.dtype, stream: int, workspace: Array, tf32: bool = False) -> None:
        self._library = ctypes.CDLL(loaded())
        self._workspace = workspace
        handle = ctypes.c_void_p()
        self._call("cublasCreate_v2", ctypes.byref(handle))
        self._handle = handle
        self._call("cublasSetStream_v2", handle, ctypes.c_void_p(stream))
        size = ctypes.c_size_t(workspace.nbytes)
        self._call("cublasSetWorkspace_v2", handle, ctypes.c_void_p(workspace.data.ptr), size)
        self._call("cublasSetMathMode", handle, _TF32_MATH if tf32 else _DEFAULT_MATH)
        name, number = {4: ("S", ctypes.c_float), 8: ("D", ctypes.c_double)}[dtype.itemsize]
        self._gemm = getattr(self._library, f"cublas{name}gemm_v2")
        self._gemm.argtypes = [
            ctypes.c_void_p, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_int,
            ctypes.POINTER(number), ctypes.c_void_p, ctypes.c_int, ctypes.c_void_p, ctypes.c_int,
            ctypes.POINTER(number), ctypes.c_void_p, ctypes.c_int,
        ]  # fmt: skip
        self._zero, self._one = number(0), number(1)

    def gemm(self, a: Array, b: Array, out: Array, add: bool = False) -> None:
        """Compute out = a b, or out += a b if `add` is set.

        Parameters
        ----------
        a, b : (M, K), (K, N)
            Matrices with contiguous rows or contiguous columns.
        out : (M, N)
            A matrix with contiguous rows.
        add : bool

        Raises
        ------
        ValueError
            If a matrix has a different layout.
        RuntimeError
            If cuBLAS reports an error.
        """
        (m, k), n = a.shape, b.shape[1]
        if not (m and n and k):  # empty matrices have no valid strides; their product is empty or 0
            if not add:
                out[...] = 0
            return
        (op_a, step_a), (op_b, step_b), (op_out, step_out) = map(_operand, (a, b, out))
        if op_out != _NORMAL:
            raise ValueError("the rows of the result of a cuBLAS product must be contiguous")
        # cuBLAS matrices are column-major: compute out' = b' a'.
        status = self._gemm(
            self._handle, op_b, op_a, n, m, k, self._one, b.data.ptr, step_b, a.data.ptr, step_a,
            self._one if add else self._zero, out.data.ptr, step_out,
        )  # fmt: skip
        if status:
            raise RuntimeError(f"cuBLAS reports status {status}")

    def _call(self, name: str, *arguments: Any) -> None:
        status = getattr(self._library, name)(*arguments)
        if status:
            raise RuntimeError(f"{name} reports status {status}")
