"""L-BFGS: the line search on functions of More and Thuente, directions against a dense matrix, runs."""

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small import history, make_run, same, shared_corpus, train, write_corpus
from test_python_train import AtLine, Line
from test_subspace import BLOCKS, SIZE, Bowl

import hfmpi
from hfmpi.errors import UserError
from hfmpi.optim import LBFGS, Gradient, Objective, Objectives, Subspace
from hfmpi.optim.lbfgs import two_loop
from hfmpi.optim.wolfe import MoreThuente, Trial
from hfmpi.parallel.communicator import MPICommunicator

# The line search ------------------------------------------------------------------------------


def rational(a):
    return -a / (a * a + 2), (a * a - 2) / (a * a + 2) ** 2


def quintic(a):
    b = a + 0.004
    return b**5 - 2 * b**4, 5 * b**4 - 8 * b**3


def waves(a, beta=0.01, count=39):
    value, slope = abs(1 - a), math.copysign(1.0, a - 1)
    if abs(1 - a) < beta:
        value, slope = (a - 1) ** 2 / (2 * beta) + beta / 2, (a - 1) / beta
    turn = count * math.pi / 2
    return (
        value + (1 - beta) / turn * math.sin(turn * a),
        slope + (1 - beta) * math.cos(turn * a),
    )


def yanai(one, two):
    """Return the function of Yanai, Ozawa and Kaneko."""
    left, right = math.hypot(1, one) - one, math.hypot(1, two) - two
    return lambda a: (
        left * math.hypot(1 - a, two) + right * math.hypot(a, one),
        left * (a - 1) / math.hypot(1 - a, two) + right * a / math.hypot(a, one),
    )


def searched(function, first, **changes):
    """Search from an initial rate; return the result and the rates that were tried."""
    tried = []

    def evaluate(rate):
        tried.append(rate)
        return Trial(rate, *function(rate))

    start = Trial(0.0, *function(0.0))
    return MoreThuente(**changes).search(evaluate, start, first), tried


# Functions, constants and numbers of evaluations: tables I to VI of More and Thuente (1994).
TABLES = [
    (rational, 1e-3, 0.1, (6, 3, 1, 4)),
    (quintic, 0.1, 0.1, (12, 8, 8, 11)),
    (waves, 0.1, 0.1, (12, 12, 10, 13)),
    (yanai(1e-3, 1e-3), 1e-3, 1e-3, (4, 1, 3, 4)),
    (yanai(1e-2, 1e-3), 1e-3, 1e-3, (6, 3, 7, 8)),
    (yanai(1e-3, 1e-2), 1e-3, 1e-3, (13, 11, 8, 11)),
]


@pytest.mark.parametrize(("function", "sufficient", "curvature", "evaluations"), TABLES)
def test_the_line_search_is_that_of_the_paper(function, sufficient, curvature, evaluations):
    for first, count in zip((1e-3, 1e-1, 10.0, 1e3), evaluations, strict=True):
        result, tried = searched(function, first, sufficient=sufficient, curvature=curvature, narrow=1e-10)
        (before, slope), (after, later) = function(0.0), function(result.best.rate)
        assert result.satisfied
        assert after <= before + sufficient * result.best.rate * slope
        assert abs(later) <= curvature * abs(slope)
        assert len(tried) == result.evaluations == count


@given(wall=st.floats(1e-6, 2.0), first=st.floats(1e-3, 1e6), bad=st.sampled_from([math.nan, math.inf]))
@settings(deadline=None, derandomize=True)
def test_no_trial_follows_beyond_one_that_is_not_finite(wall, first, bad):
    def function(a):
        return (-math.sqrt(a + 1), -0.5 / math.sqrt(a + 1)) if a < wall else (bad, bad)

    result, tried = searched(function, first)
    assert result.best.loss < -1
    assert result.best.rate < wall
    bounds = [a for a in tried if a >= wall]
    assert bounds == sorted(bounds, reverse=True)


def test_a_search_without_a_lower_or_finite_value_ends():
    rising, tried = searched(lambda a: (1 + a, -1.0 if a == 0 else 1.0), 1.0)
    assert (rising.best.rate, rising.satisfied, rising.finite.rate) == (0.0, False, 1.0)
    nowhere, others = searched(lambda a: (0.0, -1.0) if a == 0 else (math.nan, math.nan), 1.0)
    assert (nowhere.best.rate, nowhere.satisfied, nowhere.finite) == (0.0, False, None)
    assert max(len(tried), len(others)) <= MoreThuente.tries


# The direction --------------------------------------------------------------------------------


@given(count=st.integers(0, 6), seed=st.integers(0, 2**31))
@settings(deadline=None, derandomize=True, max_examples=30)
def test_the_recursion_is_the_dense_bfgs_matrix(count, seed):
    rng, size = np.random.default_rng(seed), 5
    root = rng.standard_normal((size, size))
    s = rng.standard_normal((count, size))
    y = s @ (root @ root.T + 0.1 * np.eye(size))
    g = rng.standard_normal(size)
    h = np.eye(size) * (s[0] @ y[0] / (y[0] @ y[0]) if count else 1.0)
    for a, b in zip(s[::-1], y[::-1], strict=True):  # the oldest first
        left = np.eye(size) - np.outer(a, b) / (a @ b)
        h = left @ h @ left.T + np.outer(a, a) / (a @ b)
    p, coefficients = two_loop(g, s, y)
    np.testing.assert_allclose(p, -h @ g, rtol=1e-7, atol=1e-9 * np.linalg.norm(h @ g))
    np.testing.assert_array_equal(two_loop(g, s, y, coefficients)[0], p)


# Steps ----------------------------------------------------------------------------------------


class Function(Objective):
    """A risk from a function theta -> (value, gradient); counts the evaluations."""

    def __init__(self, function):
        self.function, self.evaluations = function, 0

    def loss(self, theta):
        raise AssertionError("L-BFGS needs no losses")

    def gradient(self, theta):
        self.evaluations += 1
        value, g = self.function(theta)
        return Gradient(float(value), g.astype(theta.dtype))


def rosenbrock(theta):
    x, y = theta.astype(np.float64)
    g = np.array([-400 * x * (y - x * x) - 2 * (1 - x), 200 * (y - x * x)])
    return 100 * (y - x * x) ** 2 + (1 - x) ** 2, g


def bowl(scale, centre=1.0):
    return lambda theta: (scale @ (theta - centre) ** 2 / 2, scale * (theta - centre))


def minimised(function, theta, most=300, **changes):
    """Take steps until convergence; return theta, the last report and the objective."""
    objective, optimizer = Function(function), LBFGS(**changes)
    state, total = optimizer.init(theta), 0
    for _ in range(most):
        before = theta
        theta, state, report = optimizer.step(theta, state, Objectives(objective))
        total += report.work.gradients
        if report.converged or not report.accepted:
            np.testing.assert_array_equal(theta, before)
            break
    assert objective.evaluations == total
    return theta, report, objective


@pytest.mark.parametrize(("dtype", "close"), [(np.float32, 1e-3), (np.float64, 1e-12)])
def test_rosenbrock_converges_to_rounding(dtype, close):
    theta, report, objective = minimised(rosenbrock, np.array([-1.2, 1.0], dtype))
    assert report.converged
    np.testing.assert_allclose(theta, 1, atol=close)
    assert objective.evaluations < 100
    assert theta.dtype == dtype


def test_a_quadratic_takes_as_many_steps_as_it_has_curvatures():
    """With exact line searches BFGS ends after n steps (Nocedal and Wright 2006, theorem 6.4)."""
    scale = np.array([1.0, 3.0, 10.0, 40.0])
    objective, theta = Function(bowl(scale)), np.zeros(4)
    optimizer = LBFGS(line_search_curvature=1e-9, line_search_sufficient=1e-10, line_search_tries=60)
    state = optimizer.init(theta)
    for _ in range(4):
        theta, state, _ = optimizer.step(theta, state, Objectives(objective))
    np.testing.assert_allclose(theta, 1, atol=1e-7)


def test_a_longer_memory_takes_fewer_gradients():
    scale = np.geomspace(1, 1e4, 40)
    counts = [minimised(bowl(scale), np.zeros(40), 3000, memory=m)[2].evaluations for m in (3, 40)]
    assert counts[1] < counts[0] / 2


def test_each_gradient_is_computed_once_where_the_batch_stays_the_same():
    for repeated, most in ((True, 1), (False, 2)):
        optimizer, objective, theta = LBFGS(), Function(bowl(np.ones(3))), np.zeros(3)
        theta, state, _ = optimizer.step(
            theta, optimizer.init(theta), Objectives(objective, repeated=repeated)
        )
        before = objective.evaluations
        _, _, report = optimizer.step(theta, state, Objectives(objective, repeated=repeated))
        assert objective.evaluations - before == report.work.gradients == most


def test_pairs_without_curvature_are_left_out():
    optimizer, theta = LBFGS(), np.zeros(2)
    objective = Function(lambda t: (-t.sum(), -np.ones(2)))  # an unbounded slope
    _, state, report = optimizer.step(theta, optimizer.init(theta), Objectives(objective))
    assert report.accepted
    assert state.pairs == 0


def test_memory_that_misleads_is_forgotten_and_the_gradient_followed():
    optimizer, objective, theta = LBFGS(memory=1), Function(bowl(np.array([1.0, 2.0]))), np.zeros(2)
    state = optimizer.init(theta)
    s, y = np.array([1e9, 0.0]), np.array([1e-9, 0.0])  # steps along it overflow
    wrong = replace(state, pairs=1, s=s * 1e160, y=y * 1e-160)
    with np.errstate(all="ignore"):
        _, later, report = optimizer.step(theta, wrong, Objectives(objective))
    assert report.accepted
    assert report.details["pairs"] == 0
    assert later.pairs == 1


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize(
    "function",
    [bowl(np.ones(2), 0.0), lambda t: (3.0, np.zeros(2)), lambda t: (3.0, np.full(2, 1e-30))],
    ids=["at the optimum", "flat", "flat with a slope of rounding"],
)
def test_nothing_moves_where_nothing_can_be_gained(function, dtype):
    theta, report, _ = minimised(function, np.zeros(2, dtype))
    assert (report.converged, report.accepted) == (True, True)
    assert report.message
    np.testing.assert_array_equal(theta, 0)


def test_a_large_risk_is_lowered_where_a_short_step_is_lost_in_its_rounding():
    scale = np.float32(1e8)

    def far(theta):  # a step of length 1 lowers the risk of 5e15 by 1e8, and its rounding is 6e8
        return float((theta - scale) @ (theta - scale)) / 2, theta - scale

    theta, report, _ = minimised(far, np.zeros(1, np.float32))
    assert report.converged
    np.testing.assert_allclose(theta, scale, rtol=1e-3)


def test_a_wall_of_nan_is_approached_and_not_crossed():
    def barrier(theta):
        with np.errstate(all="ignore"):
            return theta.sum() - 1e-3 * np.log(theta).sum(), 1 - 1e-3 / np.where(theta > 0, theta, np.nan)

    theta, report, _ = minimised(barrier, np.array([0.9, 0.1]))
    assert report.converged
    np.testing.assert_allclose(theta, 1e-3, rtol=1e-6)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_is_rejected(value):
    _, report, _ = minimised(lambda t: (value, t), np.ones(2))
    assert not report.accepted
    # Finite at the start only: no step is possible, but the start is not an optimum.
    _, report, _ = minimised(lambda t: (1.0 if t[0] == 1 else value, np.ones(2)), np.ones(2))
    assert (report.accepted, report.converged) == (False, False)
    assert "not finite" in report.message


def test_settings_and_states_that_do_not_fit_are_refused():
    for name, value in (("memory", 0), ("line_search_tries", 0), ("line_search_curvature", 1.0)):
        with pytest.raises(ValueError, match=name):
            LBFGS(**{name: value})
    with pytest.raises(ValueError, match="must be smaller"):
        LBFGS(line_search_sufficient=0.5, line_search_curvature=0.1)
    theta, objective = np.zeros(2), Function(rosenbrock)
    with pytest.raises(ValueError, match="does not fit memory="):
        LBFGS(memory=3).step(theta, LBFGS(memory=2).init(theta), Objectives(objective))


# Ranks ----------------------------------------------------------------------------------------

TEXT = {"optimizer": "lbfgs", "gradient_batch": 210, "curvature_batch": 0, "max_steps": 6}


@pytest.mark.mpi(ranks=3, timeout=100, unit="s")
def test_the_numbers_of_ranks_make_no_difference(mpi_ranks, comm, mpi_tmp_path):
    assert comm.size == mpi_ranks
    data = shared_corpus(comm, mpi_tmp_path)
    losses = []
    for ranks in (1, 2, 3):
        part = comm.Split(0 if comm.rank < ranks else 1)
        if comm.rank < ranks:
            communicator = MPICommunicator(part)
            run, _ = train(None, data, communicator, **TEXT)
            losses.append(run.lowest.risk)
            communicator.close()
        comm.Barrier()
    np.testing.assert_allclose(losses, losses[-1], rtol=1e-9)


# Runs -----------------------------------------------------------------------------------------


def test_a_resumed_run_is_the_same_bit_for_bit(tmp_path):
    data = write_corpus(tmp_path / "text.h5")
    whole, _ = train(tmp_path / "whole", data, **TEXT)
    train(tmp_path / "part", data, **TEXT | {"max_steps": 3})
    rest, _ = train(tmp_path / "part", data, **TEXT)
    same(whole, rest)
    assert history(tmp_path / "whole") == history(tmp_path / "part")


def test_batches_that_change_are_refused(tmp_path):
    data = write_corpus(tmp_path / "text.h5")
    with pytest.raises(UserError, match="same batch in every step: set --gradient-batch to 210, the number"):
        make_run(None, data, **TEXT | {"gradient_batch": 100})
    with pytest.raises(UserError, match="same batch in every step, but --input-noise changes it"):
        make_run(None, data, **TEXT, input_noise=0.1)
    x = np.linspace(-1, 1, 40)[:, None]
    with pytest.raises(UserError, match="same batch in every step: set gradient_batch to 40, the number"):
        hfmpi.train(Line(1), (x, x[:, 0]), optimizer="lbfgs", gradient_batch=30, max_steps=1, quiet=True)


def test_all_data_are_the_batch_however_many_they_are():
    x = np.linspace(-1, 1, 15_000)[:, None]
    result = hfmpi.train(Line(1), (x, 3 * x[:, 0]), optimizer="lbfgs", max_steps=50, quiet=True)
    np.testing.assert_allclose(result.theta, [3, 0], atol=1e-9)
    assert "converged" in result.reason


class Negative(Line):
    """A linear function with a negative risk, as a logarithm of a density can have."""

    def linearise(self, theta, batch, reuse=None):
        at = super().linearise(theta, batch)
        at.loss -= 10.0 * len(batch.targets)
        return at


def test_a_run_with_a_negative_risk_goes_on(tmp_path):
    x = np.random.default_rng(0).standard_normal((40, 3))
    options = {"optimizer": "lbfgs", "out": tmp_path / "run", "quiet": True}
    hfmpi.train(Negative(3), (x, x.sum(axis=1)), max_steps=2, **options)
    result = hfmpi.train(Negative(3), (x, x.sum(axis=1)), max_steps=4, **options)
    assert [record["loss"] < -5 for record in result.history] == [True] * 4


class Tanh(Line):
    """v tanh(w x + b) + c."""

    def __init__(self, hidden):
        super().__init__(3 * hidden)

    def linearise(self, theta, batch, reuse=None):
        w, b, v = theta[:-1].reshape(3, -1)
        h = np.tanh(w * batch.inputs + b)
        d = v * (1 - h * h)
        rows = np.column_stack([d * batch.inputs, d, h, np.ones(len(h))])
        at = AtLine(rows, theta, 0.0)
        at.error = h @ v + theta[-1] - batch.targets
        at.loss = float(at.error @ at.error) / 2
        return at


@pytest.mark.parametrize("optimizer", ["lbfgs", "bhf", "bhf-squares"])
def test_least_squares_in_float64_go_down_to_rounding(optimizer):
    """A relative error of 1e-9 is a risk of 1e-18 and less, far below the grid of 2^-52."""
    model, x = Tanh(2), np.linspace(-2, 2, 50)[:, None]
    w, b, v = np.random.default_rng(102).standard_normal(model.size)[:-1].reshape(3, -1)
    y = np.tanh(x * w + b) @ v
    result = hfmpi.train(model, (x, y), optimizer=optimizer, max_steps=1000, quiet=True, seed=2)
    lowest = min(record["loss"] for record in result.history)
    assert math.sqrt(2 * lowest) < 1e-9 * math.sqrt(np.mean(y * y))
    assert "converged" in result.reason  # on its own, without an error


@pytest.mark.parametrize("candidates", [0, 1])
@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_the_subspace_step_goes_down_to_rounding_too(candidates, scale):
    bowl, optimizer = Bowl(1), Subspace(candidates=candidates)
    bowl.centre = bowl.centre * scale
    theta, report = np.zeros(SIZE), None
    state = optimizer.init(theta, BLOCKS)
    rejected = 0
    while not (report and report.converged):
        theta, state, report = optimizer.step(theta, state, Objectives(bowl, bowl))
        rejected = 0 if report.accepted else rejected + 1
        assert rejected < 20
    assert report.loss < 1e-26 * scale**2
