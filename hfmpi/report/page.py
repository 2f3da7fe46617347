"""The page itself: one HTML file with everything in it, which a browser lets load nothing."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from datetime import datetime
from importlib.resources import files
from pathlib import Path
from string import Template

from hfmpi.errors import UserError
from hfmpi.files.atomic import open_regular
from hfmpi.report import tables
from hfmpi.report.contents import Contents
from hfmpi.report.curves import Panel, curves, panels
from hfmpi.report.styles import GLYPHS, style
from hfmpi.report.times import MOST_RANKS, Spans, bars, outside, spans
from hfmpi.report.words import escaped
from hfmpi.version import __version__

__all__ = ["is_page", "page", "plotly_js"]

FIRST_BYTES = b"<!DOCTYPE html>\n<!-- a page of hfmpi report -->"
"""Of every page, by which a page is told from other files."""

AGAINST = {
    "P_I": "P<sub>I</sub>",
    "P_D": "P<sub>D</sub>",
    "P_I_full": "P<sub>I</sub> full",
    "P_D_full": "P<sub>D</sub> full",
    "step": "steps",
    "seconds": "seconds",
}
"""What curves are drawn against, in HTML."""

DIFFERENT = "The runs were trained on different data: their losses are not those of one task."


def plotly_js() -> str:
    """Give the library that draws, as its Python package has it.

    Raises
    ------
    UserError
        If the package is not installed.
    """
    try:
        from plotly.offline import get_plotlyjs
    except ImportError:
        raise UserError("a page needs plotly: pip install plotly") from None
    return str(get_plotlyjs())


def is_page(path: Path) -> bool:
    """Whether a file is a page, which another page may replace; a damaged run or a book is none."""
    try:
        with open_regular(path) as file:
            return file.read(len(FIRST_BYTES)) == FIRST_BYTES
    except UserError:
        return False


def page(runs: Sequence[Contents], every: float | None = None) -> bytes:
    """Give the page of some runs.

    Parameters
    ----------
    runs : sequence of Contents
    every : float, optional
        Seconds after which the page loads itself anew, because a new one will be there.
    """
    told = panels(runs)
    units = dict.fromkeys(run.unit for run in runs if len(run.steps))
    times = {i: spans(run.times) for i, run in enumerate(runs) if run.times}
    drawn = [
        {
            "name": escaped(run.name),
            "unit": run.unit,
            "style": asdict(style(i)),
            **curves(run, list(told)),
        }
        for i, run in enumerate(runs)
    ]
    data = {
        "every": every,
        "panels": [asdict(panel) for panel in told.values()],
        "runs": drawn,
        "times": {i: bars(found) for i, found in times.items()},
    }
    here = files("hfmpi.report")
    style_sheet, script, skeleton = (
        (here / f"page.{kind}").read_text("utf-8") for kind in ("css", "js", "html")
    )
    words = {
        "title": escaped(", ".join(run.name for run in runs)),
        "heading": escaped(runs[0].name) if len(runs) == 1 else f"{len(runs)} runs",
        "css": style_sheet,
        "now": f"{datetime.now().astimezone():%Y-%m-%d %H:%M:%S %Z}",
        "version": __version__,
        "follows": f", and anew every {every:g} s" if every else "",
        "note": _note(DIFFERENT) if len({run.network.corpus for run in runs} - {None}) > 1 else "",
        "legend": "\n".join(_entry(i, run) for i, run in enumerate(runs)),
        "against_loss": _against("loss"),
        "against_told": _against("told"),
        "losses": "\n".join(
            f'<div class="plot loss" id="loss-{i}" data-unit="{unit}"></div>' for i, unit in enumerate(units)
        )
        or _note("There is no step yet."),
        "inside": "" if told else "hidden",
        "told": "\n".join(_panel(i, panel) for i, panel in enumerate(told.values())),
        "accounts": tables.accounts(runs),
        "times": "\n".join(_times(i, run, times.get(i)) for i, run in enumerate(runs)),
        "places": "" if times else "hidden",
        "machine": tables.machine(runs),
        "samples": "\n".join(map(_sample, runs)),
        "settings": tables.settings(runs),
        "missing": "\n".join(
            _note(f"{run.name}: {run.missing['settings']}") for run in runs if "settings" in run.missing
        ),
        # No < : nothing in it ends the script that holds it, whatever a file says.
        "data": json.dumps(data, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c"),
        "plotly": plotly_js(),
        "script": script,
    }
    return FIRST_BYTES + Template(skeleton).substitute(words).encode()


def _note(sentence: str) -> str:
    return f'<p class="note">{escaped(sentence, 1000)}</p>'


def _against(view: str) -> str:
    """Give the buttons that choose what the curves of a view are drawn against."""
    return "\n".join(
        f'<button type="button" data-view="{view}" data-against="{key}">{words}</button>'
        for key, words in AGAINST.items()
    )


def _entry(number: int, run: Contents) -> str:
    """Give the entry of a run in the legend, which shows and hides it."""
    look = style(number)
    return (
        f'<label><input type="checkbox" data-run="{number}" checked>'
        f'<svg width="46" height="12" aria-hidden="true"><line x1="0" y1="6" x2="46" y2="6"'
        f' stroke="{look.colour}" stroke-width="2" stroke-dasharray="{look.dash}"/></svg>'
        f'<span aria-hidden="true" style="color:{look.colour}">{GLYPHS[look.mark]}</span> {escaped(run.name)}'
        f'<span class="small">{escaped(tables.state(run))}</span></label>'
    )


def _panel(number: int, panel: Panel) -> str:
    return (
        f"<div><h3>{escaped(panel.meaning)}</h3>"
        f'<div class="plot told" id="told-{number}" data-panel="{number}"></div></div>'
    )


def _times(number: int, run: Contents, found: Spans | None) -> str:
    """Give the bars of a run and their numbers."""
    head = f"<h3>{escaped(run.name)}</h3>\n"
    if run.times is None or found is None or not found.seconds:
        return head + _note(run.missing.get("times", "no time was measured"))
    count, few = len(found.total), ""
    if count > MOST_RANKS:
        few = f'<p class="small">{MOST_RANKS} of {count:,} ranks, by the time that they wait.</p>\n'
    figure = f'<div class="plot times" id="times-{number}" data-run="{number}"></div>'
    between = [f"{name} {seconds:.3g} s" for name, seconds in outside(run.times).items() if seconds]
    rest = f'<p class="small">Between the steps: {", ".join(between)}.</p>\n' if between else ""
    return f'{head}{few}<div class="time">{figure}\n<div>{tables.shares(found)}{rest}</div></div>'


def _sample(run: Contents) -> str:
    """Give what the network of a run wrote; bytes that are no text have codes."""
    network, head = run.network, f"<h3>{escaped(run.name)}</h3>\n"
    if "sample" in run.missing:
        return head + _note(run.missing["sample"])
    text = network.sample.decode("utf-8", "backslashreplace")
    about = f"{len(network.sample)} characters, from the checkpoint of step {network.step:,}"
    return f'{head}<p class="small">{about}</p>\n<pre class="sample">{escaped(text, 4 * len(text) + 1)}</pre>'
