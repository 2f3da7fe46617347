"""What a checkpoint says of its run, checked before memory is taken for it: it may come from anyone."""

from __future__ import annotations

import math
from dataclasses import asdict, fields
from typing import Any

import numpy as np

from hfmpi.errors import UserError
from hfmpi.files.checkpoint import Checkpoint, Entry
from hfmpi.files.numbers import is_amount
from hfmpi.measure import cost

__all__ = ["check_model", "progress", "restored_state"]


def check_model(found: Checkpoint, symbols: bytes, size: int, dtype: np.dtype) -> None:
    """Raise a UserError unless the parameters are those of a model of this size for this alphabet."""
    if found.meta.get("vocabulary") != list(symbols):
        raise UserError("the checkpoint was trained on another vocabulary than that of the data")
    if found.theta.shape != (size,) or found.theta.dtype != dtype:
        raise UserError(
            f"the checkpoint holds a model of {found.theta.size:,} parameters ({found.theta.dtype}), "
            f"not of {size:,} ({dtype})"
        )


def restored_state(found: Checkpoint, state: Any, optimizer: str) -> dict[str, Entry]:
    """Give the entries of the optimizer's state; they must have the names and forms of a fresh state's.

    Raises
    ------
    UserError
        If they have not.
    """
    fresh = {f.name: getattr(state, f.name) for f in fields(state)}
    if set(found.state) != set(fresh):
        raise UserError(f"the checkpoint was not written by optimizer {optimizer}")
    for name, value in fresh.items():
        entry = found.state[name]
        most = math.inf if type(entry) is float else 2**53  # lambda may be as large as the user lets it
        if _form(entry) != _form(value) or not (hasattr(entry, "shape") or is_amount(entry, most)):
            raise UserError(f"the checkpoint's {name} does not fit optimizer {optimizer}")
    return found.state


def progress(found: Checkpoint) -> tuple[int, float, int, cost.Counts]:
    """Give steps, seconds, rejections in a row and the counts of the work so far.

    Raises
    ------
    UserError
        If they are no such numbers.
    """
    meta = found.meta
    try:
        step, seconds, counts = meta["step"], meta["seconds"], cost.Counts(**meta["counts"])
        rejections = meta.get("rejections", 0)
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"the checkpoint describes no run of this version: {error!r}") from None
    numbers = step, rejections, *asdict(counts).values()
    if not all(type(n) is int and is_amount(n) for n in numbers) or not is_amount(seconds):
        raise UserError("the checkpoint describes no run: its step, seconds and counts must be numbers")
    return step, seconds, rejections, counts


def _form(value: Any) -> tuple[Any, ...]:
    """Give what must agree between the entry of a checkpoint and the state that it takes the place of."""
    return (value.shape, value.dtype) if hasattr(value, "shape") else (type(value),)
