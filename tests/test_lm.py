"""Levenberg-Marquardt: steps against dense algebra, known solutions, the distributed factorization."""

import math
from itertools import pairwise

import numpy as np
import pytest
import scipy.linalg.lapack
from hypothesis import given, settings
from hypothesis import strategies as st

from hfmpi import LM, Arrays, DataParallel, Network, Objective, Objectives
from hfmpi.backends import create
from hfmpi.errors import UserError
from hfmpi.measure.linear_algebra import cholesky, gram, product, together, triangular_solve
from hfmpi.optim import Gradient
from hfmpi.optim.cholesky import ALONE, PANEL, solutions
from hfmpi.optim.exact_model import exact_model
from hfmpi.optim.lm import LMState
from hfmpi.optim.rows import DenseRows, RowRequest
from hfmpi.parallel.communicator import Communicator, MPICommunicator, digest


class LeastSquares(Objective):
    """f = r'r / 2 over N, from a function theta -> residuals (M,), Jacobian (M, D)."""

    def __init__(self, function, scored=1):
        self.function, self.scored = function, scored

    def loss(self, theta):
        with np.errstate(over="ignore", invalid="ignore"):
            r = self.function(theta)[0]
            return float(r @ r) / 2 / self.scored

    def gradient(self, theta):
        rows = self.rows(theta)
        return Gradient(rows.loss, rows.gradient)

    def rows(self, theta, request=None):
        r, j = self.function(theta)
        return DenseRows(self.loss(theta), j.T @ r / self.scored, j, np.asarray(r, float), scored=self.scored)


def run(objective, theta, steps=200, optimizer=None):
    """Take steps until the method has converged; return theta, the last report and all losses."""
    optimizer, theta, losses = optimizer or LM(), np.array(theta, float), []
    state = optimizer.init(theta)
    for _ in range(steps):
        theta, state, report = optimizer.step(theta, state, Objectives(objective))
        losses.append(report.loss)
        if report.converged:
            break
    return theta, report, losses


def solved(objective, a, shift, b):
    (x,) = solutions(objective, a, [shift], [b], {})
    return x


def linear(rows, columns, seed=0, scored=3):
    rng = np.random.default_rng(seed)
    j, y = rng.standard_normal((rows, columns)), rng.standard_normal(rows)
    return LeastSquares(lambda theta: ((j @ theta - y).astype(theta.dtype), j.astype(theta.dtype)), scored)


# The step


@pytest.mark.parametrize("shape", [(4, 9), (9, 9), (9, 4)])
def test_the_step_is_that_of_the_dense_matrix(shape):
    objective, theta = linear(*shape), np.linspace(-1, 1, shape[1])
    rows = objective.rows(theta)
    system = rows.normal() / 3 + 0.2 * np.eye(shape[1])
    model = exact_model(objective, rows, 0.0, theta[:0])
    (step,) = model.steps([0.2])
    np.testing.assert_allclose(step.p, -np.linalg.solve(system, rows.gradient), rtol=1e-10)
    assert model.trace == pytest.approx(np.trace(rows.normal()) / 3)
    assert step.norm == pytest.approx(np.linalg.norm(step.p))
    # The risk is quadratic, so that the model predicts it.
    assert step.promise == pytest.approx(rows.loss - objective.loss(theta + step.p))


@pytest.mark.parametrize("shape", [(4, 9), (9, 4)])
def test_with_momentum_the_damping_pulls_to_part_of_the_last_step(shape):
    objective, theta = linear(*shape), np.linspace(-1, 1, shape[1])
    rows, last = objective.rows(theta), np.cos(np.arange(shape[1]))
    g, hessian = rows.gradient, rows.normal() / 3
    optimizer = LM(momentum=0.7)
    after, state, report = optimizer.step(theta, LMState(0.2, last), Objectives(objective))
    p = after - theta
    np.testing.assert_allclose(g + hessian @ p + 0.2 * (p - 0.7 * last), 0, atol=1e-10)
    np.testing.assert_array_equal(theta + state.direction, after)
    # A correction that raises the risk is left out.
    after, _, report = optimizer.step(theta, LMState(0.2, 1e3 * last), Objectives(objective))
    assert report.accepted
    without = exact_model(objective, rows, 0.0, theta[:0]).steps([report.details["damping"]])[0]
    np.testing.assert_allclose(after - theta, without.p, rtol=1e-10)


@pytest.mark.parametrize("shape", [(4, 9), (9, 4)])
def test_a_part_of_the_gradient_that_the_hessian_does_not_see_is_followed(shape):
    objective, theta = linear(*shape), np.linspace(-1, 1, shape[1])
    rows, slope = objective.rows(theta), np.cos(np.arange(shape[1]))
    g, hessian = rows.gradient + slope, rows.normal() / 3
    rows = DenseRows(rows.loss, g, rows.matrix, rows.residuals, scored=3, complete=False)
    step = exact_model(objective, rows, 0.0, theta[:0]).steps([0.2])[0]
    np.testing.assert_allclose(hessian @ step.p + 0.2 * step.p, -g, rtol=1e-9)
    assert step.promise == pytest.approx(-g @ step.p - step.p @ hessian @ step.p / 2)


def test_in_float32_the_matrix_and_its_factor_are_float64():
    for shape in ((30, 40), (40, 30)):
        objective, theta = linear(*shape), np.linspace(-1, 1, shape[1])
        rows = objective.rows(theta.astype(np.float32))
        step = exact_model(objective, rows, 0.0, theta[:0]).steps([1e-6])[0]
        exact = exact_model(objective, objective.rows(theta), 0.0, theta[:0]).steps([1e-6])[0]
        assert step.p.dtype == np.float32
        assert np.linalg.norm(step.p - exact.p) < 1e-4 * exact.norm


@given(st.integers(0, 2**32), st.integers(1, 12), st.integers(1, 12), st.floats(-6, 3))
@settings(deadline=None, derandomize=True)
def test_both_matrices_give_the_step(seed, count, size, exponent):
    objective, damping = linear(count, size, seed), 10.0**exponent
    theta = np.random.default_rng(seed).standard_normal(size)
    rows = objective.rows(theta)
    padded = np.vstack([rows.matrix, np.zeros((size, size))])  # at least as many rows as parameters
    more = DenseRows(rows.loss, rows.gradient, padded, np.append(rows.residuals, np.zeros(size)), scored=3)
    steps = [exact_model(objective, each, 0.0, theta[:0]).steps([damping])[0] for each in (rows, more)]
    np.testing.assert_allclose(steps[0].p, steps[1].p, rtol=1e-7, atol=1e-10 * steps[1].norm)
    assert steps[0].promise == pytest.approx(steps[1].promise, rel=1e-7)
    assert steps[0].promise >= 0


# Problems with known solutions


def rosenbrock(theta):
    x, y = theta
    return np.array([10 * (y - x * x), 1 - x]), np.array([[-20 * x, 10.0], [-1.0, 0.0]])


def powell(theta):
    """Powell's singular function: J is singular at the solution, 0."""
    a, b, c, d = theta
    r = np.array([a + 10 * b, 5**0.5 * (c - d), (b - 2 * c) ** 2, 10**0.5 * (a - d) ** 2])
    j = np.zeros((4, 4))
    j[0, :2], j[1, 2:] = (1, 10), (5**0.5, -(5**0.5))
    j[2, 1:3] = 2 * (b - 2 * c) * np.array([1, -2])
    j[3, [0, 3]] = 2 * 10**0.5 * (a - d) * np.array([1, -1])
    return r, j


def exponentials(x, y, constant):
    """Residuals of a sum of two exponentials, [constant +] a e^(-c x) + b e^(-d x) - y."""

    def function(theta):
        a, b, c, d = theta[-4:]
        with np.errstate(over="ignore", invalid="ignore"):
            e, f = np.exp(-c * x), np.exp(-d * x)
            columns = [np.ones_like(x)] * constant + [e, f, -a * x * e, -b * x * f]
            return a * e + b * f + (theta[0] if constant else 0) - y, np.stack(columns, 1)

    return function


MGH17 = [
    0.844, 0.908, 0.932, 0.936, 0.925, 0.908, 0.881, 0.850, 0.818, 0.784, 0.751, 0.718, 0.685, 0.658, 0.628,
    0.603, 0.580, 0.558, 0.538, 0.522, 0.506, 0.490, 0.478, 0.467, 0.457, 0.448, 0.438, 0.431, 0.424, 0.420,
    0.414, 0.411, 0.406,
]  # fmt: skip
"""NIST StRD, nonlinear regression (Osborne 1); b = b1, b2, b3, b4, b5, residual sum of squares."""

CERTIFIED = 3.7541005211e-1, 1.9358469127, -1.4646871366, 1.2867534640e-2, 2.2122699662e-2
SQUARES = 5.4648946975e-5


@pytest.mark.parametrize("start", [(50, 150, -100, 1, 2), (0.5, 1.5, -1, 0.01, 0.02)])
@pytest.mark.parametrize("scored", [1, 33])
def test_mgh17_has_the_certified_solution(start, scored):
    objective = LeastSquares(exponentials(np.arange(33) * 10.0, np.array(MGH17), True), scored)
    theta, report, losses = run(objective, start)
    assert report.converged
    assert 2 * scored * report.loss == pytest.approx(SQUARES, rel=1e-9)
    np.testing.assert_allclose(theta, CERTIFIED, rtol=1e-6)
    assert len(losses) < 80


def test_rosenbrock_takes_few_steps_and_no_residual_is_left():
    theta, report, losses = run(LeastSquares(rosenbrock), (-1.2, 1))
    assert report.converged
    np.testing.assert_allclose(theta, 1, rtol=1e-12)
    assert len(losses) <= 20


def test_a_singular_solution_is_approached():
    theta, _, losses = run(LeastSquares(powell), (3, -1, 0, 1), 40)
    assert losses[-1] < 1e-20
    assert abs(theta).max() < 1e-4


def test_exact_data_are_fitted_exactly():
    x, wanted = np.linspace(0, 4, 40), np.array([2.0, 0.7, 1.3, 0.3])
    data = exponentials(x, np.zeros(40), False)(wanted)[0]
    for start in ((1, 1, 1, 0.1), (10, -3, 5, 0.01)):
        theta, report, losses = run(LeastSquares(exponentials(x, data, False), 40), start)
        assert report.converged
        assert losses[-1] < 1e-28
        assert len(losses) <= 20
        np.testing.assert_allclose(theta, wanted, rtol=1e-9)


@pytest.mark.parametrize("rows", [5, 20])
def test_directions_without_curvature_are_left_alone(rows):
    """Two columns of J are equal, and one is zero."""
    rng = np.random.default_rng(1)
    x, y = rng.standard_normal((rows, 8)), rng.standard_normal(rows)
    x[:, 7], x[:, 6] = x[:, 5], 0

    def function(theta):
        z = np.tanh(x @ theta)
        return z - y, (1 - z * z)[:, None] * x

    start = np.full(8, 0.1)
    theta, report, _ = run(LeastSquares(function, rows), start)
    assert report.converged
    assert report.details["gradient_norm"] < 1e-7
    assert theta[6] == pytest.approx(start[6], abs=1e-6)
    assert theta[7] == pytest.approx(theta[5], abs=1e-6)


@given(st.integers(0, 2**32), st.integers(1, 8), st.integers(1, 8), st.floats(-4, 4), st.floats(0, 6))
@settings(deadline=None, derandomize=True)
def test_linear_problems_are_solved_whatever_their_scale(seed, count, size, scale, spread):
    rng = np.random.default_rng(seed)
    j = rng.standard_normal((count, size)) * np.geomspace(1, 10.0**-spread, size) * 10.0**scale
    y = rng.standard_normal(count)
    objective = LeastSquares(lambda theta: (j @ theta - y, j), count)
    _, report, losses = run(objective, np.zeros(size), 40)
    best = j @ np.linalg.lstsq(j, y, rcond=None)[0] - y
    assert report.converged
    assert losses[-1] == pytest.approx(best @ best / 2 / count, rel=1e-6, abs=1e-12)


class Softmax(Objective):
    """Multinomial logistic regression with one weight vector per class, or a single one for two classes."""

    def __init__(self, classes, count=300, inputs=8, seed=0):
        rng = np.random.default_rng(seed)
        self.x = rng.standard_normal((count, inputs)) * np.geomspace(1, 30, inputs)
        z = self.x @ rng.standard_normal((inputs, classes)) / 20
        self.hot = np.eye(classes)[(z + rng.gumbel(size=z.shape)).argmax(1)]
        self.size = inputs * classes

    def outputs(self, theta):
        z = self.x @ theta.reshape(-1, self.hot.shape[1])
        z = z - z.max(1, keepdims=True)
        return z, np.exp(z) / np.exp(z).sum(1, keepdims=True)

    def loss(self, theta):
        z, _ = self.outputs(theta)
        return float((np.log(np.exp(z).sum(1)) - (z * self.hot).sum(1)).mean())

    def gradient(self, theta):
        _, p = self.outputs(theta)
        return Gradient(self.loss(theta), (self.x.T @ (p - self.hot)).reshape(-1) / len(p))

    def rows(self, theta, request=None):
        _, p = self.outputs(theta)
        root = np.sqrt(p)[:, :, None] * (np.eye(p.shape[1]) - np.sqrt(p[:, :, None] * p[:, None]))
        j = np.einsum("nkc,ni->ncik", root, self.x).reshape(p.size, -1)
        r = ((p - self.hot) / np.sqrt(p)).reshape(-1)
        return DenseRows(self.loss(theta), self.gradient(theta).vector, j, r, len(p), p.shape[1])


@pytest.mark.parametrize("classes", [2, 3, 10])
def test_logistic_regression_converges_quadratically(classes):
    objective = Softmax(classes)
    theta = np.zeros(objective.size)
    rows = objective.rows(theta)
    np.testing.assert_allclose(rows.matrix.T @ rows.residuals / rows.scored, rows.gradient, atol=1e-12)
    optimizer, newton, norms, newtons = LM(), theta, [], []
    state = optimizer.init(theta)
    for _ in range(10):
        rows = objective.rows(newton)
        newtons.append(np.linalg.norm(rows.gradient))
        newton = newton - np.linalg.lstsq(rows.normal() / rows.scored, rows.gradient, rcond=1e-10)[0]
        theta, state, report = optimizer.step(theta, state, Objectives(objective))
        norms.append(report.details["gradient_norm"])
        assert report.work.adjoints == classes - 1
    assert min(norms) < 1e-8
    first = [next(i for i, norm in enumerate(each) if norm < 1e-7) for each in (norms, newtons)]
    assert first[0] <= first[1] + 2


def test_lambda_rises_within_a_step_until_the_risk_falls():
    """The model overshoots: f = sqrt(1 + x^2) has a residual r = sqrt(2 f) whose J decreases far from 0."""

    def function(theta):
        f = np.sqrt(1 + theta**2)
        r = np.sqrt(2 * f)
        return r, (theta / f / r)[:, None]

    objective, optimizer = LeastSquares(function), LM()
    theta = np.array([3.0])
    after, state, report = optimizer.step(theta, LMState(1e-6, theta[:0]), Objectives(objective))
    damping = report.details["damping"]
    assert report.accepted
    assert objective.loss(after) < objective.loss(theta)
    assert report.work.losses > 1  # passes, of three candidates each
    assert report.work.candidates == 2 * report.work.losses
    (lower,) = exact_model(objective, objective.rows(theta), 0.0, theta[:0]).steps([damping / 27])
    assert objective.loss(theta + lower.p) > objective.loss(theta)
    assert state.damping < damping


@pytest.mark.parametrize("ranks", [1, 2, 3, 7])
def test_lambdas_after_the_first_that_lowers_the_risk_are_left_out_but_count(ranks, monkeypatch):
    """The step and its counts are those of the full group; each rank computes one lambda at a time."""
    objective, theta, solved, judged = LeastSquares(rosenbrock), np.array([-1.2, 1.0]), [], []
    state = LMState(0.3, theta[:0])  # its second lambda lowers the risk
    expected = LM().step(theta, state, Objectives(objective))
    monkeypatch.setattr(objective, "ranks", ranks, raising=False)
    spread, loss = objective.spread, objective.loss
    monkeypatch.setattr(
        objective, "spread", lambda works, *rest: solved.append(len(works)) or spread(works, *rest)
    )
    monkeypatch.setattr(objective, "loss", lambda theta: judged.append(theta) or loss(theta))
    after, later, report = LM().step(theta, state, Objectives(objective))
    np.testing.assert_array_equal(after, expected[0])
    assert (later.damping, report) == (expected[1].damping, expected[2])
    assert solved == {1: [1, 1], 2: [2], 3: [3], 7: [3]}[ranks]
    assert len(judged) == 3  # rows at theta, and two trials


@pytest.mark.parametrize("at_once", [1, 3])
def test_what_a_step_counts(at_once, monkeypatch):
    """Three lambdas are factored in parallel if the matrix is small, and share one loss pass."""
    monkeypatch.setattr("hfmpi.optim.exact_model.ALONE", 0 if at_once == 1 else ALONE)
    for (m, d), side in (((4, 9), 4), ((9, 4), 4)):
        theta = np.ones(d)
        _, _, report = LM().step(theta, LM().init(theta), Objectives(linear(m, d)))
        solve = cholesky(side) + triangular_solve(side) + triangular_solve(side)
        algebra = gram(side, max(m, d)) + together([solve] * at_once)
        if m < d:
            algebra += product(d, m, at_once)  # S'a of each lambda
        work = report.work
        assert (work.gradients, work.losses, work.adjoints) == (1, 1, 0)
        assert work.candidates == at_once - 1
        assert (work.operations, work.depth) == (algebra.operations, algebra.depth)


# The second-order correction


class Bending(LeastSquares):
    """With the second derivative of the residuals along a step, from a difference of J p."""

    def bends(self, theta):
        j = self.function(theta)[1]

        def bend(p):
            return j.T @ ((self.function(theta + 0.1 * p)[1] - j) @ p) / 0.1 / self.scored

        return bend


@pytest.mark.parametrize("shape", [(4, 9), (9, 4)])
def test_the_correction_is_that_of_the_dense_matrix(shape):
    objective, theta = linear(*shape), np.linspace(-1, 1, shape[1])
    rows, b = objective.rows(theta), np.cos(np.arange(shape[1]))
    model = exact_model(objective, rows, 0.0, theta[:0])
    steps = model.steps([0.2, 0.7])
    found = [model.bent(*each) for each in ((steps[0], 0.2, 1e-3 * b), (steps[1], 0.7, 1e3 * b))]
    a = -np.linalg.solve(rows.normal() / 3 + 0.2 * np.eye(shape[1]), 1e-3 * b)
    np.testing.assert_allclose(found[0].p, steps[0].p + a / 2, rtol=1e-9)
    assert (found[0].norm, found[0].promise) == (steps[0].norm, steps[0].promise)
    np.testing.assert_array_equal(found[1].p, steps[1].p)  # one that is too long is left out


def test_the_correction_follows_a_curved_valley_in_fewer_steps():
    def valley(theta):
        x, y = theta
        return np.array([100 * (y - x**3), 1 - x]), np.array([[-300 * x**2, 100.0], [-1.0, 0.0]])

    plain, bent = (run(kind(valley), (-1.2, -1.0)) for kind in (LeastSquares, Bending))
    for theta, report, _ in (plain, bent):
        assert report.converged
        np.testing.assert_allclose(theta, 1, rtol=1e-9)
    assert len(bent[2]) < 0.8 * len(plain[2])


@pytest.mark.parametrize("budget", [math.inf, 0.0])
def test_a_bend_is_the_second_derivative_of_the_outputs_along_a_step(budget):
    rng = np.random.default_rng(0)
    x, backend = rng.standard_normal((7, 5, 2)), create("numpy", "float64")
    model = Network(cell="rnn", inputs=2, outputs=1, hidden=8, loss="squares", backend=backend)
    owner = DataParallel(model, Communicator(), memory_budget=budget, micro_batch=3)
    risk, theta = owner.on(Arrays(x, x[:, :, :1]), np.arange(7)), model.initial(0)
    p = 0.1 * rng.standard_normal(theta.size)
    found = risk.bends(theta)(p)
    owner.memory_budget = owner.local.memory_budget = math.inf
    request = RowRequest("residuals")
    near, far = risk.rows(theta, request), risk.rows(theta + 0.1 * p, request)
    expected = near.transposed(far.times(p) - near.times(p)) / 0.1 / near.scored
    assert np.linalg.norm(expected) > 1e-4
    np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-12)


# Ends


def test_at_an_optimum_it_has_converged():
    objective = linear(9, 4)
    theta, report, _ = run(objective, np.ones(4))
    assert report.converged
    optimizer = LM()
    state = optimizer.init(theta)
    after, later, report = optimizer.step(theta, state, Objectives(objective))
    assert report.converged
    assert (after is theta, later is state) == (True, True)
    zero = LeastSquares(lambda theta: (np.zeros(2), np.eye(2)))
    _, _, report = optimizer.step(theta[:2], state, Objectives(zero))
    assert (report.converged, report.message) == (True, "the gradient is zero: nothing to do")


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_numbers_that_are_not_finite_are_rejected(bad):
    theta, optimizer = np.ones(2), LM()
    good = linear(3, 2).rows(theta)
    for loss, gradient, matrix in (
        (bad, good.gradient, good.matrix),
        (good.loss, good.gradient * bad, good.matrix),
        (good.loss, good.gradient, good.matrix * bad),
    ):
        objective, state = linear(3, 2), optimizer.init(theta)
        rows = DenseRows(loss, gradient, matrix, good.residuals)
        objective.rows = lambda theta, request, rows=rows: rows
        with np.errstate(invalid="ignore"):
            after, later, report = optimizer.step(theta, state, Objectives(objective))
        assert (after is theta, later is state, report.accepted) == (True, True, False)
        assert "not finite" in report.message


def test_a_risk_that_is_not_finite_after_every_step_ends_without_an_error():
    objective, theta = linear(3, 2), np.ones(2)
    objective.loss = lambda at: 1.0 if at is theta else math.inf
    after, state, report = LM().step(theta, LM().init(theta), Objectives(objective))
    assert (after is theta, report.accepted, report.converged) == (True, False, False)
    assert report.message == "step rejected: no damping lowers the risk"
    _, _, report = LM().step(theta, state, Objectives(objective))
    assert (report.converged, report.work.losses) == (True, 0)
    assert report.message.endswith("the damping is too large")


def test_too_large_a_matrix_is_refused_before_it_is_made():
    class Large(Objective):
        def loss(self, theta):
            return 1.0

        def gradient(self, theta):
            return Gradient(1.0, theta)

        def rows(self, theta, request):
            return DenseRows(1.0, theta, np.broadcast_to(np.zeros(1), (50_000, theta.size)))

    theta = np.ones(20_000)
    sentence = (
        r"^50,000 residuals and 20,000 parameters need a matrix of 20,000 x 20,000 numbers, which takes "
        r"3.2 GB, and the same amount for its factor: use fewer examples per step or a different optimizer, "
        r"or raise largest_side$"
    )
    with pytest.raises(UserError, match=sentence):
        LM().step(theta, LM().init(theta), Objectives(Large()))


def test_wrong_rows_and_settings_are_refused():
    theta, objective = np.ones(2), linear(1, 2)
    for wrong in ({"damping": 0.0}, {"momentum": 1.0}, {"momentum": -0.1}, {"largest_side": 0}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            LM(**wrong)
    good = objective.rows(theta)
    for rows, error, words in (
        (None, TypeError, r"LeastSquares.rows must return a RowMatrix, not None"),
        (DenseRows(None, theta, good.matrix, good.residuals), TypeError, "must return a number as the loss"),
        (DenseRows(1.0, theta[:1], good.matrix, good.residuals), ValueError, r"theta's shape \(2,\)"),
        (DenseRows(1.0, theta, good.matrix, theta), ValueError, "one residual for each of its 1 rows"),
        (
            DenseRows(1.0, theta.astype(np.float32), good.matrix, good.residuals),
            TypeError,
            "a gradient of theta's type, float64",
        ),
        (DenseRows(1.0, theta, good.matrix), UserError, "needs the residuals of the objective"),
    ):
        objective.rows = lambda theta, request, rows=rows: rows
        with pytest.raises(error, match=words):
            LM().step(theta, LM().init(theta), Objectives(objective))
    with pytest.raises(ValueError, match="direction of the state"):
        LM(momentum=0.5).step(theta, LM().init(theta), Objectives(objective))


@pytest.mark.parametrize("momentum", [0.0, 0.5])
def test_a_run_goes_on_bit_for_bit(momentum):
    objective, optimizer = LeastSquares(rosenbrock), LM(momentum=momentum)
    theta = np.array([-1.2, 1.0])
    state, way = optimizer.init(theta), []
    for _ in range(6):
        theta, state, _ = optimizer.step(theta, state, Objectives(objective))
        way.append((theta, state))
    theta, state = way[2]
    state = LMState(state.damping, state.direction.copy())
    for expected, _ in way[3:]:
        theta, state, _ = LM(momentum=momentum).step(theta.copy(), state, Objectives(objective))
        np.testing.assert_array_equal(theta, expected)


# The factorization


def positive(size, condition=1e3, seed=0):
    rng = np.random.default_rng(seed)
    q, _ = np.linalg.qr(rng.standard_normal((size, size)))
    a = (q * np.geomspace(1, 1 / condition, size)) @ q.T
    return (a + a.T) / 2


@pytest.fixture
def panels(monkeypatch):
    """Use narrow panels for small matrices too."""
    monkeypatch.setattr("hfmpi.optim.cholesky.ALONE", 0)
    monkeypatch.setattr("hfmpi.optim.cholesky.PANEL", 40)


@pytest.mark.parametrize("size", [1, 2, 39, 40, 41, 80, 123])
@pytest.mark.parametrize("condition", [1e3, 1e14])
def test_a_factor_by_panels_solves_as_accurately_as_numpy(panels, size, condition):
    a, b = positive(size, condition), np.cos(np.arange(2.0 * size)).reshape(size, 2)
    before = a.copy()
    x = solved(linear(1, 1), a, 0.25 / condition, b)
    np.testing.assert_array_equal(a, before)
    shifted = a + 0.25 / condition * np.eye(size)
    residual = np.linalg.norm(shifted @ x - b) / (np.linalg.norm(shifted) * np.linalg.norm(x))
    assert residual < 1e-14
    np.testing.assert_allclose(x, np.linalg.solve(shifted, b), rtol=1e-13 * condition)


@pytest.mark.parametrize("at", [0, 39, 40, 100])
def test_a_matrix_that_is_not_positive_definite_has_no_factor(panels, at):
    a = positive(123)
    a[at, at] = -1e-3
    assert solved(linear(1, 1), a, 0.0, np.ones((123, 1))) is None
    assert solved(linear(1, 1), a, 2.0, np.ones((123, 1))) is not None


def test_without_panels_such_a_matrix_has_no_factor_either():
    assert solved(linear(1, 1), np.diag([1.0, -1.0]), 0.0, np.ones((2, 1))) is None
    assert solved(linear(1, 1), np.diag([1.0, math.nan]), 0.0, np.ones((2, 1))) is None


class Ranks(Objective):
    """Passes works to a number of ranks without shared memory: no work sees the results of another one."""

    def __init__(self, ranks):
        self.ranks, self.messages = ranks, 0

    def loss(self, theta):
        return 0.0

    def gradient(self, theta):
        return Gradient(0.0, theta)

    def spread(self, works, sizes, wide=False, name=""):
        assert wide
        self.messages += 1
        results = [work() for work in reversed(works)]
        assert [result.size for result in results] == [*reversed(sizes)]
        return results[::-1]


def test_a_large_matrix_is_factored_by_panels_with_one_message_each():
    size = ALONE + 1
    a, b, ranks = positive(size), np.ones((size, 1)), Ranks(2)
    x = solved(ranks, a, 0.0, b)
    assert ranks.messages == -(-size // PANEL) + 1
    np.testing.assert_allclose(a @ x, b, atol=1e-9)
    np.testing.assert_array_equal(x, solved(linear(1, 1), a, 0.0, b))
    assert solved(ranks, a[:ALONE, :ALONE], 0.0, b[:ALONE]) is not None
    assert ranks.messages == -(-size // PANEL) + 2


@pytest.mark.parametrize("size", [1, 4, 97])
def test_each_shift_is_factored_once_and_a_solution_may_be_left_out(size, monkeypatch):
    a, b = positive(size), np.cos(np.arange(2.0 * size)).reshape(size, 2)
    before, shifts, known, factored = a.copy(), [0.1, 0.3, 0.9], {}, []
    whole = np.array([np.linalg.solve(a + shift * np.eye(size), b) for shift in shifts])
    dpotrf = scipy.linalg.lapack.dpotrf
    monkeypatch.setattr("hfmpi.optim.cholesky.dpotrf", lambda *x, **y: factored.append(1) or dpotrf(*x, **y))
    objective = Ranks(3)
    found = solutions(objective, a, shifts, [b] * 3, known)
    np.testing.assert_allclose(found, whole, rtol=1e-12, atol=1e-12)
    nothing, x, none = solutions(objective, a, shifts, [None, b[:, :1], None], known)
    np.testing.assert_allclose(x, whole[1, :, :1], rtol=1e-12, atol=1e-12)
    np.testing.assert_array_equal(a, before)
    assert nothing is none is None
    assert (objective.messages, len(factored)) == (2, 3)


# On the objective of a model


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_network_is_fitted(dtype):
    rng = np.random.default_rng(0)
    x = rng.standard_normal((12, 5, 2))
    backend = create("numpy", np.dtype(dtype).name)
    model = Network(cell="rnn", inputs=2, outputs=1, hidden=6, loss="squares", backend=backend)
    cases = Arrays(x, np.sin(x.cumsum(axis=1)[:, :, :1]))
    risk = DataParallel(model, Communicator()).on(cases, np.arange(12))
    theta = model.initial(0).astype(dtype)
    optimizer, losses = LM(), [risk.loss(theta)]
    state = optimizer.init(theta)
    for _ in range(15):
        theta, state, _ = optimizer.step(theta, state, Objectives(risk))
        losses.append(risk.loss(theta))
    assert theta.dtype == dtype
    assert losses[-1] < 0.05 * losses[0]
    assert all(b <= a for a, b in pairwise(losses))


def network_way(communicator, slices, optimizer):
    """Return theta after some steps of a network with 97 parameters on 60 residuals, then on 300."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((60, 5, 2))
    backend = create("numpy", "float64")
    model = Network(cell="rnn", inputs=2, outputs=1, hidden=8, loss="squares", backend=backend)
    cases, theta = Arrays(x, np.sin(x.cumsum(axis=1)[:, :, :1])), model.initial(0)
    state, owner = optimizer.init(theta), DataParallel(model, communicator, slices=slices)
    for count in (12, 12, 12, 60, 60, 60):
        objectives = Objectives(owner.on(cases, np.arange(count)))
        theta, state, report = optimizer.step(theta, state, objectives)
        assert report.accepted
    return theta


def check_refused_before_its_rows(communicator, monkeypatch):
    x, backend = np.random.default_rng(0).standard_normal((12, 5, 2)), create("numpy", "float64")
    model = Network(cell="rnn", inputs=2, outputs=1, hidden=8, loss="squares", backend=backend)
    risk = DataParallel(model, communicator).on(Arrays(x, x[:, :, :1]), np.arange(12))
    theta, optimizer = model.initial(0), LM(largest_side=59)

    def computed(*_):
        raise AssertionError("a row was computed")

    monkeypatch.setattr("hfmpi.objective.local_rows._add", computed)
    with pytest.raises(UserError, match=r"60 residuals and 97 parameters need a matrix of 60 x 60 numbers"):
        optimizer.step(theta, optimizer.init(theta), Objectives(risk))


def test_too_large_a_matrix_of_a_model_is_refused_before_its_rows_are_computed(monkeypatch):
    check_refused_before_its_rows(Communicator(), monkeypatch)


@pytest.mark.mpi(ranks=3, timeout=60, unit="s")
def test_ranks_refuse_too_large_a_matrix_in_one_sentence(mpi_ranks, comm, monkeypatch):
    communicator = MPICommunicator(comm)
    check_refused_before_its_rows(communicator, monkeypatch)
    communicator.close()


def check_ranks(comm):
    """Check that the ranks of comm take the same steps as one rank, with momentum and without."""
    communicator = MPICommunicator(comm)
    for momentum in (0.0, 0.5):
        optimizer = LM(momentum=momentum)
        theta = network_way(communicator, 0, optimizer)
        assert communicator.same(digest(theta)) == []
        np.testing.assert_allclose(theta, network_way(Communicator(), 0, optimizer), rtol=1e-6)
    communicator.close()


@pytest.mark.mpi(ranks=3, timeout=60, unit="s")
def test_ranks_share_the_factorization(mpi_ranks, comm, panels):
    assert comm.size == mpi_ranks
    check_ranks(comm)


@pytest.mark.mpi(ranks=2, timeout=60, unit="s")
def test_ranks_compute_several_shifts_side_by_side(mpi_ranks, comm):
    check_ranks(comm)


@pytest.mark.mpi(ranks=2, timeout=60, unit="s")
def test_with_slices_theta_does_not_depend_on_the_ranks(mpi_ranks, comm, panels):
    communicator = MPICommunicator(comm)
    theta = network_way(communicator, 4, LM())
    np.testing.assert_array_equal(theta, network_way(Communicator(), 4, LM()))
    communicator.close()


class Replayed(LeastSquares):
    """A rank other than rank 0, which rounds differently and continues with the values of rank 0."""

    def __init__(self, function, log):
        super().__init__(function)
        self.log = log

    def loss(self, theta):
        return super().loss(theta) * (1 + 1e-9)

    def agree(self, values):
        agreed = self.log.pop(0)
        assert len(agreed) == len(values)
        return agreed

    def spread(self, works, sizes, wide=False, name=""):
        return self.log.pop(0)


@pytest.mark.parametrize("momentum", [0.0, 0.5])
def test_ranks_that_round_differently_take_the_same_steps(momentum):
    log, first, optimizer = [], LeastSquares(rosenbrock), LM(momentum=momentum)

    def logged(values):
        log.append(values)
        return values

    first.agree = logged
    first.spread = lambda works, sizes, wide: logged([work() for work in works])
    theta, report, losses = run(first, (-1.2, 1), 12, optimizer)
    other, same, same_losses = run(Replayed(rosenbrock, log), (-1.2, 1), 12, optimizer)
    np.testing.assert_array_equal(theta, other)
    assert (report, losses, log) == (same, same_losses, [])


def test_on_changing_batches_lambda_has_a_floor():
    objective, theta = linear(4, 9), np.linspace(-1, 1, 9)
    optimizer, changing = LM(damping=0.01), Objectives(objective, repeated=False)
    state, lambdas = optimizer.init(theta), []
    for _ in range(5):
        theta, state, report = optimizer.step(theta, state, changing)
        lambdas.append(report.details["damping"])
    floor = 0.01 * np.trace(objective.rows(theta).normal()) / 3 / 9
    np.testing.assert_allclose(lambdas, floor)
