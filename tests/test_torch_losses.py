"""PyTorch's losses in hfmpi: values, gradients and Gauss-Newton products, with options."""

import numpy as np
import pytest

import hfmpi

torch = pytest.importorskip("torch")
nn = torch.nn

RNG = np.random.default_rng(0)
X = RNG.standard_normal((30, 5))
STEPS = RNG.standard_normal((30, 6, 5))
LABELS = RNG.integers(0, 4, 30)
NUMBERS, BITS = RNG.standard_normal((30, 4)), (RNG.random((30, 4)) < 0.3) * 1.0
TAGS = RNG.integers(0, 4, (30, 6))
TAGS[RNG.random((30, 6)) < 0.3] = -100
POSITIVE = torch.tensor([0.5, 1.0, 3.0, 20.0])


class ByClass(nn.Module):
    """The classes are on axis 1, as in PyTorch's cross-entropy."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 4))

    def forward(self, x):
        return self.net(x).movedim(-1, 1)


class Last(ByClass):
    def forward(self, x):
        return self.net(x)


CASES = [
    pytest.param(nn.CrossEntropyLoss(), ByClass, X, LABELS, id="cross-entropy"),
    pytest.param(nn.CrossEntropyLoss(label_smoothing=0.2), ByClass, X, LABELS, id="smoothing"),
    pytest.param(nn.CrossEntropyLoss(label_smoothing=1.0), ByClass, X, LABELS, id="all smoothing"),
    pytest.param(nn.CrossEntropyLoss(label_smoothing=0.2), ByClass, STEPS, TAGS, id="smoothing, ignored"),
    pytest.param(nn.CrossEntropyLoss(ignore_index=2), ByClass, STEPS, abs(TAGS) % 4, id="ignore_index"),
    pytest.param(nn.CrossEntropyLoss(weight=POSITIVE), ByClass, X, LABELS, id="weight"),
    pytest.param(
        nn.CrossEntropyLoss(POSITIVE, ignore_index=-100), ByClass, STEPS, TAGS, id="weight, ignored"
    ),
    pytest.param(
        nn.CrossEntropyLoss(torch.eye(4)[0] + 1, ignore_index=2), ByClass, X, LABELS, id="weight, 2"
    ),
    pytest.param(nn.MSELoss(), Last, X, NUMBERS, id="mse"),
    pytest.param(nn.MSELoss(), Last, STEPS, RNG.standard_normal((30, 6, 4)), id="mse of steps"),
    pytest.param(nn.BCEWithLogitsLoss(), Last, X, RNG.random((30, 4)), id="bce"),
    pytest.param(nn.BCEWithLogitsLoss(pos_weight=POSITIVE), Last, X, BITS, id="pos_weight"),
    pytest.param(nn.BCEWithLogitsLoss(pos_weight=torch.tensor(7.0)), Last, X, BITS, id="one pos_weight"),
]


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.mark.parametrize(("loss", "kind", "x", "y"), CASES)
@pytest.mark.parametrize("size", [1.0, 30.0])
def test_a_loss_is_that_of_pytorch(loss, kind, x, y, size):
    module = kind().double()
    with torch.no_grad():
        module.net[-1].weight *= size
    model = hfmpi.TorchModel(module, loss)
    theta, loss = model.initial(0), loss.double()

    def of(vector):
        parts = model.named(vector)
        outputs = torch.func.functional_call(module, parts, torch.from_numpy(x))
        return outputs, loss(outputs, torch.from_numpy(y))

    at = torch.from_numpy(theta).requires_grad_()
    z, value = of(at)
    (gradient,) = torch.autograd.grad(value, at)
    curvature = hfmpi.curvature(model, theta, (x, y))
    assert curvature.gradient().loss == pytest.approx(value.item(), rel=1e-12)
    np.testing.assert_allclose(curvature.gradient().vector, gradient.numpy(), rtol=1e-9, atol=1e-13)

    # J' H J of PyTorch, with the Hessian H of its loss in the outputs.
    jacobian = torch.autograd.functional.jacobian(lambda v: of(v)[0], at.detach()).reshape(z.numel(), -1)
    targets = torch.from_numpy(y)
    hessian = torch.autograd.functional.hessian(lambda z: loss(z, targets), z.detach()).reshape(z.numel(), -1)
    g = (jacobian.T @ hessian @ jacobian).numpy()
    v = np.random.default_rng(1).standard_normal(theta.size)
    np.testing.assert_allclose(curvature.gauss_newton(v), g @ v, rtol=1e-7, atol=1e-10 * abs(g).max())
    # By rows of the root of H, which Levenberg-Marquardt uses; see `hfmpi.models.losses.LEAST`.
    np.testing.assert_allclose(curvature.matrix(), g, rtol=1e-6, atol=1e-9 * abs(g).max() + 1e-12)


@pytest.mark.parametrize("optimizer", ["adam", "bhf-short", "lm", "subspace"])
@pytest.mark.parametrize(("loss", "kind", "x", "y"), CASES)
def test_runs_with_the_losses_of_pytorch(loss, kind, x, y, optimizer):
    result = hfmpi.train(
        hfmpi.TorchModel(kind().double(), loss), (x, y), optimizer=optimizer, max_steps=6, quiet=True
    )
    losses = [record["loss"] for record in result.history]
    assert min(losses[1:]) < losses[0]


def test_names_are_the_losses_of_pytorch():
    for name, loss, y in (
        ("mse", nn.MSELoss(), NUMBERS),
        ("binary-cross-entropy", nn.BCEWithLogitsLoss(), BITS),
    ):
        results = [
            hfmpi.train(
                hfmpi.TorchModel(module, each), (X, y), optimizer="bhf-short", max_steps=2, quiet=True
            )
            for module, each in (
                (torch.manual_seed(1) and Last(), name),
                (torch.manual_seed(1) and Last(), loss),
            )
        ]
        np.testing.assert_array_equal(results[0].theta, results[1].theta)


def test_other_options_of_a_loss_are_another_model(tmp_path):
    def run(loss, steps):
        torch.manual_seed(1)
        model = hfmpi.TorchModel(ByClass(), loss)
        return hfmpi.train(
            model, (X, LABELS), optimizer="adam", max_steps=steps, out=tmp_path / "run", quiet=True
        )

    run(nn.CrossEntropyLoss(label_smoothing=0.1), 1)
    for loss in (nn.CrossEntropyLoss(label_smoothing=0.3), nn.CrossEntropyLoss()):
        with pytest.raises(hfmpi.UserError, match="belongs to a run of a different model"):
            run(loss, 2)
    assert run(nn.CrossEntropyLoss(label_smoothing=0.1), 2).step == 2


def test_soft_targets_have_no_pos_weight():
    with pytest.raises(hfmpi.UserError, match="the targets must be 0 or 1, because the loss has weights for"):
        hfmpi.train(
            hfmpi.TorchModel(Last(), nn.BCEWithLogitsLoss(pos_weight=POSITIVE)),
            (X, RNG.random((30, 4))),
            optimizer="adam",
            max_steps=1,
            quiet=True,
        )


def test_class_weights_are_those_of_the_run(tmp_path):
    def run(weights, steps):
        torch.manual_seed(1)
        model = hfmpi.TorchModel(ByClass(), nn.CrossEntropyLoss(weight=torch.tensor(weights)))
        options = {"optimizer": "adam", "gradient_batch": 10, "max_steps": steps, "quiet": True}
        return hfmpi.train(model, (X, LABELS), (X, LABELS), out=tmp_path / "run", **options), model

    run([1.0, 2.0, 3.0, 4.0], 1)
    result, model = run([1.0, 2.0, 3.0, 4.0], 2)
    model.write_back(result.theta)
    loss = nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0, 3.0, 4.0]))
    right = loss(model.module(torch.from_numpy(X).float()), torch.from_numpy(LABELS))
    assert result.valid_loss == pytest.approx(right.item(), rel=1e-5)
    with pytest.raises(hfmpi.UserError, match="belongs to a run with different training examples"):
        run([1.0, 2.0, 3.0, 5.0], 3)
    with pytest.raises(
        hfmpi.UserError, match="weight of the loss has 3 classes, but the module has 4 outputs"
    ):
        hfmpi.train(
            hfmpi.TorchModel(ByClass(), nn.CrossEntropyLoss(weight=torch.ones(3))),
            (X, LABELS),
            optimizer="adam",
            max_steps=1,
            quiet=True,
        )
