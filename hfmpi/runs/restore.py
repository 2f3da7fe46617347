"""Read a run from a checkpoint, and check it before memory is allocated, as the file may be from anyone."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np

from hfmpi.backends.base import Array, Backend
from hfmpi.errors import UserError
from hfmpi.files.checkpoint import BEST as BEST_FILE
from hfmpi.files.checkpoint import NEWEST, PREVIOUS, Checkpoint, Entry, identity, load
from hfmpi.files.numbers import is_amount
from hfmpi.measure.cost import Counts, ForwardPass
from hfmpi.runs.best import Best, Watch
from hfmpi.runs.config import CHANGEABLE, Config
from hfmpi.runs.merge import merge
from hfmpi.runs.record import NO_UNIT, Progress, Spent, Validation

__all__ = [
    "LOWEST",
    "Lowest",
    "Misfit",
    "are_amounts",
    "best",
    "best_entries",
    "check_leftover",
    "check_model",
    "check_one_run",
    "check_parameters",
    "entries",
    "evaluated_parameters",
    "lowest",
    "lowest_entries",
    "progress",
    "restored",
    "settled",
    "without_best",
]

StateT = TypeVar("StateT")


class Lowest(NamedTuple):
    """The parameters with the lowest risk that a run knows, if every step has the same batch.

    Attributes
    ----------
    theta : (D,)
    risk : float
    returned : bool
        Whether they are the result of the run, because the risk of its last parameters is higher.
    """

    theta: Array
    risk: float
    returned: bool = False


MOST_OPERATIONS = 2**100
"""An upper bound on the operations of a run, which is finite as a float."""

LOWEST = "lowest"
"""Name of the entries for the lowest risk: alongside the optimizer's state, and in the meta."""

BEST = "best"
"""Name of the entries for the best validation: its parameters, if they are not theta, and its values."""


class Misfit(UserError):
    """The state in a checkpoint does not fit this optimizer or its settings."""


def entries(state: Any, backend: Backend) -> dict[str, Entry]:
    """Return an optimizer's state (a dataclass of numbers and vectors) as the entries of a checkpoint."""
    values = {f.name: getattr(state, f.name) for f in fields(state)}
    return {
        name: value if isinstance(value, (int, float, str)) else backend.to_host(value)
        for name, value in values.items()
    }


def restored(checkpoint: Checkpoint, fresh: StateT, backend: Backend, optimizer: str) -> StateT:
    """Return the optimizer's state; its entries must have the names, types and shapes of a fresh state.

    Raises
    ------
    Misfit
        If an entry does not match.
    """
    expected = entries(fresh, backend)
    state = {name: entry for name, entry in checkpoint.state.items() if name not in (LOWEST, BEST)}
    # Checkpoints of earlier versions have different vectors; vectors that are empty need not match.
    missing = {name: value for name, value in expected.items() if _empty(value)}
    saved = {name: v for name, v in state.items() if name in expected or not _empty(v)}
    entries_read = missing | saved
    if set(entries_read) != set(expected):
        raise Misfit(f"the checkpoint was not written by optimizer {optimizer}")
    for name, value in expected.items():
        entry = entries_read[name]
        most = math.inf if type(entry) is float else 2**53  # lambda has no upper bound
        number = abs(entry) if name == "loss" and type(entry) is float else entry  # a loss may be negative
        if _form(entry) != _form(value) or not (isinstance(entry, np.ndarray) or is_amount(number, most)):
            raise Misfit(f'the entry "{name}" of the checkpoint does not fit optimizer {optimizer}')
    values = {k: backend.to_device(v) if isinstance(v, np.ndarray) else v for k, v in entries_read.items()}
    return type(fresh)(**values)


def lowest_entries(found: Lowest | None, backend: Backend) -> tuple[dict[str, Entry], dict[str, Any]]:
    """Return the entries of a checkpoint for the lowest risk: alongside the state, and in its meta."""
    if found is None:
        return {}, {}
    return {LOWEST: backend.to_host(found.theta)}, {LOWEST: {"risk": found.risk, "returned": found.returned}}


def lowest(checkpoint: Checkpoint) -> Lowest | None:
    """Read the lowest risk that the run of a checkpoint knew, with parameters on the host.

    Raises
    ------
    UserError
        If the entries are not valid.
    """
    theta, about = checkpoint.state.get(LOWEST), checkpoint.meta.get(LOWEST)
    if theta is None and about is None:
        return None
    fits = isinstance(theta, np.ndarray) and _form(theta) == _form(checkpoint.theta)
    risk, returned = (about.get("risk"), about.get("returned")) if isinstance(about, dict) else (None, None)
    if not fits or not isinstance(risk, float) or not math.isfinite(risk) or not isinstance(returned, bool):
        raise UserError("invalid checkpoint: the entries of its lowest risk do not match the model")
    return Lowest(theta, risk, returned)


def best_entries(found: Best | None, theta: Array, watch: Watch) -> tuple[dict[str, Array], dict[str, Any]]:
    """Return the entries of a checkpoint of theta for the best validation, in its state and its meta."""
    if found is None:
        return {}, {}
    about = {
        "step": found.step,
        "last": found.last,
        "stale": found.stale,
        "loss": found.valid.loss,
        "metrics": dict(found.valid.metrics),
        "watch": str(watch),
        "current": found.theta is theta,
    }
    return {} if about["current"] else {BEST: found.theta}, {BEST: about}


def best(checkpoint: Checkpoint, watch: Watch) -> Best | None:
    """Read the best validation that the run of a checkpoint knew, with parameters on the host.

    Raises
    ------
    UserError
        If the entries are not valid, or the run compared its validations by a different value.
    """
    theta, about = checkpoint.state.get(BEST, checkpoint.theta), checkpoint.meta.get(BEST)
    if about is None and BEST not in checkpoint.state:
        return None
    about = about if isinstance(about, dict) else {}
    try:
        valid = Validation(about["loss"], about["metrics"])
        steps = about["step"], about["last"], about["stale"]
        sound = isinstance(theta, np.ndarray) and _form(theta) == _form(checkpoint.theta)
        sound = sound and all(type(n) is int and is_amount(n) for n in steps) and steps[0] <= steps[1]
        sound = sound and about["current"] is (BEST not in checkpoint.state)
        values = [valid.loss, *valid.metrics.values()]
        sound = sound and all(isinstance(x, float) for x in values) and math.isfinite(valid.loss)
        watched = about["watch"]
    except (KeyError, TypeError, AttributeError):
        sound, watched = False, ""
    if not sound:
        raise UserError("invalid checkpoint: the entries of its best validation do not match the model")
    if watched != str(watch):
        raise UserError(
            f"this run compares its validations by watch={watched!r}, not {str(watch)!r}: "
            "use a different out for a new run"
        )
    assert isinstance(theta, np.ndarray)
    return Best(theta, valid, *steps)


def without_best(checkpoint: Checkpoint) -> Checkpoint:
    """Return the checkpoint without the best validation, for a run that starts from a different one."""
    state = {name: entry for name, entry in checkpoint.state.items() if name != BEST}
    return replace(checkpoint, state=state, meta=checkpoint.meta | {BEST: None})


def settled(checkpoint: Checkpoint) -> Checkpoint:
    """Return the checkpoint with the parameters that the run returned, to start a different run from it."""
    found = lowest(checkpoint)
    theta = found.theta if found is not None and found.returned else checkpoint.theta
    state = {name: entry for name, entry in checkpoint.state.items() if name != LOWEST}
    meta = {name: value for name, value in checkpoint.meta.items() if name != LOWEST}
    return replace(checkpoint, theta=theta, state=state, meta=meta)


def evaluated_parameters(checkpoint: Checkpoint) -> np.ndarray:
    """Return the parameters to evaluate: the mean of the iterates, or those that the run returned."""
    average = checkpoint.state.get("average")
    return average if isinstance(average, np.ndarray) and average.size else settled(checkpoint).theta


def check_model(checkpoint: Checkpoint, symbols: bytes, size: int, dtype: np.dtype) -> None:
    """Check that the parameters fit a model of this size for these symbols."""
    if checkpoint.meta.get("vocabulary") != list(symbols):
        raise UserError(
            "the checkpoint was trained with a different vocabulary than that of the data: "
            "prepare the text with `hfmpi prepare --vocabulary RUN`"
        )
    check_parameters(checkpoint, size, dtype)


def check_parameters(checkpoint: Checkpoint, size: int, dtype: np.dtype) -> None:
    """Check that the checkpoint has this number of parameters of this type."""
    theta = checkpoint.theta
    if theta.shape != (size,) or theta.dtype != dtype:
        raise UserError(
            f"the checkpoint contains a model of {theta.size:,} parameters ({theta.dtype}), "
            f"not of {size:,} ({dtype})"
        )


def check_one_run(folder: Path, checkpoint: Checkpoint) -> None:
    """Check that the other checkpoints in the folder belong to the same run as this one.

    If one of them does not, it was copied there, because a run never changes what it computes, nor its data.
    """
    for other in PREVIOUS, BEST_FILE:
        try:
            name = _difference(merge(checkpoint.meta["config"]), checkpoint.meta, folder / other)
        except (UserError, KeyError, TypeError):  # nothing to compare
            continue
        if name:
            raise UserError(
                f"{folder / NEWEST} and {other} belong to different runs (the {name} differs): "
                "remove one of them"
            )


def check_leftover(folder: Path, config: Config, about: Mapping[str, Any], out: str) -> None:
    """Check that best.h5 in the folder of a new run does not belong to a different run.

    A best.h5 of the same run exists if the run was stopped before its first checkpoint. `about` has the
    digests of data and model, and `out` is the name of the option for the folder.
    """
    path = folder / BEST_FILE
    try:
        name = _difference(config, about, path)
    except (UserError, KeyError, TypeError):
        name = ""
    if name:
        raise UserError(
            f"{path} belongs to a different run (the {name} differs): move it elsewhere, or use a different "
            f"{out}"
        )


def _difference(config: Config, about: Mapping[str, Any], path: Path) -> str:
    """Return the first option or digest in which the run of a checkpoint differs, or "".

    Raises
    ------
    UserError, KeyError, TypeError
        If the checkpoint cannot be read or does not describe a run.
    """
    meta = load(path).meta
    ours, theirs = asdict(config) | identity(about), asdict(merge(meta["config"])) | identity(meta)
    changed = (name for name, value in ours.items() if name not in CHANGEABLE and value != theirs.get(name))
    return next(changed, "")


def progress(checkpoint: Checkpoint) -> Progress:
    """Read the progress of the run from the checkpoint's meta, in which `asdict` stored it.

    Raises
    ------
    UserError
        If an entry is missing or is not a valid number.
    """
    meta = checkpoint.meta
    try:
        step, seconds, counts = meta["step"], meta["seconds"], _counts(meta["counts"])
        rejections, origin, unit = meta.get("rejections", 0), meta.get("origin", ""), _unit(meta)
        before = tuple(
            Spent(_counts(part["counts"]), part["gradient_batch"], part["curvature_batch"], _unit(part))
            for part in meta.get("before", ())
        )
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"the checkpoint does not describe a run of this version: {error!r}") from None
    spent = *before, Spent(counts, 0, 0, unit)
    batches = (number for part in before for number in (part.gradient_batch, part.curvature_batch))
    sound = all(type(n) is int and is_amount(n) for n in (step, rejections, *batches)) and is_amount(seconds)
    units = (number for part in spent for number in part.unit)
    sound = sound and all(type(n) is int and 0 < n < MOST_OPERATIONS for n in units)
    if not (sound and all(are_amounts(part.counts) for part in spent)):
        raise UserError("invalid checkpoint: its step, seconds and counts must be non-negative numbers")
    if not isinstance(origin, str):
        raise UserError('invalid checkpoint: "origin" must be a string')
    return Progress(step, seconds, rejections, counts, unit, before, origin)


def are_amounts(counts: Counts) -> bool:
    """Return whether the counts, from a file, are integers of a possible size."""
    return all(
        type(number) is int and is_amount(number, MOST_OPERATIONS if name == "operations" else 2**53)
        for name, number in asdict(counts).items()
    )


def _unit(saved: dict[str, Any]) -> ForwardPass:
    """Return the unit that was saved with counts; versions up to 0.2.0 did not count linear algebra."""
    return ForwardPass(*saved.get("unit", NO_UNIT))


def _counts(saved: dict[str, int]) -> Counts:
    """Return counts that this version or an earlier one saved.

    Up to version 0.2.0 they also contain `columns`, which is always 0.
    """
    return Counts(**{name: number for name, number in dict(saved).items() if name != "columns"})


def _empty(value: Entry) -> bool:
    return isinstance(value, np.ndarray) and not value.size


def _form(value: Entry) -> tuple[Any, ...]:
    """Return the properties that an entry of a checkpoint must share with the state that it replaces."""
    return (value.shape, value.dtype) if isinstance(value, np.ndarray) else (type(value),)
