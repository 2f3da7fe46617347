"""Reduce batches to the size of the data."""

from __future__ import annotations

from dataclasses import replace

from hfmpi.errors import UserError
from hfmpi.runs.config import Config
from hfmpi.runs.session import Names

__all__ = ["fitted"]


def fitted(config: Config, count: int, names: Names) -> tuple[Config, list[str]]:
    """Return the options with batches of at most `count` examples, and notes on the changes.

    The batch sizes of a preset are reduced, and its gradient batch is all examples if the optimizer needs the
    same batch in every step.

    Raises
    ------
    UserError
        If a batch size that the user has set is too large.
    """
    chosen, notes = config.preset(), list[str]()
    gradient, curvature = chosen.gradient_batch, chosen.curvature_batch
    if config.gradient_batch > count:
        raise UserError(
            f"{names.gradient_batch} can be at most {count:,}, the number of {names.examples}, not "
            f"{config.gradient_batch:,}"
        )
    whole = chosen.optimizer.needs.same_batch and not config.gradient_batch
    if gradient > count or (gradient < count and whole):
        notes.append(
            f"the gradient batch is {count:,}, all {names.examples}; the preset {config.optimizer} has "
            f"{gradient:,}"
        )
        gradient = count
    if config.curvature_batch > gradient:
        raise UserError(
            f"{names.curvature_batch} can be at most {gradient:,}, the gradient batch, not "
            f"{config.curvature_batch:,}"
        )
    if curvature > gradient:
        notes.append(
            f"the curvature batch is {gradient:,}, the gradient batch; the preset {config.optimizer} has "
            f"{curvature:,}"
        )
        curvature = gradient
    return replace(config, gradient_batch=gradient, curvature_batch=curvature), notes
