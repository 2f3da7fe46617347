"""Per-example rows of PyTorch and JAX models, compared with derivatives that the frameworks compute."""

import numpy as np
import pytest
from dense import CASES, INPUTS, OUTPUTS, STEPS, numbers, symbols

import hfmpi
from hfmpi.models.base import has_rows
from hfmpi.optim.layout import Directions, parts_of, whole
from hfmpi.optim.reduced_model import Basis, Row

CLOSE = {"rtol": 1e-12, "atol": 1e-12}


class Dense(Directions):
    """Directions that are stored."""

    def __init__(self, v):
        self.v, self.shape, self.dtype = v, v.shape, v.dtype

    def fill(self, start, out):
        out[...] = self.v[start : start + len(out)]

    def dense(self):
        return self.v


def check_rows(model, inputs, dense, targets, burn_in=0, loop=False):
    """Check rows for one cotangent and for several against J (N, O, D), with all ways to compute them."""
    outputs, jacobian = dense
    count, width, size = jacobian.shape
    theta = model.initial(0)
    batch = hfmpi.Examples(inputs, targets, burn_in=burn_in).take(np.arange(CASES))
    expected_z = jacobian.reshape(CASES, -1, width, size)
    wide = np.full((CASES, 4, size), np.nan)  # rows are written to a part of a larger array
    sequential = [model.plan.sequential] + [frozenset({"examples"})] * loop
    assert has_rows(model)
    # Directions that are cut into parts, full directions, and directions that are only known as functions.
    vectors = [*numbers(2, size, seed=8)]
    cuts = parts_of(model.blocks), [whole(size)]
    rows = [[Row(part, i, 0.5 + i) for part in parts for i in (0, 1)] for parts in cuts]
    bases = [Basis([np.array(vectors)], each) for each in rows]
    bases.append(Dense(bases[0].dense()))
    for linearise in (model.linearise, model.linearise_rows):
        for how in sequential:
            passes = linearise(theta, batch).passes
            if how:
                model.replan(sequential=how)
            np.testing.assert_allclose(passes.outputs, outputs, **CLOSE)
            assert (passes.examples, passes.by_step) == (CASES, False)
            for several in (1, 3):
                u = numbers(count, several, width, seed=7)
                out = wide[:, 1 : 1 + several]
                passes.rows(u.reshape(-1, width), out)
                by_example = u.reshape(CASES, -1, several, width)
                expected = np.einsum("bnod,bnco->bcd", expected_z, by_example)
                np.testing.assert_allclose(out, expected, **CLOSE)
                for basis in bases:
                    functions = basis.along()
                    found = passes.rows_along(u.reshape(-1, width), several, functions)
                    found *= functions.scales[:, None, None].astype(found.dtype)
                    along = np.einsum("kd,bcd->kbc", basis.dense(), expected)
                    np.testing.assert_allclose(found, along, **CLOSE)
            back, u = np.zeros(size), numbers(count, width)
            passes.vjp(u, back)
            np.testing.assert_allclose(back, np.einsum("nod,no->d", jacobian, u), **CLOSE)
    assert np.isnan(wide[:, 0]).all()


def check_matrices(model, inputs, targets, jacobian, hessian):
    """Check that rows of residuals have S'S = J' H J and S'r = g, and that scores sum to g; H (N, O, O)."""
    count, width, size = jacobian.shape
    at = model.linearise_rows(model.initial(0), hfmpi.Examples(inputs, targets).take(np.arange(CASES)))
    gradient = np.zeros(size)
    at.gradient(1.0, gradient)
    out, r = np.empty((CASES, count * width // CASES, size)), np.empty((CASES, count * width // CASES))
    assert at.residual_rows(out, r)
    s = out.reshape(-1, size)
    right = np.einsum("nod,nop,npe->de", jacobian, hessian, jacobian)
    np.testing.assert_allclose(s.T @ s, right, rtol=1e-10, atol=1e-11)
    np.testing.assert_allclose(s.T @ r.reshape(-1), gradient, rtol=1e-10, atol=1e-11)
    scores = np.empty((CASES, 2, size))
    at.scores(2, scores)
    np.testing.assert_allclose(scores.sum((0, 1)), gradient, rtol=1e-10, atol=1e-11)


def softmax_hessian(z):
    p = np.exp(z) / np.exp(z).sum(1, keepdims=True)
    return np.einsum("no,op->nop", p, np.eye(len(p.T))) - p[:, :, None] * p[:, None]


# PyTorch -----------------------------------------------------------------------------------------


class TestTorch:
    """Modules."""

    @pytest.fixture(autouse=True)
    def _torch(self):
        self.torch = pytest.importorskip("torch")
        self.torch.manual_seed(0)

    def dense(self, module, *inputs):
        """Compute outputs (N, O) and J (N, O, D) by one reverse pass for each output."""
        torch, parameters = self.torch, [p for p in module.parameters() if p.requires_grad]
        z = module(*map(torch.tensor, inputs))
        z = z.reshape(-1, z.shape[-1])
        rows = [
            torch.autograd.grad(one, parameters, retain_graph=True, materialize_grads=True)
            for one in z.reshape(-1)
        ]
        flat = torch.stack([torch.cat([g.reshape(-1) for g in row]) for row in rows])
        return z.detach().numpy(), flat.reshape(*z.shape, -1).numpy()

    def module(self, name):
        """Return a module, its inputs, and whether each example has several steps."""
        nn, f = self.torch.nn, self.torch.nn.functional

        class Steps(nn.Module):
            def __init__(self, kind):
                super().__init__()
                self.loop, self.top = getattr(nn, kind)(INPUTS, 3, batch_first=True), nn.Linear(3, OUTPUTS)

            def forward(self, x):
                return self.top(self.loop(x)[0])

        class Two(nn.Module):
            def __init__(self):
                super().__init__()
                self.a, self.b = nn.Linear(INPUTS, 2), nn.Linear(2, OUTPUTS)
                self.a.weight.requires_grad_(False)
                self.unused = nn.Parameter(self.b.bias.detach().clone())

            def forward(self, x, y):
                return self.b(self.torch_relu(self.a(x)) * y)

            torch_relu = staticmethod(f.relu)

        class Shared(nn.Module):
            def __init__(self):
                super().__init__()
                self.table, self.mix = nn.Embedding(OUTPUTS, 4), nn.Linear(4, 4)

            def forward(self, x):
                return f.linear(self.mix(f.softplus(self.mix(self.table(x)))), self.table.weight)

        from test_torch import Changed, Choosing, Hooked

        steps = numbers(CASES, STEPS, INPUTS)
        if name in ("LSTM", "GRU", "RNN"):
            return Steps(name), (steps,)
        if name == "convolution":
            layers = nn.Conv2d(1, 2, 3), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(8, OUTPUTS)
            return nn.Sequential(*layers), (numbers(CASES, 1, 4, 4),)
        kinds = {"choosing": Choosing, "hooked": Hooked, "changed": Changed}
        if name in kinds:
            return kinds[name](INPUTS, OUTPUTS), (steps,)
        if name == "two":
            return Two(), (numbers(CASES, INPUTS), numbers(CASES, 2, seed=8))
        if name == "shared":
            return Shared(), (symbols(CASES, STEPS),)
        return nn.Sequential(nn.Linear(INPUTS, 4), nn.Tanh(), nn.Linear(4, OUTPUTS)), (
            numbers(CASES, INPUTS),
        )

    @pytest.mark.parametrize(
        "name",
        ["mlp", "two", "shared", "LSTM", "GRU", "RNN", "convolution", "choosing", "hooked", "changed"],
    )
    def test_rows_are_the_gradients_of_single_examples(self, name, monkeypatch, caplog):
        module, inputs = self.module(name)
        module.double()
        z, jacobian = dense = self.dense(module, *inputs)
        shape = (CASES, -1) if len(z) > CASES else (CASES,)
        targets = np.zeros(len(z), int).reshape(shape)
        model = hfmpi.TorchModel(module, "cross-entropy")
        given = inputs if len(inputs) > 1 else inputs[0]
        check_rows(model, given, dense, targets, loop=True)
        assert ("one at a time" in caplog.text) == (name == "changed")
        monkeypatch.setattr("hfmpi.frameworks.framework.GRADIENT_NUMBERS", 1)  # each example is a part
        check_rows(hfmpi.TorchModel(module, "cross-entropy"), given, dense, targets)
        check_matrices(model, given, targets, jacobian, softmax_hessian(z))

    def test_steps_of_the_burn_in_have_no_cotangents(self):
        module, (x,) = self.module("LSTM")
        z, jacobian = self.dense(module.double(), x)
        rest = [a.reshape(CASES, STEPS, *a.shape[1:])[:, 1:].reshape(-1, *a.shape[1:]) for a in (z, jacobian)]
        model = hfmpi.TorchModel(module, "cross-entropy")
        check_rows(model, x, rest, symbols(CASES, STEPS - 1), burn_in=1)

    @pytest.mark.filterwarnings("ignore:.*torch.jit")
    @pytest.mark.parametrize("kind", ["func", "in place", "detached", "setter", "columns", "nowhere"])
    def test_residuals_of_differential_equations(self, kind, caplog):
        torch, nn = self.torch, self.torch.nn

        class Residual(nn.Module):
            def __init__(self):
                super().__init__()
                self.net = nn.Sequential(
                    nn.Linear(2, 5), nn.Tanh(), nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 1)
                )

            def forward(self, x):
                if kind == "func":
                    h = torch.func.vmap(torch.func.hessian(lambda p: self.net(p)[0]))(x)
                    return (h[:, 0, 0] + h[:, 1, 1])[:, None] - x.sum(1, keepdim=True)
                if kind == "columns":
                    a, b = (x[:, i : i + 1].clone().requires_grad_() for i in (0, 1))
                    u = self.net(torch.cat([a, b], 1))
                    ones = torch.ones_like(u)
                    first = torch.autograd.grad(u, [a, b], grad_outputs=ones, create_graph=True)
                    second = [
                        torch.autograd.grad(g, y, ones, create_graph=True)[0]
                        for g, y in zip(first, (a, b), strict=True)
                    ]
                    return second[0] + second[1] + u * first[0]
                if kind == "detached":
                    x = x.detach().requires_grad_(True)
                elif kind == "setter":
                    x.requires_grad = True
                else:
                    x.requires_grad_()
                u = self.net(x)
                g = torch.autograd.grad(u.sum(), x, create_graph=True)[0]
                if kind == "nowhere":  # a derivative that cannot be batched
                    g = torch.autograd.grad(
                        u, x, torch.ones_like(u)[None], create_graph=True, is_grads_batched=True
                    )[0][0]
                parts = [torch.autograd.grad(g[:, i].sum(), x, create_graph=True)[0][:, i] for i in (0, 1)]
                return (parts[0] + parts[1])[:, None] - x.sum(1, keepdim=True)

        module, x = Residual().double(), numbers(CASES, 2)
        dense = self.dense(module, x)
        model = hfmpi.TorchModel(module, "squares")
        check_rows(model, x, dense, np.zeros((CASES, 1)))
        check_matrices(model, x, np.zeros((CASES, 1)), dense[1], np.ones((CASES, 1, 1)))
        assert ("one at a time" in caplog.text) == (kind == "nowhere")

    def test_an_unused_derivative_is_none(self):
        torch, nn = self.torch, self.torch.nn

        class Flow(nn.Linear):
            def forward(self, x):
                x.requires_grad_()
                t = x[:, :1].clone()
                u = super().forward(x).tanh()
                pair = torch.autograd.grad(u.sum(), (t, x), create_graph=True, allow_unused=True)
                assert pair[0] is None
                return pair[1][:, :1] + u

        module, x = Flow(2, 1).double(), numbers(CASES, 2)
        check_rows(hfmpi.TorchModel(module, "squares"), x, self.dense(module, x), np.zeros((CASES, 1)))


# JAX ---------------------------------------------------------------------------------------------


class TestJax:
    """Functions."""

    @pytest.fixture(autouse=True)
    def _jax(self):
        self.jax = jax = pytest.importorskip("jax")
        before = jax.config.jax_enable_x64
        jax.config.update("jax_enable_x64", True)
        yield
        jax.config.update("jax_enable_x64", before)

    def function(self, name):
        """Return a function, its params and inputs."""
        jax, jnp = self.jax, self.jax.numpy
        if name == "two":
            params = {"a": numbers(INPUTS, 2), "b": numbers(2, OUTPUTS), "shift": np.arange(2)}
            inputs = numbers(CASES, INPUTS), numbers(CASES, 2, seed=8)
            return lambda p, x, y: (jnp.tanh(x @ p["a"]) * y + p["shift"]) @ p["b"], params, inputs
        if name == "loop":

            def loop(p, x):
                def step(h, x):
                    h = jnp.tanh(x @ p["x"] + h @ p["h"])
                    return h, h

                first = jnp.zeros((x.shape[0], 3))
                return jax.lax.scan(step, first, x.swapaxes(0, 1))[1].swapaxes(0, 1) @ p["top"]

            params = {"x": numbers(INPUTS, 3), "h": numbers(3, 3), "top": numbers(3, OUTPUTS)}
            return loop, params, (numbers(CASES, STEPS, INPUTS),)
        if name == "table":
            params = numbers(OUTPUTS, 4), numbers(4, 4)
            return lambda p, x: jnp.tanh(p[0][x] @ p[1]) @ p[0].T, params, (symbols(CASES, STEPS),)
        if name == "convolution":

            def convolution(p, x):
                z = jax.lax.conv_general_dilated(x, p["kernel"], (1, 1), "VALID")
                return jax.nn.softplus(z).reshape(len(x), -1) @ p["top"]

            params = {"kernel": numbers(2, 1, 3, 3), "top": numbers(8, OUTPUTS)}
            return convolution, params, (numbers(CASES, 1, 4, 4),)
        if name == "callback":

            @jax.custom_vjp
            def double(x):
                like = jax.ShapeDtypeStruct(x.shape, x.dtype)
                return jax.pure_callback(lambda x: 2 * np.asarray(x), like, x)

            double.defvjp(lambda x: (double(x), None), lambda _, u: (double(u),))
            return lambda w, x: double(x @ w), numbers(INPUTS, OUTPUTS), (numbers(CASES, INPUTS),)
        return (
            lambda p, x: jnp.tanh(x @ p[0] + p[1]) @ p[2],
            [numbers(INPUTS, 4), numbers(4), numbers(4, OUTPUTS)],
            (numbers(CASES, INPUTS),),
        )

    def dense(self, model, apply, inputs):
        """Compute outputs (N, O) and J (N, O, D) by one reverse pass for each output."""

        def outputs(theta):
            z = apply(model._params.joined(model._params.split(theta)), *inputs)
            return z.reshape(-1, z.shape[-1])

        z, back = self.jax.vjp(outputs, self.jax.numpy.asarray(model.initial(0)))
        unit = np.eye(z.size).reshape(-1, *z.shape)
        return np.asarray(z), np.stack([back(u)[0] for u in unit]).reshape(*z.shape, -1)

    @pytest.mark.parametrize("name", ["mlp", "two", "loop", "table", "convolution", "callback"])
    def test_rows_are_the_gradients_of_single_examples(self, name, monkeypatch, caplog):
        apply, params, inputs = self.function(name)
        model = hfmpi.JaxModel(apply, params, "cross-entropy")
        z, jacobian = dense = self.dense(model, apply, inputs)
        targets = np.zeros(len(z), int).reshape((CASES, -1) if len(z) > CASES else (CASES,))
        given = inputs if len(inputs) > 1 else inputs[0]
        check_rows(model, given, dense, targets, loop=True)
        assert ("one at a time" in caplog.text) == (name == "callback")
        check_matrices(model, given, targets, jacobian, softmax_hessian(z))
        monkeypatch.setattr("hfmpi.frameworks.framework.GRADIENT_NUMBERS", 1)  # each example is a part
        check_rows(hfmpi.JaxModel(apply, params, "cross-entropy"), given, dense, targets)

    @pytest.mark.parametrize("batched", [True, False])
    def test_residuals_of_differential_equations(self, batched, caplog):
        jax, jnp = self.jax, self.jax.numpy

        def u(p, x):
            return (jnp.tanh(jnp.tanh(x @ p["a"] + p["b"]) @ p["c"]) @ p["d"])[0]

        def residual(p, x):
            return jnp.trace(jax.hessian(u, 1)(p, x)) - x.sum()

        def apply(p, x):
            return jax.vmap(residual, (None, 0))(p, x) if batched else jnp.stack([residual(p, r) for r in x])

        def dense_apply(p, x):
            return apply(p, x)[:, None]

        params = {"a": numbers(2, 5), "b": numbers(5), "c": numbers(5, 5), "d": numbers(5, 1)}
        x = numbers(CASES, 2)
        model = hfmpi.JaxModel(apply, params, "squares")
        dense = self.dense(model, dense_apply, (x,))
        check_rows(model, x, dense, np.zeros((CASES, 1)), loop=True)
        check_matrices(model, x, np.zeros((CASES, 1)), dense[1], np.ones((CASES, 1, 1)))
        assert not caplog.text

    def test_the_output_of_a_callback_has_no_gradient_beside_it(self, caplog):
        apply, params, inputs = self.function("callback")
        model = hfmpi.JaxModel(lambda w, x: apply(w, x)[:, 0], params, "squares")
        dense = self.dense(model, lambda w, x: apply(w, x)[:, :1], inputs)
        check_rows(model, inputs[0], dense, np.zeros((CASES, 1)))
        assert "one at a time" in caplog.text
