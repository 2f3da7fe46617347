"""The GPU of this rank among those of its node, for models whose device the user chooses."""

from __future__ import annotations

from functools import cache

from hfmpi.backends import devices, gpus
from hfmpi.parallel.launch import connect

__all__ = ["device", "local_rank"]


@cache
def local_rank() -> int:
    """Return the number of this rank among the ranks on its node, from 0 on; collective.

    All ranks of a program under mpirun call it, before or after a run. In one process it is 0.

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
    """Return the device of this rank, such as "cuda:1", or "cpu" where CUDA shows no GPU; collective.

    The ranks of a node take turns in choosing one of the GPUs that CUDA shows to this process, as with the
    built-in networks. All ranks of a program under mpirun call it.

    Examples
    --------
    >>> module = torch.nn.Linear(2, 4).to(hfmpi.device())
    >>> model = hfmpi.TorchModel(module, "cross-entropy")
    """
    number = local_rank()  # on all ranks, even without a GPU
    count = len(gpus()) or len(devices())  # without CuPy the system's list
    return f"cuda:{number % count}" if count else "cpu"
