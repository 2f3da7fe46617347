"""Loops over time on thread-block clusters: the blocks of a cluster exchange the state through shared memory.

A cluster of 16 blocks stores the recurrent matrix of the paper's networks in the shared memory of its
multiprocessors, and runs the loop for some of the sequences. This needs compute capability 9.0 (H100, H200).
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import cupy
import numpy as np

from hfmpi.backends.base import Array, Packed
from hfmpi.backends.cublas import loaded
from hfmpi.backends.persistent import SIGNATURES

__all__ = ["BLOCKS", "SOURCES", "ClusterLoops", "options"]

THREADS = 512
"""Threads of a block."""

BLOCKS = 16
"""Blocks of a cluster: at most 8 on every GPU that has clusters, and 16 on H100 and H200."""

SOURCES = tuple(Path(__file__).with_name(name) for name in ("kernels.cu", "clusters.cu"))

_PORTABLE = 8  # blocks of a cluster that every GPU with clusters accepts
_NON_PORTABLE_ALLOWED = 14  # CU_FUNC_ATTRIBUTE_NON_PORTABLE_CLUSTER_SIZE_ALLOWED
_CLUSTER_DIMENSION = 4  # CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION
_NULL = np.intp(0)


def options(real: str, blocks: int) -> tuple[str, ...]:
    """Return the options with which `SOURCES` are compiled."""
    return "-std=c++17", f"-DREAL={real}", f"-DCLUSTER={blocks}", f"-DTHREADS_CLUSTER={THREADS}"


@functools.cache
def _module(real: str, device: int, blocks: int) -> Any:
    """Compile the kernels for the current device."""
    code = "\n".join(path.read_text() for path in SOURCES)
    return cupy.RawModule(code=code, options=options(real, blocks))


class _Attribute(ctypes.Structure):
    """A CUlaunchAttribute whose value is a cluster dimension."""

    _fields_ = (
        ("id", ctypes.c_int), ("pad", ctypes.c_char * 4),
        ("dimension", ctypes.c_uint * 3), ("rest", ctypes.c_char * 52),
    )  # fmt: skip


class _Configuration(ctypes.Structure):
    """A CUlaunchConfig."""

    _fields_ = (
        ("grid", ctypes.c_uint * 3), ("block", ctypes.c_uint * 3), ("shared", ctypes.c_uint),
        ("stream", ctypes.c_void_p), ("attributes", ctypes.POINTER(_Attribute)), ("count", ctypes.c_uint),
    )  # fmt: skip


class ClusterLoops:
    """The loops of gated cells on the clusters of one GPU.

    Parameters
    ----------
    device : cupy.cuda.Device
    stream : cupy.cuda.Stream
    dtype : dtype
    blocks : int
        Blocks of a cluster, a power of two.

    Attributes
    ----------
    supported : bool
        Whether the GPU has clusters.
    """

    def __init__(self, device: Any, stream: Any, dtype: np.dtype, blocks: int = BLOCKS) -> None:
        about = device.attributes
        self.supported = int(device.compute_capability) >= 90
        self._shared_bytes, self._processors = (
            about["MaxSharedMemoryPerBlockOptin"],
            about["MultiProcessorCount"],
        )
        self._device, self._stream, self._dtype, self._blocks = device, stream, dtype, blocks
        self._kernels: dict[str, tuple[Any, int]] = {}

    def fit(self, n: int, multiplicative: bool) -> bool:
        """Return whether a cluster can run the loops of n units."""
        return self.supported and all(self._most_sequences(name, n, multiplicative) for name in SIGNATURES)

    def _numbers(self, name: str, n: int, multiplicative: bool, sequences: int) -> int:
        """Return how many numbers a block stores in shared memory for this many sequences."""
        most, padded = -(-n // self._blocks), _padded(sequences)
        if name == "gated adjoint":
            parts = _round_up(self._blocks * padded * most)
            return 2 * parts + 4 * padded * most + (4 + multiplicative) * n * most
        return 2 * _round_up(padded * n) + 4 * padded * most + (4 + multiplicative) * n * (most | 1)

    def _most_sequences(self, name: str, n: int, multiplicative: bool) -> int:
        """Return the maximum number of sequences of a cluster: each thread has at most one unit of one."""
        numbers, most = self._shared_bytes // self._dtype.itemsize, -(-n // self._blocks)
        possible = (
            sequences
            for sequences in (*range(THREADS // 4 * 4, 0, -4), 1)
            if _padded(sequences) * most <= THREADS
            and self._numbers(name, n, multiplicative, sequences) <= numbers
        )
        return next(possible, 0)

    def run(self, name: str, arrays: Mapping[str, Any]) -> None:
        """Run the loop of this name in one launch."""
        (steps, batch), n = arrays["x"].shape, arrays["hidden"].shape[2]
        multiplicative = arrays["p_table"] is not None
        kernel, at_once = self._kernel(name)
        per = min(self._most_sequences(name, n, multiplicative), -(-batch // at_once))
        shared = self._numbers(name, n, multiplicative, per) * self._dtype.itemsize
        sizes = (steps, batch, n, -(-n // self._blocks), per)
        names = (key for key in SIGNATURES[name].split() if (name, key) != ("gated tangent", "dm"))
        arguments = tuple(_argument(value) for value in (*sizes, *(arrays[key] for key in names)))
        grid = (-(-batch // per) * self._blocks,)
        kernel(grid, (THREADS,), arguments, shared_mem=max(shared, self._alone))

    @property
    def _alone(self) -> int:
        """The bytes of shared memory with which a block has its multiprocessor to itself."""
        return int(self._shared_bytes // 2 + 1)

    def _kernel(self, name: str) -> tuple[Any, int]:
        """Return the kernel of a loop, and how many of its clusters the GPU runs at once."""
        if name not in self._kernels:
            real = "float" if self._dtype.itemsize == 4 else "double"
            module = _module(real, self._device.id, self._blocks)
            kernel = module.get_function(name.replace("gated ", "cluster_"))
            kernel.max_dynamic_shared_size_bytes = self._shared_bytes
            if self._blocks > _PORTABLE:
                cupy.cuda.driver.funcSetAttribute(kernel.kernel.ptr, _NON_PORTABLE_ALLOWED, 1)
            self._kernels[name] = kernel, self._at_once(kernel)
        return self._kernels[name]

    def _at_once(self, kernel: Any) -> int:
        """Ask CUDA how many clusters of this kernel the GPU runs at once.

        That can be fewer than its multiprocessors suffice for, because the blocks of a cluster share one part
        of the GPU.

        Raises
        ------
        RuntimeError
            If it runs none.
        """
        dimension = _Attribute(_CLUSTER_DIMENSION, b"", (self._blocks, 1, 1), b"")
        grid = max(self._processors // self._blocks, 1) * self._blocks
        configuration = _Configuration(
            (grid, 1, 1), (THREADS, 1, 1), self._alone, self._stream.ptr, ctypes.pointer(dimension), 1
        )
        clusters = ctypes.c_int()
        status = ctypes.CDLL(loaded("libcuda")).cuOccupancyMaxActiveClusters(
            ctypes.byref(clusters), ctypes.c_void_p(kernel.kernel.ptr), ctypes.byref(configuration)
        )
        if status or clusters.value < 1:
            raise RuntimeError(f"CUDA runs no cluster of {self._blocks} blocks (status {status})")
        return clusters.value


def _padded(sequences: int) -> int:
    """Return the sequences for which a cluster has memory: 1, or a multiple of 4."""
    return sequences if sequences == 1 else _round_up(sequences)


def _round_up(number: int) -> int:
    return -(-number // 4) * 4


def _argument(value: Array | Packed | int | None) -> Any:
    """Return an argument of a kernel: int32, an array, or a null pointer."""
    if isinstance(value, int):
        return np.int32(value)
    if value is None:
        return _NULL
    return value.matrix if isinstance(value, Packed) else value
