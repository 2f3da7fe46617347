"""hfmpi.torch and hfmpi.jax: the steps of hfmpi.train in user-written loops, on ranks, saved and resumed."""

import contextlib
import copy
import difflib
import importlib.util
import io
import itertools
import pickle
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from conftest import REAL_GPU
from dense import run_page

import hfmpi
from hfmpi.backends import create
from hfmpi.data.batches import global_indices
from hfmpi.errors import UserError
from hfmpi.facades.batches import GlobalBatch, curvature_part
from hfmpi.optim import Adam, GradientDescent, HessianFree
from hfmpi.optim.layout import split_factors
from hfmpi.optim.presets import preset
from hfmpi.optim.rows import RowRequest
from hfmpi.parallel.communicator import Communicator, MPICommunicator

torch = pytest.importorskip("torch")
nn = torch.nn

INPUTS, OUTPUTS, COUNT = 5, 3, 60
LOSS = nn.CrossEntropyLoss(ignore_index=-1)
ALONE = Communicator()


def data(count=COUNT, seed=0):
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((count, INPUTS)).astype(np.float32)
    return x, (x[:, 0] > 0) + (x[:, 1] * x[:, 2] > 0).astype(np.int64)


def tensors(x, y):
    return torch.from_numpy(x), torch.from_numpy(y)


def mlp(seed=0, hidden=8):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(INPUTS, hidden), nn.Tanh(), nn.Linear(hidden, OUTPUTS))


def vector(module):
    return torch.cat([p.detach().reshape(-1) for p in module.parameters()]).numpy()


def make(module, method, **options):
    return hfmpi.torch.Optimizer(module, LOSS, method, **options)


def run(optimizer, steps, batch=COUNT, first=0):
    """Take steps on the batches of `hfmpi.train`; return the losses."""
    x, y = data()
    losses = []
    for step in range(first, first + steps):
        at = global_indices(0, step, batch, COUNT)
        losses.append(optimizer.step(*tensors(x[at], y[at])))
    return losses


# Steps -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["bhf-short", "adam", "muon", "soap", "sgd", "lm", "subspace-rows"])
def test_the_steps_are_those_of_a_run(method):
    module = mlp()
    optimizer = make(module, method, same_batch=method == "lm")
    if method == "lm":  # its batch is constant, in the order of one step
        result = hfmpi.train(
            hfmpi.TorchModel(mlp(), LOSS),
            data(),
            optimizer=method,
            gradient_batch=COUNT,
            max_steps=1,
            quiet=True,
        )
        losses = run(optimizer, 1)
    else:
        curvature = None if method in ("adam", "muon", "soap", "sgd") else 20
        result = hfmpi.train(
            hfmpi.TorchModel(mlp(), LOSS),
            data(),
            optimizer=method,
            gradient_batch=20,
            curvature_batch=curvature,
            max_steps=4,
            quiet=True,
        )
        losses = run(optimizer, 4, batch=20)
    assert losses == [record["loss"] for record in result.history]
    assert np.array_equal(vector(module), result.theta)
    assert optimizer.report.loss == losses[-1]


def test_a_loop_lowers_the_loss_with_every_form_of_batch():
    x, y = tensors(*data())
    module = mlp()
    optimizer = make(module, "subspace", damping=0.01, same_batch=True)
    losses = [optimizer.step(x, y) for _ in range(12)]
    assert losses[-1] < 0.7 * losses[0]

    def once(form):
        module = mlp()
        loss = make(module, HessianFree(damping=0.1)).step(*form(module))
        return loss, vector(module)

    found = [
        once(lambda module: (x, y)),
        once(lambda module: ([x], y)),
        once(lambda module: (hfmpi.Examples(x.numpy(), y.numpy()),)),
        once(lambda module: (lambda: (module(x), y),)),
    ]
    assert all(a == found[0][0] and np.array_equal(v, found[0][1]) for a, v in found)


def test_the_curvature_has_a_batch_of_its_own_or_a_part():
    x, y = tensors(*data())
    modules = [mlp() for _ in range(4)]
    optimizers = [
        make(module, "bhf-short", **options)
        for module, options in zip(modules, [{}, {}, {"curvature_fraction": 0.25}, {}], strict=True)
    ]
    part = torch.from_numpy(curvature_part(0, COUNT, 15))
    optimizers[0].step(x, y)
    optimizers[1].step(x, y, curvature=(x, y))
    optimizers[2].step(x, y)
    optimizers[3].step(x, y, curvature=(x[part], y[part]))
    whole, same, quarter, chosen = map(vector, modules)
    assert np.allclose(whole, same, atol=1e-5)
    assert np.allclose(quarter, chosen, atol=1e-5)
    assert not np.allclose(whole, quarter, atol=1e-3)


def test_the_parts_of_the_curvature_are_spread_and_take_turns():
    parts = [curvature_part(step, 12, 4) for step in range(3)]
    assert sorted(np.concatenate(parts).tolist()) == list(range(12))
    batch = GlobalBatch(None, (0, 6, 12), 0, 1, 12)
    assert [len(part) for part in batch.parts(parts[0])] == [2, 2]


def test_ignored_targets_count_for_nothing():
    x, y = data()
    y[::3] = -1
    kept = y >= 0
    modules = mlp(), mlp()
    method = HessianFree(damping=0.1, cg_max_steps=5, preconditioner="none")
    losses = [make(modules[0], method).step(*tensors(x, y))]
    losses.append(make(modules[1], method).step(*tensors(x[kept], y[kept])))
    assert np.isclose(*losses, rtol=1e-6)
    assert np.allclose(*map(vector, modules), atol=1e-5)


@pytest.mark.parametrize("loss", ["ignored", "weighted"])
def test_every_form_of_examples_is_scored(loss):
    x, y = data()
    more = {"ignore_index": 2} if loss == "ignored" else {"weight": torch.tensor([1.0, 5.0, 0.5])}
    loss = nn.CrossEntropyLoss(**more)
    right = loss(mlp()(torch.from_numpy(x)), torch.from_numpy(y)).item()
    examples = hfmpi.Examples(x, y)
    step = hfmpi.Augmented(examples, lambda x, y, rng: (x, y)).at(0, 0)
    for batch in examples, hfmpi.Dataset([*zip(x, y, strict=True)]), step:
        assert np.isclose(hfmpi.torch.Optimizer(mlp(), loss, "adam").step(batch), right, rtol=1e-5)
        assert np.isclose(hfmpi.evaluate(hfmpi.TorchModel(mlp(), loss), vector(mlp()), batch).loss, right)
    model = hfmpi.TorchModel(mlp(), loss)
    for refused in (
        lambda: hfmpi.torch.Optimizer(mlp(), loss, "adam").step(Bare(examples)),
        lambda: hfmpi.train(model, Bare(examples), max_steps=1, quiet=True),
    ):
        with pytest.raises(UserError, match="ignores targets or weights classes, which Bare does not"):
            refused()


class Bare:
    """Examples of a class that is unknown to hfmpi."""

    def __init__(self, examples):
        self.count, self.take, self.scored = examples.count, examples.take, examples.scored


def test_augmented_examples_belong_to_a_run():
    x, y = data()
    augmented = hfmpi.Augmented((x, y), lambda x, y, rng: (x + rng.random(), y))
    model = hfmpi.TorchModel(mlp(), LOSS)
    for use in (
        lambda: make(mlp(), "adam").step(augmented),
        lambda: hfmpi.evaluate(model, vector(mlp()), augmented),
        lambda: hfmpi.curvature(model, vector(mlp()), augmented),
    ):
        with pytest.raises(UserError, match=r"only hfmpi\.train accepts hfmpi\.Augmented"):
            use()


def test_weights_count_as_repeated_examples():
    x, y = data()
    weights = np.random.default_rng(3).integers(1, 4, COUNT)
    modules = mlp(), mlp()
    weighted = make(modules[0], "bhf-short", curvature_fraction=1.0)
    repeated = make(modules[1], "bhf-short", curvature_fraction=1.0)
    losses = [weighted.step(hfmpi.Examples(x, y, weights=weights.astype(float)))]
    losses.append(repeated.step(*tensors(x.repeat(weights, axis=0), y.repeat(weights))))
    assert np.isclose(*losses, rtol=1e-6)
    assert np.allclose(*map(vector, modules), atol=1e-4)


def test_the_outputs_are_selected_of_what_a_module_returns():
    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = mlp()

        def forward(self, x, y):
            z = self.inner(x)
            return z, nn.functional.cross_entropy(z, y)

    x, y = tensors(*data())
    plain, both = mlp(), Both()
    first = make(plain, "bhf-short").step(x, y)
    assert make(both, "bhf-short", outputs=lambda result: result[0]).step((x, y), y) == first
    assert np.array_equal(vector(plain), vector(both))


def test_the_mean_of_the_iterates_is_in_the_module_for_a_while():
    module = mlp()
    optimizer = make(module, Adam(rate=0.1, averaging=0.9))
    run(optimizer, 3)
    theta = vector(module)
    with optimizer.averaged():
        assert np.array_equal(vector(module), optimizer._progress.state.average)
        assert not np.array_equal(vector(module), theta)
        with pytest.raises(UserError, match=r"a step inside averaged\(\) would be lost"):
            run(optimizer, 1)
    assert np.array_equal(vector(module), theta)
    run(optimizer, 1)


def test_parameters_of_another_type_need_another_optimizer():
    module, (x, y) = mlp(), tensors(*data())
    optimizer = make(module, "adam")
    optimizer.step(x, y)
    module.double()
    with pytest.raises(
        UserError, match="the parameters are float64, but were float32 when the optimizer was"
    ):
        optimizer.step(x.double(), y)


def test_parameters_that_something_else_changed_are_where_the_next_step_starts():
    x, y = tensors(*data())
    module = mlp()
    optimizer = make(module, "lbfgs", same_batch=True)
    for _ in range(3):
        optimizer.step(x, y)
    with torch.no_grad():
        module[2].bias += 1
    expected = nn.functional.cross_entropy(module(x), y).item()
    assert np.isclose(optimizer.step(x, y), expected, rtol=1e-5)


# Saved and continued -----------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["bhf-short", "adam", "soap", "subspace", "lbfgs", "subspace-rows"])
def test_a_resumed_loop_is_the_uninterrupted_one_bit_for_bit(method):
    def fresh():
        module = mlp()
        groups = [{"params": module[0].parameters(), "scale": 0.3}, {"params": module[2].parameters()}]
        return module, make(module, method, params=groups, same_batch=method == "lbfgs")

    def steps(optimizer, first, count):
        if method != "lbfgs":
            return run(optimizer, count, batch=20, first=first)
        return [optimizer.step(*tensors(*data())) for _ in range(count)]

    module, optimizer = fresh()
    whole = steps(optimizer, 0, 6)
    interrupted, other = fresh()
    start = steps(other, 0, 3)
    file = io.BytesIO()
    torch.save({"module": interrupted.state_dict(), "optimizer": other.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    resumed, again = fresh()
    resumed.load_state_dict(saved["module"])
    again.load_state_dict(saved["optimizer"])
    assert start + steps(again, 3, 3) == whole
    assert np.array_equal(vector(module), vector(resumed))


def test_a_state_of_another_optimizer_is_refused():
    saved = make(mlp(), "adam").state_dict()
    scaled = mlp()
    for optimizer, words in [
        (make(mlp(), "bhf-short"), "belongs to Adam"),
        (make(nn.Linear(INPUTS, OUTPUTS), "adam"), "group 0"),
        (make(scaled, "adam", params=[{"params": scaled.parameters(), "scale": 2.0}]), "group 0"),
        (make(mlp(hidden=9), "adam"), "does not fit adam"),
    ]:
        with pytest.raises(UserError, match=words):
            optimizer.load_state_dict(saved)
    with pytest.raises(UserError, match="needs a state from state_dict"):
        make(mlp(), "adam").load_state_dict(torch.optim.Adam(mlp().parameters()).state_dict())


# Groups ------------------------------------------------------------------------------------------


def groups_of(module, **first):
    return [{"params": module[0].parameters(), **first}, {"params": module[2].parameters()}]


def test_frozen_parameters_stay():
    module, copied = mlp(), mlp()
    optimizer = make(module, "bhf-short", params=groups_of(module, frozen=True))
    copied[0].requires_grad_(False)
    before = copy.deepcopy(module[0].state_dict())
    assert run(optimizer, 3) == run(make(copied, "bhf-short"), 3)
    assert all(torch.equal(value, before[name]) for name, value in module[0].state_dict().items())


@pytest.mark.parametrize(
    "method", [Adam(rate=1e-3, threshold=1e9), GradientDescent("clip", threshold=1e9, rate=0.1)]
)
def test_a_scale_multiplies_the_steps_of_first_order(method):
    plain, scaled = mlp(), mlp()
    start = mlp()
    make(plain, method).step(*tensors(*data()))
    make(scaled, method, params=groups_of(scaled, scale=0.1)).step(*tensors(*data()))
    for i, factor in (0, 0.1), (2, 1.0):
        for before, a, b in zip(*(m[i].parameters() for m in (start, plain, scaled)), strict=True):
            assert torch.allclose(b - before, factor * (a - before), rtol=1e-3, atol=1e-7)


def test_a_scale_divides_the_damping():
    start, plain, scaled = mlp(), mlp(), mlp()
    strong = HessianFree(damping=1e4, cg_max_steps=50, preconditioner="none", line_search_tries=1)
    make(plain, strong).step(*tensors(*data()))
    make(scaled, strong, params=groups_of(scaled, scale=0.1)).step(*tensors(*data()))
    for i, factor in (0, 0.1), (2, 1.0):
        for before, a, b in zip(*(m[i].parameters() for m in (start, plain, scaled)), strict=True):
            assert torch.allclose(b - before, factor * (a - before), rtol=2e-2, atol=1e-7)


def test_scaled_variables_have_the_scaled_derivatives():
    from hfmpi.facades.scaled import ScaledModel

    x, y = data()
    cases, indices = hfmpi.Examples(x.astype(float), y), np.arange(COUNT)
    model = hfmpi.TorchModel(mlp().double(), "cross-entropy")
    scale = np.concatenate([np.full(block.size, 0.5 + i) for i, block in enumerate(model.blocks)])
    risk = hfmpi.DataParallel(model, ALONE).on(cases, indices)
    scaled = hfmpi.DataParallel(ScaledModel(model, scale), ALONE).on(cases, indices)
    theta = model.initial(0)
    phi = theta / scale
    v = np.random.default_rng(1).standard_normal((2, model.size))
    ours, theirs = scaled.squared_gradients(phi), risk.squared_gradients(theta)
    assert np.isclose(ours.loss, theirs.loss)
    assert np.allclose(ours.vector, theirs.vector * scale)
    assert np.allclose(ours.squares, theirs.squares * scale**2)
    assert np.allclose(scaled.gauss_newton(phi)(v[0]), scale * risk.gauss_newton(theta)(scale * v[0]))
    assert np.allclose(scaled.project(phi)(v), risk.project(theta)(v * scale))
    assert np.allclose(scaled.bends(phi)(v[0]), scale * risk.bends(theta)(scale * v[0]))
    for kind in "scores", "sketch", "residuals":
        rows = [r.rows(at, RowRequest(kind)) for r, at in ((scaled, phi), (risk, theta))]
        assert np.allclose(rows[0].times(v[0]), rows[1].times(scale * v[0]))
    found = [r.factored_gradient(at) for r, at in ((scaled, phi), (risk, theta))]
    assert np.allclose(found[0][0].vector, found[1][0].vector * scale)
    for (block, a, b), (_, c, d) in zip(*(split_factors(model.blocks, f) for _, f in found), strict=True):
        assert np.allclose(np.kron(a, b), np.kron(c, d) * scale[block.start] ** 2)


def test_groups_that_do_not_fit_are_refused():
    module = mlp()
    for params, words in [
        (module[0].parameters(), "is not in any group"),
        (groups_of(module, scale=0.0), "positive number"),
        (groups_of(module, frozen="yes"), "True or False"),
        (groups_of(module, weight_decay=0.1), "'weight_decay'"),
        (groups_of(module, lr=0.1), "factor of the step"),
        ([{"params": mlp().parameters()}], "does not belong to the module"),
        ([*groups_of(module), {"params": module[0].parameters()}], "more than one"),
        ([], "empty"),
        ([{"scale": 1.0}], "params"),
    ]:
        with pytest.raises(UserError, match=words):
            make(module, "adam", params=params)
    with pytest.raises(UserError, match="after construction"):
        make(module, "adam").add_param_group({"params": []})


@pytest.mark.parametrize("method", ["bhf-short", "soap"])
def test_vectors_may_stay_on_a_device(method, monkeypatch):
    pytest.importorskip("cupy")
    if REAL_GPU:
        pytest.skip("the stand-in shares the memory of the CPU")
    from hfmpi.frameworks import torch as models
    from hfmpi.frameworks import torch_exchange as exchange

    def loop():
        module = mlp()
        optimizer = make(module, method, params=groups_of(module, scale=0.5))
        losses = run(optimizer, 2, batch=20)
        other = make(module, method, params=groups_of(module, scale=0.5))
        other.load_state_dict(optimizer.state_dict())
        return [*losses, *run(other, 2, batch=20, first=2)], optimizer

    on_host, _ = loop()
    monkeypatch.setattr(exchange, "on_stream", lambda backend, device: contextlib.nullcontext())
    monkeypatch.setattr(
        models,
        "choose_exchange",
        lambda device, dtype: exchange.ThroughDevice(create("cupy", dtype, 0), device),
    )
    on_device, optimizer = loop()
    assert optimizer._model.backend.xp is not np
    assert np.allclose(on_device, on_host, rtol=1e-3)


# Learning rates ----------------------------------------------------------------------------------


def test_a_scheduler_of_pytorch_sets_the_rate():
    scheduled, module = mlp(), mlp()
    optimizer = make(scheduled, Adam(rate=0.01))
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: [1.0, 0.5, 0.0, 0.25][step])
    thetas, rates = [vector(scheduled)], []
    for step in range(4):
        run(optimizer, 1)
        thetas.append(vector(scheduled))
        rates.append(optimizer.report.details["rate"])
        if step < 3:
            scheduler.step()
    assert rates == pytest.approx([0.01, 0.005, 0.0, 0.0025])
    assert [np.array_equal(*pair) for pair in itertools.pairwise(thetas)] == [False, False, True, False]
    run(make(module, Adam(rate=0.01)), 1)
    assert np.array_equal(vector(module), thetas[1])


def test_a_method_without_a_rate_says_so_once(caplog):
    optimizer = make(mlp(), "bhf-short")
    for rate in 0.1, 0.2:
        optimizer.param_groups[0]["lr"] = rate
        run(optimizer, 1)
    assert [record.getMessage() for record in caplog.records if "learning rate" in record.getMessage()] == [
        'Note: bhf-short has no learning rate: "lr" in param_groups is ignored.'
    ]


def test_rates_that_differ_are_refused():
    module = mlp()
    optimizer = make(module, "adam", params=groups_of(module))
    optimizer.param_groups[0]["lr"] = 0.5
    with pytest.raises(UserError, match="the same number"):
        run(optimizer, 1)


# What is refused ---------------------------------------------------------------------------------


def test_zero_grad_is_harmless():
    module = mlp()
    optimizer = make(module, "adam")
    module(torch.ones(1, INPUTS)).sum().backward()
    optimizer.zero_grad()
    assert module[0].weight.grad is None


@pytest.mark.parametrize(("arguments", "options", "words"), [
    ((mlp(), LOSS, "newton"), {}, "no optimizer 'newton'"),
    ((mlp(), LOSS, 3), {}, "method must be a name"),
    ((mlp(), LOSS, HessianFree), {}, "method must be a name"),
    ((mlp(), LOSS, "adam"), {"damping": 1.0}, "damping"),
    ((mlp(), LOSS, preset("adam")), {"rate": 1.0}, "because the method is an object"),
    ((mlp(), LOSS, Adam()), {"rate": 1.0}, r"hfmpi.Adam\(rate=...\)"),
    ((mlp, LOSS, "adam"), {}, "must be a torch.nn.Module"),
    ((mlp(), nn.HingeEmbeddingLoss(), "adam"), {}, "loss"),
    ((mlp(), LOSS, "lbfgs"), {}, "same_batch=True"),
    ((mlp(), LOSS, "bhf"), {"curvature_fraction": 2}, "larger than 0 and at most 1"),
    ((mlp(), LOSS, "bhf"), {"same_batch": 1}, "same_batch must be"),
    ((mlp(), LOSS, "bhf"), {"epoch_examples": -1}, "epoch_examples must be"),
    ((mlp(), LOSS, "bhf"), {"outputs": 0}, "outputs must be a function"),
])  # fmt: skip
def test_arguments_that_do_not_fit_are_refused(arguments, options, words):
    with pytest.raises(UserError, match=words):
        hfmpi.torch.Optimizer(*arguments, **options)


def test_batches_and_closures_that_do_not_fit_are_refused():
    module = mlp()
    optimizer, (x, y) = make(module, "bhf-short"), tensors(*data())
    before = vector(module)

    def classic():
        loss = LOSS(module(x), y)
        loss.backward()
        return loss

    for given, words in [
        ((x,), "step needs a batch"),
        ((x, y[:3]), "the batch: inputs have 60 examples"),
        ((x, y.float()), "whole numbers"),
        ((classic,), "must return .outputs, targets., not Tensor"),
        ((lambda: (2 * module(x), y),), "of the module unchanged"),
        ((lambda: (module(x), module(x), y)[1:],), "once, not 2 times"),
        ((lambda: (x, y),), "once, not 0 times"),
        ((lambda: (module(input=x), y),), "without keyword arguments, not with input="),
    ]:
        with pytest.raises(UserError, match=words):
            optimizer.step(*given)
    with pytest.raises(UserError, match=r"a tuple \(x, y\)"):
        optimizer.step(x, y, curvature=x)
    with pytest.raises(UserError, match="does not use a curvature batch"):
        make(mlp(), "adam").step(x, y, curvature=(x, y))
    assert np.array_equal(vector(module), before)
    steady = make(mlp(), "bhf-short", same_batch=True)
    steady.step(x, y)
    with pytest.raises(UserError, match="a different batch than the previous step"):
        steady.step(x + 1, y)


def test_dropout_is_refused_until_the_module_is_evaluated():
    module = nn.Sequential(mlp(), nn.Dropout(0.5))
    optimizer = make(module, "bhf-short")
    with pytest.raises(UserError, match=r"call module.eval\(\) first"):
        optimizer.step(*tensors(*data()))
    module.eval()
    assert np.isfinite(optimizer.step(*tensors(*data())))


# JAX ---------------------------------------------------------------------------------------------


def network(params, x):
    import jax.numpy as jnp

    return jnp.tanh(x @ params["a"]) @ params["b"]


def params(seed=0):
    rng = np.random.default_rng(seed)
    jnp = pytest.importorskip("jax.numpy")
    return {
        "a": jnp.asarray(rng.standard_normal((INPUTS, 8), np.float32) / 3),
        "b": jnp.asarray(rng.standard_normal((8, OUTPUTS), np.float32) / 3),
    }


def add(tree, updates):
    import jax

    return jax.tree.map(lambda a, b: a + b, tree, updates)


def jax_steps(optimizer, tree, state, first, count):
    x, y = data()
    losses = []
    for step in range(first, first + count):
        at = global_indices(0, step, 20, COUNT)
        updates, state = optimizer.update((x[at], y[at]), state, tree)
        tree = add(tree, updates)
        losses.append(state.loss)
    return tree, state, losses


@pytest.mark.parametrize("method", ["bhf-short", "adam", "soap", "subspace"])
def test_the_steps_in_jax_are_those_of_a_run_and_resume_bit_for_bit(method):
    jax = pytest.importorskip("jax")
    tree = params()
    options = {} if method in ("adam", "soap") else {"curvature_batch": 20}
    result = hfmpi.train(
        hfmpi.JaxModel(network, tree, "cross-entropy"),
        data(),
        optimizer=method,
        gradient_batch=20,
        max_steps=4,
        quiet=True,
        **options,
    )
    optimizer = hfmpi.jax.Optimizer(network, "cross-entropy", method)
    whole, _, losses = jax_steps(optimizer, tree, optimizer.init(tree), 0, 4)
    assert np.allclose(losses, [record["loss"] for record in result.history], rtol=1e-3)
    half, state, start = jax_steps(optimizer, tree, optimizer.init(tree), 0, 2)
    half, state = pickle.loads(pickle.dumps((half, state)))
    state = jax.tree.map(np.asarray, state)  # as checkpoints restore it
    other = hfmpi.jax.Optimizer(network, "cross-entropy", method)
    resumed, _, end = jax_steps(other, half, state, 2, 2)
    assert start + end == losses
    assert all(np.array_equal(whole[name], resumed[name]) for name in whole)


def test_a_state_of_flax_takes_steps_of_hfmpi():
    train_state = pytest.importorskip("flax.training.train_state")
    x, y = data()
    tx = hfmpi.jax.Optimizer(network, "cross-entropy", "bhf-short")
    state = train_state.TrainState.create(apply_fn=network, params=params(), tx=tx)
    losses = []
    for _ in range(4):
        state = state.apply_gradients(grads={"x": x, "y": y})
        losses.append(state.opt_state.loss)
    assert losses[-1] < 0.8 * losses[0]


def test_what_does_not_fit_in_jax_is_refused():
    jax = pytest.importorskip("jax")
    tree, (x, y) = params(), data()
    optimizer = hfmpi.jax.Optimizer(network, "cross-entropy", "bhf-short")
    state = optimizer.init(tree)
    other = hfmpi.jax.Optimizer(network, "cross-entropy", "adam").init(tree)
    for call, words in [
        (lambda: jax.jit(lambda p: optimizer.update((x, y), state, p))(tree), "cannot be compiled"),
        (lambda: optimizer.update((x, y), state), "needs the params"),
        (lambda: optimizer.update((x, y), None, tree), "a State from init or update"),
        (lambda: optimizer.update((x, y), other, tree), "belongs to a different method than bhf-short"),
        (lambda: optimizer.update({"image": x, "label": y}, state, tree), "the keys x and y, not image"),
        (lambda: optimizer.update((x, y), state, {"a": tree["a"]}), "the structure"),
        (lambda: optimizer.update((x, y), state, {**tree, "b": tree["b"][:, :2]}), "has shape"),
        (lambda: hfmpi.jax.Optimizer(network, "cross-entropy", "nothing"), "no optimizer"),
    ]:
        with pytest.raises(UserError, match=words):
            call()
    frozen = hfmpi.jax.Optimizer(network, "cross-entropy", "bhf-short", trained={"a": False, "b": True})
    updates, _ = frozen.update((x, y), frozen.init(tree), tree)
    assert not updates["a"].any()
    assert updates["b"].any()


# Ranks -------------------------------------------------------------------------------------------


def part_of(x, y, comm):
    """Return an unequal part of a batch for each of two ranks."""
    edges = [0, len(y) // 3, len(y)]
    part = slice(edges[comm.rank], edges[comm.rank + 1])
    return torch.from_numpy(x[part]), torch.from_numpy(y[part])


@pytest.mark.mpi(ranks=2, timeout=200, unit="s")
@pytest.mark.parametrize("method", ["bhf-short", "adam", "soap", "subspace", "lbfgs"])
def test_two_ranks_take_the_steps_of_one(mpi_ranks, comm, method):
    ranks, (x, y) = MPICommunicator(comm), data()
    y[5::7] = -1
    same = {"same_batch": method == "lbfgs"}
    more = {} if method in ("adam", "soap", "lbfgs") else {"curvature_fraction": 0.5}
    alone, module = mlp(), mlp(ranks.rank)  # the module of rank 0 is copied to all ranks
    one = make(alone, method, communicator=ALONE, **same, **more)
    two = make(module, method, communicator=ranks, **same, **more)
    assert np.array_equal(vector(alone), vector(module))
    pairs = [(one.step(*tensors(x, y)), two.step(*part_of(x, y, ranks))) for _ in range(3)]
    assert all(np.isclose(*pair, rtol=1e-4) for pair in pairs)
    theta = vector(module)
    assert ranks.same(int.from_bytes(theta.tobytes()) % 2**63) == []
    resumed = mlp()
    again = make(resumed, method, communicator=ranks, **same, **more)
    resumed.load_state_dict(module.state_dict())
    again.load_state_dict(two.state_dict())
    assert two.step(*part_of(x, y, ranks)) == again.step(*part_of(x, y, ranks))
    assert np.array_equal(vector(module), vector(resumed))


@pytest.mark.mpi(ranks=2, timeout=100, unit="s")
def test_weights_of_two_ranks_are_those_of_one(mpi_ranks, comm):
    ranks, (x, y) = MPICommunicator(comm), data()
    weights = np.random.default_rng(3).uniform(0.5, 2, COUNT)
    part = slice(0, 20) if ranks.rank == 0 else slice(20, COUNT)
    alone, module = mlp(), mlp()
    one = make(alone, "bhf-short", communicator=ALONE, curvature_fraction=0.5)
    two = make(module, "bhf-short", communicator=ranks, curvature_fraction=0.5)
    for _ in range(2):
        loss = one.step(hfmpi.Examples(x, y, weights=weights))
        assert np.isclose(loss, two.step(hfmpi.Examples(x[part], y[part], weights=weights[part])), rtol=1e-4)
    assert np.allclose(vector(alone), vector(module), atol=1e-3)


@pytest.mark.mpi(ranks=2, timeout=100, unit="s")
@pytest.mark.parametrize(
    "options",
    [
        {"same_batch": True},
        {"curvature_fraction": 0.5},
        {"damping": 1.0},
        {"loss": nn.CrossEntropyLoss(label_smoothing=0.1)},
        {"loss": nn.CrossEntropyLoss(weight=torch.ones(OUTPUTS))},
    ],
    ids=["same_batch", "fraction", "setting", "smoothing", "weight"],
)
def test_ranks_with_other_arguments_are_refused(mpi_ranks, comm, options):
    ranks = MPICommunicator(comm)
    options = {"loss": nn.CrossEntropyLoss(), "method": "bhf-short"} | (options if ranks.rank else {})
    optimizer = hfmpi.torch.Optimizer(mlp(), communicator=ranks, **options)
    with pytest.raises(UserError, match="rank 1 has a different method, loss or options than rank 0"):
        optimizer.step(*tensors(*data()))


@pytest.mark.mpi(ranks=2, timeout=100, unit="s")
def test_what_one_rank_gets_wrong_is_said_on_all(mpi_ranks, comm):
    ranks = MPICommunicator(comm)
    x, y = tensors(*data())
    module = mlp()
    optimizer = make(module, "bhf-short", communicator=ranks)
    second = ranks.rank == 1
    with pytest.raises(UserError, match="inputs have 60 examples, but targets have 3"):
        optimizer.step(x, y[:3] if second else y)
    with pytest.raises(UserError, match="on all ranks"):
        optimizer.step(x, y, curvature=(x, y) if second else None)
    optimizer.step(x, y)
    with torch.no_grad():
        module[0].bias += float(second)
    with pytest.raises(UserError, match="rank 1 has different parameters"):
        optimizer.step(x, y)
    with pytest.raises(UserError, match="rank 1 has a module with different parameters"):
        make(nn.Linear(INPUTS, OUTPUTS, bias=second), "adam", communicator=ranks)
    with pytest.raises(UserError, match="no optimizer"):
        make(mlp(), "nothing" if second else "adam", communicator=ranks)


@pytest.mark.mpi(ranks=2, timeout=100, unit="s")
def test_two_ranks_take_the_steps_of_one_in_jax(mpi_ranks, comm):
    pytest.importorskip("jax")
    ranks, (x, y) = MPICommunicator(comm), data()
    found = []
    for communicator in ALONE, ranks:
        part = slice(None) if communicator is ALONE else slice(20 * ranks.rank, 20 + 40 * ranks.rank)
        optimizer = hfmpi.jax.Optimizer(network, "cross-entropy", "bhf-short", communicator=communicator)
        tree, losses = params(), []
        state = optimizer.init(tree)
        for _ in range(3):
            updates, state = optimizer.update((x[part], y[part]), state, tree)
            tree = add(tree, updates)
            losses.append(state.loss)
        found.append(losses)
    assert np.allclose(*found, rtol=1e-4)
    tree = params(ranks.rank)
    with pytest.raises(UserError, match="rank 1 has different parameters"):
        optimizer.update((x, y), optimizer.init(tree), tree)


# Pages and examples ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("framework", "line"), [("torch", "import hfmpi.torch"), ("optax", "import hfmpi.jax")]
)
def test_the_loops_of_the_page_lower_the_loss(framework, line, tmp_path, request):
    pytest.importorskip(framework)
    if framework == "optax":  # separate programs use JAX's default precision
        config = pytest.importorskip("jax").config
        request.addfinalizer(partial(config.update, "jax_enable_x64", config.jax_enable_x64))
        config.update("jax_enable_x64", False)
    names = run_page(line, tmp_path)
    assert names["loss" if framework == "torch" else "state"] is not None
    assert (names["loss"] if framework == "torch" else names["state"].loss) < 0.7  # initially log 4


def test_the_example_changes_five_lines():
    file = Path(__file__).parents[1] / "examples" / "facades" / "change.py"
    spec = importlib.util.spec_from_file_location("change", file)
    change = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(change)
    for name, script in change.SCRIPTS.items():
        before = "\n".join(old for old, _ in script.changes)
        after = change.changed(name, before)
        lines = [text.splitlines() for text in (before, after)]
        edits = difflib.SequenceMatcher(None, *lines, autojunk=False).get_opcodes()
        assert sum(max(b - a, d - c) for kind, a, b, c, d in edits if kind != "equal") <= 5
        assert "hfmpi" in after
        with pytest.raises(SystemExit, match="use the revision"):
            change.changed(name, after)


# Imports -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["torch", "jax"])
def test_the_facades_are_imported_when_they_are_asked_for(name):
    pytest.importorskip(name)
    lines = [
        "import sys, hfmpi",
        "assert not {'torch', 'jax'} & set(sys.modules)",
        f"import hfmpi.{name}",
        f"assert hfmpi.{name}.Optimizer.__module__ == 'hfmpi.facades.{name}'",
        f"import {name}",
        f"assert {name} is not hfmpi.{name}",
    ]
    subprocess.run([sys.executable, "-c", "; ".join(lines)], check=True)
    lines = [f"import sys; sys.modules[{name!r}] = None", "import hfmpi", f"hfmpi.{name}"]
    done = subprocess.run(
        [sys.executable, "-c", "; ".join(lines)], capture_output=True, text=True, check=False
    )
    assert f"hfmpi.{name} needs" in done.stderr
    assert "pip install" in done.stderr.splitlines()[-1]
