"""The interface of a device: arrays, memory, matrix products, and a hook for loops over time.

The kernels of a network's steps are in numpy.py, in plain array code that runs on any device; numba.py and
cupy.py replace those for which a compiled kernel is worth it.
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
"""A NumPy array, or an array of the same interface on a device (CuPy)."""


@dataclass(frozen=True)
class Packed:
    """A matrix that is multiplied from the left many times, prepared by `Backend.pack`.

    Attributes
    ----------
    matrix : (K, N)
    panels : array or None
        The same numbers in the order in which the backend's custom product reads them, if it has one.
    """

    matrix: Array
    panels: Array | None = None


class Workspace:
    """Named scratch arrays: the same memory for the same name, growing and never shrinking.

    Fresh pages cost as much as the arithmetic on them, so temporaries and tapes live in workspaces.
    """

    def __init__(self, xp: Any, dtype: np.dtype) -> None:
        self.xp = xp
        self.dtype = dtype
        self.flat: dict[str, Array] = {}

    def __call__(self, name: str, shape: tuple[int, ...], dtype: Any = None) -> Array:
        """Return an uninitialised array whose content is valid until the next request for the same name.

        `dtype` defaults to that of the workspace and must always be the same for one name.
        """
        size = prod(shape)
        flat = self.flat.get(name)
        if flat is None or flat.size < size:
            flat = self.flat[name] = self.xp.empty(size, dtype or self.dtype)
        return flat[:size].reshape(shape)


class Scratch(threading.local, Workspace):
    """A workspace whose arrays belong to a thread each, so that several threads can use one model."""


class Backend:
    """Arrays and matrix products of one kind of device, here of the host.

    Parameters
    ----------
    dtype : str
        'float32' or 'float64', the type of parameters, tapes and vectors.

    Attributes
    ----------
    micro_batch : int
        The recommended number of sequences that a rank processes at a time.
    block_rows : int
        The recommended number of rows (steps times sequences) in a time-batched product: on a CPU a few MB of
        pre-activations, which stay in the cache, yet enough rows for a fast product.
    each_numbers : int
        The recommended number of elements in the per-sequence gradients that are computed at once: on a CPU
        few enough for the cache.
    directions : int
        The recommended number of directions in one pass J V of a network.
    device : str
        The name of the device.
    device_id : str or None
        Identifies the GPU among those of the node; None on a CPU.
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
        """Return what a copy or a pickle of the backend is made of: workspaces are not copied."""
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
        """Return the array as a NumPy array."""
        return array

    def to_device(self, array: np.ndarray) -> Array:
        """Return the NumPy array as an array of this device."""
        return array

    def stage(self, vector: Array) -> np.ndarray:
        """Return the content of a vector on the host: the array itself on a CPU, else a reused buffer."""
        return vector

    def unstage(self, message: np.ndarray, vector: Array) -> None:
        """Copy the buffer that `stage` returned, with its current content, back into the vector."""

    def address(self, array: Array) -> int:
        """Return the address of the array in the device's memory."""
        return int(array.ctypes.data)

    @property
    def stream(self) -> int:
        """The address of the CUDA stream on which the backend works; 0 on a CPU."""
        return 0

    def use(self) -> None:
        """Make the device and its stream current in this thread: other libraries change them."""

    def synchronize(self) -> None:
        """Wait until the device has finished all its work."""

    def free_memory(self) -> int | None:
        """Return the free bytes on the device; None if it uses the memory of the node."""
        return None

    def release(self) -> None:
        """Free unused memory; the content of all workspaces is lost."""
        self.workspace.flat.clear()

    def replay(self, key: Hashable, launch: Callable[[], None]) -> None:
        """Call `launch`, which must launch the same work each time that it is called with the same key."""
        launch()

    def loop(self, name: str, run: Callable[[], None], arrays: Mapping[str, Any]) -> None:
        """Run a loop over time: here, call `run`.

        Parameters
        ----------
        name : str
            The kernels that the steps call, and the pass: "gated forward".
        run : callable
            Runs the loop step by step; it reads and writes nothing but `arrays`.
        arrays : mapping of str to Array, Packed, int or None
            Arrays by their names in `kernels.cu`. They lie in tapes and workspaces, so that a captured loop
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
        """Return an empty workspace on this device whose arrays belong to a thread each."""
        return Scratch(self.xp, self.dtype)

    def matmul(self, a: Array, b: Array, out: Array) -> None:
        """Compute out = a b; every matrix product of a pass calls this or `multiply`."""
        self.xp.matmul(a, b, out=out)

    def pack(self, matrix: Array, memory: Workspace, name: str) -> Packed:
        """Prepare a matrix (K, N) for many calls of `multiply`, in the memory of this name."""
        copy = memory(name, matrix.shape)
        copy[...] = matrix
        return Packed(copy)

    def multiply(self, a: Array, b: Packed, out: Array, add: bool = False) -> None:
        """Compute out = a b, or out += a b, for few rows of a (B, K): the sequential products of a pass."""
        if add:
            product = self.workspace("multiply", out.shape)
            self.matmul(a, b.matrix, product)
            out += product
        else:
            self.matmul(a, b.matrix, out)
