"""NVIDIA GPUs through CuPy: fused CUDA kernels, and loops over time that are replayed as CUDA graphs.

A pass over 200 steps launches about 400 to 800 small kernels. A launch from Python takes longer than the
kernel, but a graph launches all of them at once. A graph requires that its arrays have the same addresses as
when it was captured. They do, because all arrays of a loop are in tapes or workspaces.
"""

from __future__ import annotations

import functools
from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping
from pathlib import Path
from typing import Any

import cupy
import numpy as np

from hfmpi.backends.base import Array, Packed
from hfmpi.backends.clusters import BLOCKS, ClusterLoops
from hfmpi.backends.cublas import WORKSPACE_BYTES, Cublas
from hfmpi.backends.numpy import NumpyBackend
from hfmpi.backends.persistent import SIGNATURES, PersistentLoops
from hfmpi.errors import UserError

__all__ = ["CupyBackend", "device_count", "device_names"]

THREADS = 256
WARP = 32
SHARED_BYTES = 48 * 1024
"""The shared memory that a kernel can use on every GPU (CUDA programming guide, compute capabilities)."""

SLICE_ROWS, MOST_SLICES = 256, 128
"""The minimum number of rows in a block of a segment sum, and the maximum number of blocks of rows."""

MOST_GRAPHS = 256
"""The maximum number of captured loops; the least recently used one is dropped first."""

PERSISTENT_BATCH = {4: 32, 8: 8}
"""The largest batches that run faster in persistent kernels (docs/gpu.md), by the bytes per number."""

FUSED = ("gated", "plain")
"""The kinds of cells whose steps are kernels of kernels.cu."""

NULL = np.intp(0)
KERNELS = Path(__file__).with_name("kernels.cu")

_CUDA_ERRORS = (cupy.cuda.runtime.CUDARuntimeError, RuntimeError, NotImplementedError)


def device_count() -> int:
    """Return the number of GPUs that are visible to this process."""
    try:
        return int(cupy.cuda.runtime.getDeviceCount())
    except cupy.cuda.runtime.CUDARuntimeError:
        return 0


def device_names() -> list[str]:
    """Return the names of the GPUs that are visible to this process, in CUDA's order."""
    properties = map(cupy.cuda.runtime.getDeviceProperties, range(device_count()))
    return [about["name"].decode() for about in properties]


@functools.cache
def _stream(device: int) -> Any:
    """Return the stream for all work on a device; the default stream cannot be captured."""
    with cupy.cuda.Device(device):
        return cupy.cuda.Stream(non_blocking=True)


@functools.cache
def _module(real: str, device: int) -> Any:
    """Compile the kernels for the current device; CuPy caches the machine code on disk."""
    return cupy.RawModule(code=KERNELS.read_text(), options=("-std=c++17", f"-DREAL={real}"))


def _columns(rows: Array, sequences: Array) -> np.int32:
    """Return C, the number of columns, from rows (B C, .) of B sequences."""
    return np.int32(len(rows) // max(1, len(sequences)))


def _is_single(name: str, arrays: Mapping[str, Any]) -> bool:
    """Return whether a loop is one of a gated cell, with one column for each sequence."""
    return name in SIGNATURES and ("dc" not in arrays or len(arrays["dc"]) == arrays["x"].shape[1])


class CupyBackend(NumpyBackend):
    """Arrays, products and kernels on one GPU.

    Parameters
    ----------
    dtype : str
    local_rank : int
        The index of this rank among the ranks of its node, to which the visible GPUs are assigned in turn.
    precision : {'float32', 'tf32'}
        The precision of float32 matrix products; `tf32` rounds their factors to 10 bits, for tensor cores.

    Raises
    ------
    UserError
        If there is no GPU.

    Attributes
    ----------
    captures : bool
        Whether loops over time are captured in graphs; becomes False if CUDA cannot capture a loop.
    persistent_batch : int
        The maximum number of sequences for which a loop of a gated cell is one kernel; 0: never. For more
        sequences graphs are faster.
    cluster_batch : int
        The maximum number of sequences for which a loop of a gated cell runs on thread-block clusters; 0:
        never, the default until a card has shown where clusters are faster (docs/gpu.md).
    cluster_blocks : int
        Blocks of a cluster.
    """

    name = "cupy"
    xp = cupy
    micro_batch = 1024
    block_rows = 2**18
    each_numbers = 2**25
    directions = 2**16  # all at once

    def __init__(self, dtype: str = "float32", local_rank: int = 0, precision: str = "float32") -> None:
        count = device_count()
        if count == 0:
            raise UserError("the cupy backend requires an NVIDIA GPU, but CUDA shows none to this process")
        self._device = cupy.cuda.Device(local_rank % count)
        self._stream = _stream(self._device.id)
        self.use()
        super().__init__(dtype)
        self._device.cublas_handle  # noqa: B018 (makes CuPy load cuBLAS)
        workspace = cupy.empty(WORKSPACE_BYTES, np.uint8)
        self._cublas = Cublas(self.dtype, self._stream.ptr, workspace, precision == "tf32")
        self._module = _module("float" if self.dtype.itemsize == 4 else "double", self._device.id)
        self._precision = precision
        self._kernels: dict[str, Any] = {}
        self._pinned: Any = None
        self._pinned_bytes = 0
        self._graphs: OrderedDict[Hashable, Any] = OrderedDict()
        self.captures = True
        self.persistent_batch = PERSISTENT_BATCH[self.dtype.itemsize]
        self.cluster_batch, self.cluster_blocks = 0, BLOCKS

    def __reduce__(self) -> tuple[Any, ...]:
        """Return the class, arguments and state of a copy or a pickle, which uses the same device."""
        state = {"micro_batch": self.micro_batch}
        return type(self), (self.dtype.name, self._device.id, self._precision), state

    # Arrays ------------------------------------------------------------------------------------

    @property
    def device(self) -> str:
        """The name and number of the GPU."""
        properties = cupy.cuda.runtime.getDeviceProperties(self._device.id)
        return f"{properties['name'].decode()} (GPU {self._device.id})"

    @property
    def device_id(self) -> str:
        """The PCI bus id, which identifies the GPU independently of CUDA_VISIBLE_DEVICES."""
        return str(self._device.pci_bus_id)

    def to_host(self, array: Array) -> np.ndarray:
        return cupy.asnumpy(array)

    def to_device(self, array: np.ndarray) -> Array:
        return cupy.asarray(array)

    def stage(self, vector: Array) -> np.ndarray:
        if self._pinned_bytes < vector.nbytes:
            self._pinned, self._pinned_bytes = cupy.cuda.alloc_pinned_memory(vector.nbytes), vector.nbytes
        message = np.frombuffer(self._pinned, vector.dtype, vector.size)
        vector.get(out=message)  # waits for the stream
        return message

    def unstage(self, message: np.ndarray, vector: Array) -> None:
        vector.set(message)

    def address(self, array: Array) -> int:
        return int(array.data.ptr)

    @property
    def stream(self) -> int:
        return int(self._stream.ptr)

    def use(self) -> None:
        self._device.use()
        self._stream.use()

    def synchronize(self) -> None:
        self._stream.synchronize()

    def free_memory(self) -> int:
        free, _ = self._device.mem_info
        return int(free) + int(cupy.get_default_memory_pool().free_bytes())

    def release(self) -> None:
        self.synchronize()
        super().release()
        self._graphs.clear()
        cupy.get_default_memory_pool().free_all_blocks()

    # Products ----------------------------------------------------------------------------------

    def matmul(self, a: Array, b: Array, out: Array) -> None:
        self._cublas.gemm(a, b, out)

    def multiply(self, a: Array, b: Packed, out: Array, add: bool = False) -> None:
        self._cublas.gemm(a, b.matrix, out, add)

    # Loops, captured ---------------------------------------------------------------------------

    def replay(self, key: Hashable, launch: Callable[[], None]) -> None:
        """Call `launch`, whose work must be the same for one key; replay a graph from the second call on.

        If the graph cannot be captured, `launch` is called each time, with the same results.
        """
        graph = self._graphs.pop(key, None)
        if graph is None or not self.captures:
            launch()
        else:
            graph = graph or self._captured(launch)
            if graph is None:
                launch()
            else:
                graph.launch(self._stream)
        self._graphs[key] = graph or False  # False: ran once, so that everything is loaded and compiled
        if len(self._graphs) > MOST_GRAPHS:
            self._graphs.popitem(last=False)

    def _captured(self, launch: Callable[[], None]) -> Any:
        """Capture the work of `launch` without running it; return None, now and later, if CUDA refuses."""
        try:
            self._stream.begin_capture()
            try:
                launch()
            finally:
                graph = self._stream.end_capture()
        except _CUDA_ERRORS:
            self.captures = False
            return None
        return graph

    def loop(self, name: str, run: Callable[[], None], arrays: Mapping[str, Any]) -> None:
        """Run a loop over time as one kernel or as a graph, or directly if its steps are plain array code."""
        key = self.loop_key(name, arrays)
        if key is None:
            run()
        elif not (self._on_clusters(name, arrays) or self._in_one_kernel(name, arrays)):
            self.replay(key, run)

    def loop_key(self, name: str, arrays: Mapping[str, Any]) -> Hashable | None:
        if name.partition(" ")[0] not in FUSED:  # the addresses of its temporaries change
            return None
        return name, *map(self._location, arrays.values())

    def _location(self, argument: Any) -> Hashable:
        """Return the address and shape of an array."""
        if argument is None or isinstance(argument, int):
            return argument
        array = argument.matrix if isinstance(argument, Packed) else argument
        return self.address(array), array.shape

    @functools.cached_property
    def clusters(self) -> ClusterLoops:
        return ClusterLoops(self._device, self._stream, self.dtype, self.cluster_blocks)

    def _on_clusters(self, name: str, arrays: Mapping[str, Any]) -> bool:
        """Run a loop on thread-block clusters if that is chosen and possible; return whether it was run."""
        if arrays["x"].shape[1] > self.cluster_batch or not _is_single(name, arrays):
            return False
        if not self.clusters.fit(arrays["hidden"].shape[2], arrays["p_table"] is not None):
            return False
        try:
            self.clusters.run(name, arrays)
        except _CUDA_ERRORS:  # nothing was launched
            self.cluster_batch = 0
            return False
        return True

    @functools.cached_property
    def _persistent(self) -> PersistentLoops:
        return PersistentLoops(self._device, self._stream, self.dtype, self._kernel)

    def _in_one_kernel(self, name: str, arrays: Mapping[str, Any]) -> bool:
        """Run a loop as a persistent kernel if that is possible and faster; return whether it was run."""
        if arrays["x"].shape[1] > self.persistent_batch or not _is_single(name, arrays):
            return False
        if not self._persistent.fit(arrays["hidden"].shape[2], arrays["p_table"] is not None):
            return False
        try:
            self._persistent.run(name, arrays)
        except _CUDA_ERRORS:  # nothing was launched
            self.persistent_batch = 0
            return False
        return True

    # Kernels -----------------------------------------------------------------------------------

    def _launch(self, name: str, threads: int, *arguments: Any) -> None:
        """Launch a kernel with at least `threads` threads; an argument None becomes a null pointer."""
        arguments = tuple(NULL if a is None else a for a in arguments)
        self._kernel(name)((-(-threads // THREADS),), (THREADS,), arguments)

    def _kernel(self, name: str) -> Any:
        kernel = self._kernels.get(name)
        if kernel is None:
            kernel = self._kernels[name] = self._module.get_function(name)
        return kernel

    def _step(self, name: str, like: Array, *arguments: Any) -> None:
        """Launch a step kernel with one thread per element of `like` (B, n) or (B C, n)."""
        rows, n = like.shape
        self._launch(name, rows * n, np.int32(rows), np.int32(n), *arguments)

    def _rows(self, name: str, like: Array, *arguments: Any) -> None:
        """Launch a kernel with one warp per row of `like` (N, V) or (N C, V)."""
        rows, symbols = like.shape
        if rows:
            self._launch(name, rows * WARP, np.int32(rows), np.int32(symbols), *arguments)

    def gated_forward(
        self, a: Array, table: Array, x: Array, bias_h: Array, c: Array, h: Array, k: Array, w: Array
    ) -> None:
        self._step("gated_forward", c, a, table, x, bias_h, c, h, k, w)

    def gated_tangent(
        self, pre: Array, table: Array, x: Array, k: Array, dc: Array, dh: Array, add: bool
    ) -> None:
        self._step("gated_tangent", dc, _columns(dc, x), pre, table, x, k, dc, dh, np.int32(add))

    def gated_adjoint(self, dh: Array, back: Array, k: Array, dc: Array, da: Array, inject: bool) -> None:
        self._step("gated_adjoint", dc, _columns(dc, k[0]), dh, back, k, dc, da, np.int32(inject))

    def plain_forward(self, a: Array, table: Array, x: Array, h: Array, w: Array) -> None:
        self._step("plain_forward", h, a, table, x, h, w)

    def plain_tangent(self, pre: Array, table: Array, x: Array, h: Array, dh: Array) -> None:
        self._step("plain_tangent", dh, _columns(dh, h), pre, table, x, h, dh)

    def plain_adjoint(self, dh: Array, back: Array, h: Array, da: Array, inject: bool) -> None:
        self._step("plain_adjoint", dh, _columns(dh, h), dh, back, h, da, np.int32(inject))

    def factor_forward(self, p_table: Array, x: Array, q: Array, m: Array) -> None:
        self._step("factor_forward", q, p_table, x, q, m)

    def factor_tangent(
        self, p_table: Array, dp_table: Array, x: Array, q: Array, dq: Array, dm: Array
    ) -> None:
        self._step("factor_tangent", dq, _columns(dq, q), p_table, dp_table, x, q, dq, dm)

    def factor_adjoint(self, p_table: Array, x: Array, q: Array, dm: Array, dp: Array, dq: Array) -> None:
        self._step("factor_adjoint", dq, _columns(dq, q), p_table, x, q, dm, dp, dq)

    def softmax_loss(self, logits: Array, targets: Array) -> Array:
        losses = cupy.empty(len(targets), np.float64)
        self._rows("softmax_loss", logits, logits, targets, losses)
        return losses

    def softmax_gradient(self, p: Array, targets: Array, scale: float, out: Array) -> None:
        self._rows("softmax_gradient", p, p, targets, self.dtype.type(scale), out)

    def softmax_hessian(self, p: Array, u: Array, scale: float) -> None:
        self._rows("softmax_hessian", u, _columns(u, p), p, u, self.dtype.type(scale))

    def segment_sum(self, rows: Array, x: Array, out: Array) -> None:
        count = len(rows)
        length = -(-count // min(MOST_SLICES, -(-count // SLICE_ROWS)))
        parts = self.workspace("segments", (-(-count // length), *out.shape))
        self._segments(rows, x, parts, first=length, step=1, length=length)
        cupy.sum(parts, axis=0, out=out)

    def segment_sum_each(self, rows: Array, x: Array, out: Array) -> None:
        steps, batch, width = rows.shape
        flat = cupy.ascontiguousarray(rows).reshape(-1, width)
        self._segments(flat, cupy.ascontiguousarray(x), out, first=1, step=batch, length=steps)

    def _segments(self, rows: Array, x: Array, out: Array, first: int, step: int, length: int) -> None:
        """Compute the segment sums of many parts of the rows (N, K); part y starts at row y * first."""
        parts, symbols, width = out.shape
        columns = WARP
        while symbols * columns * self.dtype.itemsize > SHARED_BYTES:
            columns //= 2
        sizes = (np.int32(size) for size in (len(rows), width, symbols, first, step, length))
        stride, out_stride = (np.int64(array.strides[0] // array.itemsize) for array in (rows, out))
        self._kernel("segment_sums")(
            (-(-width // columns), parts),
            (columns,),
            (*sizes, rows, stride, x, out, out_stride),
            shared_mem=symbols * columns * self.dtype.itemsize,
        )

    def accumulate_squares(self, each: Array, total: Array, squares: Array) -> None:
        batch, size = each.shape
        self._launch("accumulate_squares", size, np.int32(batch), np.int32(size), each, total, squares)
