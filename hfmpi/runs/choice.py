"""--prefer: choose the optimizer with the fewest sequential passes or seconds on the available ranks."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from hfmpi.errors import UserError
from hfmpi.optim.presets import preset
from hfmpi.runs.config import Config

__all__ = ["preferred"]

SOME, MANY = 200, 2_000
"""Numbers of ranks, of one core each, by the measurements and the model of docs/results/clock.md.

On fewer than SOME ranks `muon-small` is the fastest. From there on it is a subspace step, with the gradient
on a quarter of the sequences, and on all of them from MANY ranks on. With an mLSTM whole directions are
sufficient.
"""

SHARE = 0.25
"""The maximum share of a rank's memory for rows; the step needs the same amount in addition to the rows."""


def preferred(config: Config, parameters: int, sequences: int, ranks: int, memory: int) -> tuple[Config, str]:
    """Return a configuration with the optimizer that its `prefer` selects, and a note with the reason.

    Parameters
    ----------
    config : Config
    parameters, sequences : int
        D, and the number of training sequences.
    ranks : int
    memory : int
        Bytes that a rank may use.

    Raises
    ------
    UserError
        If an optimizer is set too.
    """
    if config.optimizer != Config().optimizer:
        raise UserError(f"use either --prefer {config.prefer} or --optimizer {config.optimizer}, not both")
    share = 1
    if config.prefer == "passes":
        rows = preset("subspace-rows")
        examples = min(config.gradient_batch or rows.gradient_batch, sequences)
        count = vars(rows.optimizer)["segments"] * examples
        need = -(-count // ranks) * parameters * np.dtype(config.dtype).itemsize
        size = f"{need / 2**30:.3g} GiB per rank"
        if need <= SHARE * memory:
            name, why = "subspace-rows", f"the rows of all sequences need {size}"
        else:
            name, why = "subspace", f"subspace-rows would need {size} for the rows of all sequences"
    else:
        name = "muon-small"
        if ranks >= SOME:
            name = "subspace-whole" if config.model == "mlstm" else "subspace"
        why = f"it is the fastest on {ranks:,} rank(s) according to docs/results/clock.md"
        if SOME <= ranks < MANY and not config.gradient_batch:
            share, why = 4, f"{why}, with the gradient on a quarter of the sequences"
    chosen = preset(name)
    gradient = config.gradient_batch or min(chosen.gradient_batch, -(-sequences // share))
    curvature = config.curvature_batch or min(chosen.curvature_batch, gradient)
    return (
        replace(config, optimizer=name, gradient_batch=gradient, curvature_batch=curvature),
        f"--prefer {config.prefer} chooses {name}: {why}",
    )
