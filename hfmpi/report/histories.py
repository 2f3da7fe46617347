"""The histories of the runs that `hfmpi plot` draws together."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from hfmpi.data.corpus import loss_unit
from hfmpi.errors import UserError
from hfmpi.files.checkpoint import trained_on
from hfmpi.files.history import BITS, History, Record, loss_keys
from hfmpi.report.figure import AXES

__all__ = ["Histories", "read"]


class Histories(NamedTuple):
    """Histories of runs.

    Attributes
    ----------
    runs : list of (str, list of Record)
        Name and step records of each run.
    unit : str
        Unit of the losses.
    note : str
        What the user should know about them; empty if nothing.
    """

    runs: list[tuple[str, list[Record]]]
    unit: str
    note: str


def read(runs: Sequence[tuple[str, Path]], internals: bool) -> Histories:
    """Read the histories of runs.

    Parameters
    ----------
    runs : sequence of (str, Path)
        Name and folder of each run.
    internals : bool
        Whether internals are drawn rather than losses. Losses must have one unit, and steps without a loss
        (some rejected ones) are left out.

    Raises
    ------
    UserError
        If a history cannot be read or is empty, or if the losses have different units.
    """
    histories = []
    symbols, trained, in_bits = b"", dict[str, str](), dict[bool, str]()  # a run of each kind by name
    for name, folder in runs:
        records = History.read(folder, AXES)
        keys = loss_keys(records[0]) if records else BITS
        records = History.read(folder, (keys.train, keys.valid, *AXES))
        records = [record for record in records if internals or keys.of(record)[0] is not None]
        if not records:
            raise UserError(f"the history of {name} is empty")
        histories.append((name, records))
        in_bits.setdefault(keys == BITS, name)
        digest, vocabulary = trained_on(folder)
        symbols += vocabulary
        if digest is not None:
            trained.setdefault(digest, name)
    if len(in_bits) > 1 and not internals:
        raise UserError(
            f"{in_bits[True]} has losses in bits/char and {in_bits[False]} those of a model: "
            "plot them separately"
        )
    note = ""
    if len(trained) > 1 and not internals:
        first, second, *_ = trained.values()
        note = f"{first} and {second} were trained on different data"
    return Histories(histories, loss_unit(symbols) if True in in_bits else "loss", note)
