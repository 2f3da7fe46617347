"""The history of a run: one JSON object a line and a line a step."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, NotRequired, TypedDict, cast

import numpy as np

from hfmpi.errors import UserError
from hfmpi.files.atomic import open_regular, replace
from hfmpi.files.numbers import is_drawable

__all__ = ["BITS", "HISTORY", "NATS", "History", "LossKeys", "Record", "loss_keys", "plain"]

HISTORY = "history.jsonl"
DAMAGED = "history.damaged.jsonl"
MOST_LINE = 2**16  # bytes; hfmpi writes about 500


class Record(TypedDict):
    """A line: the keys of a step (docs/file-formats.md), those of single methods at the end."""

    step: int
    seconds: float
    step_seconds: float
    train_bpc: NotRequired[float | None]
    valid_bpc: NotRequired[float | None]
    loss: NotRequired[float | None]
    valid_loss: NotRequired[float | None]
    valid_metric: NotRequired[float | None]
    P_I: int
    P_D: int
    P_P: int
    P_I_full: int
    P_D_full: int
    accepted: bool
    message: str
    gradients: int
    losses: int
    linearisations: int
    products: int
    cg_steps: int
    projections: NotRequired[int]
    candidates: NotRequired[int]
    columns: NotRequired[int]
    directions: NotRequired[int]
    gradient_norm: NotRequired[float | None]
    step_norm: NotRequired[float]
    damping: NotRequired[float]
    rho: NotRequired[float | None]
    cg_stop: NotRequired[str]
    cg_chosen: NotRequired[int]
    line_search_rate: NotRequired[float]
    rate: NotRequired[float]


class LossKeys(NamedTuple):
    """Under which keys the records of a run have its loss, and in which unit.

    Attributes
    ----------
    train, valid : str
    per_nat : float
        Units in a nat.
    """

    train: str
    valid: str
    per_nat: float

    def of(self, record: Record) -> tuple[float | None, float | None]:
        """Give the loss of the training batch and of the validation set, if known."""
        values = cast("dict[str, Any]", record)
        return values[self.train], values[self.valid]


BITS = LossKeys("train_bpc", "valid_bpc", 1 / math.log(2))
"""Of `hfmpi train`: bits a character."""

NATS = LossKeys("loss", "valid_loss", 1.0)
"""Of `hfmpi.train`: the loss as the model has it."""


def loss_keys(record: Record) -> LossKeys:
    """Give those of a record."""
    return NATS if NATS.train in record else BITS


class History:
    """The file history.jsonl in the folder of a run.

    Lines that cannot be written are kept, and written in their order as soon as that is possible.

    Parameters
    ----------
    folder : path
        The folder; it must exist.
    """

    def __init__(self, folder: str | Path) -> None:
        self.path = Path(folder) / HISTORY
        self._waiting: list[bytes] = []
        self._whole = self._size()  # bytes that end in a whole line; what follows is the torn rest of a write

    def add(self, record: Record) -> None:
        """Add one line to those that wait for `flush`.

        Numbers that are not finite, which JSON does not know, are written as null.
        """
        self._waiting.append((json.dumps(plain(record), allow_nan=False) + "\n").encode())

    def flush(self, sync: bool = False) -> None:
        """Write the lines that wait; with `sync` all lines reach the disk.

        Raises
        ------
        UserError
            If the file cannot be written.
        """
        if not self._waiting and not sync:
            return
        content = b"".join(self._waiting)
        try:
            # Not "a": what an earlier attempt left half-written is overwritten.
            descriptor = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_NONBLOCK, 0o666)
            with os.fdopen(descriptor, "wb") as file:
                self._whole = min(self._whole, os.fstat(descriptor).st_size)  # less if it was removed
                file.truncate(self._whole)
                file.seek(self._whole)
                file.write(content)
                if sync:
                    file.flush()
                    os.fsync(descriptor)
        except OSError as error:  # a quota may be told of by `close` alone
            raise UserError(f"cannot write {self.path}: {error.strerror or error}") from None
        self._whole += len(content)
        self._waiting.clear()

    def truncate(self, step: int) -> list[str]:
        """Drop what comes after a step, and a torn last line; without a file there is nothing to do.

        A run that goes on from a checkpoint repeats the steps after it. Lines that are no steps are dropped
        too, and the file as it was is then kept beside the new one.

        Returns
        -------
        list of str
            What the user should know: that steps are dropped, that the file was damaged.

        Raises
        ------
        UserError
            If the file cannot be read or written.
        """
        if not os.path.lexists(self.path):
            return []
        kept, foreign, last, later = [], 0, 0, 0
        for _, line, record in _lines(self.path):
            if record is None or not last < record["step"]:
                foreign += 1
                if len(line) == MOST_LINE:
                    break  # no history, and perhaps without end
            elif record["step"] <= step:
                kept.append(line.rstrip(b"\n") + b"\n")
                last = record["step"]
            else:
                later += 1
        aside = self.path.with_name(DAMAGED) if foreign else None
        replace(self.path, b"".join(kept), keep=aside)
        self._whole = self._size()
        notes = []
        if later:
            notes.append(f"{self.path} had {later:,} step(s) that no checkpoint holds: they are taken anew")
        if foreign:
            lines = f"{foreign:,} damaged or foreign line(s)"
            notes.append(f"{self.path} had {lines}, left out now; as it was it is {aside}")
        return notes

    @staticmethod
    def read(folder: str | Path, numbers: Iterable[str] = ()) -> list[Record]:
        """Read the history in the folder of a run; a last line that was torn by a crash is left out.

        Parameters
        ----------
        folder : path
        numbers : iterable of str
            Keys whose values must be there: numbers or None.

        Raises
        ------
        UserError
            If there is no history or a line is not one of a history.
        """
        path = Path(folder) / HISTORY
        records = []
        for number, _, record in _lines(path):
            if record is None:
                raise UserError(f"{path} is damaged in line {number}: it is no step of a history")
            bad = [key for key in numbers if not is_drawable(record.get(key, ""))]
            if bad:
                raise UserError(f"{path} is damaged in line {number}: its {bad[0]} is no number")
            records.append(cast(Record, record))
        return records

    def _size(self) -> int:
        try:
            return os.stat(self.path).st_size
        except OSError:
            return 0


def _lines(path: Path) -> Iterator[tuple[int, bytes, dict[str, Any] | None]]:
    """Give number, content and record of each line: None if it is no step; not a last one that is torn."""
    with open_regular(path) as file:
        number = 0
        # A line at a time and none without end: the file may be larger than the memory.
        while line := file.readline(MOST_LINE):
            number += 1
            try:
                record = json.loads(line, parse_constant=_refuse)
            except (ValueError, RecursionError):  # undecodable bytes are a ValueError too
                if not line.endswith(b"\n") and len(line) < MOST_LINE:
                    return
                record = None
            is_step = isinstance(record, dict) and type(record.get("step")) is int and record["step"] >= 0
            yield number, line, record if is_step else None


def _refuse(constant: str) -> None:
    raise ValueError(f"JSON has no {constant}")


def plain(value: Any) -> Any:
    """Give a record as the file has it: numbers of Python's own, and None for those that are not finite."""
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, dict):
        return {key: plain(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
