"""What a device offers: arrays, memory, matrix products, and a hook for loops over time.

The kernels that a network's steps are made of are in numpy.py, in plain array code that runs on any device;
the others replace those that pay (numba.py, cupy.py).
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np

__all__ = ["Array", "Backend", "Packed", "Workspace"]

Array = Any
"""A NumPy array, or an array of the same interface on a device (CuPy)."""


@dataclass(frozen=True)
class Packed:
    """A matrix that is multiplied from the left many times, made ready for it by `Backend.pack`.

    Attributes
    ----------
    matrix : (K, N)
    panels : array or None
        The same numbers in the order in which a backend's own product reads them, if it has one.
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
        """Give an uninitialised array whose content lasts until the next request of its name.

        `dtype` is the workspace's own unless given, and always the same for one name.
        """
        size = prod(shape)
        flat = self.flat.get(name)
        if flat is None or flat.size < size:
            flat = self.flat[name] = self.xp.empty(size, dtype or self.dtype)
        return flat[:size].reshape(shape)


class Backend:
    """Arrays and matrix products of one kind of device, here of the host.

    Parameters
    ----------
    dtype : str
        'float32' or 'float64', the type of parameters, tapes and vectors.

    Attributes
    ----------
    micro_batch : int
        Sequences that a rank had best work on at a time.
    block_rows : int
        Steps times sequences that the time-batched products had best take at once: on a CPU a few MB of
        pre-activations, which stay in the cache, yet enough rows for a fast product.
    each_numbers : int
        Numbers of the gradients of single sequences that had best be computed at once; 0: one sequence after
        the other, which suits a CPU.
    device : str
        What it computes on, in words.
    device_id : str or None
        The same for all ranks of a node that share a GPU; None on a CPU.
    """

    name = "base"
    xp: Any = np
    micro_batch = 32
    block_rows = 1024
    each_numbers = 0

    def __init__(self, dtype: str = "float32") -> None:
        if dtype not in ("float32", "float64"):
            raise ValueError(f"dtype must be float32 or float64, not {dtype}")
        self.dtype = np.dtype(dtype)
        self.workspace = self.new_workspace()

    # Arrays ------------------------------------------------------------------------------------

    @property
    def device(self) -> str:
        """What it computes on, in words."""
        return "CPU"

    @property
    def device_id(self) -> str | None:
        """Tell one GPU of the node from another; None on a CPU."""
        return None

    def to_host(self, array: Array) -> np.ndarray:
        """Give the array as a NumPy array."""
        return array

    def to_device(self, array: np.ndarray) -> Array:
        """Give the NumPy array as an array of this device."""
        return array

    def stage(self, vector: Array) -> np.ndarray:
        """Give the content of a vector on the host: the array itself on a CPU, else a reused buffer."""
        return vector

    def unstage(self, message: np.ndarray, vector: Array) -> None:
        """Put what `stage` gave, and what has become of it, back into the vector."""

    def address(self, array: Array) -> int:
        """Say where in the device's memory the array begins."""
        return int(array.ctypes.data)

    @property
    def stream(self) -> int:
        """The address of the CUDA stream of all its work; 0 on a CPU."""
        return 0

    def synchronize(self) -> None:
        """Wait until everything asked of the device is done."""

    def free_memory(self) -> int | None:
        """Give the bytes that are free on the device; None where it uses the memory of the node."""
        return None

    def release(self) -> None:
        """Give unused memory back; all workspaces lose what they hold."""
        self.workspace.flat.clear()

    def replay(self, key: Hashable, launch: Callable[[], None]) -> None:
        """Do what `launch` asks of the device, which is always the same for one key."""
        launch()

    def loop(self, name: str, run: Callable[[], None], arrays: Mapping[str, Any]) -> None:
        """Do a loop over time: here, call `run`.

        Parameters
        ----------
        name : str
            Of the kernels that its steps call, and of the pass: "gated forward".
        run : callable
            Does the loop; all that it reads and writes are the arrays, by the names of `kernels.cu`.
        arrays : mapping of str to Array, Packed, int or None
            They lie in tapes and workspaces, so that what was recorded of a loop can be done again.
        """
        run()

    def loop_key(self, name: str, arrays: Mapping[str, Any]) -> Hashable | None:
        """Tell a loop that may be done as a whole from all others, by its arrays; None: step by step."""
        return None

    def new_workspace(self) -> Workspace:
        """Make an empty workspace on this device."""
        return Workspace(self.xp, self.dtype)

    def matmul(self, a: Array, b: Array, out: Array) -> None:
        """Out = a b: every matrix product of a pass goes through here, so that they can be counted."""
        self.xp.matmul(a, b, out=out)

    def pack(self, matrix: Array, memory: Workspace, name: str) -> Packed:
        """Make a matrix (K, N) ready for many calls of `multiply`, in memory of this name."""
        ready = memory(name, matrix.shape)
        ready[...] = matrix
        return Packed(ready)

    def multiply(self, a: Array, b: Packed, out: Array, add: bool = False) -> None:
        """Out = a b, or out += a b, for the few rows of a (B, K): the sequential products of a pass."""
        if add:
            product = self.workspace("multiply", out.shape)
            self.matmul(a, b.matrix, product)
            out += product
        else:
            self.matmul(a, b.matrix, out)
