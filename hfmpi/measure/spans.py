"""Names of the spans into which a timer divides the time of a run."""

from __future__ import annotations

from collections.abc import Mapping

PASSES = FORWARD, GRADIENT, LINEARISE, PRODUCTS, LINE_SEARCH = (
    "forward",
    "gradient",
    "linearise",
    "products",
    "line search",
)
"""Passes over the network."""

ROWS = "rows"
"""Products with the rows of examples that are stored (hfmpi.optim.rows)."""

INPUT = "input"
SHARED = (*PASSES, ROWS, INPUT)
"""The work that is divided among ranks."""

ALLREDUCE = "allreduce"
WAITING = "waiting"
"""The time in collectives during which a rank waits for slower ranks."""

MATRIX = "matrix "
"""Work on a matrix that one rank does (`Objective.spread`); the number of the work follows in the name."""

OPTIMIZER = "optimizer"
"""The remaining time of a step."""

EVALUATE, FILES = "evaluate", "files"
"""Time between steps."""

MATRICES = "matrices"
"""All work on matrices, if it is shown as one span."""


def together(spans: Mapping[str, float]) -> dict[str, float]:
    """Return the spans with all work on matrices merged into one span."""
    merged = {name: seconds for name, seconds in spans.items() if not name.startswith(MATRIX)}
    works = [seconds for name, seconds in spans.items() if name.startswith(MATRIX)]
    return merged | ({MATRICES: sum(works)} if works else {})
