"""The history of a run: a file with one JSON object per line and one line per step."""

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
MOST_LINE = 2**16  # maximum number of bytes of a line; hfmpi writes about 500


class Record(TypedDict):
    """A line: the keys of a step (docs/file-formats.md), with those of particular optimizers at the end."""

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
    bends: NotRequired[int]
    candidates: NotRequired[int]
    directions: NotRequired[int]
    adjoints: NotRequired[int]
    row_products: NotRequired[int]
    operations: NotRequired[int]
    depth: NotRequired[int]
    gradient_norm: NotRequired[float | None]
    step_norm: NotRequired[float]
    damping: NotRequired[float]
    rho: NotRequired[float | None]
    cg_stop: NotRequired[str]
    cg_chosen: NotRequired[int]
    line_search_rate: NotRequired[float]
    rate: NotRequired[float]


class LossKeys(NamedTuple):
    """The keys of the losses in the records of a run, and their unit.

    Attributes
    ----------
    train, valid : str
    per_nat : float
        Units per nat.
    """

    train: str
    valid: str
    per_nat: float

    def of(self, record: Record) -> tuple[float | None, float | None]:
        """Return the losses of the training batch and of the validation set; None: unknown."""
        values = cast("dict[str, Any]", record)
        return values[self.train], values[self.valid]


BITS = LossKeys("train_bpc", "valid_bpc", 1 / math.log(2))
"""The keys of `hfmpi train`: bits per character."""

NATS = LossKeys("loss", "valid_loss", 1.0)
"""The keys of `hfmpi.train`: the loss in the unit of the model."""


def loss_keys(record: Record) -> LossKeys:
    """Return the keys of the losses in a record."""
    return NATS if NATS.train in record else BITS


class History:
    """The file history.jsonl in the folder of a run.

    Lines that cannot be written are buffered, and written in order as soon as possible.

    Parameters
    ----------
    folder : path
        The folder; it must exist.
    """

    def __init__(self, folder: str | Path) -> None:
        self.path = Path(folder) / HISTORY
        self._waiting: list[bytes] = []
        self._whole = self._size()  # bytes up to the end of the last complete line

    def add(self, record: Record) -> None:
        """Append a line to the buffer that `flush` writes.

        Numbers that are not finite, which JSON cannot represent, are written as null.
        """
        self._waiting.append((json.dumps(plain(record), allow_nan=False) + "\n").encode())

    def flush(self, sync: bool = False) -> None:
        """Write the buffered lines; with `sync` flush all lines to the disk.

        Raises
        ------
        UserError
            If the file cannot be written.
        """
        if not self._waiting and not sync:
            return
        content = b"".join(self._waiting)
        try:
            # Not in append mode, so that an incomplete write of an earlier attempt is overwritten.
            descriptor = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_NONBLOCK, 0o666)
            with os.fdopen(descriptor, "wb") as file:
                self._whole = min(self._whole, os.fstat(descriptor).st_size)  # 0 if the file was removed
                file.truncate(self._whole)
                file.seek(self._whole)
                file.write(content)
                if sync:
                    file.flush()
                    os.fsync(descriptor)
        except OSError as error:  # `close` may be the first to report a quota
            raise UserError(f"cannot write {self.path}: {error.strerror or error}") from None
        self._whole += len(content)
        self._waiting.clear()

    def amend(self, step: int, values: dict[str, Any]) -> None:
        """Replace values in the last line if it belongs to this step; raise a UserError if writing fails."""
        self.flush()
        if not os.path.lexists(self.path):
            return
        lines = [(line, record) for _, line, record in _lines(self.path)]
        record = lines[-1][1] if lines else None
        if record is not None and record["step"] == step:
            last = (json.dumps(plain(record | values), allow_nan=False) + "\n").encode()
            replace(self.path, b"".join([*(line for line, _ in lines[:-1]), last]))
            self._whole = self._size()

    def truncate(self, step: int) -> list[str]:
        """Remove the lines after a step and an incomplete last line; do nothing if there is no file.

        A run that continues from a checkpoint repeats the steps after it. Lines that are not steps are also
        removed; the original file is then renamed to `DAMAGED`.

        Returns
        -------
        list of str
            Notes for the user on removed steps and on damage to the file.

        Raises
        ------
        UserError
            If the file cannot be read or written.
        """
        if not os.path.lexists(self.path):
            return []
        lines, foreign, last, later = [], 0, 0, 0
        for _, line, record in _lines(self.path):
            if record is None or not last < record["step"]:
                foreign += 1
                if len(line) == MOST_LINE:
                    break  # the file is not a history and may be endless
            elif record["step"] <= step:
                lines.append(line.rstrip(b"\n") + b"\n")
                last = record["step"]
            else:
                later += 1
        aside = self.path.with_name(DAMAGED) if foreign else None
        replace(self.path, b"".join(lines), keep=aside)
        self._whole = self._size()
        notes = []
        if later:
            notes.append(f"{self.path}: {later:,} step(s) after the last checkpoint will be recomputed")
        if foreign:
            notes.append(
                f"{self.path}: {foreign:,} damaged or foreign line(s) were removed; the original file is now "
                f"{aside}"
            )
        return notes

    @staticmethod
    def read(folder: str | Path, numbers: Iterable[str] = ()) -> list[Record]:
        """Read the history in the folder of a run, without a last line that a crash left incomplete.

        Parameters
        ----------
        folder : path
        numbers : iterable of str
            Keys that every record must have; their values must be numbers or None.

        Raises
        ------
        UserError
            If there is no history, or a line is not a step of a history.
        """
        path = Path(folder) / HISTORY
        records = []
        for number, _, record in _lines(path):
            if record is None:
                raise UserError(f"{path} is damaged in line {number}: it is not a step of a history")
            bad = [key for key in numbers if not is_drawable(record.get(key, ""))]
            if bad:
                raise UserError(f"{path} is damaged in line {number}: its {bad[0]} is not a number")
            records.append(cast(Record, record))
        return records

    def _size(self) -> int:
        try:
            return os.stat(self.path).st_size
        except OSError:
            return 0


def _lines(path: Path) -> Iterator[tuple[int, bytes, dict[str, Any] | None]]:
    """Yield number, content and record of each line, without an incomplete last line.

    The record is None if the line is not a step.
    """
    with open_regular(path) as file:
        number = 0
        # Read one line of limited length at a time, because the file may be larger than the memory.
        while line := file.readline(MOST_LINE):
            number += 1
            try:
                record = json.loads(line, parse_constant=_refuse)
            except (ValueError, RecursionError):  # ValueError includes undecodable bytes
                if not line.endswith(b"\n") and len(line) < MOST_LINE:
                    return
                record = None
            is_step = isinstance(record, dict) and type(record.get("step")) is int and record["step"] >= 0
            yield number, line, record if is_step else None


def _refuse(constant: str) -> None:
    raise ValueError(f"JSON has no {constant}")


def plain(value: Any) -> Any:
    """Convert a record to JSON values: Python numbers, and None for numbers that are not finite."""
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, dict):
        return {key: plain(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
