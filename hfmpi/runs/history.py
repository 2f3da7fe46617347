"""The history of a run: one JSON object a line and a line a step."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from hfmpi.errors import UserError
from hfmpi.files import replace

__all__ = ["History"]


class History:
    """The file history.jsonl in the folder of a run.

    Parameters
    ----------
    folder : path
        The folder; it must exist.
    """

    def __init__(self, folder: str | Path) -> None:
        self.path = Path(folder) / "history.jsonl"

    def append(self, record: Mapping[str, Any]) -> None:
        """Add one line and hand it to the operating system.

        Parameters
        ----------
        record : mapping of str
            With at least an integer "step". Values are numbers, strings, None, and lists and dicts of
            these; numbers that are not finite, which JSON does not know, are written as null.

        Raises
        ------
        UserError
            If the file cannot be written.
        """
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(_plain(dict(record)), allow_nan=False) + "\n")
        except OSError as error:
            raise UserError(f"cannot write {self.path}: {error.strerror or error}") from error

    def truncate(self, step: int) -> None:
        """Drop what comes after a step, and a torn last line; without a file there is nothing to do.

        A run that goes on from a checkpoint repeats the steps after it.

        Raises
        ------
        UserError
            If the file is damaged or cannot be written.
        """
        if self.path.exists():
            kept = [record for record in self.read(self.path.parent) if record["step"] <= step]
            replace(self.path, "".join(json.dumps(record) + "\n" for record in kept).encode())

    @staticmethod
    def read(folder: str | Path) -> list[dict[str, Any]]:
        """Read the history in the folder of a run; a last line that was torn by a crash is left out.

        Raises
        ------
        UserError
            If there is no history or a line is not one of a history.
        """
        path = Path(folder) / "history.jsonl"
        try:
            lines = path.read_bytes().splitlines()
        except OSError as error:
            raise UserError(f"cannot read {path}: {error.strerror or error}") from error
        records = []
        for number, line in enumerate(lines, start=1):
            try:
                record = json.loads(line)
            except (ValueError, RecursionError):  # undecodable bytes are a ValueError too
                if number == len(lines):
                    break
                raise UserError(f"{path} is damaged in line {number}") from None
            if not isinstance(record, dict) or not isinstance(record.get("step"), int):
                raise UserError(f"{path} is damaged in line {number}: it is no step of a history")
            records.append(record)
        return records


def _plain(value: Any) -> Any:
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, dict):
        return {key: _plain(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
