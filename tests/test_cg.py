"""Conjugate gradients, its stop rule, damping, backtracking, line search, and the preconditioner."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hfmpi.optim.cg import ConjugateGradients, Iterate, Stop, relative_progress
from hfmpi.optim.damping import LevenbergMarquardt, reduction_ratio
from hfmpi.optim.line_search import Armijo, backtrack
from hfmpi.optim.preconditioner import diagonal


def inner(a, b):
    return float(a.astype(np.float64) @ b.astype(np.float64))


def system(size, seed=0, condition=100.0):
    """Return a symmetric positive definite A, eigenvalues from 1 to `condition`, and a right-hand side."""
    rng = np.random.default_rng(seed)
    q, _ = np.linalg.qr(rng.standard_normal((size, size)))
    a = q @ np.diag(np.geomspace(1, condition, size)) @ q.T
    return (a + a.T) / 2, rng.standard_normal(size)


def solve(a, b, x0=None, **options):
    options = {"tolerance": 0.0, "keep_ratio": 1.0} | options
    return cg(lambda v: a @ v, b, np.zeros_like(b) if x0 is None else x0, **options)


def cg(apply, b, x0, precondition=None, **settings):
    return ConjugateGradients(**settings).solve(apply, b, x0, inner=inner, precondition=precondition)


def phi(a, b, x):
    return x @ a @ x / 2 - b @ x


@given(st.integers(1, 8), st.integers(0, 1000), st.booleans(), st.booleans())
@settings(deadline=None, max_examples=40)
def test_a_system_is_solved_in_as_many_steps_as_it_has_unknowns(size, seed, warm, preconditioned):
    a, b = system(size, seed, condition=10)
    x0 = np.random.default_rng(seed + 1).standard_normal(size) if warm else None
    m = np.diag(a) ** 0.75
    result = solve(a, b, x0, max_steps=size, precondition=(lambda r: r / m) if preconditioned else None)
    assert np.allclose(result.iterates[-1].x, np.linalg.solve(a, b), rtol=1e-5, atol=1e-7)
    assert result.steps <= size
    assert result.products == result.steps + warm


def test_model_values_are_those_of_the_quadratic_and_fall():
    a, b = system(30, condition=1e4)
    x0 = np.random.default_rng(5).standard_normal(30)
    result = solve(a, b, x0, max_steps=20)
    assert result.model_values[0] == pytest.approx(phi(a, b, x0))
    for iterate in result.iterates:
        assert iterate.value == pytest.approx(phi(a, b, iterate.x), rel=1e-9)
        assert result.model_values[iterate.step] == iterate.value
    assert all(
        later < earlier for earlier, later in zip(result.model_values, result.model_values[1:], strict=False)
    )


def test_martens_keeps_iterates_at_growing_distances_and_the_last():
    a, b = system(200, condition=1e6)
    steps = [i.step for i in solve(a, b, max_steps=97, keep_ratio=1.3).iterates]
    wanted = [math.ceil(5 * 1.3**j) for j in range(40)]
    assert steps == sorted({s for s in wanted if s <= 97} | {97})
    assert [i.step for i in solve(a, b, max_steps=7).iterates] == list(range(1, 8))


def martens(values, tolerance):
    """Return Martens' rule: i > k, phi_{i-k} < 0, (phi_i - phi_{i-k}) / phi_i < k eps."""
    i = len(values) - 1
    k = 10 if i <= 100 else int(np.ceil(i / 10))
    return bool(i > k and values[i - k] < 0 and (values[i] - values[i - k]) / values[i] < k * tolerance)


@given(st.lists(st.floats(0.001, 1.0), min_size=1, max_size=140), st.floats(-3, 3), st.floats(1e-5, 0.1))
@settings(deadline=None, max_examples=200)
def test_the_stop_rule_is_martens(falls, start, tolerance):
    values = list(start - np.cumsum(falls))
    assert relative_progress(values, tolerance) == martens(values, tolerance)


def test_it_stops_where_martens_rule_first_holds():
    a, b = system(300, condition=1e4)
    result = solve(a, b, max_steps=250, tolerance=5e-4)
    assert result.stop is Stop.PROGRESS
    values = result.model_values
    holds = [i for i in range(1, len(values)) if martens(values[: i + 1], 5e-4)]
    assert holds == [result.steps]


def test_every_reason_to_stop():
    a, b = system(20)
    assert solve(a, b, max_steps=3).stop is Stop.MAX_STEPS
    assert solve(a, np.zeros(20)).stop is Stop.SOLVED
    assert solve(np.eye(20), b).stop is Stop.SOLVED
    negative = solve(np.diag([1.0, -1.0]), np.array([1.0, 1.1]))
    assert negative.stop is Stop.NOT_POSITIVE
    assert negative.steps == 0
    assert np.array_equal(negative.iterates[-1].x, np.zeros(2))
    assert solve(np.full((20, 20), np.nan), b).stop is Stop.NOT_FINITE
    assert len({stop.value for stop in Stop}) == len(Stop) == 5


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_it_stops_when_nothing_but_rounding_is_left(dtype):
    a, b = (z.astype(dtype) for z in system(8))
    result = solve(a, b, max_steps=1000)
    assert result.stop is Stop.SOLVED
    assert result.steps < 100
    error = np.linalg.norm(a @ result.iterates[-1].x - b)
    assert error < 20 * np.finfo(dtype).eps * np.linalg.norm(b)


def test_a_bad_product_keeps_the_last_good_iterate():
    a, b = system(20)
    calls = []

    def broken(v):
        calls.append(1)
        return a @ v if len(calls) <= 4 else np.full(20, np.inf)

    with np.errstate(invalid="ignore"):
        result = cg(broken, b, np.zeros(20), keep_ratio=1.0)
    assert result.stop is Stop.NOT_FINITE
    assert result.steps == 4
    assert np.array_equal(result.iterates[-1].x, solve(a, b, max_steps=4).iterates[-1].x)


@pytest.mark.parametrize("refresh", [0, 10])
def test_a_fresh_residual_forgets_a_wrong_product(refresh):
    a, b = system(30)
    calls = []

    def flawed(v):
        calls.append(1)
        return a @ v * (1.05 if len(calls) == 5 else 1)

    result = cg(flawed, b, np.zeros(30), tolerance=0.0, max_steps=80, refresh=refresh)
    extra = 7 if refresh else 0  # not after the last iteration
    assert result.products == len(calls) == result.steps + extra
    assert result.steps == 80 or not refresh
    error = np.linalg.norm(a @ result.iterates[-1].x - b)
    assert (error < 1e-6) == bool(refresh)


def test_inputs_are_left_as_they_are():
    a, b = system(10)
    x0 = np.ones(10)
    before = b.copy(), x0.copy()
    solve(a, b, x0)
    assert np.array_equal(b, before[0])
    assert np.array_equal(x0, before[1])


def test_reduction_ratio():
    assert reduction_ratio(3.0, 2.0, -2.0) == 0.5
    assert reduction_ratio(3.0, 4.0, -2.0) == -0.5
    for arguments in (
        (3.0, 2.0, 0.0),
        (3.0, 2.0, 1.0),
        (3.0, math.nan, -1.0),
        (3.0, 2.0, math.nan),
        (3.0, math.inf, -1.0),
    ):
        assert math.isnan(reduction_ratio(*arguments))


def test_levenberg_marquardt():
    rule = LevenbergMarquardt(2 / 3, 1e-3, 1e3)
    assert rule.update(6.0, 0.2) == pytest.approx(9.0)
    assert rule.update(6.0, math.nan) == pytest.approx(9.0)
    assert rule.update(6.0, -math.inf) == pytest.approx(9.0)
    assert rule.update(6.0, 0.8) == pytest.approx(4.0)
    assert rule.update(6.0, 0.25) == rule.update(6.0, 0.75) == rule.update(6.0, 0.5) == 6.0
    assert rule.update(1e-3, 0.9) == 1e-3
    assert rule.update(1e3, 0.0) == 1e3
    assert LevenbergMarquardt(1.0).update(6.0, 0.0) == 6.0


def iterates(*points):
    return [Iterate(step, np.array([float(x)]), -float(step)) for step, x in enumerate(points, 1)]


def counted(function):
    calls = []

    def loss(p):
        calls.append(float(p[0]))
        return function(float(p[0]))

    loss.calls = calls
    return loss


def test_backtracking_goes_down_while_the_risk_improves():
    loss = counted(lambda x: (x - 2) ** 2)
    choice = backtrack(loss, iterates(1, 2, 3, 4))
    assert choice.iterate.step == 2
    assert choice.loss == 0
    assert loss.calls == [4, 3, 2, 1]
    assert choice.evaluations == 4
    loss = counted(lambda x: (x - 4) ** 2)
    assert backtrack(loss, iterates(1, 2, 3, 4)).iterate.step == 4
    assert loss.calls == [4, 3]
    assert backtrack(counted(lambda x: x), iterates(7)).evaluations == 1


def test_backtracking_leaves_what_is_not_finite():
    for bad in (math.nan, math.inf):
        choice = backtrack(counted(lambda x, bad=bad: bad if x > 2 else -x), iterates(1, 2, 3, 4))
        assert choice.iterate.step == 2
        assert choice.loss == -2
    assert math.isnan(backtrack(counted(lambda x: math.nan), iterates(1, 2)).loss)


def search(function, p=1.0, **options):
    """Search along p from 0, on a function of one variable with slope -1 at 0."""
    loss = counted(function)
    result = Armijo(**options).search(loss, np.array([p]), function(0.0), function(p), -p)
    assert result.evaluations == len(loss.calls)
    return result


def test_line_search():
    full = search(lambda x: -x)
    assert full == (1.0, -1.0, 0)

    def steep(x):  # -x + 2 x^2 <= -0.01 x until x = 0.495
        return -x + 2 * x * x

    result = search(steep)
    assert result.rate == pytest.approx(0.8**4)
    assert result.loss == pytest.approx(steep(0.8**4))
    assert result.evaluations == 4
    assert search(steep, tries=3).rate == 0
    assert search(steep, shrink=0.5).rate == pytest.approx(0.25)
    assert search(steep, sufficient=0.5).rate == pytest.approx(0.8**7)  # until x = 0.25
    assert search(lambda x: math.nan if x > 0.3 else -x).rate == pytest.approx(0.8**6)
    never = search(lambda x: 0.0 if x == 0 else 1.0)
    assert never.rate == 0
    assert never.evaluations == 59


def test_an_ascent_direction_is_refused_at_once():
    for slope in (0.0, 1.0, math.nan):
        result = Armijo().search(lambda p: 1 / 0, np.ones(1), 1.0, 0.5, slope)
        assert result == (0.0, 1.0, 0)


@given(st.integers(1, 30), st.floats(0, 10), st.sampled_from([0.5, 0.75, 1.0]))
@settings(deadline=None)
def test_diagonal_preconditioner(size, damping, exponent):
    rng = np.random.default_rng(size)
    squares, r = rng.uniform(0.1, 5, size), rng.standard_normal(size)
    assert np.allclose(
        diagonal(squares, damping, exponent)(r), r / (squares + damping) ** exponent, rtol=1e-13
    )
    single = diagonal(squares.astype(np.float32), damping, exponent)(r.astype(np.float32))
    assert single.dtype == np.float32
