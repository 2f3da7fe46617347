"""A new run that starts from another one, with other options or data: what goes on and what starts anew.

Theta, steps, seconds and costs go on, so that no history claims a loss for less than it cost. The optimizer's
state goes on where it is one of the same kind. Batches and epochs go on only where they are those of the run
before.
"""

from __future__ import annotations

import os
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np

from hfmpi.errors import UserError
from hfmpi.files.checkpoint import Checkpoint, latest
from hfmpi.measure.cost import Counts
from hfmpi.optim.subspace import Subspace
from hfmpi.runs.config import Config, merge
from hfmpi.runs.record import Progress
from hfmpi.runs.restore import progress

__all__ = ["anew", "check_limits", "start", "started_from"]

BATCHES = "sequence_length", "burn_in", "seed"
"""Options that decide, with the data and the batch sizes, which batches a run takes."""


def started_from(folder: Path, source: str) -> bool:
    """Whether the folder holds a run that was started from this one, and so goes on where it was itself."""
    try:
        return latest(folder).meta.get("origin") == os.path.realpath(source)
    except UserError:
        return False


def start(found: Checkpoint, source: str, config: Config, corpus: str) -> tuple[Checkpoint, str]:
    """Give the checkpoint from which a new run starts, and why the optimizer's state starts anew, if it does.

    Parameters
    ----------
    found : Checkpoint
        Of the run to start from.
    source : str
        Its path.
    config : Config
        Of the new run, as `config.started` makes it.
    corpus : str
        Digest of the data of the new run.
    """
    had, so_far, why = merge(found.meta["config"]), progress(found), ""
    before, now = had.preset(), config.preset()
    batches = before.gradient_batch, before.curvature_batch
    if type(before.optimizer) is not type(now.optimizer):
        why = f"it was trained with {had.optimizer}, and this is {config.optimizer}"
        found = anew(found)
    state = dict(found.state)
    if state and "damping" in config.settings and config.settings["damping"] != had.in_effect()["damping"]:
        state["damping"] = float(config.settings["damping"])  # who gives lambda wants it, not the one reached
    same = (now.gradient_batch, now.curvature_batch) == batches and found.meta.get("corpus") == corpus
    if why or not same or any(getattr(had, name) != getattr(config, name) for name in BATCHES):
        so_far = replace(so_far, counts=Counts(), before=so_far.spent(*batches))
        if isinstance(now.optimizer, Subspace) and state:
            state |= {"loss": 0.0, "descent": 0.0, "curvature": 0.0}  # the last risk was of another batch
    so_far = replace(so_far, rejections=0, origin=os.path.realpath(source))
    return replace(found, state=state, meta=found.meta | asdict(so_far)), why


def anew(found: Checkpoint) -> Checkpoint:
    """Give the checkpoint without the optimizer's state, with the parameters that were evaluated.

    They are the mean of the iterates where the optimizer made one.
    """
    average = found.state.get("average")
    if isinstance(average, np.ndarray) and average.shape == found.theta.shape:
        return replace(found, theta=average, state={})
    return replace(found, state={})


def check_limits(config: Config, so_far: Progress, source: str) -> None:
    """Raise a UserError if a new run has reached a limit before it starts, which counts what went before."""
    steps, seconds = f"{so_far.step:,} steps", f"{so_far.seconds:,.1f} seconds"
    for option, limit, value, had in (
        ("--max-steps", config.max_steps, so_far.step, steps),
        ("--max-seconds", config.max_seconds, so_far.seconds, seconds),
    ):
        if 0 < limit <= value:
            raise UserError(
                f"{source} has {had} already, and {option} counts from its first start: give more than that, "
                f"not {limit:,g}"
            )
