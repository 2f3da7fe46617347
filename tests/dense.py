"""Checks of models of any framework against their dense Jacobian, in float64."""

import re
from contextlib import chdir
from pathlib import Path

import numpy as np
import pytest

import hfmpi
from hfmpi.errors import UserError
from hfmpi.optim import Objectives, layout
from hfmpi.optim.layout import split_factors
from hfmpi.parallel.communicator import Communicator, MPICommunicator

CASES, STEPS, INPUTS, OUTPUTS = 4, 3, 2, 3


def numbers(*shape, seed=3):
    """Return inputs or weights, or real-valued targets of a loss."""
    return np.random.default_rng(seed).standard_normal(shape)


def symbols(*shape):
    """Return targets of a loss that takes symbols."""
    return np.random.default_rng(4).integers(0, OUTPUTS, shape)


def loss_of_rows(kind, z, y):
    """Return loss, gradient (N, O) and Hessian (N, O, O) of rows z (N, O) by formula."""
    if kind == "cross-entropy":
        p = np.exp(z) / np.exp(z).sum(axis=1, keepdims=True)
        hot = np.eye(z.shape[1])[y]
        return (
            -(np.log(p) * hot).sum(),
            p - hot,
            np.einsum("no,op->nop", p, np.eye(len(p.T))) - (p[:, :, None] * p[:, None]),
        )
    if kind in ("mse", "binary-cross-entropy"):  # means over outputs
        base, factor = ("squares", 2) if kind == "mse" else ("bernoulli", 1)
        return tuple(part * factor / z.shape[1] for part in loss_of_rows(base, z, y))
    if kind == "squares":
        return ((z - y) ** 2).sum() / 2, z - y, np.broadcast_to(np.eye(z.shape[1]), (*z.shape, z.shape[1]))
    p = 1 / (1 + np.exp(-z))
    value = -(y * np.log(p) + (1 - y) * np.log(1 - p)).sum()
    return value, p - y, (p * (1 - p))[:, :, None] * np.eye(z.shape[1])


def stored(matrix, groups=1):
    """Return the stored part of a dense Kronecker factor: all, the part of each group, or the diagonal."""
    shape = layout.factor_shape(len(matrix), groups)
    if len(shape) == 1:
        return np.diag(matrix)
    n = shape[-1]
    return (
        matrix if groups == 1 else np.stack([matrix[i : i + n, i : i + n] for i in range(0, len(matrix), n)])
    )


def restored(factor):
    """Return the dense factor for its stored part."""
    if factor.ndim < 3:
        return np.diag(factor) if factor.ndim == 1 else factor
    groups, n, _ = factor.shape
    dense = np.zeros((groups, n, groups, n))
    dense[range(groups), :, range(groups)] = factor
    return dense.reshape(groups * n, groups * n)


def factors_of_cases(blocks, each, scored):
    """Return Kronecker factors of the summed loss by their formula, from per-example gradients (B, D)."""
    found = []
    for block in blocks:
        gradients = [block.of(g) / scored for g in each]
        a = scored * sum(g @ g.T for g in gradients)
        b = sum(g.T @ g for g in gradients)
        b /= max(np.trace(b), 1e-300)
        found += [stored(a).reshape(-1), stored(b, block.groups).reshape(-1)]
    return np.concatenate(found)


def check_factors(model, cases, theta, each, scored, by_cases):
    """Check the gradient and its factors; with `by_cases` those of `factors_of_cases`."""
    owner = hfmpi.DataParallel(model, Communicator(), micro_batch=max(1, cases.count // 2))
    gradient, factors = owner.on(cases, np.arange(cases.count)).factored_gradient(theta)
    assert np.allclose(gradient.vector, each.sum(axis=0) / scored)
    for block, *both in split_factors(model.blocks, factors):
        own = [block.of(g) / scored for g in each]
        both = [*map(restored, both)]
        for matrix in both:
            assert np.allclose(matrix, matrix.T)
            assert np.linalg.eigvalsh(matrix).min() >= -1e-12 * abs(matrix).max(), block.name
        if by_cases:
            trace = scored * sum((g**2).sum() for g in own)  # the trace of the empirical Fisher matrix
            assert np.isclose(np.trace(both[0]) * np.trace(both[1]), trace), block.name
    if by_cases:
        assert np.allclose(factors, factors_of_cases(model.blocks, each, scored))


def check(model, kind, cases, theta, outputs, jacobian, mask=None, apart=True, by_cases=False):
    """Check a model on all examples, each of which has equally many rows.

    Parameters
    ----------
    outputs : (N, O)
    jacobian : (N, O, D)
    mask : (N,), optional
    apart : bool
        In two micro-batches.
    by_cases : bool
        Whether its Kronecker factors are those of the gradients of single cases.
    """
    count, scored = cases.count, cases.scored(np.arange(cases.count))
    batch = cases.take(np.arange(count))
    y = np.asarray(batch.targets)
    y = y.reshape(-1) if kind == "cross-entropy" else y.reshape(outputs.shape)
    mask = np.ones(len(outputs)) if mask is None else mask
    gradients = loss_of_rows(kind, outputs, y)[1] * mask[:, None]
    hessian = loss_of_rows(kind, outputs, y)[2] * mask[:, None, None]
    value = sum(loss_of_rows(kind, z[None], t[None])[0] * m for z, t, m in zip(outputs, y, mask, strict=True))
    each = np.einsum("no,nod->nd", gradients, jacobian).reshape(count, -1, theta.size).sum(axis=1)
    dense = np.einsum("nod,nop,npe->de", jacobian, hessian, jacobian)

    at = model.linearise(theta, batch)
    assert np.isclose(at.loss, value, rtol=1e-10)
    assert np.isclose(model.loss(theta, batch), value, rtol=1e-6)  # uses kernels without derivatives
    assert at.nbytes > 0
    rng = np.random.default_rng(5)
    v, u = rng.standard_normal(theta.size), rng.standard_normal(outputs.shape)
    along, back = at.jvp(v), np.zeros(theta.size)
    at.vjp(u, back)
    assert np.allclose(along, np.einsum("nod,d->no", jacobian, v))
    assert np.isclose(np.vdot(along, u), back @ v)
    many, backs = rng.standard_normal((len(outputs), 2, outputs.shape[1])), np.zeros((2, theta.size))
    at.vjp(many.reshape(-1, outputs.shape[1]), backs)
    assert np.allclose(backs, np.einsum("nod,nco->cd", jacobian, many))
    assert v @ dense @ v >= -1e-12

    owner = hfmpi.DataParallel(model, Communicator(), micro_batch=count // 2 if apart else count)
    risk = owner.on(cases, np.arange(count))
    assert np.isclose(risk.loss(theta), value / scored, rtol=1e-6)
    assert np.allclose(risk.gradient(theta).vector, each.sum(axis=0) / scored)
    squared = risk.squared_gradients(theta)
    assert np.allclose(squared.vector, each.sum(axis=0) / scored)
    assert np.allclose(squared.squares, count * ((each / scored) ** 2).sum(axis=0))
    if apart:
        check_factors(model, cases, theta, each, scored, by_cases)
    columns = rng.standard_normal((9, theta.size))
    before = columns.copy()
    product = risk.gauss_newton(theta)
    assert np.allclose([product(column) for column in columns], columns @ dense / scored)
    assert np.allclose(risk.project(theta)(columns), columns @ dense @ columns.T / scored)
    assert np.array_equal(columns, before)
    ends = [block.start + block.rows * block.columns for block in risk.blocks]
    assert [0, *ends] == [*(block.start for block in risk.blocks), theta.size]
    return at


def check_optimizers(model, cases):
    """Check that every optimizer lowers the risk of the model."""
    owner = hfmpi.DataParallel(model, Communicator())
    risk = owner.on(cases, np.arange(cases.count))
    for optimizer in (
        hfmpi.HessianFree(),
        hfmpi.Adam(),
        hfmpi.GradientDescent(),
        hfmpi.SOAP(),
        hfmpi.Muon(),
        hfmpi.SOAPMuon(),
        hfmpi.Subspace(),
        hfmpi.Subspace("kfac+rows"),
        hfmpi.LBFGS(),
        hfmpi.LM(),
    ):
        theta = model.initial(0).astype(model.backend.dtype)
        state, losses = optimizer.init(theta, risk.blocks), [risk.loss(theta)]
        for _ in range(4):
            theta, state, _ = optimizer.step(theta, state, Objectives(risk, risk))
            losses.append(risk.loss(theta))
        assert min(losses) < losses[0], optimizer
        assert theta.dtype == model.backend.dtype


def check_ranks(model, cases, comm):
    """Check that the ranks of comm compute the same as one rank."""
    assert comm.size > 1
    v, found = np.random.default_rng(1).standard_normal((2, model.size)), []
    for communicator in (MPICommunicator(comm), Communicator()):
        risk = hfmpi.DataParallel(model, communicator).on(cases, np.arange(cases.count - 1))
        theta = model.initial(0)
        squared = risk.squared_gradients(theta)
        gradient, factors = risk.factored_gradient(theta)
        product = risk.gauss_newton(theta)
        own = [risk.loss(theta), squared.vector, squared.squares, [product(row) for row in v]]
        own.append(risk.project(theta)(v))
        found.append([*own, gradient.vector, factors])
    assert all(np.allclose(ours, theirs) for ours, theirs in zip(*found, strict=True))


def check_refused(make, cases, words):
    """Check that a model of `make`, or its first batch, is refused in one short sentence."""

    def once():
        model = make()
        model.loss(model.initial(0), cases.take(np.arange(cases.count)))

    with pytest.raises(UserError, match=words) as caught:
        once()
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 200


def check_page(name, folder):
    """Check that the program with this name on the page "Your own model" lowers the loss."""
    names = run_page(name, folder)
    losses = [record["loss"] for record in names["result"].history]
    assert losses[-1] < 0.9 * losses[0]
    return names


def run_page(name, folder):
    """Run the program with this name on the page "Your own model"; return its variables."""
    page = (Path(__file__).parents[1] / "docs" / "own_model.md").read_text()
    (program,) = [code for code in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if name in code]
    names = {}
    with chdir(folder):
        exec(program, names)
    return names
