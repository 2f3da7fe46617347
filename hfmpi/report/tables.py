"""The tables of the page."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from hfmpi.files.history import NATS
from hfmpi.measure.smoothing import smoothed
from hfmpi.report.contents import Contents
from hfmpi.report.steps import COUNTS
from hfmpi.report.times import Spans
from hfmpi.report.words import escaped

__all__ = ["accounts", "machine", "settings", "shares", "state", "table"]


def table(head: Sequence[object], rows: Iterable[Sequence[object]]) -> str:
    """Give a table whose first column names the rows; wide ones are scrolled."""
    top = "".join(f'<th scope="col">{escaped(word)}</th>' for word in head)
    lines = (
        f'<tr><th scope="row">{escaped(first).replace("_", "_<wbr>")}</th>'
        + "".join(f"<td>{escaped(word)}</td>" for word in rest)
        + "</tr>"
        for first, *rest in rows
    )
    body = "\n".join(lines)
    return (
        f'<div class="wide"><table>\n<thead><tr>{top}</tr></thead>\n<tbody>\n{body}\n</tbody></table></div>'
    )


def number(value: float | None) -> str:
    """Give a number with the digits that one reads; nothing if it is none."""
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
"""What the last step says of all steps."""

STATE, PARAMETERS, UNIT = "state", "parameters", "unit of the losses"
STOPS, REJECTED = "CG stopped by", "steps rejected"
LOSSES = TRAIN, VALID, LEAST = "training loss", "validation loss", "least validation loss"
ACCOUNTS = (STATE, PARAMETERS, UNIT, *LOSSES, *LAST.values(), *COUNTS.values(), STOPS, REJECTED)


def accounts(runs: Sequence[Contents]) -> str:
    """Give what the runs have done and what it cost, a column a run."""
    columns = [_account(run) for run in runs]
    keys = [key for key in ACCOUNTS if any(column.get(key) for column in columns)]
    return table(["", *(run.name for run in runs)], [[k, *(c.get(k, "") for c in columns)] for k in keys])


def _account(run: Contents) -> dict[str, str]:
    """Give the column of a run."""
    unit = "that of the model" if run.loss == NATS else run.unit
    found = {STATE: state(run), PARAMETERS: number(run.network.parameters or None), UNIT: unit}
    if not len(run.steps):
        return found
    train, valid = smoothed(run.steps.column(run.loss.train)), run.steps.column(run.loss.valid)
    for name, values in ((TRAIN, train), (VALID, valid)):
        known = values[~np.isnan(values)]
        found[name] = f"{known[-1]:.5g}" if known.size else ""
    if not np.isnan(valid).all():
        least = int(np.nanargmin(valid))
        found[LEAST] = f"{valid[least]:.5g}, step {number(run.steps.column('step')[least])}"
    found |= {name: number(run.steps.column(key)[-1]) for key, name in LAST.items()}
    found |= {name: number(np.nansum(run.steps.column(key)) or None) for key, name in COUNTS.items()}
    found[STOPS] = ", ".join(f"{word} {count:,}" for word, count in run.steps.stops.most_common(5))
    if run.steps.rejected:
        found[REJECTED] = f"{run.steps.rejected:,}, last {run.steps.why}"
    return found


def state(run: Contents) -> str:
    """Say whether a run is done, and when it took its last step if it is not."""
    if run.done is not None:
        return f"done: {run.done}" if run.done else "done"
    if not len(run.steps) or run.changed is None:
        return "no step yet"
    return f"last step at {run.changed:%Y-%m-%d %H:%M:%S}"


def settings(runs: Sequence[Contents]) -> str:
    """Give options and settings, a column a run; first those in which the runs differ."""
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
    """Give entries, those of a table under joined names."""
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from ((f"{key}.{inner}", _word(entry)) for inner, entry in value.items())
        else:
            yield key, _word(value)


def _word(value: object) -> str:
    """Give a value as TOML has it, a number as short as it is exact."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float) and float(f"{value:g}") == value:
        return f"{value:g}"
    try:
        return str(value)
    except (ValueError, RecursionError):  # a number without end, tables without end in one another
        return "…"


def machine(runs: Sequence[Contents]) -> str:
    """Give the places of the ranks; neighbours of one kind have one row."""
    rows = []
    for run in runs:
        ranks = run.times["ranks"] if run.times else []
        places = [
            tuple(str(rank.get(key, "")) for key in ("host", "cores", "threads", "device")) for rank in ranks
        ]
        first = 0
        for place, group in itertools.groupby(places):
            last = first + len(list(group)) - 1
            rows.append([run.name, str(first) if first == last else f"{first} to {last}", *place])
            first = last + 1
    return table(["run", "rank", "host", "cores", "threads", "device"], rows)


def shares(found: Spans) -> str:
    """Give the spans of the ranks in numbers."""
    mean = float(np.mean(found.total))
    rows = [
        [
            name,
            *(f"{value:.4g}" for value in (values.mean(), values.min(), values.max())),
            f"{values.mean() / mean:.1%}",
        ]
        for name, values in found.seconds.items()
    ]
    if len(found.total) == 1:
        rows = [[row[0], row[1], row[4]] for row in rows]
        return table(["span", f"s/{found.unit}", "share"], rows)
    return table(["span", f"s/{found.unit}, mean", "least", "most", "share"], rows)
