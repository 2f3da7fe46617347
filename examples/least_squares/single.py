"""Run one method on one task: `run.py` starts it with the path of the run's file and the run's settings."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

if __name__ == "__main__" and "LEAST_SQUARES_CORE" in os.environ:
    rank = int(os.environ.get("PMI_RANK", os.environ.get("OMPI_COMM_WORLD_RANK", "0")))
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[(int(os.environ["LEAST_SQUARES_CORE"]) + rank) % len(cores)]})

import jax
import numpy as np
from rivals import RIVALS, NotForTask, Rival
from tasks import TASKS, Task

import hfmpi
from hfmpi.errors import UserError
from hfmpi.measure import machine
from hfmpi.runs import call
from hfmpi.runs.train import Run

POINTS = 60
"""The number of evaluations of the error in a run."""

WARM = 8
"""Steps of hfmpi's methods before the run: what is compiled may depend on the number of steps so far."""

ROUNDING = 1e-14
"""A run ends when its relative error is below this."""


class Own(NamedTuple):
    """A method of hfmpi: its optimizer, and the candidates of its settings."""

    optimizer: str
    candidates: tuple[dict[str, Any], ...]


OWN = {
    "lm": Own("lm", ({}, {"damping": 1e-5}, {"damping": 1e-1})),
    "lbfgs": Own("lbfgs", ({}, {"memory": 20}, {"memory": 150})),
    "bhf-squares": Own("bhf-squares", ({}, {"damping": 1e-1}, {"damping": 1e-5})),
    "subspace": Own("subspace", ({"damping": 1e-3}, {"damping": 1e-5}, {"damping": 1e-7})),
    "subspace-whole": Own("subspace-whole", ({"damping": 1e-3}, {"damping": 1e-5}, {"damping": 1e-7})),
    "bhf": Own("bhf", ({"damping": 1e-1}, {"damping": 1e-3}, {"damping": 1e-5})),
    "bhf-short": Own("bhf-short", ({"damping": 1e-1}, {"damping": 1e-3}, {"damping": 1e-5})),
    "soap": Own("soap", ({"rate": 1e-1}, {"rate": 3e-2}, {"rate": 1e-2})),
    "adam": Own("adam", ({"rate": 1e-2}, {"rate": 3e-3}, {"rate": 1e-3})),
}
"""hfmpi's methods by name; the gradient is that of all examples."""


def candidates(method: str) -> tuple[dict[str, Any], ...]:
    """Return the candidates of a method's settings."""
    return OWN[method].candidates if method in OWN else RIVALS[method].candidates


@contextmanager
def timed_by(clock: Callable[[], float]) -> Iterator[None]:
    """Use this clock for hfmpi runs inside the context, and stop it during their validation."""
    opened, validated, stood = call.open_session, Run.validate, 0.0

    @contextmanager
    def open_session(*args: Any) -> Iterator[Any]:
        with opened(*args) as session:
            yield replace(session, clock=lambda: clock() - stood)

    def validate(run: Run, theta: Any) -> Any:
        nonlocal stood
        began = clock()
        try:
            return validated(run, theta)
        finally:
            stood += clock() - began

    call.open_session, Run.validate = open_session, validate
    try:
        yield
    finally:
        call.open_session, Run.validate = opened, validated


Point = tuple[float, int, float, float]
"""Seconds, steps, training loss (of hfmpi: before the step) and relative error."""


def own(
    task: Task, method: str, setting: dict[str, Any], seconds: float, clock: Callable[[], float]
) -> tuple[float, list[Point], str]:
    """Run a method of hfmpi; return the seconds of compilation, the trace, and why the run ended."""
    model = hfmpi.JaxModel(task.apply, task.params, "squares")
    per_row = float(np.mean(np.sum(task.test[1] ** 2, axis=-1)))
    count = len(task.train[0])

    def train(every: int, **limits: float) -> Any:
        return hfmpi.train(
            model,
            task.train,
            task.test,
            optimizer=OWN[method].optimizer,
            settings=setting,
            gradient_batch=count,
            evaluate_every=every,
            max_rejections=0,
            quiet=True,
            **limits,
        )

    began = clock()
    warm = train(1, max_steps=WARM).history
    compiled = clock() - began
    step = median(record["step_seconds"] for record in warm[1:]) if len(warm) > 1 else seconds
    result = train(max(1, round(seconds / POINTS / step)), max_seconds=seconds)
    trace = [
        (record["seconds"], record["step"], record["loss"], (2 * record["valid_loss"] / per_row) ** 0.5)
        for record in result.history
        if record["valid_loss"] is not None
    ]
    return compiled, trace, result.reason


class Meter:
    """The clock of a rival's run, which is stopped while the error is measured."""

    def __init__(self, task: Task, seconds: float, clock: Callable[[], float]) -> None:
        (x, y), (at, targets) = task.train, task.test
        rows, norm = y.size // y.shape[-1], np.linalg.norm(targets)

        @jax.jit
        def measured(params: Any) -> tuple[Any, Any]:
            loss = 0.5 * ((task.apply(params, x) - y) ** 2).sum() / rows
            return loss, ((task.apply(params, at) - targets) ** 2).sum() ** 0.5 / norm

        self.measured, self.seconds, self.clock = measured, seconds, clock
        self.trace, self.spent, self.count, self.used = list[Point](), 0.0, 1, 0.0
        measured(task.params)
        self.started = clock()

    def __call__(self, params: Any, steps: int) -> bool:
        """Measure the error; return whether the run must end."""
        took = self.clock() - self.started
        done = steps - (self.trace[-1][1] if self.trace else 0)
        self.spent += took
        self.used = self.spent / self.seconds
        loss, error = map(float, self.measured(params))
        self.trace.append((self.spent, steps, loss, error))
        left = min(self.seconds / POINTS, self.seconds - self.spent)
        self.count = max(1, min(2 * self.count, int(left * max(1, done) / took)))
        self.started = self.clock()
        return self.spent >= self.seconds or error < ROUNDING


def other(
    task: Task, method: str, setting: dict[str, Any], seconds: float, clock: Callable[[], float]
) -> tuple[float, list[Point], str]:
    """Run a rival; return the same as `own`."""
    began = clock()
    rival: Rival = RIVALS[method](task, **setting)
    compiled = clock() - began
    meter = Meter(task, seconds, clock)
    rival.run(meter)
    return compiled, meter.trace, "nothing left to do" if rival.over else "time"


def main(path: Path, run: dict[str, Any]) -> None:
    """Execute a run and write its record on rank 0."""
    jax.config.update("jax_enable_x64", True)
    task, method = TASKS[run["task"]](run["seed"]), run["method"]
    setting = candidates(method)[run["setting"]]
    clock = time.process_time if run["ranks"] == 1 else time.perf_counter  # ranks wait for each other
    compiled, trace, why, left_out = 0.0, list[Point](), "", ""
    try:
        with timed_by(clock):
            measure = own if method in OWN else other
            compiled, trace, why = measure(task, method, setting, run["seconds"], clock)
    except (NotForTask, UserError) as error:
        left_out = str(error)
    record = run | {"values": setting, "parameters": task.size, "compile": round(compiled, 2), "end": why}
    record |= {"left_out": left_out, "processor": machine.processor()}
    versions = machine.versions("numpy", "scipy", "jax", "optax", "deepxde", "torch")
    record |= {"versions": {"hfmpi": hfmpi.__version__} | versions}
    record["trace"] = [
        [round(at, 4), steps, float(f"{loss:.6g}"), float(f"{error:.6g}")] for at, steps, loss, error in trace
    ]
    if hfmpi.connect().rank == 0:
        made = path.with_suffix(".part")
        made.write_text(json.dumps(record) + "\n")
        made.replace(path)


if __name__ == "__main__":
    with hfmpi.guard():
        main(Path(sys.argv[1]), json.loads(sys.argv[2]))
