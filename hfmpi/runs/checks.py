"""Checks of a run; each of them raises its UserError on all ranks."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from hfmpi.data.augmented import Augmented
from hfmpi.data.batches import Cases, unread
from hfmpi.data.by_index import Dataset
from hfmpi.data.examples import Examples
from hfmpi.errors import UserError
from hfmpi.files.checkpoint import Entry
from hfmpi.measure.machine import free_memory
from hfmpi.networks.architecture import Architecture
from hfmpi.parallel.communicator import Communicator, digest
from hfmpi.runs.record import Progress

__all__ = [
    "Unsound",
    "enough_memory",
    "enough_text",
    "examples",
    "finite",
    "least",
    "not_stuck",
    "same_start",
    "same_vectors",
    "scored",
    "unaugmented",
]


class Unsound(UserError):
    """An error after which the parameters of the run must not be saved."""


def enough_memory(network: Architecture) -> None:
    """Check that the parameters, in double precision, fit into memory."""
    need, free = 8 * network.layout.size / 2**30, free_memory() / 2**30
    if need > free:
        raise UserError(
            f"there is not enough memory: {network.layers:,} x {network.hidden:,} hidden units have "
            f"{network.layout.size:,} parameters, which need {need:,.1f} GiB, but {free:,.1f} GiB are free"
        )


def enough_text(
    data: Path, train: int, valid: int, length: int, burn_in: int, gradient: int, curvature: int
) -> None:
    """Check that splits of these lengths, in characters, have enough sequences for batches of these sizes.

    The error names all options that are too large. The maximum that it reports for an option assumes that
    the options before it are corrected.
    """
    wrong = []
    least, split = min((train, "training"), (valid, "validation"))
    if length + burn_in > least:
        options = "--sequence-length" + " and --burn-in together" * (burn_in > 0)
        wrong.append(
            f"the {split} text of {data} has {least:,} characters: {options} can be at most {least:,}, "
            f"not {length + burn_in:,}"
        )
        length = least - burn_in if burn_in < least else min(length, least)
    count = train // length
    if gradient > count:
        wrong.append(
            f"the training text of {data} makes {count:,} sequences of {length:,} characters: "
            f"--gradient-batch can be at most {count:,}, not {gradient:,}"
        )
    if curvature > min(gradient, count):
        most = f"{min(gradient, count):,}, the gradient batch"
        wrong.append(f"--curvature-batch can be at most {most}, not {curvature:,}")
    if wrong:
        raise UserError("; ".join(wrong))


def same_batch(optimizer: str, batch: int, count: int, option: str, redrawn: str = "") -> None:
    """Check, for an optimizer that needs it, that every step has the same gradient batch.

    Parameters
    ----------
    batch, count : int
        The gradient batch, and all training examples.
    option : str
        The name of the option for the gradient batch.
    redrawn : str
        The name of the option that changes the examples in every step, if it is set.
    """
    need = f"{optimizer} needs the same batch in every step"
    if batch < count:
        raise UserError(
            f"{need}: set {option} to {count:,}, the number of training examples, instead of {batch:,}, or "
            "use a different optimizer"
        )
    if redrawn:
        raise UserError(f"{need}, but {redrawn} changes it: omit {redrawn}, or use a different optimizer")


def scored(cases: Cases) -> None:
    """Check that at least one training output is scored, if this is known without reading all examples."""
    if not unread(cases) and not cases.scored(np.arange(cases.count)):
        raise UserError("no output of the training examples is scored: check mask and weights")


def examples(cases: Cases, check: Callable[[Examples], None], name: str = "") -> None:
    """Check examples in memory now, and other examples when they are read.

    An error message starts with the name of the data set.
    """
    if isinstance(cases, Augmented):
        examples(cases.data, check, name)
    elif isinstance(cases, Dataset):
        cases.add_check(check, name)
    elif isinstance(cases, Examples):
        try:
            check(cases)
        except UserError as error:
            raise UserError(f"{name}: {error}" if name else str(error)) from None


def unaugmented(data: Any, remedy: str) -> Any:
    """Return the data unchanged, and refuse `hfmpi.Augmented`, which would change them in each step.

    Raises
    ------
    UserError
        If the data are augmented; the message ends with the remedy.
    """
    if isinstance(data, Augmented):
        raise UserError(
            f"only hfmpi.train accepts hfmpi.Augmented, which changes the examples in each step: {remedy}"
        )
    return data


def least(communicator: Communicator, number: int) -> int:
    """Return the smallest number of all ranks; collective."""
    numbers = communicator.gather(number)
    return communicator.agree(min(numbers) if numbers else 0)


def same_start(communicator: Communicator, compared: Mapping[str, Any]) -> None:
    """Check that the values, which JSON can represent, are equal on all ranks.

    Otherwise nodes that do not share their files would execute different runs, and wait for one another.
    The key of a value is the error sentence, in which {} stands for the ranks that differ.
    """
    for sentence, value in compared.items():
        content = json.dumps(value, sort_keys=True).encode()
        strays = communicator.same(digest(np.frombuffer(content, np.uint8)))
        if strays:
            raise UserError(sentence.format(_names(strays)))


def same_vectors(communicator: Communicator, values: Iterable[Entry], step: int, last_good: str) -> None:
    """Check that all ranks hold the same parameters and optimizer state, bit for bit."""
    digests = [digest(np.asarray(value)) for value in values]
    strays = communicator.same(digest(np.array(digests, np.uint64)))
    if strays:
        raise Unsound(
            f"rank {_names(strays)} has different parameters than the other ranks after step {step:,}: "
            f"{last_good}"
        )


def not_stuck(progress: Progress, most: int, message: str, last_good: str) -> None:
    """Check that fewer than `most` steps in a row were rejected, unless `most` is 0.

    `message` is that of the last step.
    """
    if most and progress.rejections >= most:
        raise UserError(
            f"{progress.rejections:,} steps in a row were rejected up to step {progress.step:,}, "
            f"the last one with: {message} (max_rejections = {most}); {last_good}"
        )


def finite(loss: float, step: int, last_good: str) -> None:
    """Check that the loss is finite; it is not after an update that was too large."""
    if not math.isfinite(loss):
        raise Unsound(f"the validation loss is not finite after step {step:,}: {last_good}")


def _names(ranks: list[int]) -> str:
    return ", ".join(map(str, ranks))
