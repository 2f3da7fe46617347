"""The complete Hessian-free step: known minima, each setting, and its counts."""

import math
from dataclasses import FrozenInstanceError, replace
from itertools import pairwise

import numpy as np
import pytest

from hfmpi.errors import UserError
from hfmpi.optim import Gradient, HessianFree, Objective, Objectives
from hfmpi.optim.presets import PRESETS, preset

PLAIN = HessianFree(damping=1.0, preconditioner="none", warm_start=0.0)


class Counting(Objective):
    """An objective of a risk, its gradient and its curvature matrix, which records every call."""

    def __init__(self, risk, gradient, curvature, structure=None):
        self.risk, self.slope, self.matrix, self.structure = risk, gradient, curvature, structure
        self.calls = {"loss": 0, "gradient": 0, "gauss_newton": 0, "product": 0}
        self.structural, self.asked_squares = [], []

    def loss(self, theta):
        self.calls["loss"] += 1
        return self.risk(theta)

    def gradient(self, theta, squares=False):
        self.calls["gradient"] += 1
        self.asked_squares.append(squares)
        g = self.slope(theta)
        return Gradient(self.risk(theta), g, g * g if squares else None)

    def squared_gradients(self, theta):
        return self.gradient(theta, squares=True)

    def gauss_newton(self, theta, structural=0.0):
        self.calls["gauss_newton"] += 1
        self.structural.append(structural)
        matrix = self.matrix(theta)
        if structural:
            matrix = matrix + structural * self.structure

        def product(v):
            self.calls["product"] += 1
            return (matrix @ v).astype(v.dtype)

        return product

    def structural_gauss_newton(self, theta, structural):
        return self.gauss_newton(theta, structural)


def quadratic(size=6, seed=0):
    rng = np.random.default_rng(seed)
    root = rng.standard_normal((size, size))
    a, b = root @ root.T + np.eye(size), rng.standard_normal(size)
    structure = np.diag(rng.uniform(0.5, 2, size))
    objective = Counting(lambda x: float(x @ a @ x / 2 - b @ x), lambda x: a @ x - b, lambda x: a, structure)
    return objective, np.linalg.solve(a, b)


def rosenbrock():
    def residual(x):
        return np.array([1 - x[0], 10 * (x[1] - x[0] ** 2)])

    def jacobian(x):
        return np.array([[-1.0, 0.0], [-20 * x[0], 10.0]])

    return Counting(
        lambda x: float(residual(x) @ residual(x)) / 2,
        lambda x: jacobian(x).T @ residual(x),
        lambda x: jacobian(x).T @ jacobian(x),
    )


def take(optimizer, objective, theta, steps=1, state=None, epoch=0.0):
    state = state or optimizer.init(theta)
    reports = []
    for _ in range(steps):
        theta, state, report = optimizer.step(theta, state, Objectives(objective, objective, epoch))
        reports.append(report)
    return theta, state, reports


@pytest.mark.parametrize("preconditioner", ["none", "diagonal"])
@pytest.mark.parametrize("backtracking", [True, False])
def test_a_quadratic_is_minimised_in_one_step(preconditioner, backtracking):
    objective, minimum = quadratic()
    optimizer = HessianFree(damping=0.0, preconditioner=preconditioner, backtracking=backtracking)
    theta, _, (report,) = take(optimizer, objective, np.ones(6))
    assert np.allclose(theta, minimum, rtol=1e-9)
    assert report.details["rho"] == pytest.approx(1.0)
    assert report.details["line_search_rate"] == 1.0
    assert report.accepted


def test_rosenbrock_converges():
    theta, _, reports = take(PLAIN, rosenbrock(), np.array([-1.2, 1.0]), steps=60)
    assert np.allclose(theta, 1.0, atol=1e-6)
    losses = [report.loss for report in reports]
    assert all(later <= earlier for earlier, later in pairwise(losses))


def test_work_counts_what_was_called():
    for optimizer in (
        PLAIN,
        HessianFree(damping=1.0),
        replace(PLAIN, structural_damping=0.5),
        replace(PLAIN, backtracking=False),
        replace(PLAIN, cg_refresh=2, keep_ratio=1.0),
    ):
        objective, _ = quadratic()
        _, _, reports = take(optimizer, objective, np.ones(6) * 3, steps=3)
        work = [report.work for report in reports]
        assert sum(w.gradients for w in work) == objective.calls["gradient"] == 3
        assert sum(w.losses for w in work) == objective.calls["loss"]
        assert sum(w.linearisations for w in work) == objective.calls["gauss_newton"]
        assert sum(w.products for w in work) == objective.calls["product"]
        assert [w.cg_steps for w in work] == [report.details["cg_steps"] for report in reports]


def uphill():
    """Return a risk that is larger everywhere else, although gradient and curvature promise a descent."""
    return Counting(lambda x: 0.0 if np.all(x == 1) else 1.0, lambda x: np.ones(3), lambda x: np.eye(3))


@pytest.mark.parametrize("line_search", [True, False])
def test_a_bad_step_is_rejected(line_search):
    optimizer = replace(PLAIN, line_search=line_search, damping_factor=0.5)
    theta = np.ones(3)
    after, state, (report,) = take(optimizer, uphill(), theta)
    assert np.array_equal(after, theta)
    assert not report.accepted
    assert "rejected" in report.message
    assert np.array_equal(state.direction, np.zeros(3))
    assert state.damping == 2.0
    assert report.details["line_search_rate"] == 0


def test_what_is_not_finite_is_rejected():
    for bad in (math.nan, math.inf):
        objective = Counting(lambda x, bad=bad: bad, lambda x: np.ones(3), lambda x: np.eye(3))
        theta, state, (report,) = take(PLAIN, objective, np.ones(3))
        assert np.array_equal(theta, np.ones(3))
        assert not report.accepted
        assert report.details["rho"] is None
        assert state.damping == pytest.approx(1.5)
    objective, _ = quadratic()
    objective.slope = lambda x: np.full(6, np.nan)
    theta, state, (report,) = take(PLAIN, objective, np.ones(6))
    assert np.array_equal(theta, np.ones(6))
    assert not report.accepted
    assert np.all(np.isfinite(state.direction))


def test_a_zero_gradient_is_a_minimum():
    objective, minimum = quadratic()
    objective.slope = lambda x: np.zeros(6)
    theta, _, (report,) = take(PLAIN, objective, minimum)
    assert np.array_equal(theta, minimum)
    assert report.details["cg_stop"] == "SOLVED"


def test_damping_shortens_the_step_and_follows_the_rule():
    objective, _ = quadratic()
    norms = [
        take(replace(PLAIN, damping=d), objective, np.ones(6))[2][0].details["step_norm"]
        for d in (0.0, 1.0, 100.0)
    ]
    assert norms == sorted(norms, reverse=True)
    assert norms[2] < 0.5 * norms[0]
    _, state, _ = take(
        replace(PLAIN, damping_factor=0.5, damping_minimum=0.3), objective, np.ones(6), steps=5
    )
    assert state.damping == 0.3  # the model is exact: rho = 1 lowers lambda to its bound
    _, state, _ = take(replace(PLAIN, damping_factor=0.5, damping_maximum=5.0), uphill(), np.ones(3), steps=5)
    assert state.damping == 5.0


def test_the_damped_system_is_solved():
    objective, _ = quadratic()
    a, g = objective.matrix(None), objective.slope(np.ones(6))
    for mu in (0.0, 0.3):
        optimizer = HessianFree(damping=2.0, structural_damping=mu, preconditioner="none", line_search=False)
        theta, state, (report,) = take(optimizer, objective, np.ones(6))
        p = -np.linalg.solve(a + 2.0 * np.eye(6) + 2.0 * mu * objective.structure, g)
        assert np.allclose(theta - 1, p, rtol=1e-9)
        assert np.allclose(state.direction, p, rtol=1e-9)
        # rho compares with the undamped model, which is exact here for any damping
        assert report.details["rho"] == pytest.approx(1.0, rel=1e-9)
    assert objective.structural == [0.0, 0.6, 0.0]


def test_warm_start_begins_at_the_decayed_direction():
    objective, _ = quadratic()
    optimizer = HessianFree(
        damping=1.0, preconditioner="none", cg_max_steps=1, backtracking=False, warm_start=0.5,
        warm_start_growth=1.2, warm_start_maximum=0.7, damping_factor=1.0,
    )  # fmt: skip
    theta, state, _ = take(optimizer, objective, np.ones(6))
    a = objective.matrix(None) + np.eye(6)
    for epoch, factor in ((0.0, 0.5), (1.0, 0.6), (5.0, 0.7), (1e12, 0.7)):
        _, after, (report,) = take(optimizer, objective, theta, state=state, epoch=epoch)
        x = factor * state.direction
        r = -objective.slope(theta) - a @ x
        assert np.allclose(after.direction, x + (r @ r) / (r @ a @ r) * r, rtol=1e-10)
        assert report.work.products == 2
    cold = replace(optimizer, warm_start=0.0)
    assert take(cold, objective, theta, state=state)[2][0].work.products == 1


def test_the_preconditioner_asks_for_squares_and_changes_the_iterates():
    results = []
    for kind in ("none", "diagonal"):
        objective, _ = quadratic()
        optimizer = HessianFree(damping=1.0, preconditioner=kind, cg_max_steps=2, line_search=False)
        results.append(take(optimizer, objective, np.ones(6))[0])
        assert objective.asked_squares == [kind == "diagonal"]
    assert not np.allclose(*results)


def test_backtracking_prefers_an_earlier_iterate():
    """The curvature batch has no information on one direction: the last iterate goes too far."""
    rng = np.random.default_rng(0)
    a = np.diag([1.0, 10.0, 100.0])
    true, seen = Counting(lambda x: float(x @ a @ x) / 2, lambda x: a @ x, None), np.diag([0.01, 10.0, 100.0])
    curvature = Counting(None, None, lambda x: seen)
    theta = rng.standard_normal(3) + 2
    optimizer = HessianFree(
        damping=1e-8, preconditioner="none", keep_ratio=1.0, line_search=False, cg_max_steps=3
    )
    objectives = Objectives(true, curvature)
    _, _, with_it = optimizer.step(theta, optimizer.init(theta), objectives)
    without = replace(optimizer, backtracking=False)
    _, _, without_it = without.step(theta, without.init(theta), objectives)
    assert with_it.details["cg_chosen"] < with_it.details["cg_steps"]
    assert with_it.accepted
    assert not without_it.accepted
    assert without_it.work.losses == 1


def test_the_step_is_scaled_and_the_scale_decays():
    objective, _ = quadratic()
    plain, _, _ = take(PLAIN, objective, np.ones(6))
    for epoch, scale in ((0.0, 0.5), (2.0, 0.5 * 0.81)):
        optimizer = replace(PLAIN, step_scale=0.5, step_scale_decay=0.9)
        theta, _, (report,) = take(optimizer, objective, np.ones(6), epoch=epoch)
        assert np.allclose(theta - 1, scale * (plain - 1))
        assert report.details["step_norm"] == pytest.approx(np.linalg.norm(theta - 1))


def test_nothing_given_is_changed_and_single_precision_stays():
    objective, _ = quadratic()
    objective.slope = lambda x: (objective.matrix(x) @ x).astype(np.float32)
    theta = np.ones(6, np.float32)
    optimizer = HessianFree(damping=1.0)
    state = optimizer.init(theta)
    after, later, report = optimizer.step(theta, state, Objectives(objective, objective))
    assert np.array_equal(theta, np.ones(6))
    assert np.array_equal(state.direction, np.zeros(6))
    assert after.dtype == later.direction.dtype == np.float32
    assert isinstance(later.damping, float)
    assert isinstance(report.details["step_norm"], float)
    with pytest.raises(FrozenInstanceError):
        later.damping = 1.0


def test_steering_scalars_are_agreed():
    objective, _ = quadratic()
    agreed = []

    def agree(values):
        agreed.extend(values)
        return values

    objective.agree = agree
    with_it = take(PLAIN, objective, np.ones(6), steps=2)[0]
    assert len(agreed) > 10
    assert all(type(value) is float for value in agreed)
    assert np.array_equal(with_it, take(PLAIN, quadratic()[0], np.ones(6), steps=2)[0])
    objective.agree = lambda values: (math.nan,) * len(values)  # the value of rank 0 counts
    assert take(PLAIN, objective, np.ones(6))[2][0].details["cg_stop"] == "NOT_FINITE"


def test_settings_out_of_range():
    for wrong in (
        {"damping": -1.0}, {"damping_factor": 0.0}, {"damping_factor": 1.5}, {"structural_damping": -0.1},
        {"cg_max_steps": 0}, {"cg_tolerance": -1.0}, {"cg_refresh": -1}, {"warm_start": 1.1},
        {"preconditioner": "other"}, {"line_search_shrink": 1.0}, {"line_search_tries": 0},
        {"step_scale": 0.0},
        {"damping_minimum": 2.0, "damping_maximum": 1.0},
    ):  # fmt: skip
        with pytest.raises(ValueError, match=next(iter(wrong))):
            HessianFree(**wrong)


def test_presets_have_the_batches_of_the_paper():
    sizes = {name: (preset(name).gradient_batch, preset(name).curvature_batch) for name in PRESETS}
    assert sizes == {
        "sgd": (32, 0), "bgd": (3500, 0), "shf": (320, 32), "bhf": (14000, 3500),
        "bhf-short": (14000, 3500), "bhf-squares": (14000, 14000), "adam": (32, 0),
        "soap": (3500, 0), "muon": (3500, 0), "muon-small": (32, 0), "soap-muon": (3500, 0),
        "subspace": (14000, 512), "subspace-whole": (14000, 256), "subspace-rows": (14000, 14000),
        "lbfgs": (14000, 0), "lm": (14000, 0),
    }  # fmt: skip
    assert preset("sgd").optimizer.rate == preset("bgd").optimizer.rate == 2
    bhf = preset("bhf").optimizer
    assert (bhf.damping, bhf.damping_factor, bhf.cg_max_steps) == (45, 2 / 3, 250)
    assert preset("bhf-short") == replace(
        preset("bhf"), optimizer=replace(bhf, damping=0.01, cg_max_steps=10, cg_refresh=0)
    )
    assert preset("shf", damping=2).optimizer.damping == 2.0
    for arguments, changes in (
        (("newton",), {}), (("shf",), {"rate": 1.0}), (("shf",), {"damping": "high"}),
        (("shf",), {"cg_max_steps": 1.5}), (("shf",), {"damping": -1.0}), (("shf",), {"backtracking": 1}),
    ):  # fmt: skip
        with pytest.raises(UserError):
            preset(*arguments, **changes)
