"""A trained network, read from the folder of a run."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from hfmpi.backends.base import Array
from hfmpi.errors import UserError
from hfmpi.files import checkpoint
from hfmpi.files.checkpoint import BEST, Checkpoint
from hfmpi.networks.network import Network
from hfmpi.runs.config import Config
from hfmpi.runs.merge import merge
from hfmpi.runs.restore import check_one_run, evaluated_parameters, progress, settled

__all__ = ["Trained"]


@dataclass(frozen=True)
class Trained:
    """A network with its parameters and its symbols.

    Attributes
    ----------
    network : Network
    theta : (D,)
        The parameters of the best validation, the mean of the iterates if the optimizer computed one, or the
        parameters of the lowest risk if the run returned those.
    symbols : bytes
        Byte of each symbol.
    config : Config
    step : int
        Number of training steps up to theta.
    best : bool
        Whether theta comes from best.h5.
    source : str
        A clause for the user if theta comes from best.h5 and is not that of the last step; otherwise "".
    data : Path
        Path of the training corpus when the run was trained.
    corpus : str
        Digest of that corpus.
    message : str or None
        What the user should know about the checkpoint.
    """

    network: Network
    theta: Array
    symbols: bytes
    config: Config
    step: int
    data: Path
    corpus: str
    message: str | None
    best: bool = False
    source: str = ""

    @classmethod
    def read(cls, run: Path, backend: str = "auto", local_rank: int = 0, keep: str = "") -> Trained:
        """Read the best parameters in a run's folder, its newest checkpoint, or a checkpoint file.

        `keep` is "best", "last", or empty for the parameters that the run returns.

        Raises
        ------
        UserError
            If there is no checkpoint, if it cannot be read, or if its description of the run is invalid.
        """
        is_file = os.path.isfile(run)
        saved, best, source = (checkpoint.load(run), False, "") if is_file else _of_folder(run, keep)
        meta = saved.meta
        if "cases" in meta:
            raise UserError(
                f"{run} contains a model of a Python program (hfmpi.train): evaluate it in that program, "
                "with hfmpi.evaluate(model, theta, data) and the theta of the result"
            )
        try:
            config = merge(meta["config"] | {"backend": backend, "matmul_precision": "float32"})
            # First convert it to a list, because `bytes` of a number would return that many zeros.
            symbols = bytes(list(meta["vocabulary"]))
            data, corpus = Path(meta["data"]), meta["corpus"]
            if sorted(set(symbols)) != list(symbols) or not isinstance(corpus, str):
                raise ValueError("its vocabulary or the digest of its corpus is invalid")
            network = Network(config.architecture(len(symbols)), config.make_backend(local_rank))
        except UserError:
            raise
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise UserError(
                f"the checkpoint in {run} does not describe a run of this version: {error}"
            ) from None
        theta = evaluated_parameters(saved)
        if theta.shape != (network.layout.size,) or theta.dtype != network.backend.dtype:
            raise UserError(f"the checkpoint in {run} does not contain the parameters of its model")
        if not np.isfinite(theta).all():
            raise UserError(f"the parameters in the checkpoint in {run} are not finite")
        step = progress(saved).step
        theta = network.backend.to_device(theta)
        return cls(network, theta, symbols, config, step, data, corpus, saved.message, best, source)


def _of_folder(run: Path, keep: str) -> tuple[Checkpoint, bool, str]:
    """Return the checkpoint in a folder that `keep` selects, whether it is best.h5, and `Trained.source`.

    `best.h5` alone is sufficient, because the checkpoint may have been removed to save space.
    """
    best = run / BEST
    has_best = os.path.lexists(best)
    if (
        keep != "last"
        and has_best
        and not any(os.path.lexists(run / name) for name in (checkpoint.NEWEST, checkpoint.PREVIOUS))
    ):
        return checkpoint.load(best), True, ""
    saved = checkpoint.latest(run)
    check_one_run(run, saved)
    stored = saved.meta.get("config")
    wanted = keep or (stored.get("keep") if isinstance(stored, dict) else "") or "best"
    if wanted != "best":
        return saved, False, ""
    if not has_best:
        if keep == "best":
            raise UserError(
                f"there is no {best}: the run has had no validation yet, or was written by an earlier version"
            )
        return saved, False, ""
    try:
        found = checkpoint.load(best)
    except UserError as error:
        if keep == "best":
            raise
        message = f"{error}; the parameters of {checkpoint.NEWEST} are used instead"
        return replace(saved, message=message), False, ""
    last = progress(saved).step
    source = f"from {BEST}, of the best validation; the last checkpoint is that of step {last:,}"
    # The checkpoint describes the run as it is now: the corpus may have been moved since the best validation.
    meta = settled(saved).meta | {"step": found.meta.get("step")}  # without its entry of the lowest risk
    source = "" if meta["step"] == last else source
    return replace(found, meta=meta, message=saved.message), True, source
