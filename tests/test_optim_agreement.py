"""Ranks that round differently take the same steps, and the arguments of a step are unchanged."""

import math

import numpy as np
import pytest
from dense import stored

from hfmpi.optim import (
    LBFGS,
    LM,
    SOAP,
    Adam,
    Gradient,
    GradientDescent,
    HessianFree,
    Muon,
    Objective,
    Objectives,
    SOAPMuon,
    Subspace,
)
from hfmpi.optim.base import inner_product
from hfmpi.optim.cg import ConjugateGradients, Stop
from hfmpi.optim.layout import Block
from hfmpi.optim.rows import DenseRows
from hfmpi.parallel.communicator import MPICommunicator, digest


class Elsewhere(np.ndarray):
    """An array on a processor whose inner and matrix products are slightly different."""

    def __array_function__(self, function, types, arguments, options):
        result = super().__array_function__(function, types, arguments, options)
        return np.asarray(result) * (1 + 1e-7) if function is np.einsum else result

    def __array_ufunc__(self, ufunc, method, *inputs, out=(), **options):
        plain = [np.asarray(x) if isinstance(x, Elsewhere) else x for x in inputs]
        result = getattr(ufunc, method)(*plain, **options)
        result = result * (1 + 1e-7) if ufunc is np.matmul else result
        if not out:
            return result.view(Elsewhere) if isinstance(result, np.ndarray) else result
        np.asarray(out[0])[...] = result
        return out[0]


class Rank(Objective):
    """A bowl on one rank: vectors are the same on all ranks, scalars are the rank's or agreed on."""

    def __init__(self, kind, agreed=None, error=0.0):
        self.kind, self.agreed, self.error = kind, agreed, error
        self.centre = np.linspace(-2, 3, 12)
        self.scale = np.geomspace(1, 300, 12)

    def loss(self, theta):
        away = np.asarray(theta) - self.centre
        return float(np.sum(self.scale * np.sqrt(1 + away**2))) * (1 + self.error)

    def gradient(self, theta):
        away = np.asarray(theta) - self.centre
        g = self.scale * away / np.sqrt(1 + away**2)
        return Gradient(self.loss(theta), g.view(self.kind))

    def squared_gradients(self, theta):
        loss, g, _ = self.gradient(theta)
        return Gradient(loss, g, g * g)

    def gauss_newton(self, theta):
        return self.structural_gauss_newton(theta, 0.0)

    def structural_gauss_newton(self, theta, structural):
        curvature = self.scale / (1 + (np.asarray(theta) - self.centre) ** 2) ** 1.5 + structural
        return lambda v: (curvature * np.asarray(v)).view(self.kind)

    blocks = Block("a", 0, 2, 4, cuts=(1,), groups=2), Block("b", 8, 1, 4)

    def factored_gradient(self, theta):
        at, factors = self.gradient(theta), []
        for block in self.blocks:
            own = block.of(np.asarray(at.vector))
            for m, groups in (own, 1), (own.T, block.groups):
                factors.append(stored(np.eye(len(m)) + m @ m.T / 1e4, groups).reshape(-1))
        return at, np.concatenate(factors).view(self.kind)

    def rows(self, theta, request):
        if request.kind == "scores":
            at, factors = self.factored_gradient(theta)
            scores = np.diag(np.asarray(at.vector)).astype(theta.dtype).view(self.kind)
            return DenseRows(at.loss, at.vector, scores, factors=factors.astype(theta.dtype))
        away, at = np.asarray(theta) - self.centre, self.gradient(theta)
        r = np.sqrt(2 * self.scale * np.sqrt(1 + away**2)).astype(theta.dtype)
        return DenseRows(at.loss, at.vector, np.diag(np.asarray(at.vector) / r), r.astype(np.float64))

    def project(self, theta):
        product = Rank.gauss_newton(self, theta)
        return lambda v: np.asarray(v) @ np.array([np.asarray(product(row)) for row in v]).T


class First(Rank):
    """It does all of the work."""

    ranks = 2

    def agree(self, values):
        self.agreed.append(values)
        return values

    def spread(self, works, sizes, wide=False, name=""):
        found = super().spread(works, sizes, wide)
        assert [len(own) for own in found] == sizes
        self.agreed.append(found)
        return found


class Second(Rank):
    ranks = 2

    def agree(self, values):
        assert all(type(value) is float for value in values)
        assert len(values) == len(self.agreed[0])
        return self.agreed.pop(0)

    def spread(self, works, sizes, wide=False, name=""):
        found = self.agreed.pop(0)
        return found if wide else [own.view(self.kind) for own in found]


def trajectory(optimizer, objective):
    theta = np.zeros(12).view(objective.kind)
    state, reports = optimizer.init(theta, objective.blocks), []
    for step in range(6):
        theta, state, report = optimizer.step(theta, state, Objectives(objective, objective, step / 2))
        reports.append(report)
    return np.asarray(theta), state, reports


ALL = [
    HessianFree(damping=1.0),
    HessianFree(damping=1e-2, preconditioner="none", structural_damping=0.5, cg_refresh=3),
    HessianFree(damping=1e-2, cg_max_steps=7, keep_ratio=1.0, cg_tolerance=0.0, line_search=False),
    HessianFree(damping=1.0, damping_factor=0.2, backtracking=False, line_search=False),  # rejects some
    GradientDescent("clip", rate=1e-2, threshold=300.0),
    GradientDescent("normalised", rate=0.3),
    GradientDescent("rms-normalised"),
    Adam(),
    Adam(schedule="inverse-root", decay=0.1, averaging=0.5),
    SOAP(rate=0.1, refresh=2, averaging=0.5),
    Muon(decay=0.1),
    SOAPMuon(rate=0.1, epsilon=1e-6),
    Subspace(kfac_damping=1e-2, refresh=2),
    Subspace("gradient+rms", memory=1, cut=False, damping=1e3, candidates=3),
    Subspace("kfac+rms", kfac_damping=1e-2, damping=1e3, weight_decay=0.1),
    Subspace("kfac+rows", kfac_damping=1e-2, row_damping=1.0, row_steps=2),
    LBFGS(memory=3),
    LM(),
    LM(momentum=0.5),
]


@pytest.mark.parametrize("optimizer", ALL)
def test_ranks_that_round_differently_agree_in_every_bit(optimizer):
    agreed = []
    theta, state, reports = trajectory(optimizer, First(np.ndarray, agreed))
    other, other_state, other_reports = trajectory(optimizer, Second(Elsewhere, agreed, 1e-7))
    assert not agreed, "the second rank asked for fewer scalars than the first"
    assert np.array_equal(theta, other)
    assert reports == other_reports
    for name, value in vars(state).items():
        assert np.array_equal(value, vars(other_state)[name])
    alone = trajectory(optimizer, Rank(Elsewhere, None, 1e-7))
    assert alone[2] != reports, "nothing to agree about: this test shows nothing"


def test_steps_are_rejected_alike_too():
    _, _, reports = trajectory(ALL[3], Rank(np.ndarray))
    assert {report.accepted for report in reports} == {True, False}


@pytest.mark.mpi(ranks=2, timeout=60, unit="s")
@pytest.mark.parametrize("optimizer", ALL)
def test_ranks_under_mpi_agree_in_every_bit(optimizer, mpi_ranks, comm):
    assert comm.size == mpi_ranks
    communicator = MPICommunicator(comm)
    objective = Rank(Elsewhere, None, 1e-7) if comm.rank else Rank(np.ndarray)
    objective.agree, objective.ranks = communicator.agree, communicator.size
    objective.spread = lambda works, sizes, wide=False, name="": [
        own if wide else own.view(objective.kind)
        for own in communicator.agree([np.asarray(work()) for work in works])
    ]
    theta, state, reports = trajectory(optimizer, objective)
    for vector in (theta, *map(np.asarray, vars(state).values())):
        assert communicator.same(digest(vector)) == []
    assert comm.allgather(reports) == [reports] * 2
    communicator.close()


@pytest.mark.parametrize(
    ("optimizer", "most"),
    [
        *zip(ALL[4:-4], (1, 1, 2, 2, 2, 3, 3, 3, 5, 7, 5), strict=True),
        *((hessian_free, 0) for hessian_free in ALL[:4]),
    ],
)
def test_messages_of_a_step(optimizer, most):
    """One for the gradient, one for the step, one for the blocks if a method uses them.

    Hessian-free: also one per loss and per CG iteration. A checked subspace step: one per loss.
    """
    agreed = []
    _, _, reports = trajectory(optimizer, First(np.ndarray, agreed))
    back = sum("back" in report.message for report in reports)  # the risk is all that it looks at then
    expected = (len(reports) - back) * most + back
    if isinstance(optimizer, Subspace) and not optimizer.candidates:
        checked = [report.work.losses for report in reports if report.work.losses]
        assert checked
        expected += sum(checked)
    if not most:
        refresh = optimizer.cg_refresh or 1000
        for report in reports:
            steps = report.work.cg_steps
            ends_at_limit = steps == optimizer.cg_max_steps
            expected += 3 + report.work.losses + steps + (steps - ends_at_limit) // refresh
    assert len(agreed) == expected


# Conjugate gradients ---------------------------------------------------------------------------


SETTINGS = [
    {"max_steps": 9, "tolerance": 0.0},
    {"max_steps": 9, "tolerance": 0.0, "refresh": 3},
    {"tolerance": 5e-4, "keep_ratio": 1.0},
    {"max_steps": 9, "refresh": 1},
]


def wrong(at, bad):
    """Return an inner product that is wrong from call `at` on; never if `at` is None."""
    calls = []

    def inner(a, b):
        calls.append(1)
        return inner_product(a, b) if at is None or len(calls) < at else bad(inner_product(a, b))

    return inner


def solved(inner, agree, dtype, settings, warm):
    """Solve the same system on one rank; return all results, and the number of products."""
    rng = np.random.default_rng(3)
    root = rng.standard_normal((30, 30))
    a = (root @ root.T + 0.1 * np.eye(30)).astype(dtype)
    b, m = rng.standard_normal(30).astype(dtype), rng.uniform(1, 3, 30).astype(dtype)
    products = []

    def apply(v):
        products.append(v)
        return a @ v

    x0 = b * dtype(warm)
    with np.errstate(all="ignore"):
        found = ConjugateGradients(**settings).solve(
            apply, b, x0, inner=inner, agree=agree, precondition=lambda r: r / m
        )
    assert found.products == len(products)
    return found, products


BAD = {
    "rounding": lambda value: value * (1 + 1e-7),
    "nan": lambda value: math.nan,
    "infinite": lambda value: math.inf,
    "negative": lambda value: -1.0,
    "zero": lambda value: 0.0,
    "tiny": lambda value: 1e-300,
    "huge": lambda value: 1e300,
}


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("kind", BAD)
@pytest.mark.parametrize("rank", [0, 1])
def test_whatever_one_rank_computes_both_go_the_same_way(rank, kind, dtype, settings):
    stops = set()
    for at in range(1, 25):
        messages = []

        def tell(values, messages=messages):
            messages.append(values)
            return values

        def hear(values, messages=messages):
            assert len(values) == len(messages[0])
            return messages.pop(0)

        ill, well = wrong(at, BAD[kind]), wrong(None, None)
        first = solved(well if rank else ill, tell, dtype, settings, 0.1)
        second = solved(ill if rank else well, hear, dtype, settings, 0.1)
        assert not messages, "the second rank asked less often than the first"
        np.testing.assert_array_equal(first[1], second[1])
        ours, theirs = first[0], second[0]
        assert (ours.stop, ours.steps) == (theirs.stop, theirs.steps)
        assert [i.step for i in ours.iterates] == [i.step for i in theirs.iterates]
        for mine, other in zip(ours.iterates, theirs.iterates, strict=True):
            np.testing.assert_array_equal(mine.x, other.x)
        np.testing.assert_array_equal(ours.model_values, theirs.model_values)
        stops.add(ours.stop)
    if rank == 0 and kind in ("nan", "infinite"):
        assert stops == {Stop.NOT_FINITE}
    if rank == 0 and kind == "negative":
        assert Stop.NOT_POSITIVE in stops
    if rank == 1:
        assert not stops & {Stop.NOT_FINITE, Stop.NOT_POSITIVE}


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("warm", [0.0, 0.1])
def test_an_iteration_takes_one_message_and_a_fresh_residual_one_more(settings, warm):
    messages = []

    def agree(values):
        messages.append(values)
        return values

    found, products = solved(inner_product, agree, np.float64, settings, warm)
    assert found.steps > 5
    assert len(messages) == 1 + len(products) - (warm != 0)


@pytest.mark.parametrize("optimizer", ALL)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_arguments_may_be_read_only(optimizer, dtype):
    objective = Rank(np.ndarray)
    objective.centre, objective.scale = objective.centre.astype(dtype), objective.scale.astype(dtype)
    theta = np.zeros(12, dtype)
    state = optimizer.init(theta, objective.blocks)
    for _ in range(3):
        for array in (theta, *(v for v in vars(state).values() if isinstance(v, np.ndarray))):
            array.flags.writeable = False
        theta, state, report = optimizer.step(theta, state, Objectives(objective, objective))
        assert theta.dtype == dtype
        assert all(v.dtype == dtype for v in vars(state).values() if isinstance(v, np.ndarray))
        scalars = [report.loss, *(v for k, v in report.details.items() if k not in ("cg_stop", "cg_steps"))]
        assert all(type(v) in (float, int, type(None)) for v in scalars)
