"""First-order methods against their formulas, in plain NumPy and double precision."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hfmpi.errors import UserError
from hfmpi.optim import SOAP, Adam, Gradient, GradientDescent, Muon, Objective, Objectives, SOAPMuon
from hfmpi.optim.first_order import evaluated
from hfmpi.optim.layout import Block
from hfmpi.optim.muon import orthogonal
from hfmpi.optim.soap import TIES


class Linear(Objective):
    """A risk whose gradient at update t is the t-th in a list; by default theta is one row."""

    def __init__(self, gradients, blocks=()):
        self.gradients, self.named = iter(gradients), blocks or (Block("all", 0, 1, len(gradients[0])),)

    @property
    def blocks(self):
        return self.named

    def loss(self, theta):
        return 1.0

    def gradient(self, theta):
        return Gradient(1.0, next(self.gradients))


def updates(optimizer, gradients, dtype=np.float64, blocks=(), theta=None):
    """Return the changes of theta, the last state and the reports for these gradients."""
    gradients = [np.asarray(g, dtype) for g in gradients]
    theta = np.zeros(len(gradients[0]), dtype) if theta is None else theta
    objective = Linear(gradients, blocks)
    state, objectives = optimizer.init(theta, objective.blocks), Objectives(objective)
    steps, reports = [], []
    for _ in gradients:
        before = theta.copy()
        new, state, report = optimizer.step(theta, state, objectives)
        assert np.array_equal(theta, before)
        assert new.dtype == dtype
        steps.append(new - theta)
        theta = new
        reports.append(report)
    return steps, state, reports


RNG = np.random.default_rng(0)
GRADIENTS = [RNG.standard_normal(7) * scale for scale in (0.01, 1, 30, 0.3, 5)]


def test_clip():
    steps, _, reports = updates(GradientDescent("clip", rate=0.5, threshold=2.0, decay=1.0), GRADIENTS)
    for p, g, report in zip(steps, GRADIENTS, reports, strict=True):
        assert np.allclose(p, -0.5 * g * min(1, 2 / np.linalg.norm(g)))
        assert np.linalg.norm(p) <= 1.0 + 1e-12
        assert report.details["step_norm"] == pytest.approx(np.linalg.norm(p))
        assert report.work.gradients == 1


def test_normalised_with_decay_and_floor():
    optimizer = GradientDescent("normalised", rate=0.5, decay=0.5, floor=0.1)
    steps, state, _ = updates(optimizer, GRADIENTS)
    for p, g, length in zip(steps, GRADIENTS, (0.5, 0.25, 0.125, 0.1, 0.1), strict=True):
        assert np.allclose(p, -length * g / np.linalg.norm(g))
    assert state.updates == 5


def test_rms_normalised():
    optimizer = GradientDescent("rms-normalised", rate=2.0, decay=0.9, mean_square_decay=0.7, epsilon=1e-3)
    steps, state, _ = updates(optimizer, GRADIENTS)
    r = GRADIENTS[0] ** 2
    for t, (p, g) in enumerate(zip(steps, GRADIENTS, strict=True)):
        if t:
            r = 0.7 * r + 0.3 * g**2
        direction = g / (np.sqrt(r) + 1e-3)
        assert np.allclose(p, -2.0 * 0.9**t * direction / np.linalg.norm(direction))
    assert np.allclose(state.mean_square, r)


@pytest.mark.parametrize("rule", ["clip", "normalised", "rms-normalised"])
def test_zero_and_bad_gradients_move_nothing(rule):
    for bad in (0.0, np.nan, np.inf):
        steps, state, (report,) = updates(GradientDescent(rule), [np.full(3, bad)])
        assert np.array_equal(steps[0], np.zeros(3))
        assert report.accepted == (bad == 0.0)
        assert state.updates == 0
        assert ("is zero" if bad == 0.0 else "not finite") in report.message


def adam(gradients, rate, b1, b2, eps, threshold):
    """Return the updates of Algorithm 1 of Kingma and Ba."""
    m = v = np.zeros_like(gradients[0])
    for t, g in enumerate(gradients, 1):
        if np.linalg.norm(g) > threshold:
            g = threshold * g / np.linalg.norm(g)
        m = b1 * m + (1 - b1) * g
        v = b2 * v + (1 - b2) * g**2
        yield -rate * (m / (1 - b1**t)) / (np.sqrt(v / (1 - b2**t)) + eps)


@pytest.mark.parametrize("threshold", [1.0, 1e9])
def test_adam(threshold):
    optimizer = Adam(rate=0.1, beta1=0.8, beta2=0.95, epsilon=1e-4, threshold=threshold)
    steps, state, reports = updates(optimizer, GRADIENTS * 2)
    for p, q in zip(steps, adam(GRADIENTS * 2, 0.1, 0.8, 0.95, 1e-4, threshold), strict=True):
        assert np.allclose(p, q, rtol=1e-12)
    assert state.updates == 10
    assert reports[3].details["gradient_norm"] == pytest.approx(np.linalg.norm(GRADIENTS[3]))


ADAPTIVE = Adam(), SOAP(), SOAP(nesterov=True), Muon(), SOAPMuon()


@pytest.mark.parametrize("optimizer", ADAPTIVE)
@pytest.mark.parametrize("shape", [(1, 6), (2, 3)])
def test_adaptive_methods_leave_zero_and_bad_gradients(optimizer, shape):
    blocks = (Block("all", 0, *shape),)
    steps, state, (report,) = updates(optimizer, [np.zeros(6)], blocks=blocks)
    assert np.array_equal(steps[0], np.zeros(6))
    assert (report.accepted, report.message) == (True, "the gradient is zero")
    assert state.updates == 1
    for bad in (np.nan, np.inf):
        steps, state, (report,) = updates(optimizer, [np.full(6, bad)], blocks=blocks)
        assert np.array_equal(steps[0], np.zeros(6))
        assert (report.accepted, report.message) == (False, "update rejected: the gradient is not finite")
        assert state.updates == 0


def test_factors_that_overflow_are_rejected():
    gradients, blocks = [np.ones(6), np.full(6, 1e30)], (Block("all", 0, 2, 3),)
    with np.errstate(all="ignore"):
        steps, state, reports = updates(SOAP(refresh=1), gradients, np.float32, blocks)
    assert [report.accepted for report in reports] == [True, False]
    assert np.array_equal(steps[1], np.zeros(6))
    assert reports[1].message == "update rejected: the update is not finite"
    assert state.updates == 1


@pytest.mark.parametrize("optimizer", [GradientDescent("clip"), GradientDescent(), *ADAPTIVE])
def test_single_precision_stays(optimizer):
    updates(optimizer, GRADIENTS, np.float32)
    updates(optimizer, [np.resize(g, 6) for g in GRADIENTS], np.float32, (Block("all", 0, 2, 3),))


# Matrices --------------------------------------------------------------------------------------

# If both sides are rotated, they differ by at most one: then the eigenvectors are unique.
BLOCKS = (
    Block("a", 0, 4, 5),
    Block("b", 20, 1, 6),
    Block("c", 26, 5, 4),
    Block("d", 46, 3, 9),
    Block("e", 73, 9, 3),
)
MATRICES = [RNG.standard_normal(100) * scale for scale in (1, 0.1, 3, 0.7, 2, 1, 0.2, 5, 1)]
START = RNG.standard_normal(100)


def soap(gradients, theta, block, settings, ties=0.0, finish=lambda p: p):
    """Return the steps of SOAP on a matrix, with eigenvectors from `eigh`, then by orthogonal iterations.

    `finish` is applied to the step without its rate.
    """
    s, rows, columns = settings, block.rows, block.columns
    turn = [min(rows, columns) > 1 and side <= s["longest_side"] for side in (rows, columns)]
    factors, bases = [np.zeros((side, side)) for side in (rows, columns)], [np.eye(rows), np.eye(columns)]
    m = v = np.zeros((rows, columns))
    for t, whole in enumerate(gradients, 1):
        g = whole[block.start :][: rows * columns].reshape(rows, columns)
        keep = s["factor_decay"] if t > 1 else 0.0
        for side, square in enumerate((g @ g.T, g.T @ g)):
            factors[side] = keep * factors[side] + (1 - keep) * square
            size = len(square)
            tied = factors[side] + ties * np.trace(factors[side]) / size * np.diag(np.arange(size) / size)
            if turn[side] and t == 1:
                bases[side] = np.linalg.svd(tied)[0]
            elif turn[side] and (t - 1) % s["refresh"] == 0:
                bases[side] = np.linalg.qr(tied @ bases[side])[0]
        m, turned = s["beta1"] * m + (1 - s["beta1"]) * g, bases[0].T @ g @ bases[1]
        v = s["beta2"] * v + (1 - s["beta2"]) * turned**2
        root = np.sqrt(v / (1 - s["beta2"] ** t)) + s["epsilon"]
        mean = m / (1 - s["beta1"] ** t)
        if s.get("nesterov"):
            mean = (s["beta1"] * m + (1 - s["beta1"]) * g) / (1 - s["beta1"] ** (t + 1))
        p = finish(bases[0] @ (bases[0].T @ mean @ bases[1] / root) @ bases[1].T)
        p = s["rate"] * (p.reshape(-1) + s["decay"] * theta[block.start :][: rows * columns])
        theta = theta.copy()
        theta[block.start :][: rows * columns] -= p
        yield -p


SETTINGS = {
    "rate": 0.1, "beta1": 0.8, "beta2": 0.9, "epsilon": 1e-3, "factor_decay": 0.7, "longest_side": 5,
    "decay": 0.05,
}  # fmt: skip


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("refresh", [1, 3])
def test_soap(refresh, nesterov):
    chosen = SETTINGS | {"refresh": refresh, "nesterov": nesterov}
    steps, state, _ = updates(SOAP(**chosen), MATRICES, blocks=BLOCKS, theta=START)
    for block in BLOCKS:
        for p, q in zip(steps, soap(MATRICES, START, block, chosen, TIES), strict=True):
            np.testing.assert_allclose(block.of(p).reshape(-1), q, rtol=1e-7, atol=1e-9)
    assert state.updates == len(MATRICES)
    # Sides of 4 and 5 of a and c; of d and e the sides of 3 alone.
    assert state.factors.shape == state.bases.shape == (2 * (16 + 25) + 2 * 9,)


def test_soap_on_vectors_is_adam():
    blocks = Block("a", 0, 1, 4), Block("b", 4, 3, 1)
    chosen = {"rate": 0.1, "beta1": 0.8, "beta2": 0.9, "epsilon": 1e-4, "decay": 0.1, "schedule": "cosine"}
    ours, state, _ = updates(SOAP(**chosen), GRADIENTS, blocks=blocks, theta=START[:7])
    theirs, _, _ = updates(Adam(**chosen, threshold=1e9), GRADIENTS, theta=START[:7])
    np.testing.assert_allclose(ours, theirs, rtol=1e-13)
    assert state.factors.size == 0


def test_rounding_does_not_choose_the_eigenvectors():
    """At first a factor of a wide matrix has many zero eigenvalues, and ranks round it differently."""
    blocks = (Block("a", 0, 4, 25),)
    noise = [g * (1 + 1e-15 * RNG.standard_normal(100)) for g in MATRICES]
    steps, other = (updates(SOAP(refresh=2), g, blocks=blocks)[0] for g in (MATRICES, noise))
    np.testing.assert_allclose(other, steps, rtol=1e-7, atol=1e-9)


def newton_schulz(matrix, steps):
    """Return the result of the iteration on the singular values only."""
    u, s, v = np.linalg.svd(matrix, full_matrices=False)
    s = s / np.linalg.norm(s)
    for _ in range(steps):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    return u * s @ v


@pytest.mark.parametrize("steps", [1, 5])
def test_muon(steps):
    chosen = {"rate": 0.3, "momentum": 0.7, "newton_schulz_steps": steps, "decay": 0.05}
    vectors = {"vector_rate": 0.02, "beta1": 0.8, "beta2": 0.9, "epsilon": 1e-3}
    found, state, _ = updates(Muon(**chosen, **vectors), MATRICES, blocks=BLOCKS, theta=START)
    momentum, theta = np.zeros(100), START.copy()
    own = [g[20:26] for g in MATRICES]
    by_adam = list(adam(own, 0.02, 0.8, 0.9, 1e-3, 1e9))
    for p, g, of_vector in zip(found, MATRICES, by_adam, strict=True):
        momentum, expected = 0.7 * momentum + g, np.zeros(100)
        for block in BLOCKS:
            ahead = block.of(g + 0.7 * momentum)
            block.of(expected)[...] = (
                -0.3 * max(1, block.rows / block.columns) ** 0.5 * newton_schulz(ahead, steps)
            )
        expected[20:26] = of_vector
        expected -= 0.3 * 0.05 * theta
        np.testing.assert_allclose(p, expected, rtol=1e-8, atol=1e-10)
        theta += p
    assert state.updates == len(MATRICES)


@pytest.mark.parametrize("steps", [1, 5])
def test_soap_muon_makes_hidden_matrices_orthogonal(steps):
    """The gates of an LSTM with 3 units, 5 inputs and a bias; a square block; a wide one; a vector."""
    blocks = (
        Block("gates", 0, 9, 6, cuts=(5, 8), groups=2),
        Block("hidden", 54, 4, 4),
        Block("out", 70, 4, 5),
        Block("bias", 90, 1, 10),
    )
    hidden = {"gates": slice(5, 8), "hidden": slice(0, 4)}
    chosen = SETTINGS | {"refresh": 1, "longest_side": 9, "nesterov": True}
    optimizer = SOAPMuon(**chosen, scale=2.5, newton_schulz_steps=steps)
    found, state, _ = updates(optimizer, MATRICES, blocks=blocks, theta=START)
    for block in blocks:

        def finish(p, name=block.name):
            if rows := hidden.get(name):
                p[rows] = 2.5 * newton_schulz(p[rows], steps)
            return p

        for p, q in zip(found, soap(MATRICES, START, block, chosen, TIES, finish), strict=True):
            np.testing.assert_allclose(block.of(p).reshape(-1), q, rtol=1e-7, atol=1e-9)
    assert state.updates == len(MATRICES)


def test_soap_muon_without_hidden_matrices_is_soap_with_look_ahead():
    blocks = Block("a", 0, 4, 5), Block("b", 20, 8, 10, cuts=(4,))
    ours, _, _ = updates(SOAPMuon(), MATRICES, blocks=blocks)
    theirs, _, _ = updates(SOAP(nesterov=True, refresh=1), MATRICES, blocks=blocks)
    assert np.array_equal(ours, theirs)


@given(st.integers(2, 30), st.integers(2, 30), st.integers(1, 30), st.integers(0, 2**31), st.floats(-6, 6))
@settings(deadline=None, max_examples=60)
def test_singular_values_become_about_one(rows, columns, rank, seed, size):
    rng = np.random.default_rng(seed)
    matrix = 10**size * rng.standard_normal((rows, rank)) @ rng.standard_normal((rank, columns))
    before, found = np.linalg.svd(matrix), np.linalg.svd(orthogonal(matrix))
    near = 0.01 * np.linalg.norm(before.S) < before.S
    after = (before.U.T @ orthogonal(matrix) @ before.Vh.T)[: len(near), : len(near)]
    assert np.all((np.diag(after)[near] > 0.65) & (np.diag(after)[near] < 1.25))
    assert found.S.max() < 1.25
    assert np.all(found.S[min(rank, len(near)) :] < 1e-9)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_nothing_made_orthogonal_is_nothing(dtype):
    found = orthogonal(np.zeros((3, 5), dtype))
    assert np.array_equal(found, np.zeros((3, 5)))
    assert found.dtype == dtype
    assert np.allclose(orthogonal(np.diag([2.0, 2.0])), orthogonal(np.eye(2)))


@pytest.mark.parametrize(
    ("name", "optimizer"), [("soap", SOAP()), ("muon", Muon()), ("soap-muon", SOAPMuon())]
)
def test_without_matrices_there_is_one_sentence(name, optimizer):
    class Bare(Linear):
        blocks = Objective.blocks

    theta = np.zeros(6)
    with pytest.raises(
        UserError, match=rf"^{name} needs the matrices of theta: call init\(theta, objective.blocks\)$"
    ):
        optimizer.init(theta)
    state = optimizer.init(theta, (Block("all", 0, 2, 3),))
    with pytest.raises(
        UserError, match=r"^the objective does not define the matrices of theta \(blocks\): use"
    ):
        optimizer.step(theta, state, Objectives(Bare([np.ones(6)])))


# Schedule, decay and averaging -----------------------------------------------------------------


def cosine(t):
    return 0.2 + 0.8 * (1 + math.cos(math.pi * min(t, 10) / 10)) / 2


@pytest.mark.parametrize(("name", "formula"), [
    ("constant", lambda t: 1.0), ("inverse-root", lambda t: 1 / math.sqrt(1 + t / 10)), ("cosine", cosine),
])  # fmt: skip
@pytest.mark.parametrize("warm_up", [0, 4])
@pytest.mark.parametrize("kind", [Adam, SOAP, Muon, SOAPMuon])
def test_schedules(kind, warm_up, name, formula):
    optimizer = kind(rate=0.5, schedule=name, schedule_steps=10, schedule_end=0.2, warm_up=warm_up)
    _, _, reports = updates(optimizer, GRADIENTS * 3)
    for t, report in enumerate(reports):
        rising = min(1, (t + 1) / 4) if warm_up else 1
        assert report.details["rate"] == pytest.approx(0.5 * rising * formula(t), rel=1e-14)


@pytest.mark.parametrize("kind", [Adam, SOAP, Muon, SOAPMuon])
def test_the_rate_is_that_of_the_step(kind):
    blocks = Block("a", 0, 1, 3), Block("b", 3, 2, 2)
    constant, _, _ = updates(kind(), GRADIENTS, blocks=blocks)
    rising, _, _ = updates(kind(schedule="inverse-root", warm_up=3), GRADIENTS, blocks=blocks)
    for t, (p, q) in enumerate(zip(rising, constant, strict=True)):
        np.testing.assert_allclose(p, q * min(1, (t + 1) / 3) / math.sqrt(1 + t / 50), rtol=1e-12)


@pytest.mark.parametrize("kind", [Adam, SOAP, Muon, SOAPMuon])
def test_decay_is_decoupled(kind):
    blocks, theta = (Block("a", 0, 1, 3), Block("b", 3, 2, 2)), START[:7]
    plain, _, _ = updates(kind(rate=0.1, schedule="cosine"), GRADIENTS, blocks=blocks, theta=theta)
    found, _, reports = updates(
        kind(rate=0.1, schedule="cosine", decay=0.3), GRADIENTS, blocks=blocks, theta=theta
    )
    for p, q, report in zip(found, plain, reports, strict=True):
        np.testing.assert_allclose(p, q - report.details["rate"] * 0.3 * theta, rtol=1e-10)
        assert report.details["step_norm"] == pytest.approx(np.linalg.norm(p))
        theta = theta + p


@pytest.mark.parametrize("kind", [Adam, SOAP, Muon, SOAPMuon])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("averaging", [0.05, 0.2, 0.999])
def test_the_average_is_a_mean_of_the_iterates_whose_window_grows(kind, dtype, averaging):
    optimizer, theta = kind(averaging=averaging), START[:7].astype(dtype)
    state = optimizer.init(theta, (Block("a", 0, 1, 7),))
    objectives, iterates = Objectives(Linear([g.astype(dtype) for g in GRADIENTS])), []
    assert np.array_equal(evaluated(theta, state), theta)  # before the first iterate
    plain, _, _ = updates(kind(), GRADIENTS, dtype, theta=theta)
    for p in plain:
        before = theta
        theta, state, _ = optimizer.step(theta, state, objectives)
        assert np.array_equal(theta - before, p)  # the training continues from theta
        iterates.append(theta.astype(np.float64))
        expected = average(iterates, averaging)
        np.testing.assert_allclose(evaluated(theta, state), expected, rtol=20 * np.finfo(dtype).eps)
        assert evaluated(theta, state).dtype == dtype


def average(iterates, decay):
    """Return the weighted mean by the formula of docs/theory.md; the last iterate has a separate weight."""
    found, left = 0.0, 1.0
    for t in range(len(iterates), 0, -1):
        share = max(1 - decay, 9 / (t + 8))
        found, left = found + left * share * iterates[t - 1], left * (1 - share)
    assert left == 0  # the first iterate has no weight left
    return found


def test_the_window_of_the_average_stops_growing_at_that_of_its_decay():
    optimizer, theta = Adam(averaging=0.9), np.ones(3)
    state, objectives = optimizer.init(theta), Objectives(Linear([np.ones(3)] * 200))
    for _ in range(200):
        before = evaluated(theta, state)
        theta, state, _ = optimizer.step(theta, state, objectives)
    np.testing.assert_allclose(evaluated(theta, state), 0.9 * before + 0.1 * theta, rtol=1e-12)


def test_without_averaging_theta_is_evaluated():
    theta = np.ones(3)
    for optimizer in (Adam(), GradientDescent()):
        assert evaluated(theta, optimizer.init(theta)) is theta


def test_a_rejected_update_leaves_the_average():
    optimizer, theta = Adam(averaging=0.5), np.ones(3)
    state = optimizer.init(theta)
    same, after, report = optimizer.step(theta, state, Objectives(Linear([np.full(3, np.nan)])))
    assert not report.accepted
    assert same is theta
    assert after is state


def test_settings_out_of_range():
    for kind, wrong in (
        (GradientDescent, {"rule": "other"}), (GradientDescent, {"rate": 0.0}),
        (GradientDescent, {"decay": 1.1}), (GradientDescent, {"floor": -1.0}),
        (GradientDescent, {"threshold": 0.0}), (GradientDescent, {"epsilon": 0.0}),
        (GradientDescent, {"mean_square_decay": 1.0}), (Adam, {"rate": 0.0}), (Adam, {"beta1": 1.0}),
        (Adam, {"beta2": -0.1}), (Adam, {"epsilon": 0.0}), (Adam, {"threshold": -1.0}),
        (Adam, {"decay": -1.0}), (Adam, {"averaging": 1.0}), (SOAP, {"schedule": "other"}),
        (SOAP, {"schedule_steps": 0}), (Muon, {"schedule_end": 1.1}), (Muon, {"warm_up": -1}),
        (SOAP, {"factor_decay": 1.0}), (SOAP, {"refresh": 0}), (SOAP, {"longest_side": 0}),
        (SOAP, {"rate": 0.0}), (Muon, {"momentum": 1.0}), (Muon, {"newton_schulz_steps": 0}),
        (Muon, {"vector_rate": 0.0}),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=next(iter(wrong))):
            kind(**wrong)
