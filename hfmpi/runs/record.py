"""What a run says of itself: the facts at its start, and the record of each step."""

from __future__ import annotations

import math
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from hfmpi.measure import cost
from hfmpi.optim.base import StepReport

if TYPE_CHECKING:
    from hfmpi.runs.train import Run

__all__ = ["BITS", "facts", "step_record"]

BITS = 1 / math.log(2)
"""Bits per nat."""


def linearisation_bytes(run: Run) -> int:
    """Give what the linearisation takes on the rank with the most sequences."""
    most = -(-run.preset.curvature_batch // run.communicator.size)
    steps = run.config.warmup + run.config.sequence_length
    structural = getattr(run.preset.optimizer, "structural_damping", 0) > 0
    return run.network.tape_bytes(steps, most, structural)


def facts(run: Run) -> dict[str, Any]:
    """Give what the first lines of a log should say."""
    return {
        "model": run.config.model,
        "variant": run.config.variant,
        "hidden": run.config.hidden,
        "parameters": run.network.size,
        "optimizer": run.config.optimizer,
        "gradient_batch": run.preset.gradient_batch,
        "curvature_batch": run.preset.curvature_batch,
        "sequences": run.train_set.count,
        "ranks": run.communicator.size,
        "threads": run.placement.threads,
        "backend": run.backend.name,
        "dtype": run.config.dtype,
        "matmul_precision": run.config.matmul_precision,
        "places": run.places,
        "linearisation_bytes": linearisation_bytes(run),
        "memory_budget": run.memory_budget,
        "step": run.step,
        "max_steps": run.config.max_steps,
        "max_seconds": run.config.max_seconds,
    }


def step_record(run: Run, report: StepReport, valid: float | None) -> dict[str, Any]:
    """Give the object of a step in the history (docs/file-formats.md); valid is in bits per character."""
    sizes = run.preset.gradient_batch, run.preset.curvature_batch
    p_d, p_i = cost.paper(run.counts, *sizes)
    full_d, full_i = cost.full(run.counts, *sizes)
    return {
        "step": run.step,
        "seconds": round(run.seconds, 4),
        "step_seconds": round(run.timing.step_seconds, 6),
        "train_bpc": report.loss * BITS,
        "valid_bpc": valid,
        "P_I": p_i,
        "P_D": p_d,
        "P_P": cost.ranks(run.counts, *sizes, run.communicator.size),
        "P_I_full": full_i,
        "P_D_full": full_d,
        "accepted": report.accepted,
        "message": report.message,
        **asdict(report.work),
        **report.details,
    }
