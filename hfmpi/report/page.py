"""Write the page: one self-contained HTML file, whose policy forbids a browser to load anything else."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from datetime import datetime
from importlib.resources import files
from pathlib import Path
from string import Template

import numpy as np

from hfmpi.errors import UserError
from hfmpi.files.atomic import open_regular
from hfmpi.report import tables
from hfmpi.report.contents import Contents
from hfmpi.report.curves import curves, panels
from hfmpi.report.escape import escaped
from hfmpi.report.quantities import COSTS, Internal
from hfmpi.report.styles import GLYPHS, style
from hfmpi.report.times import MOST_RANKS, Spans, bars, outside, spans
from hfmpi.runs.best import WORSE
from hfmpi.version import __version__

__all__ = ["is_page", "page", "plotly_js"]

FIRST_BYTES = b"<!DOCTYPE html>\n<!-- a page of hfmpi report -->"
"""The start of every page, which distinguishes a page from other files."""

INTRODUCTION = (
    "Losses against what they cost: sequential passes (P_I, the time on hardware without limits), passes "
    "over single examples (P_D, the time on one core), steps and seconds; then what the optimizer did in "
    "each step, where the time of a step went, and the settings."
)

DIFFERENT = "The runs were trained on different data: their losses cannot be compared."


def plotly_js() -> str:
    """Return the source of plotly.js from the Python package.

    Raises
    ------
    UserError
        If plotly is not installed.
    """
    try:
        from plotly.offline import get_plotlyjs
    except ImportError:
        raise UserError("a page needs plotly: pip install plotly") from None
    return str(get_plotlyjs())


def is_page(path: Path) -> bool:
    """Return whether a file is a page, which a new page may replace."""
    try:
        with open_regular(path) as file:
            return file.read(len(FIRST_BYTES)) == FIRST_BYTES
    except UserError:
        return False


def page(runs: Sequence[Contents], every: float | None = None) -> bytes:
    """Return the page of some runs.

    Parameters
    ----------
    runs : sequence of Contents
    every : float, optional
        Seconds after which the page reloads itself, because it will have been rewritten.
    """
    internals = panels(runs)
    units = dict.fromkeys(run.unit for run in runs if len(run.steps))
    times = {i: spans(run.times) for i, run in enumerate(runs) if run.times}
    drawn = [
        {
            "name": escaped(run.name),
            "unit": run.unit,
            "style": asdict(style(i)),
            **curves(run, list(internals)),
        }
        for i, run in enumerate(runs)
    ]
    data = {
        "every": every,
        "costs": {key: [cost.html, cost.passes] for key, cost in COSTS.items()},
        "panels": [asdict(panel) for panel in internals.values()],
        "runs": drawn,
        "times": {i: bars(of_run) for i, of_run in times.items()},
    }
    here = files("hfmpi.report")
    style_sheet, script, skeleton = (
        (here / f"page.{kind}").read_text("utf-8") for kind in ("css", "js", "html")
    )
    parts = {
        "title": escaped(", ".join(run.name for run in runs)),
        "heading": escaped(runs[0].name) if len(runs) == 1 else f"{len(runs)} runs",
        "css": style_sheet,
        "now": f"{datetime.now().astimezone():%Y-%m-%d %H:%M:%S %Z}",
        "version": __version__,
        "follows": f", and again every {every:g} s" if every else "",
        "intro": escaped(INTRODUCTION, 1000),
        "note": "\n".join(map(_note, _remarks(runs))),
        "legend": "\n".join(_entry(i, run) for i, run in enumerate(runs)),
        "loss_axes": _axes("loss"),
        "internal_axes": _axes("internal"),
        "losses": "\n".join(
            f'<div class="plot loss" id="loss-{i}" data-unit="{unit}"></div>' for i, unit in enumerate(units)
        )
        or _note("There is no step yet."),
        "hide_internals": "" if internals else "hidden",
        "internals": "\n".join(_panel(i, panel) for i, panel in enumerate(internals.values())),
        "accounts": tables.accounts(runs),
        "times": "\n".join(_times(i, run, times.get(i)) for i, run in enumerate(runs)),
        "hide_machine": "" if times else "hidden",
        "machine": tables.machine(runs),
        "samples": "\n".join(map(_sample, runs)),
        "settings": tables.settings(runs),
        "missing": "\n".join(
            _note(f"{run.name}: {run.missing['settings']}") for run in runs if "settings" in run.missing
        ),
        # Without <, no text from a file can end the script element that contains the data.
        "data": json.dumps(data, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c"),
        "plotly": plotly_js(),
        "script": script,
    }
    return FIRST_BYTES + Template(skeleton).substitute(parts).encode()


def _remarks(runs: Sequence[Contents]) -> list[str]:
    """Return sentences about the runs that a reader should know before reading the curves."""
    found = [DIFFERENT] if len({run.network.corpus for run in runs} - {None}) > 1 else []
    for run in runs:
        if not len(run.steps):
            continue
        valid, steps = run.steps.column(run.loss.valid), run.steps.column("step")
        known = np.flatnonzero(~np.isnan(valid))
        if not known.size:
            continue
        lowest, last = known[np.argmin(valid[known])], known[-1]
        if valid[last] - valid[lowest] > WORSE * abs(valid[lowest]):
            found.append(
                f"{run.name} overfits: its validation loss was lowest, {valid[lowest]:.4g}, at step "
                f"{steps[lowest]:,.0f}, and is {valid[last]:.4g} at step {steps[last]:,.0f}."
            )
    return found


def _note(sentence: str) -> str:
    return f'<p class="note">{escaped(sentence, 1000)}</p>'


def _axes(view: str) -> str:
    """Return the buttons that select the cost against which the curves of a view are drawn."""
    return "\n".join(
        f'<button type="button" data-view="{view}" data-against="{key}">{cost.html}</button>'
        for key, cost in COSTS.items()
    )


def _entry(number: int, run: Contents) -> str:
    """Return the entry of a run in the legend, which shows and hides the run."""
    line = style(number)
    return (
        f'<label><input type="checkbox" data-run="{number}" checked>'
        f'<svg width="46" height="12" aria-hidden="true"><line x1="0" y1="6" x2="46" y2="6"'
        f' stroke="{line.colour}" stroke-width="2" stroke-dasharray="{line.dash}"/></svg>'
        f'<span aria-hidden="true" style="color:{line.colour}">{GLYPHS[line.mark]}</span> {escaped(run.name)}'
        f'<span class="small">{escaped(tables.state(run))}</span></label>'
    )


def _panel(number: int, panel: Internal) -> str:
    return (
        f"<div><h3>{escaped(panel.meaning)}</h3>"
        f'<div class="plot internal" id="internal-{number}" data-panel="{number}"></div></div>'
    )


def _times(number: int, run: Contents, times: Spans | None) -> str:
    """Return the bars of a run and the table of its times."""
    head = f"<h3>{escaped(run.name)}</h3>\n"
    if run.times is None or times is None or not times.seconds:
        return head + _note(run.missing.get("times", "no time was measured"))
    count, selection = len(times.total), ""
    if count > MOST_RANKS:
        selection = f'<p class="small">{MOST_RANKS} of {count:,} ranks, in order of their waiting time.</p>\n'
    figure = f'<div class="plot times" id="times-{number}" data-run="{number}"></div>'
    between = [f"{name} {seconds:.3g} s" for name, seconds in outside(run.times).items() if seconds]
    note = f'<p class="small">Between the steps: {", ".join(between)}.</p>\n' if between else ""
    return f'{head}{selection}<div class="time">{figure}\n<div>{tables.shares(times)}{note}</div></div>'


def _sample(run: Contents) -> str:
    """Return the sample of a run, with codes for bytes that are not UTF-8."""
    network, head = run.network, f"<h3>{escaped(run.name)}</h3>\n"
    if "sample" in run.missing:
        return head + _note(run.missing["sample"])
    text = network.sample.decode("utf-8", "backslashreplace")
    about = f"{len(network.sample)} characters, from the checkpoint of step {network.step:,}"
    return f'{head}<p class="small">{about}</p>\n<pre class="sample">{escaped(text, 4 * len(text) + 1)}</pre>'
