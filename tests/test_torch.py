"""A PyTorch module as a model: its derivatives compared with dense ones, and refused modules."""

import sys
from functools import partial

import numpy as np
import pytest
from dense import (
    CASES,
    INPUTS,
    OUTPUTS,
    STEPS,
    check,
    check_optimizers,
    check_page,
    check_ranks,
    check_refused,
    factors_of_cases,
    numbers,
    symbols,
)

import hfmpi
from hfmpi.errors import UserError
from hfmpi.models.base import Blocks, KroneckerFactors, Model, Projection, has_squared_gradients
from hfmpi.optim import layout
from hfmpi.optim.layout import split_factors
from hfmpi.parallel.communicator import Communicator

torch = pytest.importorskip("torch")
torch_layers = pytest.importorskip("hfmpi.frameworks.torch_layers")
torch_recorder = pytest.importorskip("hfmpi.frameworks.torch_recorder")
torch_recurrent = pytest.importorskip("hfmpi.frameworks.torch_recurrent")
nn = torch.nn


class Tagger(nn.Module):
    """An LSTM whose outputs tag every step."""

    def __init__(self):
        super().__init__()
        self.lstm = nn.LSTM(INPUTS, 3, batch_first=True)
        self.top = nn.Linear(3, OUTPUTS)

    def forward(self, x):
        return self.top(self.lstm(x)[0])


class Attention(nn.Module):
    """Symbols, a table whose transpose computes the outputs (tied), and an encoder block with dropout."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(OUTPUTS, 4)
        self.block = nn.TransformerEncoderLayer(4, 2, 5, batch_first=True)
        self.top = nn.Linear(4, OUTPUTS, bias=False)
        self.top.weight = self.table.weight

    def forward(self, x):
        return self.top(self.block(self.table(x)))


class Two(nn.Module):
    """Two inputs, a frozen layer and a buffer."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(INPUTS, 2), nn.Linear(2, OUTPUTS)
        self.a.requires_grad_(False)
        self.register_buffer("shift", torch.ones(2))

    def forward(self, x, y):
        return self.b(torch.relu(self.a(x)) * y + self.shift)


def mlp(kind=torch.float64):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(INPUTS, 4), nn.Tanh(), nn.Linear(4, OUTPUTS)).to(kind)


def dense(module, *inputs):
    """Return outputs (N, O) and their Jacobian (N, O, D), by one reverse pass of PyTorch per output."""
    parameters = [p for p in module.parameters() if p.requires_grad]
    z = module(*map(torch.as_tensor, inputs))
    z = z.reshape(-1, z.shape[-1])
    grad = partial(torch.autograd.grad, inputs=parameters, retain_graph=True, materialize_grads=True)
    rows = [torch.cat([g.reshape(-1) for g in grad(one)]) for one in z.reshape(-1)]
    return z.detach().numpy(), torch.stack(rows).reshape(*z.shape, -1).numpy()


def setting(name):
    """Return a module, a loss, examples and the inputs of its calls."""
    torch.manual_seed(1)
    if name == "mlp":
        x = numbers(CASES, INPUTS)
        return mlp(), "squares", hfmpi.Examples(x, numbers(CASES, OUTPUTS)), [x]
    if name == "lstm":
        x = numbers(CASES, STEPS, INPUTS)
        return Tagger().double(), "cross-entropy", hfmpi.Arrays(x, symbols(CASES, STEPS)), [x]
    if name == "attention":
        x = symbols(CASES, STEPS)
        return Attention().double().eval(), "cross-entropy", hfmpi.Arrays(x, symbols(CASES, STEPS)), [x]
    if name == "two":
        x, y = numbers(CASES, INPUTS), numbers(CASES, 2) + 1
        return (
            Two().double(),
            "bernoulli",
            hfmpi.Examples((x, y), (numbers(CASES, OUTPUTS) > 0) * 1.0),
            [x, y],
        )
    images = numbers(CASES, 1, 4, 4)
    conv = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(8, OUTPUTS))
    return conv.double(), "cross-entropy", hfmpi.Examples(images, symbols(CASES)), [images]


@pytest.mark.parametrize("name", ["mlp", "lstm", "attention", "two", "convolution"])
def test_a_module_has_the_derivatives_of_its_dense_jacobian(name, caplog):
    module, kind, cases, inputs = setting(name)
    model = hfmpi.TorchModel(module, kind)
    assert isinstance(model, Model)
    assert isinstance(model, Blocks)
    assert isinstance(model, KroneckerFactors)
    assert has_squared_gradients(model)
    z, jacobian = dense(module, *inputs)
    theta = model.initial(0)
    assert jacobian.shape[2] == theta.size == sum(p.numel() for p in module.parameters() if p.requires_grad)
    at = check(model, kind, cases, theta, z, jacobian)
    assert isinstance(at, Projection)
    said = [record.getMessage().partition("(")[0] for record in caplog.records]
    notes = {"attention": ["Note: a fused kernel of the module has no second derivative "]}
    assert said == notes.get(name, [])


def test_steps_before_the_first_target_are_burn_in():
    x, y = numbers(CASES, STEPS, INPUTS), symbols(CASES, STEPS - 1)
    mask = np.array([[1, 0], [1, 1], [0, 0], [0, 1]])
    module = Tagger().double()
    z, jacobian = dense(module, x)
    scored = np.arange(CASES * STEPS).reshape(CASES, STEPS)[:, 1:].reshape(-1)
    model = hfmpi.TorchModel(module, "cross-entropy")
    cases = hfmpi.Arrays(x, y, mask, burn_in=1)
    check(model, "cross-entropy", cases, model.initial(0), z[scored], jacobian[scored], mask.reshape(-1))


@pytest.mark.parametrize("name", ["mlp", "attention"])
def test_every_optimizer_takes_a_module(name):
    module, kind, cases, _ = setting(name)
    check_optimizers(hfmpi.TorchModel(module.float(), kind), cases)


def test_the_page_works(tmp_path):
    names = check_page("TorchModel", tmp_path)
    result = names["result"]
    assert np.array_equal(hfmpi.TorchModel(names["module"], "squares").initial(0), result.theta)
    outputs = names["module"](torch.tensor(names["x"][800:], dtype=torch.float32))
    right = outputs.argmax(1).numpy() == names["y"][800:]
    assert result.valid_metric == pytest.approx(right.mean())


def test_all_forms_of_data_make_the_same_run():
    """Tensors, a PyTorch data set, and a module that computes with one thread."""
    x, y = torch.randn(40, 5), torch.randint(0, 3, (40,))
    before, thetas = torch.get_num_threads(), []
    for data in (x, y), torch.utils.data.TensorDataset(x, y), hfmpi.Examples(x, y):
        torch.manual_seed(0)
        model = hfmpi.TorchModel(nn.Linear(5, 3), "cross-entropy")
        thetas.append(hfmpi.train(model, data, threads=1, max_steps=2, quiet=True).theta)
        assert np.array_equal(thetas[-1], thetas[0])
    assert torch.get_num_threads() == before


def test_data_and_module_on_several_devices_are_refused():
    model = hfmpi.TorchModel(nn.Linear(5, 3), "cross-entropy")
    away = torch.zeros(9, 5, device="meta"), torch.zeros(9, dtype=int)
    with pytest.raises(UserError, match="tensor on the CPU without a gradient"):
        hfmpi.train(model, away, max_steps=1)
    module = nn.Linear(5, 3)
    module.register_buffer("scale", torch.ones(1, device="meta"))
    with pytest.raises(UserError, match="must be on one device, not on cpu, meta"):
        hfmpi.TorchModel(module, "cross-entropy")


def test_theta_goes_back_into_the_module_and_frozen_parameters_stay():
    module, kind, cases, _ = setting("two")
    model, before = hfmpi.TorchModel(module, kind), {k: v.clone() for k, v in module.state_dict().items()}
    theta = model.initial(0) + 0.5
    loss = model.loss(theta, cases.take(np.arange(CASES)))
    assert all(torch.equal(v, before[k]) for k, v in module.state_dict().items())  # nothing has changed it
    model.write_back(theta)
    after = module.state_dict()
    assert {k for k in after if not torch.equal(after[k], before[k])} == {"b.weight", "b.bias"}
    assert hfmpi.TorchModel(module, kind).loss(theta, cases.take(np.arange(CASES))) == loss
    assert np.array_equal(hfmpi.TorchModel(module, kind).initial(1), theta)
    with pytest.raises(UserError, match="theta must be a vector of 9 numbers, not of shape"):
        model.write_back(theta[1:])


def test_tied_weights_are_in_theta_once_and_go_back_together():
    module = setting("attention")[0]
    model = hfmpi.TorchModel(module, "cross-entropy")
    assert [block.name for block in model.blocks].count("table.weight") == 1
    assert "top.weight" not in [block.name for block in model.blocks]
    model.write_back(model.initial(0) * 2)
    assert module.top.weight is module.table.weight


def test_matrices_are_blocks_and_vectors_rows():
    model = hfmpi.TorchModel(setting("convolution")[0], "cross-entropy")
    assert [block[:4] for block in model.blocks] == [
        ("0.weight", 0, 2, 9),
        ("0.bias", 18, 1, 2),
        ("3.weight", 20, OUTPUTS, 8),
        ("3.bias", 44, 1, OUTPUTS),
    ]


def test_without_memory_for_graphs_the_numbers_are_the_same():
    module, kind, cases, _ = setting("lstm")
    model, found = hfmpi.TorchModel(module, kind), []
    v = np.random.default_rng(1).standard_normal(model.size)
    for budget in (0, np.inf):
        owner = hfmpi.DataParallel(model, Communicator(), micro_batch=1, memory_budget=budget)
        found.append(owner.on(cases, np.arange(CASES)).gauss_newton(model.initial(0))(v))
    assert np.array_equal(*found)


def test_memory_that_runs_out_halves_the_micro_batch(caplog):
    class Hungry(nn.Linear):
        def forward(self, x):
            if len(x) > 1:
                torch.empty(1 << 60)
            return super().forward(x)

    x, y = numbers(CASES, INPUTS), numbers(CASES, OUTPUTS)
    found = []
    for kind in (Hungry, nn.Linear):
        torch.manual_seed(0)
        model = hfmpi.TorchModel(kind(INPUTS, OUTPUTS).double(), "squares")
        risk = hfmpi.DataParallel(model, Communicator()).on(hfmpi.Examples(x, y), np.arange(CASES))
        found.append(risk.gradient(model.initial(0)).vector)
    assert np.allclose(*found)
    assert "micro-batches of 1 sequences" in caplog.text


# Squared gradients of single cases ---------------------------------------------------------------


class Reader(nn.Module):
    """A recurrent network that tags its steps, with the examples on the axis where it expects them."""

    def __init__(self, kind, cases_first=True, frozen=(), start=False, **about):
        super().__init__()
        self.loop = getattr(nn, kind)(INPUTS, 3, batch_first=cases_first, **about)
        self.cases_first, width = cases_first, about.get("proj_size", 0) or 3
        self.top = nn.Linear(width * (1 + about.get("bidirectional", False)), OUTPUTS)
        self.start = nn.Parameter(torch.randn(1, 1, 3)) if start else None
        for name in frozen:
            getattr(self.loop, name).requires_grad_(False)

    def forward(self, x):
        x = x if self.cases_first else x.transpose(0, 1)
        count = x.shape[0 if self.cases_first else 1]
        z = self.top(self.loop(x, None if self.start is None else self.start.expand(1, count, 3))[0])
        return z if self.cases_first else z.transpose(0, 1)


class Odd(nn.Module):
    """Uses layers in all ways in which examples can be arranged."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(INPUTS, INPUTS), nn.Linear(INPUTS, OUTPUTS)
        self.table, self.norm = nn.Parameter(torch.randn(STEPS, INPUTS)), nn.LayerNorm(INPUTS)
        self.a.bias.requires_grad_(False)
        self.unused = nn.Linear(2, 2)
        self.tied = nn.Parameter(self.b.weight.detach().T.clone())
        self.only = nn.Linear(INPUTS, OUTPUTS)
        self.only.weight.requires_grad_(False)

    def forward(self, x):
        x = torch.relu_(self.a(x.reshape(-1, INPUTS))).reshape(x.shape)  # overwritten; joint axes
        x = self.a(x).transpose(0, 1) + self.a(self.table)[:, None]  # shared; steps first; the same for all
        z = self.b(self.norm(x)) + x @ self.tied + self.only(x) + nn.functional.linear(x, weight=self.tied.T)
        return z.transpose(0, 1) + nn.functional.linear(self.table, self.b.weight)


class Tables(nn.Module):
    """Tables that are looked up: symbols, positions, one with a constant row, one that is also a layer."""

    def __init__(self):
        super().__init__()
        self.symbols, self.places = nn.Embedding(OUTPUTS, 4), nn.Embedding(STEPS + 2, 4)
        self.padded, self.tied = nn.Embedding(OUTPUTS, 4, padding_idx=1), nn.Embedding(OUTPUTS, 4)

    def forward(self, x):
        z = self.symbols(x) + self.places(torch.arange(x.shape[1])) + self.padded(x) + self.tied(x)
        return nn.functional.linear(z + self.symbols(x[:, :1]), self.tied.weight)


class Choosing(nn.Linear):
    """Branches on values, which `vmap` does not support: one ordinary pass separates its examples."""

    def forward(self, x):
        return super().forward(x if float(x.detach().square().sum()) >= 0 else 2 * x)


class Hooked(nn.Linear):
    """Changes the gradient in the backward pass, which the records of a layer do not contain."""

    def forward(self, x):
        z = super().forward(x)
        if z.requires_grad:
            z.register_hook(lambda u: 2 * u)
        return z


class Changed(nn.Linear):
    """Branches on values, and multiplies by a changed matrix: its examples are processed one at a time."""

    def forward(self, x):
        x = x if float(x.detach().square().sum()) >= 0 else 2 * x
        return nn.functional.linear(x, self.weight + 0.0, self.bias + 0.0)


class Nested(nn.Linear):
    """Takes its steps inside a `vmap`."""

    def forward(self, x):
        return torch.func.vmap(super().forward, 1, 1)(x)


ALONE = (Changed,)  # modules whose examples are processed one at a time
ORDINARY = Choosing, Hooked
LOOPS = [
    {"kind": "LSTM"}, {"kind": "GRU"}, {"kind": "RNN"},
    {"kind": "RNN", "nonlinearity": "relu", "bias": False},
    {"kind": "LSTM", "num_layers": 2, "bidirectional": True},
    {"kind": "LSTM", "proj_size": 2},
    {"kind": "GRU", "cases_first": False, "start": True},
    {"kind": "LSTM", "frozen": ["weight_hh_l0", "bias_ih_l0"]},
]  # fmt: skip


@pytest.mark.filterwarnings("ignore:LSTM with projections")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(
    "make",
    [
        Odd,
        Tables,
        *(partial(Reader, **about) for about in LOOPS),
        *(partial(kind, INPUTS, OUTPUTS) for kind in (*ALONE, *ORDINARY, Nested)),
    ],
    ids=[
        "odd",
        "tables",
        *("-".join(map(str, about.values())) for about in LOOPS),
        *(kind.__name__ for kind in (*ALONE, *ORDINARY, Nested)),
    ],
)
def test_squared_gradients_are_those_of_cases_taken_one_by_one(make, dtype, monkeypatch, caplog):
    torch.manual_seed(2)
    module = make().to(dtype)
    x, y = numbers(CASES, STEPS, INPUTS), symbols(CASES, STEPS)
    x = y if isinstance(module, Tables) else x.astype(str(dtype).removeprefix("torch."))
    z, jacobian = dense(module, x)
    p = np.exp(z) / np.exp(z).sum(axis=1, keepdims=True) - np.eye(OUTPUTS)[y.reshape(-1)]
    each = np.einsum("no,nod->nd", p, jacobian).reshape(CASES, STEPS, -1).sum(axis=1) / (CASES * STEPS)
    model = hfmpi.TorchModel(module, "cross-entropy")
    risk = hfmpi.DataParallel(model, Communicator()).on(hfmpi.Arrays(x, y), np.arange(CASES))
    theta = model.initial(0).astype(model.backend.dtype)
    found = [risk.squared_gradients(theta)]
    monkeypatch.setattr("hfmpi.frameworks.framework.GRADIENT_NUMBERS", 1)
    monkeypatch.setattr("hfmpi.frameworks.torch_gradients.CACHED_NUMBERS", 1)
    found.append(risk.squared_gradients(theta))  # in parts
    model.replan(sequential=frozenset({"examples"}))
    found.append(risk.squared_gradients(theta))  # in a loop
    close = {"rtol": 1e-9, "atol": 1e-12} if dtype == torch.float64 else {"rtol": 1e-3, "atol": 1e-6}
    for squared in found:
        np.testing.assert_allclose(squared.vector, each.sum(axis=0), **close)
        np.testing.assert_allclose(squared.squares, CASES * (each**2).sum(axis=0), **close)
    assert caplog.text.count("examples are processed one at a time") == (type(module) in ALONE)


def test_squared_gradients_need_nothing_that_is_private_to_pytorch(monkeypatch, caplog):
    torch.manual_seed(2)
    module = Reader(**LOOPS[0]).double()
    x, y = numbers(CASES, STEPS, INPUTS), symbols(CASES, STEPS)

    def squared():
        model = hfmpi.TorchModel(module, "cross-entropy")
        risk = hfmpi.DataParallel(model, Communicator()).on(hfmpi.Arrays(x, y), np.arange(CASES))
        return risk.squared_gradients(model.initial(0))

    expected = squared()
    assert "examples are processed one at a time" not in caplog.text
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "torch._decomp", None)
        assert torch_recurrent.recurrent_networks("input") == {}
    monkeypatch.setattr(torch_layers, "UNPACKED", {})
    monkeypatch.setattr(torch_recorder, "UNPACKED", {})
    found = squared()
    assert "examples are processed one at a time" in caplog.text
    np.testing.assert_allclose(found.vector, expected.vector, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(found.squares, expected.squares, rtol=1e-9, atol=1e-12)


# Kronecker factors -------------------------------------------------------------------------------


class Loop(nn.Module):
    """A recurrent layer as the products of its steps, which are recorded."""

    def __init__(self, kind):
        super().__init__()
        self.loop, self.top = getattr(nn, kind)(INPUTS, 3, batch_first=True), nn.Linear(3, OUTPUTS)
        self.kept = []

    def product(self, x, weight, bias):
        z = x @ weight.T + bias
        if z.requires_grad:
            z.retain_grad()
            self.kept.append((weight, bias, x.detach(), z))
        return z

    def forward(self, x):
        loop, found = self.loop, []
        h = c = x.new_zeros(len(x), 3)
        for t in range(x.shape[1]):
            of_x = self.product(x[:, t], loop.weight_ih_l0, loop.bias_ih_l0)
            of_h = self.product(h, loop.weight_hh_l0, loop.bias_hh_l0)
            if isinstance(loop, nn.LSTM):
                i, f, g, o = (of_x + of_h).chunk(4, 1)
                c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
                h = torch.sigmoid(o) * torch.tanh(c)
            elif isinstance(loop, nn.GRU):
                (r, z, n), (to_r, to_z, to_n) = of_x.chunk(3, 1), of_h.chunk(3, 1)
                z, n = torch.sigmoid(z + to_z), torch.tanh(n + torch.sigmoid(r + to_r) * to_n)
                h = (1 - z) * n + z * h
            else:
                h = torch.tanh(of_x + of_h)
            found.append(self.product(h, self.top.weight, self.top.bias))
        return torch.stack(found, 1)


class Whole(Loop):
    """The same with PyTorch's layer."""

    def forward(self, x):
        return self.top(self.loop(x)[0])


@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN"])
def test_factors_of_layers_are_means_over_the_products_of_their_steps(kind, caplog):
    torch.manual_seed(5)
    whole, apart = Whole(kind).double(), Loop(kind).double()
    apart.load_state_dict(whole.state_dict())
    x, y = numbers(CASES, STEPS, INPUTS), symbols(CASES, STEPS)
    z = apart(torch.from_numpy(x)).reshape(-1, OUTPUTS)
    nn.functional.cross_entropy(z, torch.from_numpy(y).reshape(-1)).backward()
    inputs, outputs, counts = {}, {}, {}
    for weight, bias, rows, z in apart.kept:
        for p, source in (weight, rows), (bias, torch.ones(CASES, 1).double()):
            inputs[id(p)] = inputs.get(id(p), 0) + source.T @ source
            outputs[id(p)] = outputs.get(id(p), 0) + z.grad.T @ z.grad
            counts[id(p)] = counts.get(id(p), 0) + CASES
    model = hfmpi.TorchModel(whole, "cross-entropy")
    owner = hfmpi.DataParallel(model, Communicator(), micro_batch=2)
    found = owner.on(hfmpi.Arrays(x, y), np.arange(CASES)).factored_gradient(model.initial(0))[1]
    for p, (_, *ours) in zip(apart.parameters(), split_factors(model.blocks, found), strict=True):
        of_rows, of_inputs = CASES * STEPS * outputs[id(p)].numpy(), (inputs[id(p)] / counts[id(p)]).numpy()
        theirs = (of_rows, of_inputs) if p.ndim == 2 else (of_inputs, of_rows)
        np.testing.assert_allclose(np.kron(*ours), np.kron(*theirs), rtol=1e-9, atol=1e-14)
    gates = {"LSTM": 4, "GRU": 3, "RNN": 1}[kind]
    assert [len(block.cuts) for block in model.blocks] == [gates - 1, gates - 1, 0, 0, 0, 0]
    assert [block.groups for block in model.blocks] == [1, 1, gates, gates, 1, 1]
    assert not caplog.text


class Various(nn.Module):
    """Operations that are not layers with known inputs: an index, a norm, a convolution, a shared weight."""

    def __init__(self):
        super().__init__()
        self.table, self.norm = nn.Parameter(torch.randn(OUTPUTS, 4)), nn.LayerNorm(4)
        self.beside, self.top = nn.Conv1d(4, 4, 3, padding=1), nn.Linear(4, OUTPUTS)
        self.both = nn.Parameter(torch.randn(4, 4))

    def forward(self, x):
        x = self.norm(self.table[x])
        x = x + self.beside(x.transpose(1, 2)).transpose(1, 2)
        return self.top(nn.functional.linear(x, self.both) + x * self.both.sum(0))


@pytest.mark.parametrize("make", [Various, *(partial(kind, INPUTS, OUTPUTS) for kind in ALONE)])
def test_factors_of_all_else_are_those_of_the_gradients_of_cases(make, monkeypatch):
    torch.manual_seed(2)
    module = make().double()
    symbolic = isinstance(module, Various)
    x, y = symbols(CASES, STEPS) if symbolic else numbers(CASES, STEPS, INPUTS), symbols(CASES, STEPS)
    z, jacobian = dense(module, x)
    p = np.exp(z) / np.exp(z).sum(axis=1, keepdims=True) - np.eye(OUTPUTS)[y.reshape(-1)]
    each = np.einsum("no,nod->nd", p, jacobian).reshape(CASES, STEPS, -1).sum(axis=1)
    model = hfmpi.TorchModel(module, "cross-entropy")
    risk = hfmpi.DataParallel(model, Communicator()).on(hfmpi.Arrays(x, y), np.arange(CASES))
    expected = split_factors(model.blocks, factors_of_cases(model.blocks, each, CASES * STEPS))
    for _ in range(2):
        gradient, found = risk.factored_gradient(model.initial(0))
        np.testing.assert_allclose(gradient.vector, each.sum(axis=0) / (CASES * STEPS), rtol=1e-9, atol=1e-12)
        for (block, *ours), (_, *theirs) in zip(split_factors(model.blocks, found), expected, strict=True):
            if not block.name.startswith("top"):
                for own, matrix in zip(ours, theirs, strict=True):
                    np.testing.assert_allclose(own, matrix, rtol=1e-9, atol=1e-12, err_msg=block.name)
        monkeypatch.setattr("hfmpi.frameworks.framework.GRADIENT_NUMBERS", 1)  # in parts
        monkeypatch.setattr("hfmpi.frameworks.torch_gradients.CACHED_NUMBERS", 1)


def test_factors_of_tables_count_what_is_looked_up():
    torch.manual_seed(2)
    module, x, y = Tables().double(), symbols(CASES, STEPS), symbols(CASES, STEPS)
    kept = {}
    for name in ("symbols", "places"):
        table = getattr(module, name)

        def keep(_, inputs, z, name=name):
            z.retain_grad()
            kept.setdefault(name, []).append((inputs[0].expand(CASES, -1).reshape(-1), z))

        table.register_forward_hook(keep)
    z = module(torch.from_numpy(x)).reshape(-1, OUTPUTS)
    nn.functional.cross_entropy(z, torch.from_numpy(y).reshape(-1)).backward()
    torch.manual_seed(2)
    model = hfmpi.TorchModel(Tables().double(), "cross-entropy")
    risk = hfmpi.DataParallel(model, Communicator()).on(hfmpi.Arrays(x, y), np.arange(CASES))
    found = split_factors(model.blocks, risk.factored_gradient(model.initial(0))[1])
    for (block, *ours), name in zip(found, ("symbols", "places"), strict=False):
        assert block.name == f"{name}.weight"
        counts = torch.cat([rows for rows, _ in kept[name]]).bincount(minlength=block.rows).numpy()
        if name == "symbols":
            assert len(kept[name]) == 2
            back = np.concatenate([z.grad.reshape(-1, 4).numpy() for _, z in kept[name]])
            expected = np.kron(np.diag(counts / counts.sum()), CASES * STEPS * back.T @ back)
            np.testing.assert_allclose(np.kron(*ours), expected, rtol=1e-9, atol=1e-14)
        else:
            np.testing.assert_allclose(np.diag(ours[0]) / ours[0].sum(), [1 / STEPS] * STEPS + [0, 0])


@pytest.mark.parametrize(
    "make", [Odd, Tables, Various, partial(Reader, **LOOPS[4]), partial(Nested, INPUTS, OUTPUTS)]
)
def test_long_sides_have_the_diagonals_of_their_factors(make, monkeypatch):
    torch.manual_seed(2)
    module = make().double()
    symbolic = isinstance(module, (Tables, Various))
    x = symbols(CASES, STEPS) if symbolic else numbers(CASES, STEPS, INPUTS)
    model = hfmpi.TorchModel(module, "cross-entropy")
    cases = hfmpi.Arrays(x, symbols(CASES, STEPS))
    risk = hfmpi.DataParallel(model, Communicator()).on(cases, np.arange(CASES))
    whole = split_factors(model.blocks, risk.factored_gradient(model.initial(0))[1])
    monkeypatch.setattr(layout, "LONGEST_SIDE", 2)
    cut = split_factors(model.blocks, risk.factored_gradient(model.initial(0))[1])
    assert 1 in {matrix.ndim for _, *both in cut for matrix in both}
    for (_, *ours), (_, *theirs) in zip(cut, whole, strict=True):
        for own, matrix in zip(ours, theirs, strict=True):
            np.testing.assert_allclose(own, matrix if own.ndim == 2 else np.diag(matrix), atol=1e-12)


# Operations without derivatives ------------------------------------------------------------------


class Cube(torch.autograd.Function):
    """x^3 whose reverse pass has no derivative, but which has a forward mode."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        ctx.save_for_forward(x)
        return x**3

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, u):
        return 3 * ctx.saved_tensors[0] ** 2 * u

    @staticmethod
    def jvp(ctx, v):
        return 3 * ctx.saved_tensors[0] ** 2 * v


class ReverseCube(Cube):
    """x^3 with a reverse pass only."""

    @staticmethod
    def jvp(ctx, v):
        raise NotImplementedError("no forward mode")


class Cubes(nn.Module):
    def __init__(self, cube):
        super().__init__()
        self.top, self.cube = nn.Linear(INPUTS, OUTPUTS).double(), cube

    def forward(self, x):
        return self.cube.apply(self.top(x))


def test_forward_mode_takes_the_place_of_a_second_derivative(caplog):
    x, module = numbers(CASES, INPUTS), Cubes(Cube)
    model = hfmpi.TorchModel(module, "squares")
    z, jacobian = dense(module, x)
    check(model, "squares", hfmpi.Examples(x, numbers(CASES, OUTPUTS)), model.initial(0), z, jacobian)
    assert "no second derivative" in caplog.text
    assert "forward mode" in caplog.text
    assert caplog.text.count("directions are processed one at a time") == 1


def test_an_operation_with_neither_is_for_first_order_methods():
    model, cases = hfmpi.TorchModel(Cubes(ReverseCube), "squares"), hfmpi.Examples(ROWS, NUMBERS)
    risk, theta = hfmpi.DataParallel(model, Communicator()).on(cases, np.arange(CASES)), model.initial(0)
    assert np.isfinite(risk.gradient(theta).vector).all()
    with pytest.raises(UserError, match="neither a second derivative nor a forward mode"):
        risk.gauss_newton(theta)(theta)


# What is refused ---------------------------------------------------------------------------------

ROWS, NUMBERS, SYMBOLS = numbers(CASES, INPUTS), numbers(CASES, OUTPUTS), symbols(CASES)
GOOD = hfmpi.Examples(ROWS, SYMBOLS)


class Shift(nn.Linear):
    """A linear layer that subtracts the mean of the batch, as batch statistics do, but without buffers."""

    def forward(self, x):
        return super().forward(x - x.mean(dim=0))


class Pair(nn.Linear):
    def forward(self, x):
        return super().forward(x), x


def module(kind=nn.Linear, **changes):
    torch.manual_seed(0)
    made = kind(INPUTS, OUTPUTS).double()
    for name, value in changes.items():
        setattr(made, name, value)
    return made


def infinite():
    made = module()
    with torch.no_grad():
        made.bias[0] = torch.inf
    return made


@pytest.mark.filterwarnings("ignore:.*torch.jit.trace")
@pytest.mark.parametrize(("make", "cases", "words"), [
    (lambda: nn.Linear, GOOD, "module must be a torch.nn.Module, not the class Linear"),
    (lambda: module().requires_grad_(False), GOOD, "no parameter that requires a gradient"),
    (lambda: torch.jit.trace(module(), torch.as_tensor(ROWS)), GOOD, "pass the original module"),
    (lambda: nn.Tanh(), GOOD, "no parameter that requires a gradient"),
    (lambda: nn.LazyLinear(OUTPUTS), GOOD, "parameters without a shape: call it once"),
    (lambda: module().bfloat16(), GOOD, "must all be float32 or all be float64, not bfloat16"),
    (lambda: nn.Sequential(module(), nn.Linear(3, 3)), GOOD, "all be float64, not float32, float64"),
    (lambda: nn.Sequential(module(), nn.Dropout()), GOOD, "as dropout and batch statistics do: call"),
    (lambda: nn.Sequential(module(), nn.BatchNorm1d(3).double()), GOOD, r"1 \(BatchNorm1d\) makes"),
    (lambda: module(Shift), GOOD, "depend on the other examples of its batch"),
    (lambda: module(Pair), GOOD, "must return one array of outputs, not tuple: wrap it"),
    (infinite, GOOD, "the loss is not finite at the start"),
    (module, hfmpi.Examples(ROWS, symbols(CASES, 2)), r"outputs must be \(4, 2, classes\)"),
    (module, hfmpi.Examples(ROWS, SYMBOLS + 9), "targets must be symbols from 0 to 2, not 1"),
    (module, hfmpi.Examples(ROWS, NUMBERS), "targets of this loss must be whole numbers"),
])  # fmt: skip
def test_what_cannot_be_trained_is_refused_in_a_sentence(make, cases, words):
    check_refused(lambda: hfmpi.TorchModel(make(), "cross-entropy"), cases, words)


def test_batch_statistics_are_left_as_they_were_and_serve_when_fixed():
    made = nn.Sequential(module(), nn.BatchNorm1d(OUTPUTS)).double()
    before = {k: v.clone() for k, v in made.state_dict().items()}
    model = hfmpi.TorchModel(made, "cross-entropy")
    with pytest.raises(UserError, match="call module"):
        model.linearise(model.initial(0), GOOD.take(np.arange(CASES)))
    assert all(torch.equal(v, before[k]) for k, v in made.state_dict().items())
    made.eval()
    assert np.isfinite(model.linearise(model.initial(0), GOOD.take(np.arange(CASES))).loss)


# Several ranks -----------------------------------------------------------------------------------


@pytest.mark.mpi(ranks=2, timeout=100, unit="s")
def test_two_ranks_compute_what_one_computes(mpi_ranks, comm):
    module, kind, cases, _ = setting("lstm")
    check_ranks(hfmpi.TorchModel(module, kind), cases, comm)
