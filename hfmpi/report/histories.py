"""Read the histories of the runs that `hfmpi plot` draws together."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from hfmpi.data.corpus import loss_unit
from hfmpi.errors import UserError
from hfmpi.files.checkpoint import trained_on
from hfmpi.files.history import BITS, History, loss_keys
from hfmpi.report.figure import AXES, Runs

__all__ = ["read"]


def read(runs: Iterable[tuple[str, Path]], internals: bool) -> tuple[Runs, str, str]:
    """Read the histories of runs from their names and folders.

    Steps without a loss, which were rejected, are omitted, unless the figure shows internals.

    Returns
    -------
    histories : sequence of (str, sequence of Record)
        Name and step records of each run.
    unit : str
        Unit of the losses.
    note : str
        What the user should know about the runs; may be empty.

    Raises
    ------
    UserError
        If a history cannot be read or is empty, or if losses of different units would be drawn.
    """
    histories = []
    symbols, trained, in_bits = b"", dict[str, str](), dict[bool, str]()  # the name of one run of each kind
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
            f"{in_bits[True]} has losses in bits/char, but {in_bits[False]} has the losses of a model: "
            "plot them separately"
        )
    note = ""
    if len(trained) > 1 and not internals:
        first, second, *_ = trained.values()
        note = f"{first} and {second} were trained on different data"
    return histories, loss_unit(symbols) if True in in_bits else "loss", note
