"""Two ranks that round differently take every step alike, and what a step is given stays as it was."""

import numpy as np
import pytest

from hfmpi.optim import Adam, Gradient, GradientDescent, HessianFree, Objectives


class Elsewhere(np.ndarray):
    """An array on a processor whose inner products come out a little different."""

    def __matmul__(self, other):
        return float(np.asarray(self) @ np.asarray(other)) * (1 + 1e-7)


class Rank:
    """A bowl seen from one rank: the vectors are everybody's, the scalars are its own or the agreed ones."""

    def __init__(self, kind, agreed, error=0.0):
        self.kind, self.agreed, self.error = kind, agreed, error
        self.centre = np.linspace(-2, 3, 12)
        self.scale = np.geomspace(1, 300, 12)

    def loss(self, theta):
        away = np.asarray(theta) - self.centre
        return float(np.sum(self.scale * np.sqrt(1 + away**2))) * (1 + self.error)

    def gradient(self, theta, squares=False):
        away = np.asarray(theta) - self.centre
        g = self.scale * away / np.sqrt(1 + away**2)
        return Gradient(self.loss(theta), g.view(self.kind), (g * g).view(self.kind) if squares else None)

    def gauss_newton(self, theta, structural=0.0):
        curvature = self.scale / (1 + (np.asarray(theta) - self.centre) ** 2) ** 1.5 + structural
        return lambda v: (curvature * np.asarray(v)).view(self.kind)


class First(Rank):
    def agree(self, value):
        self.agreed.append(value)
        return value


class Second(Rank):
    def agree(self, value):
        assert type(value) is float
        return self.agreed.pop(0)


def trajectory(optimizer, objective):
    theta = np.zeros(12).view(objective.kind)
    state, reports = optimizer.init(theta), []
    for step in range(6):
        theta, state, report = optimizer.step(theta, state, Objectives(objective, objective, step / 2))
        reports.append(report)
    return np.asarray(theta), state, reports


ALL = [
    HessianFree(damping=1.0),
    HessianFree(damping=1e-2, preconditioner="none", structural_damping=0.5, cg_refresh=3),
    HessianFree(damping=1e-2, cg_max_steps=7, keep_ratio=1.0, cg_tolerance=0.0, line_search=False),
    GradientDescent("clip", rate=1e-2, threshold=300.0),
    GradientDescent("normalised", rate=0.3),
    GradientDescent("rms-normalised"),
    Adam(),
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


@pytest.mark.parametrize("optimizer", ALL)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_arguments_may_be_read_only(optimizer, dtype):
    objective = Rank(np.ndarray, None)
    objective.centre, objective.scale = objective.centre.astype(dtype), objective.scale.astype(dtype)
    theta = np.zeros(12, dtype)
    state = optimizer.init(theta)
    for _ in range(3):
        for array in (theta, *(v for v in vars(state).values() if isinstance(v, np.ndarray))):
            array.flags.writeable = False
        theta, state, report = optimizer.step(theta, state, Objectives(objective, objective))
        assert theta.dtype == dtype
        assert all(v.dtype == dtype for v in vars(state).values() if isinstance(v, np.ndarray))
        scalars = [report.loss, *(v for k, v in report.details.items() if k not in ("cg_stop", "cg_steps"))]
        assert all(type(v) in (float, int, type(None)) for v in scalars)
