"""The interface of a device: arrays, memory, matrix products, and a hook for loops over time.

numpy.py contains the kernels of a network's steps in plain array code, which runs on any device. numba.py and
cupy.py replace the kernels that are considerably faster when compiled.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np

__all__ = ["Array", "Backend", "Packed", "Scratch", "Workspace"]

Array = Any
"""A NumPy array, or an array with the same interface on a device (CuPy)."""


@dataclass(frozen=True)
class Packed:
    """A matrix that is the right factor of many products, prepared by `Backend.pack`.

    Attributes
    ----------
    matrix : (K, N)
    panels : array or None
        The same numbers in the order in which the backend's custom product reads them; None: it has none.
    """

    matrix: Array
    panels: Array | None = None


class Workspace:
    """Named scratch arrays: each name has one block of memory, which grows and never shrinks.

    New memory pages cost as much as the arithmetic on them, so temporary arrays and tapes use workspaces.
    """

    def __init__(self, xp: Any, dtype: np.dtype) -> None:
        self.xp = xp
        self.dtype = dtype
        self.flat: dict[str, Array] = {}

    def __call__(self, name: str, shape: tuple[int, ...], dtype: Any = None) -> Array:
        """Return an uninitialised array whose content is valid until the next request for the same name.

        `dtype` defaults to that of the workspace, and must be the same in all requests for a name.
        """
        size = prod(shape)
        flat = self.flat.get(name)
        if flat is None or flat.size < size:
            flat = self.flat[name] = self.xp.empty(size, dtype or self.dtype)
        return flat[:size].reshape(shape)


class Scratch(threading.local, Workspace):
    """A workspace with separate arrays for each thread, so that several threads can use one model."""


class Backend:
    """Arrays and matrix products of one kind of device; this base class uses the host.

    Parameters
    ----------
    dtype : str
        'float32' or 'float64', the type of parameters, tapes and vectors.

    Attributes
    ----------
    micro_batch : int
        The recommended number of sequences that a rank processes at a time.
    block_rows : int
        The recommended number of rows (steps times sequences) in a time-batched product. On a CPU the
        pre-activations then have a few MB, so that they fit in the cache, and the product is still fast.
    each_numbers : int
        The recommended number of elements in the per-sequence gradients that are computed at once. On a CPU
        they fit in the cache.
    directions : int
        The recommended number of directions in one pass J V of a network.
    device : str
        The name of the device.
    device_id : str or None
        An identifier of the GPU that is unique on the node; None on a CPU.
    """

    name = "base"
    xp: Any = np
    micro_batch = 32
    block_rows = 1024
    each_numbers = 2**18
    directions = 16

    def __init__(self, dtype: str = "float32") -> None:
        if dtype not in ("float32", "float64"):
            raise ValueError(f"dtype must be float32 or float64, not {dtype}")
        self.dtype = np.dtype(dtype)
        self.workspace: Workspace = self.new_scratch()

    def __reduce__(self) -> tuple[Any, ...]:
        """Return the class, arguments and state of a copy or a pickle, which has empty workspaces."""
        return type(self), (self.dtype.name,), {"micro_batch": self.micro_batch}

    # Arrays ------------------------------------------------------------------------------------

    @property
    def device(self) -> str:
        """The name of the device."""
        return "CPU"

    @property
    def device_id(self) -> str | None:
        """An identifier of the GPU, the same for all ranks that share it; None on a CPU."""
        return None

    def to_host(self, array: Array) -> np.ndarray:
        """Return an array of this device as a NumPy array."""
        return array

    def to_device(self, array: np.ndarray) -> Array:
        """Return a NumPy array as an array of this device."""
        return array

    def stage(self, vector: Array) -> np.ndarray:
        """Return the content of a vector on the host: the vector itself on a CPU, else a reused buffer."""
        return vector

    def unstage(self, message: np.ndarray, vector: Array) -> None:
        """Copy the current content of the buffer that `stage` returned back to the vector."""

    def address(self, array: Array) -> int:
        """Return the address of the array in the device's memory."""
        return int(array.ctypes.data)

    @property
    def stream(self) -> int:
        """The address of the CUDA stream on which the backend works; 0 on a CPU."""
        return 0

    def use(self) -> None:
        """Make the device and its stream current in this thread, because other libraries change them."""

    def synchronize(self) -> None:
        """Wait until the device has finished all its work."""

    def free_memory(self) -> int | None:
        """Return the number of free bytes on the device; None if it uses the memory of the node."""
        return None

    def release(self) -> None:
        """Free the memory of all workspaces, whose content is lost, and unused memory of the device."""
        self.workspace.flat.clear()

    def replay(self, key: Hashable, launch: Callable[[], None]) -> None:
        """Call `launch`, or replay its work; it must launch the same work each time for the same key."""
        launch()

    def loop(self, name: str, run: Callable[[], None], arrays: Mapping[str, Any]) -> None:
        """Run a loop over time; this base class calls `run`.

        Parameters
        ----------
        name : str
            The kernels that the steps call, and the pass, such as "gated forward".
        run : callable
            Runs the loop step by step; it reads and writes only `arrays`.
        arrays : mapping of str to Array, Packed, int or None
            Arrays by their names in `kernels.cu`. They are in tapes and workspaces, so that a captured loop
            can be replayed.
        """
        run()

    def loop_key(self, name: str, arrays: Mapping[str, Any]) -> Hashable | None:
        """Return a key that identifies the loop and its arrays; None if it can only run step by step."""
        return None

    def new_workspace(self) -> Workspace:
        """Return an empty workspace on this device."""
        return Workspace(self.xp, self.dtype)

    def new_scratch(self) -> Scratch:
        """Return an empty workspace on this device with separate arrays for each thread."""
        return Scratch(self.xp, self.dtype)

    def matmul(self, a: Array, b: Array, out: Array) -> None:
        """Compute out = a b; every matrix product of a pass calls this method or `multiply`."""
        self.xp.matmul(a, b, out=out)

    def pack(self, matrix: Array, memory: Workspace, name: str) -> Packed:
        """Prepare a matrix (K, N) for many calls of `multiply`; copies use the memory called `name`."""
        copy = memory(name, matrix.shape)
        copy[...] = matrix
        return Packed(copy)

    def multiply(self, a: Array, b: Packed, out: Array, add: bool = False) -> None:
        """Compute out = a b, or out += a b, for few rows of a (B, K), as in sequential products of a pass."""
        if add:
            product = self.workspace("multiply", out.shape)
            self.matmul(a, b.matrix, product)
            out += product
        else:
            self.matmul(a, b.matrix, out)
