"""Communication between ranks: sums of vectors, broadcasts from rank 0, and gathering of small objects."""

from __future__ import annotations

import functools
import hashlib
import pickle
import socket
import time
from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np

__all__ = ["Communicator", "MPICommunicator", "digest"]

T = TypeVar("T")
Method = TypeVar("Method", bound=Callable[..., Any])

_SUMMABLE = ("float32", "float64", "int64")
_PACKET = 256  # bytes of the single message in which `agree` sends a small value


def digest(vector: np.ndarray) -> int:
    """Return a 64-bit digest of the bytes of a vector.

    Parameters
    ----------
    vector : ndarray
        An array of any shape and numeric dtype; the digest depends only on its bytes in C order.

    Returns
    -------
    int
        The 8-byte BLAKE2b digest, at least 0 and less than 2**64; see `Communicator.same`.
    """
    content = np.ascontiguousarray(vector).reshape(-1).view(np.uint8)
    return int.from_bytes(hashlib.blake2b(content.data, digest_size=8).digest(), "little")


class Communicator:
    """The communicator of a single rank, and the interface of all communicators.

    Every method is collective: all ranks call it, in the same order.

    Attributes
    ----------
    rank, size : int
        The index of this rank and the number of ranks.
    local_rank, local_size : int
        The same, among the ranks that share this node's memory.
    host : str
        The name of this node.
    """

    rank = 0
    size = 1
    local_rank = 0
    local_size = 1

    def __init__(self) -> None:
        self.host = socket.gethostname()

    def sum(self, vector: np.ndarray) -> None:
        """Sum a vector over all ranks, in place.

        Parameters
        ----------
        vector : ndarray
            C-contiguous float32, float64 or int64, of the same shape and dtype on every rank.

        Raises
        ------
        TypeError
            If the dtype is not supported or the array is not C-contiguous.
        """
        _check(vector)

    def sum_in_tree(self, vector: np.ndarray) -> None:
        """Sum a vector over all ranks in a binary tree, in place; the number of ranks is a power of two.

        This is slower than `sum`, but the order of additions is fixed: ((v0 + v1) + (v2 + v3)) + ...

        Raises
        ------
        TypeError
            As in `sum`.
        ValueError
            If the number of ranks is not a power of two.
        """
        _check(vector)

    def agree(self, value: T) -> T:
        """Return rank 0's value on every rank.

        Parameters
        ----------
        value : object
            Small and picklable; the values of other ranks are ignored and may be None.
        """
        return value

    def any(self, flag: bool) -> bool:
        """Return whether the flag is set on at least one rank."""
        count = np.array([bool(flag)], dtype=np.int64)
        self.sum(count)
        return bool(count[0])

    def gather(self, value: T) -> list[T] | None:
        """Gather a small picklable object of every rank: return a list in rank order on rank 0, else None."""
        return [value]

    def exchange(self, parts: list[np.ndarray], received: list[np.ndarray]) -> None:
        """Send one array to every rank, and receive one from every rank.

        Parameters
        ----------
        parts : list of ndarray
            The array for each rank, which may be empty; all of them have the same dtype, on all ranks.
        received : list of ndarray
            C-contiguous arrays, which are overwritten with the arrays from the ranks, in rank order.
        """
        received[0][...] = parts[0]

    def join(self, part: np.ndarray, counts: list[int]) -> np.ndarray:
        """Concatenate a vector of every rank, in rank order, and return the result on all ranks.

        Parameters
        ----------
        part : ndarray
            The vector of this rank, C-contiguous, with the same dtype on every rank.
        counts : list of int
            The length of each rank's vector.
        """
        return part

    def same(self, value: int) -> list[int]:
        """Compare a number such as `digest(theta)` across the ranks.

        Parameters
        ----------
        value : int
            At least 0 and less than 2**64.

        Returns
        -------
        list of int
            The ranks whose value differs from the most frequent value (in case of a tie, from the one that
            occurs on the lowest rank). Every rank returns the same list; it is empty if all values are equal.
        """
        values = np.zeros(self.size, dtype=np.int64)
        values.view(np.uint64)[self.rank] = value
        self.sum(values)  # exact, because each entry is nonzero on only one rank
        listed = values.tolist()
        usual = max(listed, key=listed.count)  # the first one of the most frequent values
        return [rank for rank, value in enumerate(listed) if value != usual]

    def rest(self) -> None:
        """Wait for all ranks while sleeping, so that, unlike in an MPI collective, the core remains free."""

    def close(self) -> None:
        """Free the communicator, which cannot be used afterwards."""


def _counted(method: Method) -> Method:
    """Wrap a collective method so that it increments `MPICommunicator.pulse` at its start and at its end."""

    @functools.wraps(method)
    def counting(self: MPICommunicator, *arguments: Any) -> Any:
        MPICommunicator.pulse += 1
        try:
            return method(self, *arguments)
        finally:
            MPICommunicator.pulse += 1

    return counting  # type: ignore[return-value]


class MPICommunicator(Communicator):
    """The ranks of an MPI communicator.

    All messages use a duplicate of that communicator, which separates them from those of other code in the
    program.

    Parameters
    ----------
    world : mpi4py.MPI.Intracomm
        Usually COMM_WORLD, as in `hfmpi.parallel.launch.connect`.

    Attributes
    ----------
    pulse : int
        Twice the number of finished collectives of all MPI communicators, including the creation of a
        communicator, plus 1 inside a collective. It is the same on every rank at the same point of the
        program, and is read by the watchdog.
    """

    pulse = 0

    @_counted
    def __init__(self, world: Any) -> None:
        from mpi4py import MPI

        super().__init__()
        self._mpi = MPI
        self._comm = world.Dup()
        self.rank = self._comm.rank
        self.size = self._comm.size
        node = self._comm.Split_type(MPI.COMM_TYPE_SHARED)
        self.local_rank = node.rank
        self.local_size = node.size
        node.Free()

    @_counted
    def sum(self, vector: np.ndarray) -> None:
        """Sum a vector over all ranks, in place; see `Communicator.sum`."""
        _check(vector)
        self._comm.Allreduce(self._mpi.IN_PLACE, vector, op=self._mpi.SUM)

    @_counted
    def sum_in_tree(self, vector: np.ndarray) -> None:
        """Sum a vector over all ranks in a fixed order, in place; see `Communicator.sum_in_tree`."""
        _check(vector)
        if self.size & (self.size - 1):
            raise ValueError(f"the number of ranks of a binary tree must be a power of two, not {self.size}")
        other, distance = np.empty_like(vector), 1
        while distance < self.size:  # both partners add the same two numbers: a + b = b + a bit for bit
            partner = self.rank ^ distance
            self._comm.Sendrecv(vector, partner, 0, other, partner, 0)
            vector += other
            distance *= 2

    @_counted
    def agree(self, value: T) -> T:
        """Return rank 0's value on every rank; one message if its pickle has at most 248 bytes, else two."""
        content = pickle.dumps(value) if self.rank == 0 else b""
        packet = bytearray(_PACKET)
        if self.rank == 0:
            packet[:8] = len(content).to_bytes(8, "little")
            packet[8:] = content[: _PACKET - 8].ljust(_PACKET - 8, b"\0")
        self._comm.Bcast(packet, root=0)
        length = int.from_bytes(packet[:8], "little")
        if length <= _PACKET - 8:
            return pickle.loads(packet[8 : 8 + length])
        whole = bytearray(content) if self.rank == 0 else bytearray(length)
        self._comm.Bcast(whole, root=0)
        return pickle.loads(whole)

    @_counted
    def gather(self, value: T) -> list[T] | None:
        """Gather a small picklable object of every rank on rank 0; see `Communicator.gather`."""
        return self._comm.gather(value, root=0)

    @_counted
    def exchange(self, parts: list[np.ndarray], received: list[np.ndarray]) -> None:
        """Send one array to every rank, and receive one from every rank; see `Communicator.exchange`."""
        others = [rank for rank in range(self.size) if rank != self.rank]
        requests = [self._comm.Irecv(received[rank], rank) for rank in others if received[rank].size]
        requests += [
            self._comm.Isend(np.ascontiguousarray(parts[rank]), rank) for rank in others if parts[rank].size
        ]
        received[self.rank][...] = parts[self.rank]
        self._mpi.Request.Waitall(requests)

    @_counted
    def join(self, part: np.ndarray, counts: list[int]) -> np.ndarray:
        """Concatenate a vector of every rank; see `Communicator.join`."""
        joined = np.empty(sum(counts), part.dtype)
        self._comm.Allgatherv(part, [joined, counts])
        return joined

    @_counted
    def rest(self) -> None:
        """Wait for all ranks while sleeping; see `Communicator.rest`."""
        request = self._comm.Ibarrier()
        while not request.Test():
            time.sleep(1e-3)

    @_counted
    def close(self) -> None:
        """Free the duplicate of the MPI communicator; collective."""
        self._comm.Free()


def _check(vector: np.ndarray) -> None:
    if vector.dtype.name not in _SUMMABLE or not vector.flags.c_contiguous:
        raise TypeError(
            f"cannot send an array of {vector.dtype} with shape {vector.shape} and strides {vector.strides}"
        )
