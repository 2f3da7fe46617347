"""What must hold while a run goes on; every check raises its UserError on all ranks alike."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from typing import Any

import numpy as np

from hfmpi.errors import UserError
from hfmpi.files.checkpoint import Entry
from hfmpi.parallel.communicator import Communicator, digest
from hfmpi.runs.record import Progress

__all__ = ["finite", "not_stuck", "same_start", "same_vectors"]


def same_start(communicator: Communicator, theta: np.ndarray, *others: Any) -> None:
    """All ranks start with the same theta and the same other things, which JSON can hold.

    Nodes that do not share their files would otherwise do different runs, and wait for one another.
    """
    start = json.dumps([*others, digest(theta)])
    strays = communicator.same(digest(np.frombuffer(start.encode(), np.uint8)))
    if strays:
        raise UserError(
            f"rank {_names(strays)} has other data, options or checkpoint files than the other ranks"
        )


def same_vectors(communicator: Communicator, values: Iterable[Entry], step: int, last_good: str) -> None:
    """All ranks hold the same parameters and optimizer state, bit for bit."""
    digests = [digest(np.asarray(value)) for value in values]
    strays = communicator.same(digest(np.array(digests, np.uint64)))
    if strays:
        raise UserError(
            f"rank {_names(strays)} holds other parameters than the other ranks after step {step:,}: "
            f"{last_good}"
        )


def not_stuck(progress: Progress, most: int, message: str, last_good: str) -> None:
    """Fewer than `most` steps in a row were rejected, or `most` is 0; `message` is that of the last one."""
    if most and progress.rejections >= most:
        raise UserError(
            f"{progress.rejections:,} steps in a row were rejected up to step {progress.step:,}, "
            f"the last one with: {message} (--max-rejections {most}); {last_good}"
        )


def finite(valid: float, step: int, last_good: str) -> None:
    """Theta has a finite loss, as it has not after an update that went too far."""
    if not math.isfinite(valid):
        raise UserError(f"the validation loss is not finite after step {step:,}: {last_good}")


def _names(ranks: list[int]) -> str:
    return ", ".join(map(str, ranks))
