"""One run of the study: a method on a task, until it is solved or a limit is reached; runs can be resumed.

Each step of a network uses new examples (for memory-5, all 32 in every step), and it is tested on examples
with a different seed. The network of the papers is the `rnn`. Its initial parameters follow the released code
of Martens and Sutskever: 15 incoming weights per unit, N(0, 1/15), and a quarter of that from the inputs. The
largest eigenvalue is then about one: states neither vanish nor become chaotic.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tasks import Task

import hfmpi
from hfmpi.backends.base import Array
from hfmpi.data.batches import curvature_slice
from hfmpi.files import checkpoint
from hfmpi.measure.cost import executed, paper
from hfmpi.networks.architecture import SPARSE_FAN_IN
from hfmpi.optim.base import Optimizer
from hfmpi.optim.presets import preset
from hfmpi.parallel.communicator import Communicator
from hfmpi.runs.record import Progress
from hfmpi.runs.restore import entries, progress, restored

WRONG = 0.04
"""Real-valued outputs are wrong if their error is larger than this."""

SOLVED = 0.01
"""A task is solved if the share of wrong sequences in the test is below this."""

TESTED, PROBED = 10_000, 200
"""Sequences of a test, and of the shorter test that precedes it."""

GROWTH = 1.05
"""A run is tested each time its P_I has grown by this factor."""

TEST_SEED = 10_000
"""Seed of the test examples; the training examples of a run have the run's seed."""

MOST_REJECTED = 50
"""Number of consecutive rejected steps that end a run."""

SAVE_EVERY = 60.0
"""Seconds of processor time between checkpoints."""


class Method(NamedTuple):
    """A preset, its tuned setting, the sequences in the batches, and other changes.

    Three (`FIRST`) of six values are tried at first. While the best is at the edge of those tried, the next
    one is tried too. A single value is not tuned.
    """

    preset: str
    setting: str
    values: tuple[float, ...]
    gradient_batch: int
    curvature_batch: int = 0
    changes: Mapping[str, Any] = {}


# The released code has no preconditioner; one thirtieth is Martens' and Sutskever's mu.
PLAIN = {"preconditioner": "none"}
STRUCTURAL = {**PLAIN, "structural_damping": 1 / 30}
DAMPINGS = 1e-4, 1e-3, 0.01, 0.1, 1.0, 10.0
ROTATED = 3e-4, 1e-3, 3e-3, 0.01, 0.03, 0.1
TRUSTS = 1e-6, 1e-5, 1e-4, 1e-3, 0.01, 0.1
# The subspace step as in the results: J V, and three last steps.
BEFORE = {"candidates": 3, "memory": 3, "curvature_segments": 0}

METHODS = {
    "sgd": Method("sgd", "rate", (0.01, 0.03, 0.1, 0.3, 1.0, 3.0), 100),
    "adam": Method("adam", "rate", (1e-4, 3e-4, 1e-3, 3e-3, 0.01, 0.03), 100),
    "soap": Method("soap", "rate", ROTATED, 100),
    "muon": Method("muon", "rate", (1e-3, 3e-3, 0.01, 0.03, 0.1, 0.3), 100, changes={"vector_rate": 3e-3}),
    "shf": Method("shf", "damping", DAMPINGS, 500, 125, PLAIN),
    "shf+s": Method("shf", "damping", DAMPINGS, 500, 125, STRUCTURAL),
    "bhf-short": Method("bhf-short", "damping", DAMPINGS, 500, 125, PLAIN),
    "bhf-short+s": Method("bhf-short", "damping", DAMPINGS, 500, 125, STRUCTURAL),
    "bhf-short+p": Method("bhf-short", "damping", DAMPINGS, 500, 125),
    "bhf": Method("bhf", "damping", DAMPINGS, 500, 125, PLAIN),
    "bhf+s": Method("bhf", "damping", DAMPINGS, 500, 125, STRUCTURAL),
    "subspace": Method("subspace", "damping", TRUSTS, 500, 125, BEFORE),
    "subspace-preset": Method("subspace", "damping", (1e-3,), 500, 125, BEFORE),
    "subspace-rows": Method("subspace-rows", "damping", TRUSTS, 500, 125, {"candidates": 3}),
    "soap-large": Method("soap", "rate", ROTATED, 2_000),
    "bhf-short+s-large": Method("bhf-short", "damping", DAMPINGS, 2_000, 1_000, STRUCTURAL),
    "subspace-large": Method("subspace", "damping", TRUSTS, 2_000, 1_000, BEFORE),
    "subspace-rows-large": Method("subspace-rows", "damping", TRUSTS, 2_000, 1_000, {"candidates": 3}),
}
"""Methods by name: +s with structural damping, +p with the preset's preconditioner, -preset without tuning,
-large with larger batches.

Since batches are new in each step, `subspace` must measure the effect of its own step.
"""

CELLS = "rnn", "lstm"

NUMBERS = "addition", "multiplication", "xor"
"""Tasks that read numbers; the others read symbols."""

TUNED_ON = 30
"""T in the tuning."""

FIRST = slice(2, 5)
"""Indices of the values that are tried at first."""


@dataclass(frozen=True)
class Run:
    """One run, and everything that determines it."""

    task: str
    length: int
    cell: str
    method: str
    value: float
    seed: int
    hidden: int = 50

    @property
    def name(self) -> str:
        """The name of the run's folder."""
        return (
            f"{self.task}-{self.length}-{self.cell}{self.hidden}-{self.method}-{self.value:g}-seed{self.seed}"
        )

    @property
    def batches(self) -> tuple[int, int]:
        """Sequences in the batches of gradient and curvature, at most all sequences."""
        method, count = METHODS[self.method], Task(self.task, self.length, 0).count
        return min(method.gradient_batch, count), min(method.curvature_batch, count)

    def optimizer(self) -> Optimizer[Any]:
        """Create the optimizer."""
        method = METHODS[self.method]
        changes = {**method.changes, method.setting: self.value}
        if self.batches[0] == Task(self.task, self.length, 0).count:
            changes.pop("candidates", None)  # the next gradient measures it
        return preset(method.preset, **changes).optimizer

    def network(self) -> hfmpi.Network:
        """Create the network."""
        kind = Task(self.task, self.length, 0).kind
        about = hfmpi.Architecture(self.cell, self.hidden, kind.inputs, kind.outputs)
        start = {"initialisation": "sparse"} if self.cell == "rnn" else {"forget_bias": 1.0}
        return hfmpi.Network(about, loss=kind.loss, **start)


def initial(network: hfmpi.Network, seed: int) -> np.ndarray:
    """Draw the initial parameters, (D,) float64."""
    theta = network.initial(seed)
    if network.initialisation == "sparse":  # which has N(0, 1), and N(0, 1/4) for inputs of tanh units
        views = network.layout.views(theta)
        for name, scale in ("W_h", 2.0), ("W_x", 0.5), ("W_o", 1.0):
            views[name] *= scale / math.sqrt(SPARSE_FAN_IN)
    return theta


def tuning_runs(task: str, cell: str, method: str, seed: int) -> list[Run]:
    """Return the runs from which a task's setting is chosen."""
    on = "addition" if task in NUMBERS else "memory-5"
    return [Run(on, TUNED_ON, cell, method, value, seed) for value in METHODS[method].values]


def untried(runs: Sequence[Run], tried: Mapping[Run, Mapping[str, Any]]) -> list[Run]:
    """Return the tuning runs to do next; none if the choice is made."""
    missing = [run for run in runs[FIRST] or runs if run not in tried]
    if missing:
        return missing
    value = best([tried[run] for run in runs if run in tried])
    at = [run.value for run in runs].index(value)
    return [run for run in runs[max(at - 1, 0) : at + 2] if run not in tried]


def best(records: Sequence[Mapping[str, Any]]) -> float:
    """Choose the value that solves the task with the lowest P_I, else that with the lowest training loss.

    Of equal values the smallest is chosen.
    """

    def rank(record: Mapping[str, Any]) -> tuple[bool, float, float]:
        loss = record["loss"] if math.isfinite(record["loss"]) else math.inf
        return (not record["solved"], record["P_I_full"] if record["solved"] else loss, record["value"])

    return float(min(records, key=rank)["value"])


class Error(NamedTuple):
    """Results of a test: the share of sequences with any error, and wrong outputs per sequence."""

    wrong: float
    outputs: float


def test(network: hfmpi.Network, theta: Array, task: Task, count: int) -> Error:
    """Test the network on the first `count` examples of a task."""
    wrong, outputs, tape = 0, 0, None
    for part in np.array_split(np.arange(count), -(-count // 250)):
        batch = task.take(part)
        tape = network.linearise(theta, batch, tape)
        targets, mask = (x if x is None else x.swapaxes(0, 1) for x in (batch.targets, batch.mask))
        found = network.backend.to_host(tape.cache).reshape(*targets.shape[:2], -1)
        each = mistakes(task, found, targets, mask)
        wrong, outputs = wrong + int(each.any(axis=0).sum()), outputs + int(each.sum())
    return Error(wrong / count, outputs / count)


def mistakes(task: Task, found: np.ndarray, targets: np.ndarray, mask: np.ndarray | None) -> np.ndarray:
    """Return which scored outputs are wrong, (T, B).

    Parameters
    ----------
    found : (T, B, O)
        What the loss computes from the outputs: probabilities, or differences from the targets.
    """
    if task.kind.loss == "cross-entropy":
        each = found.argmax(axis=2) != targets
        return each[-1:] if task.name == "permutation" else each  # the others cannot be predicted
    off = abs(found) > WRONG if task.kind.loss == "squares" else (found > 0.5) != (targets > 0.5)
    return off[..., 0] & (mask > 0)


def train(run: Run, folder: Path, seconds: float, passes: int) -> dict[str, Any]:
    """Train a run until it has solved its task or reached a limit of seconds or passes (P_I full).

    Seconds are of processor time. Returns the record of the run, which is also in its checkpoint.
    """
    task, network = Task(run.task, run.length, run.seed), run.network()
    exam = Task(run.task, run.length, TEST_SEED)
    tested, (gradients, curvatures) = min(TESTED, exam.count), run.batches
    data = hfmpi.DataParallel(network, Communicator())
    optimizer = run.optimizer()
    theta = network.backend.to_device(initial(network, run.seed).astype(network.backend.dtype))
    state, done, record = optimizer.init(theta, network.blocks), Progress(), dict[str, Any]()
    if (folder / checkpoint.NEWEST).exists():
        found = checkpoint.latest(folder)
        done, record = progress(found), found.meta["record"]
        theta = network.backend.to_device(found.theta)
        state = restored(found, state, network.backend, run.method)
    folder.mkdir(parents=True, exist_ok=True)
    begin, saved, error = time.process_time() - done.seconds, done.seconds, None

    def save(solved: bool) -> dict[str, Any]:
        own = error or test(network, theta, exam, tested)
        costs = dict(zip(("P_D", "P_I"), paper(done.counts, *run.batches), strict=True))
        costs |= dict(zip(("P_D_full", "P_I_full"), executed(done.counts, *run.batches), strict=True))
        now = {**asdict(run), "solved": solved, "step": done.step, **costs, "seconds": round(done.seconds, 1)}
        now |= {"loss": float(f"{loss:.4g}"), "wrong": own.wrong, "outputs": own.outputs}
        meta = {**asdict(done), "record": now}
        host = network.backend.to_host(theta)
        checkpoint.save(folder / checkpoint.NEWEST, host, entries(state, network.backend), meta)
        return now

    look = executed(done.counts, *run.batches)[1] * GROWTH
    loss = record.get("loss", math.nan)
    while not record.get("solved") and done.seconds < seconds and done.rejections < MOST_REJECTED:
        if executed(done.counts, *run.batches)[1] >= passes:
            break
        indices = np.arange(done.step * gradients, (done.step + 1) * gradients) % task.count
        risk, curvature = data.on(task, indices), None
        if curvatures:
            own = curvature_slice(done.step, gradients, curvatures)
            curvature = data.on(task, indices[own])
            risk.keep(curvature, np.delete(indices, own))
        objectives = hfmpi.Objectives(risk, curvature, shared=curvature is not None)
        theta, state, report = optimizer.step(theta, state, objectives)
        loss, done, error = report.loss, done.after(report), None
        cost = executed(done.counts, *run.batches)[1]
        if cost >= look:
            look = cost * GROWTH
            if test(network, theta, exam, min(PROBED, tested)).wrong < 2 * SOLVED:
                error = test(network, theta, exam, tested)
        done = Progress(done.step, time.process_time() - begin, done.rejections, done.counts)
        if error and error.wrong < SOLVED:
            return save(True)
        if done.seconds >= saved + SAVE_EVERY:
            saved = done.seconds
            save(False)
    if record.get("solved") or record.get("step") == done.step:
        return record
    return save(False)
