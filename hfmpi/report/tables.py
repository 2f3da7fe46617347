"""The tables of a page."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from hfmpi.files.history import NATS
from hfmpi.measure.smoothing import smoothed
from hfmpi.report.contents import Contents
from hfmpi.report.escape import escaped
from hfmpi.report.steps import COUNTS
from hfmpi.report.times import Spans

__all__ = ["accounts", "machine", "settings", "shares", "state", "table"]


def table(head: Sequence[object], rows: Iterable[Sequence[object]]) -> str:
    """Return an HTML table whose first column contains the names of the rows; a wide table scrolls."""
    top = "".join(f'<th scope="col">{escaped(cell)}</th>' for cell in head)
    body = "\n".join(
        f'<tr><th scope="row">{escaped(name).replace("_", "_<wbr>")}</th>'
        + "".join(f"<td>{escaped(cell)}</td>" for cell in cells)
        + "</tr>"
        for name, *cells in rows
    )
    return (
        f'<div class="wide"><table>\n<thead><tr>{top}</tr></thead>\n<tbody>\n{body}\n</tbody></table></div>'
    )


def number(value: float | None) -> str:
    """Return a number with at most two decimals, or an empty string if it is unknown."""
    if value is None or math.isnan(value):
        return ""
    return f"{value:,.0f}" if float(value).is_integer() else f"{value:,.2f}"


LAST = {
    "step": "steps",
    "seconds": "seconds",
    "P_I": "P_I, the paper's account",
    "P_D": "P_D, the paper's account",
    "P_I_full": "P_I, everything executed",
    "P_D_full": "P_D, everything executed",
    "P_P": "P_P, on the ranks of the run",
}
"""Totals of all steps, by their keys in the record of the last step."""

STATE, PARAMETERS, UNIT = "state", "parameters", "unit of the losses"
STOPS, REJECTED = "CG stopped by", "steps rejected"
LOSSES = TRAIN, VALID, LOWEST = "training loss", "validation loss", "lowest validation loss"
ACCOUNTS = (STATE, PARAMETERS, UNIT, *LOSSES, *LAST.values(), *COUNTS.values(), STOPS, REJECTED)


def accounts(runs: Sequence[Contents]) -> str:
    """Return a table of losses and costs with a column for each run."""
    columns = [_account(run) for run in runs]
    keys = [key for key in ACCOUNTS if any(column.get(key) for column in columns)]
    return table(["", *(run.name for run in runs)], [[k, *(c.get(k, "") for c in columns)] for k in keys])


def _account(run: Contents) -> dict[str, str]:
    unit = "that of the model" if run.loss == NATS else run.unit
    column = {STATE: state(run), PARAMETERS: number(run.network.parameters or None), UNIT: unit}
    if not len(run.steps):
        return column
    train, valid = smoothed(run.steps.column(run.loss.train)), run.steps.column(run.loss.valid)
    for name, values in ((TRAIN, train), (VALID, valid)):
        known = values[~np.isnan(values)]
        column[name] = f"{known[-1]:.5g}" if known.size else ""
    if not np.isnan(valid).all():
        lowest = int(np.nanargmin(valid))
        column[LOWEST] = f"{valid[lowest]:.5g}, step {number(run.steps.column('step')[lowest])}"
    column |= {name: number(run.steps.column(key)[-1]) for key, name in LAST.items()}
    column |= {name: number(np.nansum(run.steps.column(key)) or None) for key, name in COUNTS.items()}
    column[STOPS] = ", ".join(f"{reason} {count:,}" for reason, count in run.steps.stops.most_common(5))
    if run.steps.rejected:
        column[REJECTED] = f"{run.steps.rejected:,}, last {run.steps.last_rejection}"
    return column


def state(run: Contents) -> str:
    """Return whether a run is done, or the time of its last step."""
    if run.done is not None:
        return f"done: {run.done}" if run.done else "done"
    if not len(run.steps) or run.changed is None:
        return "no step yet"
    return f"last step at {run.changed:%Y-%m-%d %H:%M:%S}"


def settings(runs: Sequence[Contents]) -> str:
    """Return a table of the options and settings in which the runs differ, and a table of the others."""
    columns = [dict(_flat(run.settings)) for run in runs]
    keys = dict.fromkeys(key for values in columns for key in values)
    rows = [[key, *(values.get(key, "") for values in columns)] for key in keys]
    differ = [row for row in rows if len(set(row[1:])) > 1]
    same = [row[:2] for row in rows if len(set(row[1:])) == 1]
    parts = [table(["setting", *(run.name for run in runs)], differ)] if differ else []
    if same:
        parts.append(table(["setting", "in all runs" if len(runs) > 1 else ""], same))
    return "\n".join(parts)


def _flat(values: Mapping[str, Any]) -> Iterable[tuple[str, str]]:
    """Yield entries; the entries of nested tables have joined names."""
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from ((f"{key}.{inner}", _toml(entry)) for inner, entry in value.items())
        else:
            yield key, _toml(value)


def _toml(value: object) -> str:
    """Return a value in the notation of TOML; a number in its shortest exact form."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float) and float(f"{value:g}") == value:
        return f"{value:g}"
    try:
        return str(value)
    except (ValueError, RecursionError):  # too many digits, or too deeply nested tables
        return "…"


def machine(runs: Sequence[Contents]) -> str:
    """Return a table of the placement of ranks; neighbouring ranks with the same placement share a row."""
    rows = []
    for run in runs:
        ranks = run.times["ranks"] if run.times else []
        placements = [
            tuple(str(rank.get(key, "")) for key in ("host", "cores", "threads", "device")) for rank in ranks
        ]
        first = 0
        for placement, group in itertools.groupby(placements):
            last = first + len(list(group)) - 1
            rows.append([run.name, str(first) if first == last else f"{first} to {last}", *placement])
            first = last + 1
    return table(["run", "rank", "host", "cores", "threads", "device"], rows)


def shares(spans: Spans) -> str:
    """Return a table of the seconds in each span."""
    mean = float(np.mean(spans.total))
    rows = [
        [
            name,
            *(f"{value:.4g}" for value in (values.mean(), values.min(), values.max())),
            f"{values.mean() / mean:.1%}",
        ]
        for name, values in spans.seconds.items()
    ]
    if len(spans.total) == 1:
        rows = [[row[0], row[1], row[4]] for row in rows]
        return table(["span", f"s/{spans.unit}", "share"], rows)
    return table(["span", f"s/{spans.unit}, mean", "min", "max", "share"], rows)
