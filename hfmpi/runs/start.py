"""A new run that starts from another one, with other options or data: what goes on and what starts anew.

Theta, steps, seconds and costs go on, so that no history claims a loss for less than it cost. The optimizer's
state goes on where it is one of the same kind. Batches and epochs go on only where they are those of the run
before.
"""

from __future__ import annotations

import os
from dataclasses import asdict, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from hfmpi.errors import UserError
from hfmpi.files.checkpoint import Checkpoint, latest
from hfmpi.files.run_folder import find_checkpoint
from hfmpi.measure.cost import Counts
from hfmpi.parallel.communicator import Communicator
from hfmpi.parallel.placement import Placement
from hfmpi.runs.config import Config, merge
from hfmpi.runs.record import Progress
from hfmpi.runs.restore import Misfit, check_one_run, progress
from hfmpi.runs.task import Task
from hfmpi.runs.train import Run

__all__ = ["COMMAND", "Names", "begin", "find"]

BATCHES = "sequence_length", "burn_in", "seed"
"""Options that decide, with the data and the batch sizes, which batches a run takes."""


class Names(NamedTuple):
    """What a user calls the options that a sentence names."""

    out: str
    go_on: str
    max_steps: str
    max_seconds: str


COMMAND = Names("--out", "--resume auto", "--max-steps", "--max-seconds")


def find(folder: Path | None, resume: str, names: Names) -> tuple[Checkpoint | None, bool]:
    """Give the checkpoint to go on or to start from, if there is one, and whether it is the folder's own.

    A folder whose run was started from the one that `resume` names goes on where it was itself.

    Raises
    ------
    UserError
        If a checkpoint cannot be read, belongs to another run than the one before it, or a run would be
        overwritten.
    """
    own = resume in ("auto", "never") or (folder is not None and _started_from(folder, resume))
    found = find_checkpoint(folder, "auto" if own and resume != "never" else resume, names[:2])
    if own and folder is not None and found is not None:
        check_one_run(folder, found)
    return found, own


def begin(
    folder: Path | None,
    task: Task,
    communicator: Communicator,
    placement: Placement,
    found: Checkpoint,
    source: str,
    same_data: bool,
    names: Names,
) -> tuple[Run, str]:
    """Make a new run that starts from another one; say if the optimizer's state of that is not taken over.

    Parameters
    ----------
    folder, task, communicator, placement
        Of the new run, as `Run` has them; its options are those of `config.started`.
    found : Checkpoint
        Of the run to start from.
    source : str
        Its path.
    same_data : bool
        Whether that run was trained on the same data.
    names : Names

    Raises
    ------
    UserError
        If the checkpoint does not fit the task, or a limit is reached before the start.
    """
    begun, why = _start(found, source, task.config, same_data)
    try:
        run = Run(folder, task, communicator, placement, begun)
    except Misfit as error:
        why = str(error)
        run = Run(folder, task, communicator, placement, _anew(begun))
    _check_limits(task.config, run.progress, source, names)
    return run, why and f"the optimizer's state of {source} is not taken over: {why}"


def _started_from(folder: Path, source: str) -> bool:
    """Whether the folder holds a run that was started from this one."""
    try:
        return latest(folder).meta.get("origin") == os.path.realpath(source)
    except UserError:
        return False


def _start(found: Checkpoint, source: str, config: Config, same_data: bool) -> tuple[Checkpoint, str]:
    """Give the checkpoint that a new run starts from, and why the optimizer's state is not taken over."""
    had, so_far, why = merge(found.meta["config"]), progress(found), ""
    before, now = had.preset(), config.preset()
    batches = before.gradient_batch, before.curvature_batch
    if type(before.optimizer) is not type(now.optimizer):
        why = f"it was trained with {had.optimizer}, and this is {config.optimizer}"
        found = _anew(found)
    state = dict(found.state)
    if state and "damping" in config.settings and config.settings["damping"] != had.in_effect()["damping"]:
        state["damping"] = float(config.settings["damping"])  # who gives lambda wants it, not the one reached
    same = same_data and (now.gradient_batch, now.curvature_batch) == batches
    if why or not same or any(getattr(had, name) != getattr(config, name) for name in BATCHES):
        so_far = replace(so_far, counts=Counts(), before=so_far.spent(*batches))
        if state:
            state = now.optimizer.on_other_batches(state)
    so_far = replace(so_far, rejections=0, origin=os.path.realpath(source))
    return replace(found, state=state, meta=found.meta | asdict(so_far)), why


def _anew(found: Checkpoint) -> Checkpoint:
    """Give the checkpoint without the optimizer's state, with the parameters that were evaluated.

    They are the mean of the iterates where the optimizer made one.
    """
    average = found.state.get("average")
    if isinstance(average, np.ndarray) and average.shape == found.theta.shape:
        return replace(found, theta=average, state={})
    return replace(found, state={})


def _check_limits(config: Config, so_far: Progress, source: str, names: Names) -> None:
    """Raise a UserError if a new run has reached a limit before it starts, which counts what went before."""
    steps, seconds = f"{so_far.step:,} steps", f"{so_far.seconds:,.1f} seconds"
    for option, limit, value, had in (
        (names.max_steps, config.max_steps, so_far.step, steps),
        (names.max_seconds, config.max_seconds, so_far.seconds, seconds),
    ):
        if 0 < limit <= value:
            raise UserError(
                f"{source} has {had} already, and {option} counts from its first start: give more than that, "
                f"not {limit:,g}"
            )
