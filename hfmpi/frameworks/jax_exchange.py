"""Conversion between arrays and JAX arrays: through the host, or shared on a GPU.

JAX computes on internal streams that it does not expose. DLPack orders both sides when an array is handed
over: JAX waits for the work that CuPy has queued on its stream, and that stream waits until the computation
of JAX has ended. DLPack does not protect memory that one library frees and reuses while the other one still
reads it. The exchange therefore holds all arrays that were handed over, and frees them at the start of the
next pass, when CuPy's stream, which has waited for the results of JAX, has no more work.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import jax
import numpy as np

from hfmpi.backends.base import Array
from hfmpi.backends.numpy import NumpyBackend
from hfmpi.frameworks.exchange import Exchange, gpu_backend

__all__ = ["JaxExchange", "ThroughDevice", "ThroughHost", "choose_exchange"]

ALIGNMENT = 256
"""Alignment in bytes that XLA requires: allocations of CuPy have it, slices of vectors may not."""

HELD_BYTES = 1 << 28
"""Maximum size in bytes of the arrays that are held in a pass before it waits for CuPy's stream."""


def choose_exchange(params: Any, dtype: str) -> JaxExchange:
    """Return the exchange for a function of params: without copies on an NVIDIA GPU if CuPy is installed.

    The device is that of the JAX arrays in params, or JAX's default device if there are none.
    """
    leaves = [leaf for leaf in jax.tree_util.tree_leaves(params) if isinstance(leaf, jax.Array)]
    devices = {device for leaf in leaves or [jax.numpy.zeros(())] for device in leaf.devices()}
    device = devices.pop()
    if not devices and is_nvidia(device):
        backend = gpu_backend(dtype, device.local_hardware_id or 0)
        if backend is not None:
            return ThroughDevice(backend, device)
    return ThroughHost(NumpyBackend(dtype))


def is_nvidia(device: Any) -> bool:
    """Return whether a JAX device is an NVIDIA GPU."""
    return device.platform == "gpu" and "cuda" in device.client.platform_version


class JaxExchange(Exchange):
    """An exchange whose tensors are JAX arrays, which are immutable."""

    def saved(self, array: Array) -> Any:
        """Return an array of the backend as a tensor that does not change with the array."""
        return self.tensor(array)

    def copied(self, tensor: Any) -> Array:
        """Return a copy of a tensor as a writable array."""
        return self.array(tensor).copy()


class ThroughHost(JaxExchange):
    """Vectors are NumPy arrays, which compiled JAX functions accept directly."""

    def array(self, tensor: Any) -> Array:
        """Return a JAX array as a NumPy array, which may be read-only."""
        return np.asarray(tensor)

    def copied(self, tensor: Any) -> Array:
        """Return a copy of a JAX array as a NumPy array."""
        return np.array(tensor)


class ThroughDevice(JaxExchange):
    """Vectors are CuPy arrays on the GPU of the function; the JAX arrays share their memory.

    Parameters
    ----------
    backend : NumpyBackend
    device : jax.Device
    """

    def __init__(self, backend: NumpyBackend, device: Any) -> None:
        super().__init__(backend)
        self.device, self._held = device, _Held()

    def __reduce__(self) -> tuple[Any, ...]:
        """Return the arguments for copying and pickling; JAX devices cannot be pickled."""
        return _restored, (self.backend, self.device.local_hardware_id)

    def tensor(self, array: Array) -> Any:
        """Return an array as a JAX array; the array must not change while JAX uses it."""
        if not array.flags.c_contiguous or self.backend.address(array) % ALIGNMENT:
            array = array.copy()
        self._hold(array)
        return jax.dlpack.from_dlpack(array)

    def saved(self, array: Array) -> Any:
        """Return a copy of an array as a JAX array."""
        return jax.numpy.array(self.tensor(array))

    def array(self, tensor: Any) -> Array:
        """Return a JAX array as an array of the backend, which must not be written to."""
        self._hold(tensor)
        return self.backend.xp.from_dlpack(tensor)

    def moved(self, array: np.ndarray) -> Any:
        """Copy an array of the host to the device."""
        return jax.device_put(array, self.device)

    def working(self) -> AbstractContextManager[object]:
        """Return the context in which JAX computes on the device."""
        return self._on_device()

    @contextmanager
    def _on_device(self) -> Iterator[None]:
        self.backend.use()
        self._settle()
        with jax.default_device(self.device):
            yield

    def release(self) -> None:
        """Free the arrays that are held."""
        self._settle()

    def _hold(self, array: Any) -> None:
        if self._held.nbytes > HELD_BYTES:
            self._settle()
        self._held.arrays.append(array)
        self._held.nbytes += array.nbytes

    def _settle(self) -> None:
        if self._held.arrays:
            self.backend.synchronize()
            self._held.arrays.clear()
            self._held.nbytes = 0


class _Held(threading.local):
    """The arrays that were handed over in the passes of a thread."""

    def __init__(self) -> None:
        self.arrays, self.nbytes = list[Any](), 0


def _restored(backend: NumpyBackend, number: int) -> ThroughDevice:
    """Return the exchange for the device with this index among those of the process."""
    (device,) = (device for device in jax.local_devices() if device.local_hardware_id == number)
    return ThroughDevice(backend, device)
