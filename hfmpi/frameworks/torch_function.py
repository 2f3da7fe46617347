"""A PyTorch module as a function of theta, the vector of its trained parameters; arrays as tensors."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from hfmpi.models.batch import ScoredOutputs

__all__ = ["ModuleFunction", "to_array"]


class ModuleFunction:
    """The scored outputs of a module as a function of theta (D,) and of inputs, all of them tensors.

    Parameters
    ----------
    module : torch.nn.Module
    parameters : dict of str to torch.nn.Parameter
        What theta holds, in order.
    device : torch.device
        Of the module.

    Attributes
    ----------
    frozen : list of torch.nn.Parameter
        The parameters of the module that theta does not hold.
    """

    def __init__(self, module: Any, parameters: dict[str, Any], device: Any) -> None:
        self.module, self.parameters, self.device = module, parameters, device
        self.frozen = [p for name, p in module.named_parameters() if name not in parameters]
        self._sizes = [p.numel() for p in parameters.values()]

    def named(self, theta: Any) -> dict[str, Any]:
        """Return the parameters in theta (D,) by name, as views."""
        parts = zip(self.parameters.items(), theta.split(self._sizes), strict=True)
        return {name: part.view(p.shape) for (name, p), part in parts}

    def outputs(self, parameters: dict[str, Any], inputs: tuple[Any, ...], scored: ScoredOutputs) -> Any:
        """Return the scored outputs (N, O) of the module with these parameters."""
        return scored.of(torch.func.functional_call(self.module, parameters, inputs))

    def write(self, theta: np.ndarray) -> None:
        """Copy theta (D,) into the parameters of the module."""
        with torch.no_grad():
            for p, part in zip(
                self.parameters.values(), self.named(torch.from_numpy(theta)).values(), strict=True
            ):
                p.copy_(part)

    def tensor(self, array: np.ndarray) -> Any:
        """Return an array as a tensor on the module's device; on a CPU it shares the memory if possible."""
        if not array.flags.writeable or any(stride < 0 for stride in array.strides):
            array = array.copy()
        return torch.from_numpy(array).to(self.device)

    def tensors(self, inputs: tuple[np.ndarray, ...]) -> tuple[Any, ...]:
        """Return inputs as tensors; whole numbers become int64, which every module accepts."""
        return tuple(self.tensor(x.astype(np.int64) if x.dtype.kind in "iu" else x) for x in inputs)


def to_array(tensor: Any) -> np.ndarray:
    """Return a tensor as an array; on a CPU it shares the memory."""
    return np.ascontiguousarray(tensor.detach().cpu().numpy())
