"""`hfmpi info`: the hardware and libraries that a run would use."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

import click

from hfmpi.backends import create, devices, gpus, nccl
from hfmpi.backends.base import Backend
from hfmpi.errors import UserError
from hfmpi.measure.machine import blas, cupy, processor, versions
from hfmpi.objective.transport import choose
from hfmpi.parallel import library
from hfmpi.parallel.communicator import Communicator
from hfmpi.parallel.failure import speaks
from hfmpi.parallel.launch import connect
from hfmpi.parallel.placement import place

__all__ = ["info"]


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def info(as_json: bool) -> None:
    """Show ranks, hosts, cores, threads, GPUs and the libraries in use.

    Start it in the same way as the run, for example with mpirun -n 4 hfmpi info. If the launcher and the MPI
    library do not match, the command reports this, and shows what one process sees.
    """
    try:
        comm, problem = connect(), _obstacle()
    except UserError as error:
        if not speaks():
            return
        comm, problem = Communicator(), str(error)
    placement = place(comm)
    backend = create("cupy", local_rank=placement.local_rank) if gpus() else Backend()
    about = {
        "gpus": devices(),
        "device": backend.device,
        "transport": choose("auto", comm, backend).name,
        "nccl": nccl.available(backend),
    }
    ranks = comm.gather(asdict(placement) | about)
    if ranks is not None:
        name, cuda_aware = library.describe()
        machine = {
            "versions": versions("hfmpi", "numpy", "numba", "mpi4py", "h5py") | cupy(),
            "processor": processor(),
            "mpi": {
                "library": name,
                "cuda_aware": cuda_aware,
                "started": comm.size > 1,
                "problem": problem,
            },
            "blas": blas(),
        }
        click.echo(json.dumps(machine | {"ranks": ranks}) if as_json else _lines(machine, ranks))
    comm.close()


def _obstacle() -> str | None:
    """Return the reason why a process that a launcher started runs without MPI, or None."""
    if library.launched() is None or library.started():
        return None
    try:
        obstacle = library.obstacle(library.load())
    except (ImportError, RuntimeError, OSError) as error:
        return f"MPI cannot be loaded ({' '.join(str(error).split())})"
    return obstacle and f"a launcher started this process, but {obstacle}"


def _lines(machine: dict[str, Any], ranks: list[dict[str, Any]]) -> str:
    aware = {True: "CUDA-aware", False: "not CUDA-aware", None: "CUDA-awareness unknown"}
    mpi = machine["mpi"]
    lines = [
        ", ".join(f"{package} {number or 'absent'}" for package, number in machine["versions"].items()),
        f"MPI: {mpi['library']}, {aware[mpi['cuda_aware']]}" if mpi["library"] else "MPI: none",
        *([f"MPI is not started: {mpi['problem']}"] if mpi["problem"] else []),
        f"Processor: {machine['processor']}",
        f"BLAS: {', '.join(machine['blas']) or 'unknown'}",
    ]
    for rank in ranks:
        lines.append(
            f"rank {rank['rank']} of {rank['size']} on {rank['host']} "
            f"(local rank {rank['local_rank']} of {rank['local_size']}): "
            f"cores {rank['cores']}, threads {rank['threads']}, "
            f"memory {rank['memory'] / 2**30:.1f} GiB, GPUs {', '.join(rank['gpus']) or 'none'}, "
            f"computes on {rank['device']}, transport {rank['transport']}"
            + (", NCCL" if rank["nccl"] else "")
        )
    return "\n".join(lines)
