"""What a checkpoint holds of a run, checked before memory is taken for it: it may come from anyone."""

from __future__ import annotations

import math
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from hfmpi.backends.base import Backend
from hfmpi.errors import UserError
from hfmpi.files.checkpoint import NEWEST, PREVIOUS, Checkpoint, Entry, identity, load
from hfmpi.files.numbers import is_amount
from hfmpi.measure.cost import Counts
from hfmpi.runs.config import CHANGEABLE, merge
from hfmpi.runs.record import Progress, Spent

__all__ = ["Misfit", "check_model", "check_one_run", "check_parameters", "entries", "progress", "restored"]

StateT = TypeVar("StateT")


class Misfit(UserError):
    """The state in a checkpoint is not one of this optimizer, or not one with these settings."""


def entries(state: Any, backend: Backend) -> dict[str, Entry]:
    """Give an optimizer's state (a dataclass of numbers and vectors) as the entries of a checkpoint."""
    values = {f.name: getattr(state, f.name) for f in fields(state)}
    return {
        name: value if isinstance(value, (int, float, str)) else backend.to_host(value)
        for name, value in values.items()
    }


def restored(found: Checkpoint, fresh: StateT, backend: Backend, optimizer: str) -> StateT:
    """Give the optimizer's state; its entries must have the names and forms of a fresh state's.

    Raises
    ------
    Misfit
        If they have not.
    """
    expected = entries(fresh, backend)
    # Earlier versions lack some vectors and have others: where a vector is empty, that makes no difference.
    missing = {name: value for name, value in expected.items() if _empty(value)}
    saved = {name: value for name, value in found.state.items() if name in expected or not _empty(value)}
    entered = missing | saved
    if set(entered) != set(expected):
        raise Misfit(f"the checkpoint was not written by optimizer {optimizer}")
    for name, value in expected.items():
        entry = entered[name]
        most = math.inf if type(entry) is float else 2**53  # lambda may be as large as the user lets it
        if _form(entry) != _form(value) or not (isinstance(entry, np.ndarray) or is_amount(entry, most)):
            raise Misfit(f"the checkpoint's {name} does not fit optimizer {optimizer}")
    values = {k: backend.to_device(v) if isinstance(v, np.ndarray) else v for k, v in entered.items()}
    return type(fresh)(**values)


def check_model(found: Checkpoint, symbols: bytes, size: int, dtype: np.dtype) -> None:
    """Raise a UserError unless the parameters are those of a model of this size for this alphabet."""
    if found.meta.get("vocabulary") != list(symbols):
        raise UserError(
            "the checkpoint was trained on another vocabulary than that of the data: "
            "prepare its text with `hfmpi prepare --vocabulary RUN`"
        )
    check_parameters(found, size, dtype)


def check_parameters(found: Checkpoint, size: int, dtype: np.dtype) -> None:
    """Raise a UserError unless the parameters are so many of this type."""
    if found.theta.shape != (size,) or found.theta.dtype != dtype:
        raise UserError(
            f"the checkpoint holds a model of {found.theta.size:,} parameters ({found.theta.dtype}), "
            f"not of {size:,} ({dtype})"
        )


def check_one_run(folder: Path, found: Checkpoint) -> None:
    """Raise a UserError if the previous checkpoint in the folder is another run's than the one found there.

    Somebody has copied one of them there. What a run computes, and on what data, never changes.
    """
    try:
        previous = load(folder / PREVIOUS).meta
        ours, theirs = (asdict(merge(meta["config"])) | identity(meta) for meta in (found.meta, previous))
    except (UserError, KeyError, TypeError):  # nothing to compare
        return
    for name, value in ours.items():
        if name not in CHANGEABLE and value != theirs.get(name):
            raise UserError(
                f"{folder / NEWEST} is of another run than {PREVIOUS} beside it, its {name} differs: "
                "move away the one that does not belong there"
            )


def progress(found: Checkpoint) -> Progress:
    """Give how far the run had come, of which `asdict` made a part of the checkpoint's meta.

    Raises
    ------
    UserError
        If its numbers are none.
    """
    meta = found.meta
    try:
        step, seconds, counts = meta["step"], meta["seconds"], _counts(meta["counts"])
        rejections, origin = meta.get("rejections", 0), meta.get("origin", "")
        before = tuple(
            Spent(_counts(part["counts"]), part["gradient_batch"], part["curvature_batch"])
            for part in meta.get("before", ())
        )
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"the checkpoint describes no run of this version: {error!r}") from None
    spent = *before, Spent(counts, 0, 0)
    batches = (number for part in before for number in (part.gradient_batch, part.curvature_batch))
    numbers = step, rejections, *batches, *(n for part in spent for n in asdict(part.counts).values())
    if not all(type(n) is int and is_amount(n) for n in numbers) or not is_amount(seconds):
        raise UserError("the checkpoint describes no run: its step, seconds and counts must be numbers")
    if not isinstance(origin, str):
        raise UserError("the checkpoint describes no run: the one that it started from must have a name")
    return Progress(step, seconds, rejections, counts, before, origin)


def _counts(saved: dict[str, int]) -> Counts:
    """Return counts that this version or an earlier one saved.

    Until version 0.2.0 they had `columns` too, which no optimizer ever counted.
    """
    return Counts(**{name: number for name, number in dict(saved).items() if name != "columns"})


def _empty(value: Entry) -> bool:
    return isinstance(value, np.ndarray) and not value.size


def _form(value: Entry) -> tuple[Any, ...]:
    """Give what must agree between the entry of a checkpoint and the state that it takes the place of."""
    return (value.shape, value.dtype) if isinstance(value, np.ndarray) else (type(value),)
