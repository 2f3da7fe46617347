"""Sums of device vectors over the ranks: through the host, by a CUDA-aware MPI library, or by NCCL.

MPI always sends scalars and small objects from the host (`Communicator`).
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
    """A way to sum vectors over the ranks.

    Parameters
    ----------
    communicator : Communicator
    backend : Backend
        The backend of the device that holds the vectors.
    """

    name = ""

    def __init__(self, communicator: Communicator, backend: Backend) -> None:
        self.communicator = communicator
        self.backend = backend

    def sum(self, vector: Array) -> None:
        """Sum a C-contiguous vector over all ranks, in place; collective."""
        raise NotImplementedError


class HostTransport(Transport):
    """MPI on host memory: on a CPU it sends the vector, otherwise a copy in a pinned buffer."""

    name = "host"

    def __init__(self, communicator: Communicator, backend: Backend, in_tree: bool = False) -> None:
        super().__init__(communicator, backend)
        self._sum = communicator.sum_in_tree if in_tree else communicator.sum

    def sum(self, vector: Array) -> None:
        """Sum a vector over all ranks, in place; see `Transport.sum`."""
        if self.communicator.size == 1:
            self._sum(vector)  # only checks the vector
            return
        message = self.backend.stage(vector)
        self._sum(message)
        self.backend.unstage(message, vector)


class CudaTransport(Transport):
    """A CUDA-aware MPI library on device memory."""

    name = "cuda"

    def sum(self, vector: Array) -> None:
        """Sum a vector over all ranks, in place; see `Transport.sum`."""
        self.backend.synchronize()  # MPI does not wait for the stream
        self.communicator.sum(vector)


class NcclTransport(Transport):
    """NCCL on device memory; every rank has a separate GPU."""

    name = "nccl"

    def __init__(self, communicator: Communicator, backend: Backend) -> None:
        super().__init__(communicator, backend)
        name = communicator.agree(nccl.new_name() if communicator.rank == 0 else None)
        self._sum = nccl.summing(backend, communicator.size, communicator.rank, name)

    def sum(self, vector: Array) -> None:
        """Sum a vector over all ranks, in place; see `Transport.sum`."""
        self._sum(vector)


def choose(wanted: str, communicator: Communicator, backend: Backend, in_tree: bool = False) -> Transport:
    """Return the transport of this name; collective.

    Parameters
    ----------
    wanted : {'auto', 'host', 'cuda', 'nccl'}
        'auto' is 'cuda' if the MPI library reports that it accepts GPU memory on all ranks, otherwise 'host'.
        'cuda' and 'nccl' need a GPU on every rank.
    in_tree : bool
        Sum in a fixed tree, which only 'host' supports.

    Raises
    ------
    UserError
        On all ranks, if the ranks cannot use the transport.
    """
    if wanted not in TRANSPORTS:
        raise UserError(f"there is no transport {wanted!r}; choose one of {', '.join(TRANSPORTS)}")
    if in_tree and wanted not in ("auto", "host"):
        raise UserError(
            f"transport {wanted} cannot sum slices in a fixed order: choose transport host, or no slices"
        )
    if in_tree:
        return HostTransport(communicator, backend, in_tree)
    aware = cuda_aware() if communicator.size > 1 else None
    local = (communicator.host, backend.device_id, aware, wanted == "nccl" and nccl.available(backend))
    ranks = communicator.agree(communicator.gather(local)) or []
    hosts, devices, all_aware, with_nccl = zip(*ranks, strict=True)
    without_gpu = [f"rank {rank}" for rank, device in enumerate(devices) if device is None]
    if wanted in ("cuda", "nccl") and without_gpu:
        raise UserError(
            f"transport {wanted} needs a GPU on every rank, but there is none on {', '.join(without_gpu)}: "
            "choose transport host"
        )
    if wanted == "nccl":
        if not all(with_nccl):
            raise UserError("transport nccl needs NCCL, which CuPy does not find: choose host or cuda")
        if len(set(zip(hosts, devices, strict=True))) < len(ranks):
            raise UserError("transport nccl needs a separate GPU for every rank: choose host or cuda")
        return NcclTransport(communicator, backend)
    if wanted == "cuda" and False in all_aware:
        raise UserError("this MPI library does not accept GPU memory: choose transport host or nccl")
    if wanted == "cuda" or (wanted == "auto" and not without_gpu and all(all_aware)):
        return CudaTransport(communicator, backend)
    return HostTransport(communicator, backend)
