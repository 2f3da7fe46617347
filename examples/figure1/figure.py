"""Draw the study: LSTM above, mLSTM below, against P_I, P_D and the clock."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from study import METHODS, MODELS, Histories

from hfmpi.cli.plot import AXES, smoothed
from hfmpi.cli.show import STYLES, need_matplotlib


def write(histories: Histories, out: Path) -> None:
    """Write figure1.png, the training loss, and figure1-validation.png."""
    for name, key, label in (
        ("figure1.png", "train_bpc", "training bits/char"),
        ("figure1-validation.png", "valid_bpc", "validation bits/char"),
    ):
        draw(histories, key, label).savefig(out / name, dpi=130)
        print(out / name)


def curve(records: list[dict[str, Any]], key: str, axis: str) -> tuple[list[float], list[float]]:
    """Give costs and bits/char: the training loss smoothed, the validation loss where it is known.

    A step's training loss is that before it, so it belongs to the cost of the steps before; the validation
    loss is that after it.
    """
    if key == "train_bpc":
        return [r[axis] for r in records[:-1]], smoothed([r[key] for r in records[1:]])
    known = [r for r in records if r[key] is not None]
    return [r[axis] for r in known], [r[key] for r in known]


def reached(records: list[dict[str, Any]], key: str, axis: str, level: float) -> float | None:
    """Give the cost at which a curve first is at most `level`; None if it never is."""
    xs, ys = curve(records, key, axis)
    return next((x for x, y in zip(xs, ys, strict=True) if y <= level), None)


def draw(histories: Histories, key: str, label: str) -> Any:
    """Make a figure of six panels; of the training loss, the four left ones are the paper's."""
    need_matplotlib()
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 7), layout="constrained")
    panels = figure.subplots(2, 3, sharey=True, sharex="col")
    for row, model in zip(panels, MODELS, strict=True):
        for panel, (axis, name) in zip(row, AXES.items(), strict=True):
            for i, method in enumerate(METHODS):
                xs, ys = curve(histories[model, method], key, axis)
                panel.plot(xs, ys, STYLES[i], color=f"C{i}", label=method.upper(), linewidth=1.3)
            panel.set_xscale("log")
            panel.set_title("LSTM" if model == "lstm" else "mLSTM", fontsize="medium")
            panel.grid(alpha=0.3)
            if model == MODELS[-1]:
                panel.set_xlabel(name)
        row[0].set_ylabel(label)
    panels[0, -1].legend()
    panels[0, 0].set_ylim(top=4.7)
    return figure
