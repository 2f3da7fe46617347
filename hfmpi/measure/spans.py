"""Names of the spans that a timer books a run's time to."""

from __future__ import annotations

PASSES = FORWARD, GRADIENT, LINEARISE, PRODUCTS, LINE_SEARCH = (
    "forward",
    "gradient",
    "linearise",
    "products",
    "line search",
)
"""Passes over the network."""

INPUT = "input"
SHARED = (*PASSES, INPUT)
"""The work that ranks share."""

ALLREDUCE = "allreduce"
WAITING = "waiting"
"""The part of the time in collectives in which a rank waits for slower ones."""

OPTIMIZER = "optimizer"
"""The rest of a step."""

EVALUATE, FILES = "evaluate", "files"
"""Between steps."""
