"""Draw the study: LSTM above, mLSTM below, against P_I, P_D and seconds; of each method the median seed.

python examples/figure1/figure.py [--size small|medium|paper] [--counts] FILE_OR_FOLDER OUT

The paper's methods are solid, current methods dashed; markers distinguish them without colours. The median
seed is that of the costs P_I to reach the lowest multiple of 0.1 bits/char that all seeds reach. Training
losses of single batches are smoothed more in the figure than in the points, from which tables are computed.
--counts omits the panels in seconds, for runs that shared the machine with others.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import curves
import numpy as np
from curves import Curves, Point, curve, reached
from study import BATCHES, METHODS, MODELS, PAPER, SEQUENCES, arguments

from hfmpi.display import need_matplotlib
from hfmpi.parallel import guard
from hfmpi.report.figure import AXES
from hfmpi.report.quantities import COSTS


class Look(NamedTuple):
    """The style of a method's curve."""

    colour: str
    style: Any
    mark: str


DASHED = (0, (4, 1.5))
LOOKS = {
    "sgd": Look("tab:blue", "-", "o"),
    "bgd": Look("tab:cyan", "-", "s"),
    "shf": Look("tab:olive", "-", "^"),
    "bhf": Look("tab:red", "-", "D"),
    "adam": Look("tab:pink", DASHED, "v"),
    "soap": Look("tab:orange", DASHED, "P"),
    "muon": Look("tab:purple", DASHED, "X"),
    "bhf-short": Look("tab:brown", DASHED, "d"),
    "subspace": Look("black", DASHED, "*"),
    "subspace-whole": Look("gray", DASHED, "h"),
    "subspace-rows": Look("black", "-", "p"),
}

NAMES = {"adam": "Adam", "soap": "SOAP", "muon": "Muon"}

WIDTH = 0.1
"""Standard deviation of the smoothing of drawn curves, in the logarithm of the step."""


def write(runs: Curves, out: Path, clock: bool = True) -> None:
    """Write figure1.png, the training loss, and figure1-validation.png into a folder."""
    out.mkdir(parents=True, exist_ok=True)
    for name, key, label in (
        ("figure1.png", "train_bpc", "training bits/char"),
        ("figure1-validation.png", "valid_bpc", "validation bits/char"),
    ):
        draw(runs, key, label, clock).savefig(out / name, dpi=160)
        print(out / name)


def common(every: Iterable[Sequence[Point]], key: str = "train_bpc") -> float | None:
    """Return the lowest multiple of 0.1 bits/char that all curves reach; None if one has no point."""
    lowest = [min(curve(points, key, "P_I")[1], default=math.inf) for points in every]
    worst = max(lowest, default=math.inf)
    return math.ceil(worst * 10 - 1e-9) / 10 if math.isfinite(worst) else None


def middle(every: Sequence[list[Point]], key: str) -> list[Point]:
    """Return the curve of the median seed, the lower one of two."""
    level = common(every, key)
    if level is None:
        return every[0]
    costs = [reached(points, key, "P_I", level) for points in every]
    return every[sorted(range(len(every)), key=lambda i: costs[i])[(len(every) - 1) // 2]]


def smooth(steps: Sequence[float], losses: Sequence[float]) -> list[float]:
    """Return the local linear fit at each step, with weights that depend on the logarithm of the step.

    The window grows with the step, so that it suits runs of any length, and a linear fit does not lag.
    """
    at, ys = np.log(steps), np.asarray(losses)
    apart = at - at[:, None]
    weights = np.exp(-((apart / WIDTH) ** 2) / 2)
    total, first, second = (np.sum(weights * apart**k, axis=1) for k in range(3))
    mean, slope = np.sum(weights * ys, axis=1), np.sum(weights * apart * ys, axis=1)
    alone = total * second - first**2 < 1e-9 * total**2  # a single point does not determine a line
    fitted = (second * mean - first * slope) / np.where(alone, 1.0, total * second - first**2)
    return [float(v) for v in np.where(alone, ys, fitted)]


def drawn(method: str, points: list[Point], key: str, axis: str) -> tuple[list[float], list[float]]:
    """Return the curve to draw: unsmoothed if it is that of the full training set or of the validation."""
    if key != "train_bpc" or BATCHES[method][0] == SEQUENCES:
        return curve(points, key, axis)
    known = [point for point in points if point[key] is not None]
    even = [known[i] for i in sorted(curves.evenly(known))]  # others were selected for a low loss
    xs, ys = curve(even, key, axis)
    return xs, smooth([point["step"] for point in even], ys)


def draw(runs: Curves, key: str, label: str, clock: bool = True) -> Any:
    """Create a figure of six panels, or four without seconds; those of the training loss are the paper's."""
    need_matplotlib()
    from matplotlib.figure import Figure

    axes = [(key, COSTS[key].label) for key in AXES if clock or key != "seconds"]
    figure = Figure(figsize=(8.8, 7.0), layout="constrained")
    panels = figure.subplots(2, len(axes), sharey=True, sharex="col")
    lines = {}
    for row, model in zip(panels, MODELS, strict=True):
        for panel, (axis, name) in zip(row, axes, strict=True):
            for i, method in enumerate(METHODS):
                if every := curves.seeds(runs, model, method):
                    look = LOOKS[method]
                    (lines[shown(method)],) = panel.plot(
                        *drawn(method, middle([*every.values()], key), key, axis),
                        color=look.colour,
                        linestyle=look.style,
                        linewidth=2.2 if method.startswith("subspace") else 1.4,
                        marker=look.mark,
                        markersize=8 if look.mark == "*" else 5,
                        markerfacecolor=None if method in PAPER else "white",
                        markevery=(0.012 * i, 0.11),
                    )
            panel.set_xscale("log")
            panel.set_title("LSTM" if model == "lstm" else "mLSTM", fontsize="medium")
            panel.grid(alpha=0.3)
            if model == MODELS[-1]:
                panel.set_xlabel(name)
        row[0].set_ylabel(label)
    names = [name for name in map(shown, METHODS) if name in lines]
    figure.legend([lines[name] for name in names], names, loc="outside upper center", ncols=5, handlelength=3)
    lowest = min(y for panel in panels.flat for line in panel.lines for y in (*line.get_ydata(), 4.0))
    panels[0, 0].set_ylim(lowest - 0.1, 4.7)  # a first step may raise the loss a lot
    return figure


def shown(method: str) -> str:
    """Return a method's name: the paper's, that of its authors, or that of the preset."""
    return method.upper() if method in PAPER else NAMES.get(method, method)


def main() -> None:
    parser = arguments(__doc__, "FILE_OR_FOLDER", "OUT", sized=True)
    parser.add_argument("--counts", action="store_true", help="omit the panels in seconds")
    given = parser.parse_args()
    write(curves.load([given.file_or_folder], given.size, given.seconds).runs, given.out, not given.counts)


if __name__ == "__main__":
    with guard():
        main()
