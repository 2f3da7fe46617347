"""model.predict and the loss of a complete data set, for PyTorch and JAX models."""

import numpy as np
import pytest

import hfmpi
from hfmpi.errors import UserError

RNG = np.random.default_rng(0)
X = RNG.standard_normal((50, 3))
LABELS = RNG.integers(0, 4, 50)


@pytest.fixture(name="torch")
def fixture_torch():
    return pytest.importorskip("torch")


@pytest.fixture(name="jax")
def fixture_jax():
    return pytest.importorskip("jax")


def in_small_parts(model, theta, x):
    """Return predictions in micro-batches of 7."""
    model.backend.micro_batch = 7
    return model.predict(theta, x)


def test_a_module_predicts_what_it_computes(torch):
    torch.manual_seed(0)
    module = torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.Tanh(), torch.nn.Linear(5, 4)).double()
    model = hfmpi.TorchModel(module, "cross-entropy")
    theta = model.initial(0)
    expected = module(torch.from_numpy(X)).detach().numpy()
    np.testing.assert_allclose(model.predict(theta, X), expected, rtol=1e-12)
    np.testing.assert_allclose(in_small_parts(model, theta, torch.from_numpy(X)), expected, rtol=1e-12)
    whole = hfmpi.Examples(X, LABELS)
    of_batch = model.loss(theta, whole.take(np.arange(50)))
    assert model.loss(theta, whole) == pytest.approx(of_batch, rel=1e-12)
    np.testing.assert_allclose(model.predict(theta, X), expected, rtol=1e-12)  # after the first checked batch
    assert hfmpi.evaluate(model, theta, (X, LABELS)).loss == pytest.approx(of_batch / 50, rel=1e-12)
    np.testing.assert_array_equal(module(torch.from_numpy(X)).detach().numpy(), expected)


def test_classes_of_pytorch_are_on_the_last_axis(torch):
    module, loss = torch.nn.Conv1d(3, 4, 1), torch.nn.CrossEntropyLoss()
    model, x = hfmpi.TorchModel(module, loss), RNG.standard_normal((6, 3, 7))
    expected = module(torch.from_numpy(x).float()).movedim(1, -1).detach().numpy()
    np.testing.assert_allclose(model.predict(model.initial(0), x), expected, rtol=1e-5, atol=1e-6)
    targets = RNG.integers(0, 4, (6, 7))
    targets[:, 5:] = -100  # ignored by the loss of PyTorch
    data = hfmpi.Examples(x, targets)
    wanted = loss(module(torch.from_numpy(x).float()), torch.from_numpy(targets)).item()
    assert model.loss(model.initial(0), data) / 30 == pytest.approx(wanted, rel=1e-5)


def test_a_module_that_differentiates_predicts_before_a_run(torch):
    class Slope(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = torch.nn.Linear(1, 1).double()

        def forward(self, t):
            t = t.requires_grad_()
            return torch.autograd.grad(self.inner(t).tanh().sum(), t, create_graph=True)[0]

    module, t = Slope(), np.linspace(0, 1, 5)[:, None]
    model = hfmpi.TorchModel(module, "squares")
    expected = module(torch.from_numpy(t.copy())).detach().numpy()
    np.testing.assert_allclose(model.predict(model.initial(0), t), expected, rtol=1e-12)


def test_a_module_of_several_inputs_predicts(torch):
    class Sum(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.top = torch.nn.Embedding(4, 3), torch.nn.Linear(3, 2)

        def forward(self, symbols, x):
            return self.top(self.table(symbols) + x)

    module = Sum()
    model = hfmpi.TorchModel(module, "squares")
    expected = module(torch.from_numpy(LABELS), torch.from_numpy(X).float()).detach().numpy()
    np.testing.assert_allclose(in_small_parts(model, model.initial(0), (LABELS, X)), expected, rtol=1e-5)


def test_random_modules_and_wrong_inputs_are_refused(torch):
    linear = torch.nn.Linear(3, 4)
    noisy = hfmpi.TorchModel(torch.nn.Sequential(linear, torch.nn.Dropout()), "squares")
    with pytest.raises(UserError, match=r"call module.eval\(\) first"):
        noisy.predict(noisy.initial(0), X)
    model = hfmpi.TorchModel(linear, "squares")
    for theta, x, words in (
        (model.initial(0)[1:], X, "theta must be a vector"),
        (model.initial(0), X[:, :2], "the module fails on inputs"),
        (model.initial(0), (X, X[1:]), "with the same number of examples, not 49 and 50 examples"),
        (model.initial(0), "text", "x must be whole or real numbers"),
    ):
        with pytest.raises(UserError, match=words):
            model.predict(theta, x)
    total = hfmpi.TorchModel(torch.nn.Sequential(linear, Total(torch)), "squares")
    with pytest.raises(UserError, match="with the 8 examples of the batch along its first axis"):
        total.predict(total.initial(0), X)


def Total(torch):
    class Sums(torch.nn.Module):
        def forward(self, x):
            return x.sum(dim=0)

    return Sums()


def test_a_function_predicts_what_it_computes(jax):
    jnp = jax.numpy
    params = {"a": RNG.standard_normal((3, 6), np.float32), "b": RNG.standard_normal((6, 2), np.float32)}

    def apply(params, x):
        return jnp.tanh(x @ params["a"])[:, None, :] @ params["b"]

    model = hfmpi.JaxModel(apply, params, "squares")
    theta = model.initial(0)
    expected = np.asarray(apply(params, X.astype(np.float32)))
    assert expected.shape == (50, 1, 2)
    np.testing.assert_allclose(model.predict(theta, X), expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(in_small_parts(model, theta, X), expected, rtol=1e-5, atol=1e-6)
    data = hfmpi.Examples(X, RNG.standard_normal((50, 1, 2)))
    assert model.loss(theta, data) == pytest.approx(model.loss(theta, data.take(np.arange(50))), rel=1e-5)
    with pytest.raises(UserError, match="the function fails on inputs"):
        model.predict(theta, (X, X))
