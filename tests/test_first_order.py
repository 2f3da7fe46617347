"""Gradient descent's three rules and Adam against their formulas."""

import numpy as np
import pytest

from hfmpi.optim import Adam, Gradient, GradientDescent, Objective, Objectives


class Linear(Objective):
    """A risk whose gradient at update t is the t-th of a list."""

    def __init__(self, gradients):
        self.gradients = iter(gradients)

    def loss(self, theta):
        return 1.0

    def gradient(self, theta):
        return Gradient(1.0, next(self.gradients))


def updates(optimizer, gradients, dtype=np.float64):
    """Give the changes of theta, the last state and the reports over these gradients."""
    gradients = [np.asarray(g, dtype) for g in gradients]
    theta = np.zeros(len(gradients[0]), dtype)
    state, objectives = optimizer.init(theta), Objectives(Linear(gradients))
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
    """Algorithm 1 of Kingma and Ba."""
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


def test_adam_leaves_zero_and_bad_gradients():
    steps, state, _ = updates(Adam(), [np.zeros(3)])
    assert np.array_equal(steps[0], np.zeros(3))
    assert state.updates == 1
    for bad in (np.nan, np.inf):
        steps, state, (report,) = updates(Adam(), [np.full(3, bad)])
        assert np.array_equal(steps[0], np.zeros(3))
        assert not report.accepted
        assert state.updates == 0


@pytest.mark.parametrize("optimizer", [GradientDescent("clip"), GradientDescent(), Adam()])
def test_single_precision_stays(optimizer):
    updates(optimizer, GRADIENTS, np.float32)


def test_settings_out_of_range():
    for kind, wrong in (
        (GradientDescent, {"rule": "other"}), (GradientDescent, {"rate": 0.0}),
        (GradientDescent, {"decay": 1.1}), (GradientDescent, {"floor": -1.0}),
        (GradientDescent, {"threshold": 0.0}), (GradientDescent, {"epsilon": 0.0}),
        (GradientDescent, {"mean_square_decay": 1.0}), (Adam, {"rate": 0.0}), (Adam, {"beta1": 1.0}),
        (Adam, {"beta2": -0.1}), (Adam, {"epsilon": 0.0}), (Adam, {"threshold": -1.0}),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=next(iter(wrong))):
            kind(**wrong)
