"""The result of `hfmpi.train`."""

from __future__ import annotations

from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np

from hfmpi.display import save
from hfmpi.errors import UserError
from hfmpi.files.history import NATS, Record
from hfmpi.runs.live import in_notebook

__all__ = ["Result"]


@dataclass(frozen=True, repr=False)
class Result:
    """The result of a run, equal on all ranks except for `rank`.

    Attributes
    ----------
    theta : ndarray (D,)
        The parameters, on the host. With keep="best", they are those of the best validation. Otherwise, they
        are the last parameters, or the mean of the iterates if the optimizer computes one. If every step has
        the same batch, they are instead those of the lowest risk that the run knows, including that of the
        last parameters, unless weight decay or a mean of the iterates is set.
    history : list of dict
        One entry per step since the first start, as in history.jsonl, without the entries of a different run
        from which this run started.
    step : int
        Number of steps since the first start.
    done : bool
        Whether the run reached a limit, ran out of patience, converged, or was stopped by its callback;
        otherwise a signal or an error ended it.
    reason : str
        Why the run ended.
    valid_loss : float or None
        The loss on the validation examples, at theta.
    valid_metric : float, dict of str to float, or None
        The metric on the validation examples, at theta, or the metrics by name.
    best_step : int or None
        The step with the best validation; None if there was no validation.
    kept_best : bool
        Whether theta are the parameters of that step.
    rank : int
        This rank: `if result.rank == 0: print(result)`.

    Examples
    --------
    >>> result = hfmpi.train(model, (x, y), valid=(x_valid, y_valid), keep="best", max_steps=50)
    >>> result
    Result(step 50: 50 steps were taken; valid_loss 0.2104 at step 7; D = 5,706)
    >>> result.plot("losses.png")
    """

    theta: np.ndarray
    history: list[Record]
    step: int
    done: bool
    reason: str
    valid_loss: float | None
    valid_metric: float | dict[str, float] | None
    best_step: int | None = None
    kept_best: bool = False
    rank: int = 0

    def __repr__(self) -> str:
        parts = [f"step {self.step:,}: {self.reason}"]
        metrics = self.valid_metric if isinstance(self.valid_metric, dict) else {"metric": self.valid_metric}
        values = {"loss": self.valid_loss, **metrics}
        shown = [f"valid_{name} {value:.4g}" for name, value in values.items() if value is not None]
        if shown:
            parts.append(", ".join(shown) + (f" at step {self.best_step:,}" if self.kept_best else ""))
        return f"Result({'; '.join([*parts, f'D = {self.theta.size:,}'])})"

    def plot(self, out: str | PathLike[str] | None = None) -> Any:
        """Draw the training and validation losses against P_I, P_D and seconds.

        Parameters
        ----------
        out : path, optional
            Also save the figure there, as PNG, SVG or PDF by its extension.

        Returns
        -------
        matplotlib.figure.Figure

        Raises
        ------
        UserError
            If matplotlib is not installed, there is nothing to draw, or the file cannot be written.
        """
        try:
            import matplotlib.figure
        except ImportError:
            raise UserError("result.plot() needs matplotlib: pip install matplotlib") from None
        if in_notebook():
            import matplotlib.pyplot  # noqa: F401  (a notebook then knows how to show figures)
        from hfmpi.report.figure import draw

        records = [record for record in self.history if NATS.of(record)[0] is not None]
        if not records:
            raise UserError("the run has no step with a loss, so there is nothing to draw")
        figure = draw([("run", records)], "loss")
        if out is not None:
            save(figure, Path(out))
        return figure
