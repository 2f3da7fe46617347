"""The results of the runs: a file with one line per run, from which the tables are made."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from hfmpi.errors import UserError
from hfmpi.files import checkpoint
from hfmpi.files.atomic import open_regular, replace

NAME = "results.json"

SEEDS = 4
"""Runs of the study have seeds below this one, which is the seed of the tuning."""

KEYS = ("task", "length", "cell", "hidden", "method", "value", "seed", "solved", "step", "P_I", "P_I_full",
        "P_D", "P_D_full", "seconds", "loss", "wrong", "outputs")  # fmt: skip
"""The fields of a run: its identity; whether it solved its task; its costs until then, or until its end; its
last training loss; from its test the share of wrong sequences and the number of wrong outputs per
sequence."""

Record = dict[str, Any]


def collect(out: Path) -> list[Record]:
    """Return the records in the checkpoints of a study's folders, sorted by the names of the folders."""
    every = sorted(path.parent for path in out.glob(f"*/{checkpoint.NEWEST}"))
    return [checkpoint.latest(folder).meta["record"] for folder in every]


def write(out: Path) -> None:
    """Write the file of a study to its folder."""
    lines = [json.dumps({key: record[key] for key in KEYS}) for record in collect(out)]
    replace(out / NAME, ("[\n" + ",\n".join(lines) + "\n]\n").encode())


def read(path: Path) -> list[Record]:
    """Read a file of results.

    Raises
    ------
    UserError
        If it is not a file of results.
    """
    with open_regular(path) as file:
        content = file.read()
    try:
        records: list[Record] = json.loads(content)
        if not all(set(record) == set(KEYS) for record in records):
            raise ValueError
    except (ValueError, TypeError):
        raise UserError(f"{path} is not a file of results of this study") from None
    return records
