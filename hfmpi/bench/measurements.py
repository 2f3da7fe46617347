"""Measure what `hfmpi bench` prints: Gauss-Newton products, gradients, losses, the Allreduce, complete steps.

Every function is collective and returns rows (dicts) on all ranks. `seconds` is a median over the
repetitions, `bound_seconds` that of the matrix products alone, both of the slowest rank. On several ranks,
rank 0 also does the same work alone, with one BLAS thread and with as many threads as there are ranks, in
turn with all ranks.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import numpy as np

from hfmpi.backends import create
from hfmpi.bench.bound import Products, Recording
from hfmpi.bench.contest import Contestant, contest
from hfmpi.data.batches import Sequences, check_batch
from hfmpi.measure.machine import cores
from hfmpi.measure.spans import ALLREDUCE, OPTIMIZER, PASSES, WAITING, together
from hfmpi.measure.timer import split_waiting
from hfmpi.networks.architecture import Architecture
from hfmpi.networks.network import Network
from hfmpi.objective.data_parallel import DataParallel, Risk, step_objectives
from hfmpi.objective.messages import message_sizes
from hfmpi.objective.transport import choose
from hfmpi.optim.layout import parts_of
from hfmpi.optim.presets import Preset
from hfmpi.optim.reduced_model import normalised
from hfmpi.optim.rows import RowRequest
from hfmpi.parallel.communicator import Communicator

__all__ = ["Bench", "Row", "allreduce", "gradients", "products", "step"]

Row = dict[str, Any]

NEEDED = (*PASSES, ALLREDUCE, WAITING)
"""Spans of a step that do not belong to the overhead of its optimizer."""


@dataclass(frozen=True)
class Bench:
    """The settings that all measurements of a call share.

    Attributes
    ----------
    comm : Communicator
    text : ndarray of uint8, optional
        The symbols of a text; by default random symbols.
    length : int
        Characters of a sequence.
    dtype, backend, precision, transport : str
    slices, micro_batch, threads, repeats, local_rank : int
        `threads` is the number of threads of each rank when all ranks work; `micro_batch` defaults to that of
        the backend.
    """

    comm: Communicator
    text: np.ndarray | None = None
    length: int = 200
    dtype: str = "float32"
    backend: str = "auto"
    precision: str = "float32"
    transport: str = "auto"
    slices: int = 0
    micro_batch: int | None = None
    threads: int = 1
    repeats: int = 7
    local_rank: int = 0

    def teams(self) -> list[tuple[Communicator, int]]:
        """Return communicator and threads of the teams that work in turn; the first team is all ranks."""
        size = self.comm.size
        teams = [(self.comm, self.threads)]
        if size > 1:
            teams.append((Communicator(), 1))
        if 1 < size <= cores():  # this is false if each rank is bound to a core
            teams.append((Communicator(), size))
        return teams

    def make_backend(self) -> Recording:
        """Return a new backend for this rank that can record its products."""
        return cast(Recording, create(self.backend, self.dtype, self.local_rank, self.precision, Recording))

    def mean_risk(self, about: Architecture, comm: Communicator, backend: Recording) -> DataParallel:
        """Return the mean risk of a network on a backend."""
        transport = choose(self.transport, comm, backend, self.slices > 0)
        network = Network(about, backend)
        return DataParallel(network, comm, None, self.micro_batch, transport=transport, slices=self.slices)

    def sequences(self, about: Architecture, batch: int) -> Sequences:
        """Return sequences from which a batch of this size can be drawn."""
        symbols = self.text
        if symbols is None:
            rng = np.random.default_rng(0)
            symbols = rng.integers(0, about.inputs, batch * self.length).astype(np.uint8)
        sequences = Sequences(symbols, self.length)
        check_batch(batch, sequences.count)
        return sequences

    def row(self, about: Architecture, batch: int | None, ranks: int, threads: int) -> Row:
        """Return the part of a row that identifies the measurement."""
        return {
            "model": about.name,
            "hidden": about.hidden,
            "vocabulary": about.inputs,
            "length": None if batch is None else self.length,
            "batch": batch,
            "dtype": self.dtype,
            "precision": self.precision,
            "ranks": ranks,
            "threads": threads,
        }


def _timed(heads: list[Row], seconds: np.ndarray) -> list[Row]:
    """Add the times to rows; in `seconds`, the matrix products alone follow each contestant.

    Ratios are medians of the ratios within each repetition, so that a slow repetition cancels. Speedup and
    efficiency are relative to rank 0 alone with one thread, if that was measured.
    """
    kinds = [(head.get("pass"), head["ranks"], head["threads"]) for head in heads]
    rows = []
    for head, times, bound in zip(heads, seconds[::2], seconds[1::2], strict=True):
        row = head | {
            "seconds": float(np.median(times)),
            "seconds_least": float(times.min()),
            "seconds_most": float(times.max()),
            "bound_seconds": float(np.median(bound)),
            "ratio": float(np.median(times / bound)),
        }
        workers, alone = head["ranks"] * head["threads"], (head.get("pass"), 1, 1)
        if workers > 1 and alone in kinds:
            row["speedup"] = float(np.median(seconds[2 * kinds.index(alone)] / times))
            row["efficiency"] = row["speedup"] / workers
        rows.append(row)
    return rows


def _passes(
    bench: Bench, about: Architecture, batch: int, kinds: dict[str, Callable[[Risk, Any], Any]]
) -> list[Row]:
    """Time passes over one batch; each kind returns the function to call for a risk and theta."""
    text, contestants, heads = bench.sequences(about, batch), [], []
    for comm, threads in bench.teams():
        for name, kind in kinds.items():
            heads.append({"pass": name} | bench.row(about, batch, comm.size, threads))
            if comm.size == 1 and bench.comm.rank > 0:  # this rank waits for the team
                contestants += [Contestant(_nothing, 1, threads)] * 2
                continue
            backend = bench.make_backend()
            owner = bench.mean_risk(about, comm, backend)
            theta = backend.to_device(about.initial(0).astype(bench.dtype))
            run = kind(owner.on(text, np.arange(batch)), theta)
            with backend.recorded() as alone:
                run()
            contestants += [Contestant(work, comm.size, threads) for work in (run, alone.repeat)]
    return _timed(heads, contest(bench.comm, contestants, bench.repeats))


def products(bench: Bench, about: Architecture, batch: int, columns: int = 0) -> list[Row]:
    """Time Gauss-Newton products v -> G v, linearised once.

    With `columns` C, also time the projections V -> V G V' of one direction and of C directions, V (C, D),
    and the model from a sketch of three rows per sequence along about C directions, which are parts of fewer
    vectors.
    """

    def product(risk: Risk, theta: Any) -> Callable[[], Any]:
        apply = risk.gauss_newton(theta)
        v = theta * 0 + 1
        return lambda: apply(v)

    def projection(count: int, risk: Risk, theta: Any) -> Callable[[], Any]:
        apply = risk.project(theta)
        v = np.random.default_rng(0).standard_normal((count, theta.size))
        directions = risk.owner.model.backend.to_device(v.astype(bench.dtype))
        return lambda: apply(directions)

    def sketch(risk: Risk, theta: Any) -> Callable[[], Any]:
        parts = parts_of(about.blocks)
        v = np.random.default_rng(0).standard_normal((-(-columns // len(parts)), theta.size))
        found = normalised(risk, [risk.owner.model.backend.to_device(v.astype(bench.dtype))], parts, theta)
        assert found is not None  # its numbers are finite
        return lambda: risk.sketch(theta, found[0], RowRequest("sketch", 3))

    kinds: dict[str, Callable[[Risk, Any], Any]] = {"product": product}
    if columns:
        kinds["projection"] = partial(projection, 1)
        kinds[f"projection of {columns}"] = partial(projection, columns)
        kinds["sketch"] = sketch
    return _passes(bench, about, batch, kinds)


def gradients(bench: Bench, about: Architecture, batch: int) -> list[Row]:
    """Time the loss with its gradient, and the loss alone."""
    return _passes(
        bench,
        about,
        batch,
        {
            "gradient": lambda risk, theta: lambda: risk.gradient(theta),
            "loss": lambda risk, theta: lambda: risk.loss(theta),
        },
    )


def allreduce(bench: Bench, about: Architecture) -> list[Row]:
    """Time sums of the messages of a loss, a product, and a gradient with squares; the bound is a copy."""
    rows, comm = [], bench.comm
    backend = bench.make_backend()
    transport = choose(bench.transport, comm, backend)
    sizes = message_sizes(about.layout.size, about.layout.size)
    for kind, name in (("loss", "loss"), ("product", "product"), ("gradient", "gradient with squares")):
        loss = kind == "loss"  # it is on the host, even with a GPU
        vector = np.zeros(sizes[kind]) if loss else backend.xp.zeros(sizes[kind], backend.dtype)
        copy = vector.copy()
        add = comm.sum if loss else transport.sum
        many = _repeats(comm, partial(add, vector))

        def sums(vector: Any = vector, many: int = many, add: Callable[[Any], None] = add) -> None:
            for _ in range(many):
                add(vector)

        def copies(vector: Any = vector, copy: Any = copy, many: int = many) -> None:
            for _ in range(many):
                copy[...] = vector
            backend.synchronize()

        both = [Contestant(run, comm.size, bench.threads) for run in (sums, copies)]
        seconds = contest(comm, both, bench.repeats)
        head = {"pass": name, "bytes": vector.nbytes, "transport": transport.name} | bench.row(
            about, None, comm.size, bench.threads
        )
        rows += _timed([head], seconds / many)
    return rows


def _repeats(comm: Communicator, work: Callable[[], object], seconds: float = 0.05) -> int:
    """Return the number of repetitions of a collective that take about `seconds` on the slowest rank."""
    many = 1
    while True:
        start = time.perf_counter()
        for _ in range(many):
            work()
        if comm.any(time.perf_counter() - start >= seconds):
            return many
        many *= 2


def step(bench: Bench, about: Architecture, preset: Preset) -> list[Row]:
    """Time the steps of an optimizer at the start of a run, without the first one.

    `spans` has the seconds of a step by name, averaged over steps and ranks; `other` is the share outside
    passes, Allreduce and waiting.
    """
    text = bench.sequences(about, preset.gradient_batch)
    contestants, heads, runs = [], [], []
    for comm, threads in bench.teams():
        heads.append(bench.row(about, preset.gradient_batch, comm.size, threads))
        takes_part = comm.size > 1 or bench.comm.rank == 0
        run = _Steps(bench, comm, about, preset, text) if takes_part else None
        runs.append(run)
        both = (run.step, run.repeat_products) if run else (_nothing, _nothing)
        contestants += [Contestant(work, comm.size, threads) for work in both]
    rows = _timed(heads, contest(bench.comm, contestants, bench.repeats))
    for row, run in zip(rows, runs, strict=True):
        spans = row["spans"] = _spans(bench.comm, run, bench.repeats)
        row["other"] = sum(value for name, value in spans.items() if name not in NEEDED) / sum(spans.values())
    return rows


def _spans(comm: Communicator, run: _Steps | None, steps: int) -> dict[str, float]:
    """Return the seconds of a step by name, averaged over steps and over the ranks that took part."""
    times = None if run is None else (run.owner.timer.series(ALLREDUCE), together(run.owner.timer.totals))
    timers = [timer for timer in comm.agree(comm.gather(times)) or () if timer is not None]
    _, waiting = split_waiting([series for series, _ in timers])
    spans = {name: float(np.mean([t.get(name, 0.0) for _, t in timers])) for name in timers[0][1]}
    spans[WAITING] = float(np.mean(waiting))
    spans[ALLREDUCE] = spans.get(ALLREDUCE, 0.0) - spans[WAITING]
    return {name: value / steps for name, value in spans.items()}


def _nothing() -> None:
    """Replace a contestant on a rank that does not take part."""


class _Steps:
    """The steps of a run; the matrix products of the last step can be repeated alone."""

    def __init__(
        self, bench: Bench, comm: Communicator, about: Architecture, preset: Preset, text: Sequences
    ) -> None:
        self.backend, self.preset, self.text = bench.make_backend(), preset, text
        self.owner = bench.mean_risk(about, comm, self.backend)
        self.theta = self.backend.to_device(about.initial(0).astype(bench.dtype))
        self.state = preset.optimizer.init(self.theta, about.blocks)
        self.taken = 0
        self.products: Products

    def step(self) -> None:
        """Take the next step and record its products."""
        with self.backend.recorded() as self.products, self.owner.timer.span(OPTIMIZER):
            objectives = step_objectives(
                self.owner, self.text, 0, self.taken, self.preset.gradient_batch, self.preset.curvature_batch
            )
            self.theta, self.state, _ = self.preset.optimizer.step(self.theta, self.state, objectives)
        if self.taken == 0:
            self.owner.timer.clear()  # the first step allocated workspaces and compiled kernels
        self.taken += 1

    def repeat_products(self) -> None:
        """Repeat the products of the last step."""
        self.products.repeat()
