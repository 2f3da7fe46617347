"""Conversion between arrays and PyTorch tensors: through the host, or shared on a GPU.

On a GPU PyTorch and CuPy each have a current stream, and the work of two streams is not ordered. In a pass
(`working`), PyTorch therefore uses the stream of the CuPy backend. All kernels that use shared memory then
run on one stream in the order of their launches: a result is complete when the optimizer reads it, and memory
that either library frees is only reused by later work. At the start of a pass this stream waits for the work
that PyTorch has queued on its previous stream, such as an earlier change of the module's buffers, and at the
end the previous stream waits for the pass. The host never waits.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import numpy as np
import torch

from hfmpi.backends.base import Array
from hfmpi.backends.numpy import NumpyBackend
from hfmpi.frameworks.exchange import Exchange, gpu_backend

__all__ = ["ThroughDevice", "ThroughHost", "choose_exchange", "to_array"]


def choose_exchange(device: Any, dtype: str) -> Exchange:
    """Return the exchange for a module on a device: without copies on an NVIDIA GPU if CuPy is installed."""
    backend = gpu_backend(dtype, device.index or 0) if is_nvidia(device) else None
    return ThroughHost(NumpyBackend(dtype), device) if backend is None else ThroughDevice(backend, device)


def is_nvidia(device: Any) -> bool:
    """Return whether a PyTorch device is an NVIDIA GPU: devices of AMD are also called "cuda"."""
    return bool(device.type == "cuda" and torch.version.cuda)


def to_array(tensor: Any) -> np.ndarray:
    """Return a tensor as an array on the host, which shares the memory of a tensor on a CPU."""
    return np.ascontiguousarray(tensor.detach().cpu().numpy())


class ThroughHost(Exchange):
    """Vectors are NumPy arrays; tensors on a CPU share their memory.

    Parameters
    ----------
    backend : NumpyBackend
    device : torch.device
        The device of the module.
    """

    def __init__(self, backend: NumpyBackend, device: Any) -> None:
        super().__init__(backend)
        self.device = device

    def tensor(self, array: Array) -> Any:
        """Return an array as a tensor; see `Exchange.tensor`."""
        return self.moved(array)

    def array(self, tensor: Any) -> Array:
        """Return a tensor as an array; see `Exchange.array`."""
        return to_array(tensor)

    def moved(self, array: np.ndarray) -> Any:
        """Return an array of the host as a tensor; see `Exchange.moved`."""
        if not array.flags.writeable or any(stride < 0 for stride in array.strides):
            array = array.copy()
        return torch.from_numpy(array).to(self.device)


class ThroughDevice(ThroughHost):
    """Vectors are CuPy arrays on the module's GPU; the tensors share their memory."""

    def tensor(self, array: Array) -> Any:
        """Return an array as a tensor; see `Exchange.tensor`."""
        return torch.from_dlpack(array)

    def array(self, tensor: Any) -> Array:
        """Return a tensor as an array; see `Exchange.array`."""
        return self.backend.xp.from_dlpack(tensor.detach().contiguous())

    def working(self) -> AbstractContextManager[object]:
        """Return the context in which PyTorch uses the stream of the backend."""
        return on_stream(self.backend, self.device)

    def release(self) -> None:
        """Release the memory that PyTorch reserves on all GPUs."""
        torch.cuda.empty_cache()


@contextmanager
def on_stream(backend: NumpyBackend, device: Any) -> Iterator[None]:
    """Run PyTorch on the stream of the backend inside the context, ordered with its current stream."""
    backend.use()
    stream, before = torch.cuda.ExternalStream(backend.stream, device), torch.cuda.current_stream(device)
    if stream == before:  # in a nested pass
        yield
        return
    stream.wait_stream(before)
    try:
        with torch.cuda.stream(stream):
            yield
    finally:
        before.wait_stream(stream)
        backend.use()  # PyTorch may have made another GPU current
