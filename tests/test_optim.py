"""Optimizers in difficult cases: dense algebra, invalid products, huge numbers, unusual settings."""

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hfmpi.errors import UserError
from hfmpi.optim import Adam, Gradient, GradientDescent, HessianFree, Objective, Objectives
from hfmpi.optim.cg import ConjugateGradients, Stop, relative_progress
from hfmpi.optim.presets import preset


def inner(a, b):
    return float(a @ b)


# Conjugate gradients


def spd(size, seed=0, condition=50.0):
    rng = np.random.default_rng(seed)
    q, _ = np.linalg.qr(rng.standard_normal((size, size)))
    return (q * np.geomspace(1, condition, size)) @ q.T, rng.standard_normal(size), rng


@pytest.mark.parametrize("preconditioned", [False, True])
@pytest.mark.parametrize("warm", [False, True])
def test_every_iterate_minimises_the_model_over_its_krylov_space(warm, preconditioned):
    a, b, rng = spd(12)
    x0 = rng.standard_normal(12) if warm else np.zeros(12)
    m = rng.uniform(0.5, 5, 12) if preconditioned else np.ones(12)
    solver = ConjugateGradients(max_steps=5, tolerance=0.0, keep_ratio=1.0)
    result = solver.solve(lambda v: a @ v, b, x0, inner=inner, precondition=lambda r: r / m)
    assert len(result.iterates) == 5
    basis = []
    for iterate in result.iterates:  # span of z, (M^-1 A) z, (M^-1 A)^2 z, ...
        basis.append((b - a @ x0) / m if not basis else (a @ basis[-1]) / m)
        k = np.linalg.qr(np.array(basis).T)[0]
        best = x0 + k @ np.linalg.solve(k.T @ a @ k, k.T @ (b - a @ x0))
        assert np.allclose(iterate.x, best, rtol=1e-9, atol=1e-10)


def martens(values, tolerance):
    """Return Martens' rule in exact arithmetic; a quotient by zero is infinite, as in his released code."""
    i = len(values) - 1
    k = max(10, -(-i // 10))
    if not (i > k and values[i - k] < 0):
        return False
    if values[i] == 0:
        return False
    return Fraction(values[i] - values[i - k]) / Fraction(values[i]) < k * Fraction(tolerance)


@given(
    st.integers(-40, 5),
    st.lists(st.sampled_from([-1, 0, 0, 0, 0, 1, 1, 2, 9]), min_size=11, max_size=14),
    st.integers(1, 20),
    st.integers(2, 12),
)
@settings(deadline=None, max_examples=300)
def test_the_stop_rule_is_exact_even_where_values_stall_or_rise(start, falls, repeats, bits):
    tolerance = 2.0**-bits  # and integers: rounding creates no tie here
    values = [float(v) for v in start - np.cumsum(falls * repeats)]
    assert relative_progress(values, tolerance) == martens(values, tolerance)


def test_the_stop_rule_looks_back_a_tenth_after_a_hundred_iterations():
    for i in range(11, 300):
        k = max(10, -(-i // 10))
        for at, wanted in ((i - k, True), (i - k + 1, False)):  # the last great fall is just outside, inside
            values = [-1.0] * at + [-2.0] * (i + 1 - at)
            assert relative_progress(values, 1e-3) == wanted


def test_the_stop_rule_survives_a_model_value_of_zero():
    assert relative_progress([-1.0] * 11 + [0.0], 5e-4) is False


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("warm", [False, True])
def test_a_product_that_is_not_finite_from_the_start_gives_the_start(bad, warm):
    x0 = np.full(3, float(warm))
    with np.errstate(invalid="ignore"):
        result = ConjugateGradients().solve(lambda v: np.full(3, bad), np.ones(3), x0, inner=inner)
    assert (result.stop, result.steps, result.products) == (Stop.NOT_FINITE, 0, 1)
    assert np.array_equal(result.iterates[-1].x, x0)


def test_an_indefinite_matrix_keeps_what_was_reached_before_it_showed():
    a, b = np.diag([1.0, -1.0]), np.array([2.0, 1.0])
    result = ConjugateGradients().solve(lambda v: a @ v, b, np.zeros(2), inner=inner)
    assert (result.stop, result.steps, result.products) == (Stop.NOT_POSITIVE, 1, 2)
    assert np.allclose(result.iterates[-1].x, b * (b @ b) / (b @ a @ b))


# Hessian-free


class LeastSquares(Objective):
    """f = r'r with r = (1 - x, 10 (y - x^2)), Rosenbrock's function; G = 2 J'J."""

    def loss(self, theta):
        return float(self.residuals(theta)[0] @ self.residuals(theta)[0])

    def residuals(self, theta):
        x, y = theta
        return np.array([1 - x, 10 * (y - x * x)]), np.array([[-1.0, 0.0], [-20 * x, 10.0]])

    def gradient(self, theta, squares=False):
        r, j = self.residuals(theta)
        return Gradient(float(r @ r), 2 * j.T @ r, ((4 * r[:, None] * j) ** 2).mean(0) if squares else None)

    def squared_gradients(self, theta):
        return self.gradient(theta, squares=True)

    def gauss_newton(self, theta):  # has no structural damping: it must not be asked for unless it is on
        j = self.residuals(theta)[1]
        return lambda v: 2 * j.T @ (j @ v)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"preconditioner": "none"},
        {"warm_start": 0.0},
        {"backtracking": False},
        {"cg_refresh": 10},
        {"line_search": False},
        {"damping_factor": 0.9, "damping": 1.0},
    ],
)
@pytest.mark.parametrize("start", [(-1.2, 1.0), (2.0, -3.0)])
def test_rosenbrock_converges_whatever_is_switched_off(changes, start):
    optimizer, objective, theta = HessianFree(**changes), LeastSquares(), np.array(start)
    state = optimizer.init(theta)
    for _ in range(150):
        before = objective.loss(theta)
        theta, state, report = optimizer.step(theta, state, Objectives(objective, objective))
        assert objective.loss(theta) < before or not report.accepted
        if np.allclose(theta, 1, atol=1e-6):
            return
    pytest.fail(f"still at {theta}")


class Wrong(Objective):
    """x'x / 2 with a curvature that is too small by half: the step goes too far."""

    def __init__(self, curvature=0.502):
        self.curvature = curvature

    def loss(self, theta):
        return float(theta @ theta) / 2

    def gradient(self, theta):
        return Gradient(self.loss(theta), theta.copy())

    def gauss_newton(self, theta):
        return lambda v: self.curvature * v


@pytest.mark.parametrize(
    ("changes", "rate", "losses"),
    [
        ({}, 0.8, 2),
        ({"line_search": False}, 1.0, 1),
        ({"line_search_sufficient": 0.0}, 1.0, 1),
        ({"line_search_shrink": 0.5}, 0.5, 2),
        ({"line_search_tries": 1}, 0.0, 1),
    ],
)
def test_the_line_search_is_as_it_was_set(changes, rate, losses):
    optimizer = HessianFree(damping=0.0, preconditioner="none", **changes)
    theta, objective = np.ones(1), Wrong()
    after, state, report = optimizer.step(theta, optimizer.init(theta), Objectives(objective, objective))
    assert after[0] == pytest.approx(1 - rate / 0.502)
    assert report.details["line_search_rate"] == rate
    assert report.work.losses == losses
    assert report.accepted == (rate > 0)
    assert (state.direction[0] != 0) == (rate > 0)


def test_a_rejected_step_raises_the_damping_however_good_the_model_was():
    optimizer = HessianFree(
        damping=3.0, preconditioner="none", line_search_sufficient=0.9, line_search_tries=1
    )
    theta, objective = np.ones(1), Wrong(1.0)
    _, state, report = optimizer.step(theta, optimizer.init(theta), Objectives(objective, objective))
    assert report.details["rho"] == pytest.approx(1.0)
    assert not report.accepted
    assert state.damping == pytest.approx(4.5)


def test_an_ascent_is_refused_and_the_start_forgotten():
    """The stored direction points uphill, and the product that would correct it is not finite."""
    objective, theta = Wrong(math.nan), np.ones(1)
    optimizer = HessianFree(damping=2.0, preconditioner="none")
    state = type(optimizer.init(theta))(2.0, np.full(1, 5.0))
    after, later, report = optimizer.step(theta, state, Objectives(objective, objective))
    assert after is theta or np.array_equal(after, theta)
    assert (report.accepted, report.work.losses, report.work.products) == (False, 0, 1)
    assert later.damping == pytest.approx(3.0)
    assert np.array_equal(later.direction, np.zeros(1))


@pytest.mark.parametrize(("tolerance", "stop"), [(0.0, "MAX_STEPS"), (5e-4, "PROGRESS")])
def test_tolerance_zero_switches_the_stop_rule_off(tolerance, stop):
    objective, theta = Wrong(np.geomspace(1, 10, 40)), np.ones(40)
    optimizer = HessianFree(
        damping=1e-3, cg_max_steps=20, cg_tolerance=tolerance, preconditioner="none", cg_refresh=4
    )
    _, _, report = optimizer.step(theta, optimizer.init(theta), Objectives(objective, objective))
    assert report.details["cg_stop"] == stop
    assert report.work.cg_steps <= 20
    assert report.work.products == report.work.cg_steps + (report.work.cg_steps - (stop == "MAX_STEPS")) // 4


# First order


class Given(Objective):
    def __init__(self, g, loss=1.0):
        self.g, self.value = g, loss

    def loss(self, theta):
        return self.value

    def gradient(self, theta):
        return Gradient(self.value, self.g)


@pytest.mark.parametrize("rule", ["clip", "normalised", "rms-normalised"])
def test_a_gradient_that_explodes_spoils_nothing(rule):
    """The gradient is finite in float32, but its square is not."""
    optimizer, theta = GradientDescent(rule), np.zeros(3, np.float32)
    g = np.array([1e25, -1e25, 1.0], np.float32)
    after, state, report = optimizer.step(theta, optimizer.init(theta), Objectives(Given(g)))
    assert report.accepted == (rule != "rms-normalised")
    assert np.all(np.isfinite(after))
    assert np.all(np.isfinite(state.mean_square))
    after, _, report = optimizer.step(theta, state, Objectives(Given(np.ones(3, np.float32))))
    assert report.accepted
    assert np.all(after < 0)


@pytest.mark.parametrize("optimizer", [GradientDescent("clip"), GradientDescent("rms-normalised"), Adam()])
@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_moves_nothing(optimizer, loss):
    theta = np.ones(3)
    state = optimizer.init(theta)
    after, later, report = optimizer.step(theta, state, Objectives(Given(np.ones(3), loss)))
    assert np.array_equal(after, theta)
    assert later is state
    assert not report.accepted
    assert "not finite" in report.message


# Settings


@pytest.mark.parametrize(
    ("kind", "name", "value"),
    [
        (HessianFree, "keep_ratio", 0.5),
        (HessianFree, "keep_ratio", math.inf),
        (HessianFree, "warm_start_growth", 0.0),
        (HessianFree, "warm_start_maximum", 2.0),
        (HessianFree, "preconditioner_exponent", -1.0),
        (HessianFree, "line_search_sufficient", -0.1),
        (HessianFree, "step_scale_decay", 1.1),
        (HessianFree, "damping", math.nan),
        (GradientDescent, "floor", 3.0),
        (GradientDescent, "rate", 0.001),  # below the default floor, which would silently raise it
    ],
)
def test_settings_that_make_no_sense_are_refused(kind, name, value):
    with pytest.raises(ValueError, match=name):
        kind(**{name: value})


def test_sentences_of_presets():
    for changes, words in (
        ({"rate": 0.001}, "optimizer sgd: floor must"),
        ({"rates": 1.0}, "optimizer sgd has no setting 'rates' (did you mean rate?); it has rule, rate"),
        ({"rate": True}, "setting rate of sgd must be of type float, not True"),
        ({"rate": "1"}, "setting rate of sgd must be of type float, not '1'"),
    ):
        with pytest.raises(UserError) as caught:
            preset("sgd", **changes)
        assert str(caught.value).startswith(words)
        assert not str(caught.value).endswith(".")
    with pytest.raises(
        UserError,
        match=r"^there is no optimizer 'newton' \(did you mean lm\?\); choose one of sgd, .*subspace",
    ):
        preset("newton")
