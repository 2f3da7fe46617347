"""--prefer: the optimizer for the fewest sequential passes or the least seconds, on the ranks at hand."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from hfmpi.errors import UserError
from hfmpi.optim.presets import preset
from hfmpi.runs.config import Config

__all__ = ["preferred"]

QUICKEST = ((1, "muon-small"), (256, "muon"), (1_300, "subspace"))
"""The quickest method from a number of ranks on, one core each, by the model of docs/results/clock.md."""

SHARE = 0.25
"""The share of a rank's memory that rows may take: as much again is needed beside them."""


def preferred(config: Config, parameters: int, sequences: int, ranks: int, memory: int) -> tuple[Config, str]:
    """Return a configuration with the optimizer that its `prefer` asks for, and a note that says why.

    Parameters
    ----------
    config : Config
    parameters, sequences : int
        D, and the sequences for training.
    ranks : int
    memory : int
        Bytes that a rank may use.

    Raises
    ------
    UserError
        If an optimizer is named too.
    """
    if config.optimizer != Config().optimizer:
        raise UserError(f"give --prefer {config.prefer} or --optimizer {config.optimizer}, not both")
    if config.prefer == "passes":
        rows = preset("subspace-rows")
        examples = min(config.gradient_batch or rows.gradient_batch, sequences)
        count = vars(rows.optimizer)["segments"] * examples
        need = -(-count // ranks) * parameters * np.dtype(config.dtype).itemsize
        words = f"rows of all sequences take {need / 2**30:.3g} GiB a rank"
        if need <= SHARE * memory:
            name, why = "subspace-rows", f"the {words}"
        else:
            name, why = "subspace", f"without the rows of subspace-rows: {words}"
    else:
        name = [name for least, name in QUICKEST if ranks >= least][-1]
        why = f"the quickest on {ranks:,} rank(s) in the study of hfmpi"
    chosen = preset(name)
    gradient = config.gradient_batch or min(chosen.gradient_batch, sequences)
    curvature = config.curvature_batch or min(chosen.curvature_batch, gradient)
    return (
        replace(config, optimizer=name, gradient_batch=gradient, curvature_batch=curvature),
        f"--prefer {config.prefer} chooses {name}, {why}",
    )
