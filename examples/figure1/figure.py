"""Draw the study: LSTM above, mLSTM below, against P_I, P_D and the clock, of each method the median seed.

python examples/figure1/figure.py [--size small|medium|paper] FILE_OR_FOLDER OUT

The paper's methods are solid, today's dashed. The median seed is that of the costs P_I to the lowest multiple
of 0.1 bits/char that all seeds of the method reach.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import curves
from curves import Curves, Point, curve, reached
from study import METHODS, MODELS, PAPER, arguments

from hfmpi.cli.plot import AXES
from hfmpi.cli.show import need_matplotlib
from hfmpi.parallel import guard

COLOURS = {
    "sgd": "tab:blue",
    "bgd": "tab:cyan",
    "shf": "tab:green",
    "bhf": "tab:red",
    "adam": "tab:pink",
    "soap": "tab:orange",
    "muon": "tab:purple",
    "bhf-short": "tab:brown",
    "subspace": "black",
}


def write(runs: Curves, out: Path) -> None:
    """Write figure1.png, the training loss, and figure1-validation.png."""
    for name, key, label in (
        ("figure1.png", "train_bpc", "training bits/char"),
        ("figure1-validation.png", "valid_bpc", "validation bits/char"),
    ):
        draw(runs, key, label).savefig(out / name, dpi=130)
        print(out / name)


def common(every: Iterable[Sequence[Point]], key: str = "train_bpc") -> float | None:
    """Give the lowest multiple of 0.1 bits/char that all curves reach; None if one has no point."""
    lowest = [min(curve(points, key, "P_I")[1], default=math.inf) for points in every]
    worst = max(lowest, default=math.inf)
    return math.ceil(worst * 10 - 1e-9) / 10 if math.isfinite(worst) else None


def middle(every: Sequence[list[Point]], key: str) -> list[Point]:
    """Give the curve of the median seed, the lower one of two."""
    level = common(every, key)
    if level is None:
        return every[0]
    costs = [reached(points, key, "P_I", level) for points in every]
    return every[sorted(range(len(every)), key=lambda i: costs[i])[(len(every) - 1) // 2]]


def draw(runs: Curves, key: str, label: str) -> Any:
    """Make a figure of six panels; of the training loss, the four left ones are the paper's."""
    need_matplotlib()
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 8), layout="constrained")
    panels = figure.subplots(2, 3, sharey=True, sharex="col")
    lines = {}
    for row, model in zip(panels, MODELS, strict=True):
        for panel, (axis, name) in zip(row, AXES.items(), strict=True):
            for method in METHODS:
                if every := curves.seeds(runs, model, method):
                    xs, ys = curve(middle([*every.values()], key), key, axis)
                    style = "-" if method in PAPER else (0, (5, 1.5))
                    width = 2.2 if method == "subspace" else 1.4
                    (lines[shown(method)],) = panel.plot(
                        xs, ys, linestyle=style, color=COLOURS[method], linewidth=width
                    )
            panel.set_xscale("log")
            panel.set_title("LSTM" if model == "lstm" else "mLSTM", fontsize="medium")
            panel.grid(alpha=0.3)
            if model == MODELS[-1]:
                panel.set_xlabel(name)
        row[0].set_ylabel(label)
    names = [name for name in map(shown, METHODS) if name in lines]
    panels[0, -1].legend([lines[name] for name in names], names)
    lowest = min(y for panel in panels.flat for line in panel.lines for y in (*line.get_ydata(), 4.0))
    panels[0, 0].set_ylim(lowest - 0.1, 4.7)  # a first step may go far up
    return figure


def shown(method: str) -> str:
    """Give a method's name as the paper, or the command, has it."""
    return method.upper() if method in PAPER else method


def main() -> None:
    parser = arguments(__doc__, "FILE_OR_FOLDER", "OUT", sized=True)
    given = parser.parse_args()
    write(curves.load([given.file_or_folder], given.size, given.seconds).runs, given.out)


if __name__ == "__main__":
    with guard():
        main()
