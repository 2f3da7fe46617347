"""The PyTorch losses that hfmpi supports: `torch.nn.CrossEntropyLoss`, `MSELoss`, `BCEWithLogitsLoss`."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch

from hfmpi.errors import UserError
from hfmpi.models.loss_variants import SmoothedCrossEntropy, WeightedBernoulli
from hfmpi.models.losses import LOSSES, Loss, OutputMean

__all__ = ["TorchLoss", "torch_loss"]

INSTEAD = {
    "NLLLoss": "torch.nn.CrossEntropyLoss() has the same value on log-probabilities",
    "BCELoss": "return the logits from the module and pass torch.nn.BCEWithLogitsLoss()",
}
"""Advice for PyTorch losses that take other outputs."""


class TorchLoss(NamedTuple):
    """A PyTorch loss in terms of hfmpi.

    Attributes
    ----------
    loss : Loss
        The loss of the scored outputs, with the classes on the last axis.
    class_axis : bool
        Whether the classes are on axis 1 of the module's outputs.
    ignored : int or None
        The target value that is not scored.
    class_weights : (O,) or None
        The weight of an example by its target: the mean over a batch is sum(w l) / sum(w).
    """

    loss: Loss
    class_axis: bool = False
    ignored: int | None = None
    class_weights: np.ndarray | None = None


def torch_loss(loss: Any) -> TorchLoss:
    """Return the hfmpi loss that equals a PyTorch loss.

    Raises
    ------
    UserError
        If there is no such loss, or an option is not supported.
    """
    name = type(loss).__name__
    if type(loss) not in (torch.nn.CrossEntropyLoss, torch.nn.MSELoss, torch.nn.BCEWithLogitsLoss):
        instead = INSTEAD.get(
            name, f"pass {', '.join(map(repr, LOSSES))}, or a user-defined loss as in hfmpi.models.losses"
        )
        raise UserError(
            "loss can be torch.nn.CrossEntropyLoss(), MSELoss() or BCEWithLogitsLoss(), not PyTorch's "
            f"{name}: {instead}"
        )
    if loss.reduction != "mean":
        raise UserError(
            f"reduction={loss.reduction!r} of torch.nn.{name} is not supported: hfmpi minimises the mean "
            "over scored outputs, whatever the size of a batch; use reduction='mean'"
        )
    if isinstance(loss, torch.nn.CrossEntropyLoss):
        return _cross_entropy(loss)
    if isinstance(loss, torch.nn.MSELoss):
        return TorchLoss(LOSSES["mse"])
    if loss.weight is not None:
        raise UserError(
            "weight of torch.nn.BCEWithLogitsLoss is not supported: remove it, and give weights to the "
            "examples, hfmpi.Examples(x, y, weights=w)"
        )
    if loss.pos_weight is None:
        return TorchLoss(LOSSES["binary-cross-entropy"])
    if loss.pos_weight.ndim > 1:
        raise UserError(
            "pos_weight of torch.nn.BCEWithLogitsLoss must have one number for each output, or one for all, "
            f"not shape {tuple(loss.pos_weight.shape)}"
        )
    return TorchLoss(OutputMean(WeightedBernoulli(tuple(loss.pos_weight.double().reshape(-1).tolist()))))


def _cross_entropy(loss: Any) -> TorchLoss:
    weights = None
    if loss.weight is not None:
        weights = loss.weight.detach().double().cpu().numpy()
        if (
            weights.ndim != 1
            or not np.isfinite(weights).all()
            or not (weights >= 0).all()
            or not weights.any()
        ):
            raise UserError(
                "weight of torch.nn.CrossEntropyLoss must have a finite number for each class, 0 or more"
            )
        if loss.label_smoothing:
            raise UserError(
                "weight and label_smoothing of torch.nn.CrossEntropyLoss are not supported together: the "
                "smoothed loss is not a weight times a loss; remove one of them"
            )
    smoothed = SmoothedCrossEntropy(loss.label_smoothing) if loss.label_smoothing else LOSSES["cross-entropy"]
    return TorchLoss(smoothed, True, loss.ignore_index, weights)
