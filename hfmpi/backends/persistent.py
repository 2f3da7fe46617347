"""Loops over time as single kernels, which store the matrices in the shared memory of the multiprocessors.

The blocks of a launch wait for one another after each product. So the launch is cooperative: CUDA refuses it
unless all blocks fit on the GPU at once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import cupy
import numpy as np

from hfmpi.backends.base import Array, Packed

__all__ = ["SIGNATURES", "PersistentLoops"]

THREADS = 512
"""The number of threads per block, THREADS_PERSISTENT of kernels.cu."""

SIGNATURES = {
    "gated forward": "kept recurrent factor p_table table x bias_h c hidden k w q m",
    "gated tangent": "recurrent factor p_table dp_table table x k q pre dq dm dh dc add",
    "gated adjoint": "recurrent_t factor_t p_table x k q dh da dp dq back dc inject",
}
"""The arguments of the kernel of each loop, between the sizes and the counter of arrivals."""


class PersistentLoops:
    """The loops of gated cells on one GPU.

    Parameters
    ----------
    device : cupy.cuda.Device
    stream : cupy.cuda.Stream
    dtype : dtype
    kernel : callable
        Returns a kernel of kernels.cu by name.
    """

    def __init__(self, device: Any, stream: Any, dtype: np.dtype, kernel: Callable[[str], Any]) -> None:
        about = device.attributes
        self._processors = about["MultiProcessorCount"] if about["CooperativeLaunch"] else 0
        self._shared_bytes = about["MaxSharedMemoryPerBlockOptin"]
        self._stream, self._kernel, self._itemsize = stream, kernel, dtype.itemsize
        self._arrived = cupy.empty(1, np.int32)

    def fit(self, n: int, multiplicative: bool) -> bool:
        """Return whether n units can be distributed over the GPU."""
        return self._processors > 0 and self._tile(n, multiplicative, 4 * n) > 0

    def _most(self, n: int) -> int:
        """Return the number of units per block, the minimum for one block per multiprocessor."""
        return -(-n // self._processors)

    def _matrices(self, n: int, multiplicative: bool) -> int:
        """Return the number of matrix elements that a block stores."""
        return (4 + multiplicative) * n * self._most(n)

    def _tile(self, n: int, multiplicative: bool, length: int) -> int:
        """Return the number of rows of `length` elements that fit in shared memory alongside the matrices."""
        remaining = self._shared_bytes // self._itemsize - self._matrices(n, multiplicative) - 3
        return remaining // length

    def run(self, name: str, arrays: Mapping[str, Any]) -> None:
        """Run the loop `name` of `SIGNATURES` in one launch."""
        (steps, batch), n = arrays["x"].shape, arrays["hidden"].shape[2]
        multiplicative = arrays["p_table"] is not None
        length = 4 * n if name == "gated adjoint" else n  # elements in a row that its products read
        tile = min(batch, self._tile(n, multiplicative, length))
        shared = (-(-tile * length // 4) * 4 + self._matrices(n, multiplicative)) * self._itemsize
        sizes = (steps, batch, n, self._most(n), tile)
        arguments = (*sizes, *(arrays[key] for key in SIGNATURES[name].split()), self._arrived)
        values = [np.array(_plain(argument)) for argument in arguments]
        pointers = np.array([value.ctypes.data for value in values], np.uintp)
        kernel = self._kernel(name.replace("gated ", "persistent_"))
        if kernel.max_dynamic_shared_size_bytes < shared:
            kernel.max_dynamic_shared_size_bytes = self._shared_bytes
        self._arrived.data.memset_async(0, self._arrived.nbytes, self._stream)
        grid, block = (-(-n // self._most(n)), 1, 1), (THREADS, 1, 1)
        cupy.cuda.driver.launchCooperativeKernel(
            kernel.kernel.ptr, *grid, *block, shared, self._stream.ptr, pointers.ctypes.data
        )


def _plain(argument: Array | Packed | int | None) -> Any:
    """Convert a kernel argument: a number to an int, an array to its address, None to a null pointer."""
    if isinstance(argument, int):
        return np.int32(argument)
    array = argument.matrix if isinstance(argument, Packed) else argument
    return np.uintp(0 if array is None else array.data.ptr)
