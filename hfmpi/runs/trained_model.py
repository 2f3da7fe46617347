"""A trained network, read from the folder of a run."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from hfmpi.backends.base import Array
from hfmpi.errors import UserError
from hfmpi.files import checkpoint
from hfmpi.networks.network import Network
from hfmpi.runs.config import Config
from hfmpi.runs.merge import merge
from hfmpi.runs.restore import check_one_run, evaluated_parameters, progress

__all__ = ["Trained"]


@dataclass(frozen=True)
class Trained:
    """A network with its parameters and its symbols.

    Attributes
    ----------
    network : Network
    theta : (D,)
        The mean of the iterates if the optimizer computed one, or the parameters of the lowest risk if the
        run returned those.
    symbols : bytes
        Byte of each symbol.
    config : Config
    step : int
        Number of training steps.
    data : Path
        Path of the training corpus at the time.
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

    @classmethod
    def read(cls, run: Path, backend: str = "auto", local_rank: int = 0) -> Trained:
        """Read the newest checkpoint of a run's folder, or a checkpoint file.

        Raises
        ------
        UserError
            If there is none, if it cannot be read, or if its description of the run is invalid.
        """
        if os.path.isfile(run):
            saved = checkpoint.load(run)
        else:
            saved = checkpoint.latest(run)
            check_one_run(run, saved)
        meta = saved.meta
        if "cases" in meta:
            raise UserError(
                f"{run} holds a model of a Python program (hfmpi.train): evaluate it there, "
                "with model.loss or model.outputs and the theta of the result"
            )
        try:
            config = merge(meta["config"] | {"backend": backend, "matmul_precision": "float32"})
            # As a list: `bytes` of a number would be that many zeros.
            symbols = bytes(list(meta["vocabulary"]))
            data, corpus = Path(meta["data"]), meta["corpus"]
            if sorted(set(symbols)) != list(symbols) or not isinstance(corpus, str):
                raise ValueError("its vocabulary or the digest of its corpus is invalid")
            network = Network(config.architecture(len(symbols)), config.make_backend(local_rank))
        except UserError:
            raise
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise UserError(f"the checkpoint in {run} describes no run of this version: {error}") from None
        theta = evaluated_parameters(saved)
        if theta.shape != (network.layout.size,) or theta.dtype != network.backend.dtype:
            raise UserError(f"the checkpoint in {run} does not hold the parameters of its model")
        if not np.isfinite(theta).all():
            raise UserError(f"the parameters in the checkpoint in {run} are not finite")
        step = progress(saved).step
        return cls(
            network, network.backend.to_device(theta), symbols, config, step, data, corpus, saved.message
        )
