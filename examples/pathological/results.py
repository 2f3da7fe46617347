"""What came of the runs: a file of one line a run, which the tables are made of."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from hfmpi.errors import UserError
from hfmpi.files import checkpoint
from hfmpi.files.atomic import open_regular, replace

NAME = "results.json"

SEEDS = 4
"""Runs of the study have seeds below it; that of the tuning is the next."""

KEYS = ("task", "length", "cell", "hidden", "method", "value", "seed", "solved", "step", "P_I", "P_I_full",
        "P_D", "P_D_full", "seconds", "loss", "wrong", "outputs")  # fmt: skip
"""Of a run: which it is; whether it solved its task; what it had cost by then, or at its end; its last
training loss; and of its test the share of sequences that were wrong, and wrong outputs a sequence."""

Record = dict[str, Any]


def collect(out: Path) -> list[Record]:
    """Return what the checkpoints in the folders of a study say, in the order of their names."""
    every = sorted(path.parent for path in out.glob(f"*/{checkpoint.NEWEST}"))
    return [checkpoint.latest(folder).meta["record"] for folder in every]


def write(out: Path) -> None:
    """Write the file of a study into its folder."""
    lines = [json.dumps({key: record[key] for key in KEYS}) for record in collect(out)]
    replace(out / NAME, ("[\n" + ",\n".join(lines) + "\n]\n").encode())


def read(path: Path) -> list[Record]:
    """Read a file.

    Raises
    ------
    UserError
        If it is none.
    """
    with open_regular(path) as file:
        content = file.read()
    try:
        records: list[Record] = json.loads(content)
        if not all(set(record) == set(KEYS) for record in records):
            raise ValueError
    except (ValueError, TypeError):
        raise UserError(f"{path} is no file of results of this study") from None
    return records
