"""Open a run: a new one, a resumed one, or one that starts from a different run with other options or data.

A run that starts from a different one continues its theta, steps, seconds and costs, so that the history
contains the full cost of every loss. It also continues the optimizer's state if that has the same form, and
batches and epochs if they are the same as before.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

from hfmpi.errors import UserError
from hfmpi.files.checkpoint import Checkpoint, latest
from hfmpi.files.run_folder import find_checkpoint
from hfmpi.measure.cost import Counts
from hfmpi.runs.config import Config
from hfmpi.runs.merge import derive, merge
from hfmpi.runs.record import Progress
from hfmpi.runs.restore import (
    LOWEST,
    Misfit,
    check_leftover,
    check_one_run,
    evaluated_parameters,
    progress,
    settled,
    without_best,
)
from hfmpi.runs.session import PROGRAM, Names, Session
from hfmpi.runs.task import DifferentRun, Task
from hfmpi.runs.train import Callback, Run

__all__ = ["open_run"]

BATCHES = "sequence_length", "burn_in", "seed"
"""Options that determine, with the data and the batch sizes, which batches a run uses."""


def open_run(
    folder: Path | None,
    resume: str,
    options: Mapping[str, Any],
    make_task: Callable[[Config, bool], Task],
    session: Session,
    callback: Callback | None = None,
) -> Run:
    """Create the run that the user describes, and check that it can train; nothing is written.

    Parameters
    ----------
    folder : Path or None
        Folder of the run; None if nothing is to be written.
    resume : str
        'auto', 'never', or the folder or checkpoint of the run to start from.
    options : mapping
        User-supplied options by name.
    make_task : callable
        Creates the task from the options in effect; its second argument is True if the run in `folder` is
        resumed.
    session : Session
        Its reporter receives what the user should know about the checkpoint.
    callback : callable, optional
        Called after each step; see `hfmpi.train`.

    Raises
    ------
    UserError
        On this rank alone, if a checkpoint cannot be read or does not fit the options, the model or the data,
        if a run would be overwritten, or if a limit is reached before the start.
    """
    names = session.names
    make = partial(Run, callback=callback)
    checkpoint, resumes = _find(folder, resume, names)
    if checkpoint is None:
        task = make_task(merge(options), False)
        _check_leftover(folder, task, names)
        return make(folder, task, session)
    name, remedy = (folder, f"use a different {names.out}") if resumes else (resume, names.origin)
    if ("cases" in checkpoint.meta) != (names is PROGRAM):
        raise UserError(f"{name} is {names.other_kind}; {remedy}")
    stored, notes = checkpoint.meta.get("config"), [checkpoint.message]
    config = merge(options, stored, names.out) if resumes else derive(options, stored)
    task = make_task(config, resumes)
    try:
        difference = task.compare(checkpoint, resumes)
    except DifferentRun as error:
        raise UserError(f"{name} {error}; {remedy}") from None
    if resumes:
        try:
            run = make(folder, task.continuing(checkpoint), session, checkpoint)
        except Misfit as error:
            way_out = f"{remedy}, and {names.start_from} {folder} to start from its parameters"
            raise UserError(f"{error}, so that the run cannot continue: {way_out}") from None
    else:
        _check_leftover(folder, task, names)
        begin = partial(make, folder, task, session)
        run, reset = _begin(begin, task, without_best(checkpoint), resume, names, same_data=not difference)
        notes += [
            difference and f"{resume} {difference}",
            reset and f"the optimizer's state of {resume} is not used: {reset}",
        ]
    for note in filter(None, notes):
        session.reporter.note(note)
    return run


def _check_leftover(folder: Path | None, task: Task, names: Names) -> None:
    """Check that the folder of a new run has no file of a different run that would be replaced."""
    if folder is not None:
        check_leftover(folder, task.config, task.identity, names.out)


def _find(folder: Path | None, resume: str, names: Names) -> tuple[Checkpoint | None, bool]:
    """Return the checkpoint to continue, if there is one, and whether it belongs to the run in the folder.

    A run that was started from the one that `resume` names continues from the checkpoint in its folder.
    """
    resumes = resume in ("auto", "never") or (folder is not None and _started_from(folder, resume))
    source = "auto" if resumes and resume != "never" else resume
    checkpoint = find_checkpoint(folder, source, (names.out, names.resume))
    if resumes and folder is not None and checkpoint is not None:
        check_one_run(folder, checkpoint)
    return checkpoint, resumes


def _started_from(folder: Path, source: str) -> bool:
    try:
        return latest(folder).meta.get("origin") == os.path.realpath(source)
    except UserError:
        return False


def _begin(
    make: Callable[[Checkpoint], Run],
    task: Task,
    checkpoint: Checkpoint,
    source: str,
    names: Names,
    same_data: bool,
) -> tuple[Run, str]:
    """Create a new run from the checkpoint of a different one; also return why the optimizer is reset."""
    begun, why = _starting_point(checkpoint, source, task.config, same_data)
    try:
        run = make(begun)
    except Misfit as error:
        why = str(error)
        run = make(_without_state(begun))
    _check_limits(task.config, run.progress, source, names)
    return run, why


def _starting_point(
    checkpoint: Checkpoint, source: str, config: Config, same_data: bool
) -> tuple[Checkpoint, str]:
    """Return the checkpoint from which a new run starts, and why the optimizer is reset; "" if it is not."""
    had, so_far, why = merge(checkpoint.meta["config"]), progress(checkpoint), ""
    before, now = had.preset(), config.preset()
    batches = before.gradient_batch, before.curvature_batch
    if type(before.optimizer) is not type(now.optimizer):
        why = f"that run was trained with {had.optimizer}, and this run uses {config.optimizer}"
        checkpoint = _without_state(checkpoint)
    state = dict(checkpoint.state)
    if state and "damping" in config.settings and config.settings["damping"] != had.in_effect()["damping"]:
        state["damping"] = float(config.settings["damping"])  # the user's lambda replaces the adapted one
    same = same_data and (now.gradient_batch, now.curvature_batch) == batches
    if why or not same or any(getattr(had, name) != getattr(config, name) for name in BATCHES):
        so_far = replace(so_far, counts=Counts(), before=so_far.spent(*batches))
        checkpoint = settled(checkpoint)
        state.pop(LOWEST, None)
        if state:
            state = now.optimizer.on_other_batches(state)
    so_far = replace(so_far, rejections=0, origin=os.path.realpath(source))
    return replace(checkpoint, state=state, meta=checkpoint.meta | asdict(so_far)), why


def _without_state(checkpoint: Checkpoint) -> Checkpoint:
    """Return the checkpoint without the optimizer's state, with the parameters that were evaluated."""
    return replace(settled(checkpoint), theta=evaluated_parameters(checkpoint), state={})


def _check_limits(config: Config, so_far: Progress, source: str, names: Names) -> None:
    """Check that a new run has not reached a limit before it starts; limits include the earlier run."""
    steps, seconds = f"{so_far.step:,} steps", f"{so_far.seconds:,.1f} seconds"
    for option, limit, value, had in (
        (names.max_steps, config.max_steps, so_far.step, steps),
        (names.max_seconds, config.max_seconds, so_far.seconds, seconds),
    ):
        if 0 < limit <= value:
            raise UserError(
                f"{source} already has {had}, and {option} counts from its first start: use a value larger "
                f"than that, not {limit:,g}"
            )
