"""Loops over time that are one kernel each: the matrices stay on the chip.

The blocks of a launch wait for one another after each product. So the launch is cooperative: CUDA refuses it
unless all blocks fit on the GPU at once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import cupy
import numpy as np

from hfmpi.backends.base import Array, Packed, Recurrence

__all__ = ["PersistentLoops"]

THREADS = 512
"""THREADS_PERSISTENT of kernels.cu."""


class PersistentLoops:
    """The loops of gated cells on one GPU.

    Parameters
    ----------
    device : cupy.cuda.Device
    stream : cupy.cuda.Stream
    dtype : dtype
    kernel : callable
        Gives a kernel of kernels.cu by name.
    """

    def __init__(self, device: Any, stream: Any, dtype: np.dtype, kernel: Callable[[str], Any]) -> None:
        about = device.attributes
        self._processors = about["MultiProcessorCount"] if about["CooperativeLaunch"] else 0
        self._shared_bytes = about["MaxSharedMemoryPerBlockOptin"]
        self._stream, self._kernel, self._itemsize = stream, kernel, dtype.itemsize
        self._arrived = cupy.empty(1, np.int32)

    def fit(self, n: int, multiplicative: bool) -> bool:
        """Say whether n units can be shared out over the GPU."""
        return self._processors > 0 and self._tile(n, multiplicative, 4 * n) > 0

    def _most(self, n: int) -> int:
        """Units of a block: as few as the multiprocessors admit."""
        return -(-n // self._processors)

    def _matrices(self, n: int, multiplicative: bool) -> int:
        """Numbers that a block keeps of the matrices."""
        return (4 + multiplicative) * n * self._most(n)

    def _tile(self, n: int, multiplicative: bool, length: int) -> int:
        """Rows of so many numbers that fit beside the matrices."""
        left = self._shared_bytes // self._itemsize - self._matrices(n, multiplicative) - 3
        return left // length

    def forward(self, r: Recurrence, table: Array, cell_state: Array) -> None:
        """Do `Backend.forward`."""
        kept = np.int32(1 if r.factors is None else len(r.factors))
        own = (kept, r.recurrent, r.factor, r.factor_table, table, r.inputs, r.bias_h, cell_state, r.hidden)
        rest = (r.coefficients, r.weights, r.factors, r.intermediate)
        self._run("persistent_forward", r, r.hidden.shape[2], *own, *rest)

    def tangent(
        self,
        r: Recurrence,
        table: Array,
        pre: Array,
        factor_table: Array,
        factors: Array,
        dm: Array,
        dh: Array,
        dc: Array,
    ) -> None:
        """Do `Backend.tangent`; dm (B, n) is scratch."""
        own = (r.recurrent, r.factor, r.factor_table, factor_table, table, r.inputs, r.coefficients)
        rest = (r.factors, pre, factors, dm, dh, dc, np.int32(r.linear_update))
        self._run("persistent_tangent", r, r.hidden.shape[2], *own, *rest)

    def adjoint(
        self, r: Recurrence, dh: Array, da: Array, dp: Array, dq: Array, back: Array, dc: Array, inject: bool
    ) -> None:
        """Do `Backend.adjoint`."""
        own = (r.recurrent_t, r.factor_t, r.factor_table, r.inputs, r.coefficients, r.factors)
        rest = (dh, da, dp, dq, back, dc, np.int32(inject))
        self._run("persistent_adjoint", r, 4 * r.hidden.shape[2], *own, *rest)

    def _run(self, name: str, r: Recurrence, length: int, *arguments: Any) -> None:
        """Launch a kernel whose products read rows of so many numbers; arrays go by their addresses."""
        (steps, batch), n, multiplicative = r.inputs.shape, r.hidden.shape[2], r.factor is not None
        tile = min(batch, self._tile(n, multiplicative, length))
        shared = (-(-tile * length // 4) * 4 + self._matrices(n, multiplicative)) * self._itemsize
        sizes = (np.int32(size) for size in (steps, batch, n, self._most(n), tile))
        values = [np.array(_plain(argument)) for argument in (*sizes, *arguments, self._arrived)]
        pointers = np.array([value.ctypes.data for value in values], np.uintp)
        kernel = self._kernel(name)
        if kernel.max_dynamic_shared_size_bytes < shared:
            kernel.max_dynamic_shared_size_bytes = self._shared_bytes
        self._arrived.data.memset_async(0, self._arrived.nbytes, self._stream)
        grid, block = (-(-n // self._most(n)), 1, 1), (THREADS, 1, 1)
        cupy.cuda.driver.launchCooperativeKernel(
            kernel.kernel.ptr, *grid, *block, shared, self._stream.ptr, pointers.ctypes.data
        )


def _plain(argument: Any) -> Any:
    """Give a size as it is, and an array as its address; null where it is not wanted."""
    if isinstance(argument, np.int32):
        return argument
    array = argument.matrix if isinstance(argument, Packed) else argument
    return np.uintp(0 if array is None else array.data.ptr)
