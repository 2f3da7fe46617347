"""The cost of linear algebra: formulas by hand, and what steps report against their calls of NumPy."""

import math

import numpy as np
import pytest
from dense import stored
from scipy import linalg

from hfmpi.measure.cost import Counts
from hfmpi.measure.linear_algebra import cholesky, eigh, gram, product, qr, together, triangular_solve
from hfmpi.optim import SOAP, Adam, Gradient, Muon, Objective, Objectives, SOAPMuon, Subspace, layout
from hfmpi.optim.layout import Block
from hfmpi.optim.rows import DenseRows

BLOCKS = Block("gates", 0, 5, 6, cuts=(2, 4), groups=3), Block("bias", 30, 1, 4), Block("out", 34, 3, 2)
SIZE = 40


@pytest.mark.parametrize(
    ("work", "operations", "depth"),
    [
        (product(2, 3, 5), 60, 1),
        (product(4, 3), 24, 1),
        (gram(4, 10), 160, 1),
        (cholesky(3), 9, 3),
        (cholesky(2), 3, 2),  # 8 / 3, rounded up
        (triangular_solve(5), 25, 5),
        (triangular_solve(5, 3), 75, 5),
        (qr(3), 72, 6),
        (eigh(2), 72, 4),
        (eigh(2) + gram(4, 10), 232, 5),
        (together([eigh(2), gram(4, 10), cholesky(3)]), 241, 4),
        (together([]), 0, 0),
    ],
)
def test_formulas(work, operations, depth):
    assert work == Counts(operations=operations, depth=depth)


class Risk(Objective):
    """A quadratic risk plus `hard` times its square, with Kronecker factors; makes no counted calls."""

    blocks = BLOCKS

    def __init__(self, hard=0.0):
        rng = np.random.default_rng(0)
        self.centre, self.hard = rng.standard_normal(SIZE), hard
        self.factors = []
        for block in BLOCKS:
            for side, groups in (block.rows, 1), (block.columns, block.groups):
                self.factors.append(stored(np.eye(side) + 0.1, groups))

    def loss(self, theta):
        square = float((theta - self.centre) @ (theta - self.centre))
        return square / 2 + self.hard * square**2

    def gradient(self, theta):
        away = theta - self.centre
        return Gradient(self.loss(theta), (1 + 4 * self.hard * float(away @ away)) * away)

    def factored_gradient(self, theta):
        return self.gradient(theta), np.concatenate([factor.reshape(-1) for factor in self.factors])

    def gauss_newton(self, theta):
        return lambda v: v

    def rows(self, theta, request):
        at, factors = self.factored_gradient(theta)
        return DenseRows(at.loss, at.vector, np.diag(theta - self.centre), factors=factors)


@pytest.fixture
def executed(monkeypatch):
    """Count the operations of the calls of NumPy and SciPy: a list with those of each call."""
    calls, plain = [], np.matmul

    def matmul(a, b, **options):
        transposed = a.ndim == b.ndim == 2 and (b.strides, b.shape) == (a.strides[::-1], a.shape[::-1])
        same = transposed and a.__array_interface__["data"] == b.__array_interface__["data"]
        result = plain(a, b, **options)
        calls.append((1 if same else 2) * result.size * a.shape[-1])
        return result

    def count(module, name, cubic, square=0):
        compute = getattr(module, name)

        def call(matrix, *right, **options):
            assert matrix.shape[0] == matrix.shape[1]
            calls.append(math.ceil(cubic * len(matrix) ** 3) + square * len(matrix) ** 2)
            return compute(matrix, *right, **options)

        monkeypatch.setattr(module, name, call)

    monkeypatch.setattr(np, "matmul", matmul)
    count(np.linalg, "eigh", 9)
    count(linalg, "eigh", 9)
    count(linalg, "qr", 8 / 3)
    count(linalg.lapack, "dposv", 1 / 3, 2)
    return calls


@pytest.mark.parametrize("longest", [100, 4])
@pytest.mark.parametrize(
    ("optimizer", "hard"),
    [
        (Subspace(), 0.0),
        (Subspace(refresh=3, kfac_dampings=2, weight_decay=0.1), 0.0),
        (Subspace(directions="gradient+rms", cut=False), 0.0),
        (Subspace(candidates=3, memory=1), 0.0),
        (Subspace("kfac+rows"), 0.0),
        (Subspace(damping=0.0), 1.0),  # the step is solved repeatedly until the risk falls
        (SOAP(refresh=2), 0.0),
        (SOAP(refresh=1, longest_side=5), 0.0),
        (Muon(), 0.0),
        (Muon(newton_schulz_steps=2), 0.0),
        (SOAPMuon(), 0.0),
        (SOAPMuon(refresh=2, newton_schulz_steps=2, longest_side=5), 0.0),
        (Adam(), 0.0),
    ],
)
def test_a_step_reports_the_operations_that_it_executes(optimizer, hard, longest, executed, monkeypatch):
    monkeypatch.setattr(layout, "LONGEST_SIDE", longest)
    monkeypatch.setattr(layout, "WHOLE_SIDE", longest)
    risk, theta = Risk(hard), np.zeros(SIZE)
    state, objectives, losses = optimizer.init(theta, BLOCKS), Objectives(risk, risk), 0
    for _ in range(6):
        executed.clear()
        theta, state, report = optimizer.step(theta, state, objectives)
        assert report.work.operations == sum(executed)
        assert (report.work.depth > 0) == (len(executed) > 0)
        losses = max(losses, report.work.losses)
    assert losses > 1 or not hard
    assert report.work.gradients == 1


def test_blocks_run_side_by_side():
    """The depth, computed by hand from the largest block, 5 x 6, in the first and the second step."""
    risk, k = Risk(), 3 * (9 + 1 + 1)  # dampings times parts of the blocks
    solved = 1 + 2 * k + 3  # V V' and V g; eigenvalues, three products
    assert first_steps(Subspace(memory=0), risk)[0] == 2 * 6 + 2 + 2 + solved
    assert first_steps(SOAP(refresh=2), risk) == [1 + 2 * 6 + 4, 1 + 4, 1 + 1 + 2 * 6 + 4]
    assert first_steps(Muon(newton_schulz_steps=2), risk) == [6, 6, 6]
    # The eigenvectors of the largest block, then its hidden rows, 2 x 6.
    expected = [1 + 2 * 6 + 4 + 6, *[1 + 1 + 2 * 6 + 4 + 6] * 2]
    assert first_steps(SOAPMuon(newton_schulz_steps=2), risk) == expected


def first_steps(optimizer, risk):
    """Return the depth of the linear algebra of three steps."""
    theta, depths = np.zeros(SIZE), []
    state = optimizer.init(theta, BLOCKS)
    for _ in range(3):
        theta, state, report = optimizer.step(theta, state, Objectives(risk, risk))
        depths.append(report.work.depth)
    return depths


def test_work_counts_in_steps_that_are_rejected(executed):
    risk = Risk()
    risk.factors[0][...] = np.nan
    theta = np.zeros(SIZE)
    optimizer = Subspace(memory=0)
    _, _, report = optimizer.step(theta, optimizer.init(theta, BLOCKS), Objectives(risk, risk))
    assert report.message == "a direction is not finite"
    assert report.work.operations == sum(executed) > 0
