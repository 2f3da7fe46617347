"""Arrays as PyTorch tensors and back: through the host, or shared on a GPU.

On a GPU PyTorch and CuPy each have a current stream, and nothing orders the work of two streams. In a pass
(`working`) PyTorch's current stream is therefore that of the CuPy backend. All kernels that touch shared
memory are then on one stream, in the order in which they were launched: a result is complete when the
optimizer reads it, and memory that either library frees is only reused by work that comes later. At the start
of a pass this stream waits for the work that PyTorch has queued elsewhere, such as an earlier change of the
module's buffers, and at its end that stream waits for the pass. Nothing waits on the host.
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
    """Return the exchange for a module on a device: without a copy on an NVIDIA GPU if CuPy is installed."""
    backend = gpu_backend(dtype, device.index or 0) if is_nvidia(device) else None
    return ThroughHost(NumpyBackend(dtype), device) if backend is None else ThroughDevice(backend, device)


def is_nvidia(device: Any) -> bool:
    """Return whether a device of PyTorch is an NVIDIA GPU: those of AMD are called "cuda" too."""
    return bool(device.type == "cuda" and torch.version.cuda)


def to_array(tensor: Any) -> np.ndarray:
    """Return a tensor as an array on the host; on a CPU it shares the memory."""
    return np.ascontiguousarray(tensor.detach().cpu().numpy())


class ThroughHost(Exchange):
    """Vectors are NumPy arrays; on a CPU the tensors share their memory.

    Parameters
    ----------
    backend : NumpyBackend
    device : torch.device
        Of the module.
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
    """Vectors are CuPy arrays on the module's GPU, whose memory the tensors share."""

    def tensor(self, array: Array) -> Any:
        """Return an array as a tensor; see `Exchange.tensor`."""
        return torch.from_dlpack(array)

    def array(self, tensor: Any) -> Array:
        """Return a tensor as an array; see `Exchange.array`."""
        return self.backend.xp.from_dlpack(tensor.detach().contiguous())

    def working(self) -> AbstractContextManager[object]:
        """Return the context in which PyTorch works on the stream of the backend."""
        return on_stream(self.backend, self.device)

    def release(self) -> None:
        """Release the memory that PyTorch holds in reserve on all GPUs."""
        torch.cuda.empty_cache()


@contextmanager
def on_stream(backend: NumpyBackend, device: Any) -> Iterator[None]:
    """Let PyTorch work on the stream of the backend inside the context, in order with its current one."""
    backend.use()
    stream, before = torch.cuda.ExternalStream(backend.stream, device), torch.cuda.current_stream(device)
    if stream == before:  # in a pass that calls another one
        yield
        return
    stream.wait_stream(before)
    try:
        with torch.cuda.stream(stream):
            yield
    finally:
        before.wait_stream(stream)
        backend.use()  # PyTorch may have made another GPU current
