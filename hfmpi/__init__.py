"""Hessian-free optimization of recurrent networks, data-parallel under MPI.

Public names are imported when they are first used, so that `hfmpi --help` starts quickly.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from hfmpi.version import __version__ as __version__

if TYPE_CHECKING:
    from hfmpi import jax as jax
    from hfmpi import torch as torch
    from hfmpi.backends.rank_device import device, local_rank
    from hfmpi.data.augmented import Augmented
    from hfmpi.data.by_index import Dataset
    from hfmpi.data.examples import Arrays, Examples
    from hfmpi.errors import UserError
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
        Gradient,
        GradientDescent,
        HessianFree,
        Muon,
        Objective,
        Objectives,
        SOAPMuon,
        Subspace,
    )
    from hfmpi.optim.presets import preset
    from hfmpi.parallel import connect, guard
    from hfmpi.runs.call import Result, train
    from hfmpi.runs.curvature import curvature
    from hfmpi.runs.evaluate import evaluate

__all__ = [
    "LBFGS",
    "LM",
    "SOAP",
    "Adam",
    "Architecture",
    "Arrays",
    "Augmented",
    "DataParallel",
    "Dataset",
    "Examples",
    "Gradient",
    "GradientDescent",
    "HessianFree",
    "JaxModel",
    "Muon",
    "Network",
    "Objective",
    "Objectives",
    "Result",
    "SOAPMuon",
    "Subspace",
    "TorchModel",
    "UserError",
    "connect",
    "curvature",
    "device",
    "evaluate",
    "guard",
    "local_rank",
    "preset",
    "train",
]

_PLACES = {
    "Architecture": "hfmpi.networks.architecture",
    "Arrays": "hfmpi.data.examples",
    "Augmented": "hfmpi.data.augmented",
    "DataParallel": "hfmpi.objective.data_parallel",
    "Dataset": "hfmpi.data.by_index",
    "Examples": "hfmpi.data.examples",
    "JaxModel": "hfmpi.frameworks.jax",
    "Network": "hfmpi.networks.network",
    "Result": "hfmpi.runs.call",
    "TorchModel": "hfmpi.frameworks.torch",
    "UserError": "hfmpi.errors",
    "connect": "hfmpi.parallel",
    "curvature": "hfmpi.runs.curvature",
    "device": "hfmpi.backends.rank_device",
    "evaluate": "hfmpi.runs.evaluate",
    "guard": "hfmpi.parallel",
    "local_rank": "hfmpi.backends.rank_device",
    "preset": "hfmpi.optim.presets",
    "train": "hfmpi.runs.call",
}
"""Modules of the names that are not in `hfmpi.optim`."""


_FACADES = "jax", "torch"
"""Modules for training loops in these frameworks; not in `__all__`, because a framework may be missing."""


def __getattr__(name: str) -> Any:
    if name in _FACADES:
        return importlib.import_module(f"hfmpi.{name}")
    if name not in __all__:
        raise AttributeError(f"module 'hfmpi' has no attribute {name!r}")
    return getattr(importlib.import_module(_PLACES.get(name, "hfmpi.optim")), name)
