"""Hessian-free optimization of recurrent networks, data-parallel under MPI.

What a user types after `import hfmpi` is imported when it is first asked for: `hfmpi --help` stays quick.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from hfmpi.version import __version__ as __version__

if TYPE_CHECKING:
    from hfmpi.backends.rank_device import device, local_rank
    from hfmpi.data.examples import Arrays, Examples
    from hfmpi.frameworks.jax import JaxModel
    from hfmpi.frameworks.torch import TorchModel
    from hfmpi.networks.architecture import Architecture
    from hfmpi.networks.network import Network
    from hfmpi.objective.data_parallel import DataParallel
    from hfmpi.optim import (
        LBFGS,
        LM,
        SOAP,
        Adam,
        GradientDescent,
        HessianFree,
        Muon,
        Objective,
        Objectives,
        SOAPMuon,
        Subspace,
    )
    from hfmpi.parallel import connect, guard
    from hfmpi.runs.call import train
    from hfmpi.runs.curvature import curvature

__all__ = [
    "LBFGS",
    "LM",
    "SOAP",
    "Adam",
    "Architecture",
    "Arrays",
    "DataParallel",
    "Examples",
    "GradientDescent",
    "HessianFree",
    "JaxModel",
    "Muon",
    "Network",
    "Objective",
    "Objectives",
    "SOAPMuon",
    "Subspace",
    "TorchModel",
    "connect",
    "curvature",
    "device",
    "guard",
    "local_rank",
    "train",
]

_PLACES = {
    "Architecture": "hfmpi.networks.architecture",
    "Arrays": "hfmpi.data.examples",
    "DataParallel": "hfmpi.objective.data_parallel",
    "Examples": "hfmpi.data.examples",
    "JaxModel": "hfmpi.frameworks.jax",
    "Network": "hfmpi.networks.network",
    "TorchModel": "hfmpi.frameworks.torch",
    "connect": "hfmpi.parallel",
    "curvature": "hfmpi.runs.curvature",
    "device": "hfmpi.backends.rank_device",
    "guard": "hfmpi.parallel",
    "local_rank": "hfmpi.backends.rank_device",
    "train": "hfmpi.runs.call",
}
"""Modules of the names that are not in `hfmpi.optim`."""


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'hfmpi' has no attribute {name!r}")
    return getattr(importlib.import_module(_PLACES.get(name, "hfmpi.optim")), name)
