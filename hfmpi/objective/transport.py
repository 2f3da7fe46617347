"""How a vector of a device is summed over the ranks: through the host, by a CUDA-aware MPI, or by NCCL.

Scalars and small objects always go through MPI from the host (`Communicator`).
"""

from __future__ import annotations

from hfmpi.backends import nccl
from hfmpi.backends.base import Array, Backend
from hfmpi.errors import UserError
from hfmpi.parallel.communicator import Communicator
from hfmpi.parallel.library import cuda_aware

__all__ = ["TRANSPORTS", "CudaTransport", "HostTransport", "Transport", "choose"]

TRANSPORTS = ("auto", "host", "cuda", "nccl")


class Transport:
    """One way to sum vectors.

    Parameters
    ----------
    communicator : Communicator
    backend : Backend
        The vectors are on its device.
    """

    name = ""

    def __init__(self, communicator: Communicator, backend: Backend) -> None:
        self.communicator = communicator
        self.backend = backend

    def sum(self, vector: Array) -> None:
        """Sum a C-contiguous vector over all ranks, in place; collective."""
        raise NotImplementedError


class HostTransport(Transport):
    """MPI on memory of the host: the vector itself on a CPU, else a copy in a pinned buffer."""

    name = "host"

    def __init__(self, communicator: Communicator, backend: Backend, in_tree: bool = False) -> None:
        super().__init__(communicator, backend)
        self._sum = communicator.sum_in_tree if in_tree else communicator.sum

    def sum(self, vector: Array) -> None:
        """Sum a vector over all ranks, in place; see `Transport.sum`."""
        if self.communicator.size == 1:
            self._sum(vector)  # checks it, and moves nothing
            return
        message = self.backend.stage(vector)
        self._sum(message)
        self.backend.unstage(message, vector)


class CudaTransport(Transport):
    """A CUDA-aware MPI on memory of the device."""

    name = "cuda"

    def sum(self, vector: Array) -> None:
        """Sum a vector over all ranks, in place; see `Transport.sum`."""
        self.backend.synchronize()  # MPI knows nothing of the stream
        self.communicator.sum(vector)


class NcclTransport(Transport):
    """NCCL on memory of the device; every rank has a GPU of its own."""

    name = "nccl"

    def __init__(self, communicator: Communicator, backend: Backend) -> None:
        super().__init__(communicator, backend)
        name = communicator.agree(nccl.new_name() if communicator.rank == 0 else None)
        self._sum = nccl.summing(backend, communicator.size, communicator.rank, name)

    def sum(self, vector: Array) -> None:
        """Sum a vector over all ranks, in place; see `Transport.sum`."""
        self._sum(vector)


def choose(wanted: str, communicator: Communicator, backend: Backend, in_tree: bool = False) -> Transport:
    """Make the transport of this name; `auto` is `cuda` where MPI says that it takes GPU memory, else `host`.

    Collective. Ranks without a GPU go along with `auto` and `host`. Only `host` can sum in a fixed tree.

    Raises
    ------
    UserError
        On all ranks alike, if the ranks cannot use it.
    """
    if wanted not in TRANSPORTS:
        raise UserError(f"there is no transport {wanted!r}; choose one of {', '.join(TRANSPORTS)}")
    if in_tree and wanted not in ("auto", "host"):
        raise UserError(f"slices are summed in a fixed order through the host, not by transport {wanted}")
    if in_tree:
        return HostTransport(communicator, backend, in_tree)
    aware = cuda_aware() if communicator.size > 1 else None
    own = (communicator.host, backend.device_id, aware, wanted == "nccl" and nccl.available(backend))
    places = communicator.agree(communicator.gather(own)) or []
    alone = [f"rank {rank}" for rank, place in enumerate(places) if place[1] is None]
    if wanted in ("cuda", "nccl") and alone:
        raise UserError(f"transport {wanted} is for GPUs, and there is none for {', '.join(alone)}")
    if wanted == "nccl":
        if not all(place[3] for place in places):
            raise UserError("transport nccl needs NCCL, which CuPy does not find; choose host or cuda")
        if len({place[:2] for place in places}) < len(places):
            raise UserError("transport nccl needs a GPU for every rank; choose host or cuda")
        return NcclTransport(communicator, backend)
    if wanted == "cuda" and any(place[2] is False for place in places):
        raise UserError("this MPI library does not take GPU memory; choose transport host or nccl")
    if wanted == "cuda" or (wanted == "auto" and not alone and all(place[2] for place in places)):
        return CudaTransport(communicator, backend)
    return HostTransport(communicator, backend)
