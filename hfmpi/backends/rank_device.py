"""The GPU of this rank among those of its node, for models whose device the user chooses."""

from __future__ import annotations

from functools import cache

from hfmpi.backends import devices, gpus
from hfmpi.parallel.launch import connect

__all__ = ["device", "local_rank"]


@cache
def local_rank() -> int:
    """Return the index of this rank among the ranks on its node, starting from 0; collective.

    All ranks of a program under mpirun must call it, before or after a run. In a single process it returns 0.

    Examples
    --------
    >>> gpus = jax.local_devices()
    >>> jax.config.update("jax_default_device", gpus[hfmpi.local_rank() % len(gpus)])
    """
    comm = connect()
    found = comm.local_rank
    comm.close()
    return found


def device() -> str:
    """Return the device of this rank, such as "cuda:1", or "cpu" if CUDA shows no GPU; collective.

    The GPUs that CUDA shows this process are assigned to the ranks of a node in turn, as for the built-in
    networks. All ranks of a program under mpirun must call it.

    Examples
    --------
    >>> module = torch.nn.Linear(2, 4).to(hfmpi.device())
    >>> model = hfmpi.TorchModel(module, "cross-entropy")
    """
    number = local_rank()  # collective, so that ranks without a GPU call it too
    count = len(gpus()) or len(devices())  # without CuPy the list of the operating system is used
    return f"cuda:{number % count}" if count else "cpu"
