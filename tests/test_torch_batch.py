"""Per-example gradients from one ordinary pass of a batch, compared with those of single examples."""

import numpy as np
import pytest
from dense import numbers, symbols

import hfmpi
from hfmpi.errors import UserError
from hfmpi.optim.layout import split_factors
from hfmpi.parallel.communicator import Communicator

torch = pytest.importorskip("torch")
nn, F = torch.nn, torch.nn.functional
batch = pytest.importorskip("hfmpi.frameworks.torch_batch")
pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections")

B, STEPS, WIDTH, CLASSES = 5, 4, 3, 4
TIGHT = {"rtol": 1e-9, "atol": 1e-12}


class Packed(nn.Module):
    """A recurrent network that reads packed sequences of different lengths, and tags or classifies them."""

    def __init__(self, kind, tags=False, **options):
        super().__init__()
        self.net, self.tags = getattr(nn, kind)(WIDTH, 4, batch_first=True, **options), tags
        width = (options.get("proj_size", 0) or 4) * (1 + options.get("bidirectional", False))
        self.top = nn.Linear(width, CLASSES)

    def forward(self, x, lengths):
        packed = nn.utils.rnn.pack_padded_sequence(x, lengths.cpu(), batch_first=True, enforce_sorted=False)
        outputs, _ = self.net(packed)
        if self.tags:  # a layer of packed rows
            outputs = nn.utils.rnn.PackedSequence(torch.tanh(self.top(outputs.data)), *outputs[1:])
        z, _ = nn.utils.rnn.pad_packed_sequence(outputs, batch_first=True, total_length=STEPS)
        return z if self.tags else self.top(z.sum(1))


class Cells(nn.Module):
    """A loop over the steps that calls a cell."""

    def __init__(self, kind, **options):
        super().__init__()
        self.cell, self.top = kind(WIDTH, 4, **options), nn.Linear(4, CLASSES)

    def forward(self, x):
        state = None
        for step in x.unbind(1):
            state = self.cell(step, state)
        return self.top(state[0] if isinstance(state, tuple) else state)


class Encoder(nn.Module):
    """Attention with a mask that depends on values, and positions that do not depend on inputs."""

    def __init__(self, flat_positions=False):
        super().__init__()
        self.symbols, self.places = nn.Embedding(9, 4, padding_idx=0), nn.Embedding(STEPS + 2, 4)
        self.shift, self.gain = nn.Parameter(torch.randn(1, STEPS, 4)), nn.Parameter(torch.tensor(1.5))
        self.query, self.key, self.value = (nn.Linear(4, 4) for _ in range(3))
        self.norm, self.rms = nn.LayerNorm(4), nn.LayerNorm(4, bias=False)
        self.mix, self.bias = nn.Parameter(torch.randn(4, 4)), nn.Parameter(torch.randn(4))
        self.side = nn.Parameter(torch.randn(4, 4))
        self.query.bias.requires_grad_(False)
        self.key.weight.requires_grad_(False)
        self.flat = flat_positions

    def forward(self, x):
        places = torch.arange(x.shape[1])
        h = self.norm(self.symbols(x) + self.places(places if self.flat else places[None]) + self.shift)
        mask = x != 0
        scores = self.query(h) @ self.key(h).transpose(1, 2)
        if not bool(mask.all()):
            scores = scores.masked_fill(~mask[:, None], -1e9)
        h = h + torch.softmax(scores, 2) @ self.value(h) * self.gain
        h = torch.addmm(self.bias, h.view(-1, 4), self.mix).view(h.shape) + h @ self.side.T
        return F.linear(self.rms(h).mean(1), self.symbols.weight)[:, :CLASSES]


class Residual(nn.Module):
    """The residual of a differential equation, with derivatives up to the second one."""

    def __init__(self, third=False):
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(WIDTH, 4), nn.Tanh(), nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, CLASSES)
        )
        self.scale, self.third = nn.Parameter(torch.ones(CLASSES)), third

    def forward(self, x):
        x.requires_grad_(True)
        u = self.net(x)
        first = torch.autograd.grad(u.square().sum(), x, create_graph=True)[0]
        last = torch.autograd.grad(first[:, 0].sum(), x, create_graph=True)[0]
        if self.third:
            last = torch.autograd.grad(last[:, 1].sum(), x, create_graph=True)[0]
        return u * self.scale + first[:, :1] * last[:, 1:2]


LENGTHS = np.array([2, 4, 1, 3, 4])
SEQUENCES = numbers(B, STEPS, WIDTH), LENGTHS
PADDED = symbols(B, STEPS) + 1
PADDED[1, 2:] = 0

MODULES = {
    "packed LSTM": (lambda: Packed("LSTM"), SEQUENCES, "batch"),
    "packed LSTM, tags": (lambda: Packed("LSTM", tags=True), SEQUENCES, "batch"),
    "packed LSTM, deep": (lambda: Packed("LSTM", num_layers=2, bidirectional=True), SEQUENCES, "batch"),
    "packed LSTM, projections": (lambda: Packed("LSTM", proj_size=2), SEQUENCES, "batch"),
    "packed GRU": (lambda: Packed("GRU", bidirectional=True), SEQUENCES, "batch"),
    "packed RNN": (lambda: Packed("RNN", nonlinearity="relu", bias=False), SEQUENCES, "batch"),
    "LSTMCell": (lambda: Cells(nn.LSTMCell), SEQUENCES[:1], "batch"),
    "LSTMCell, no bias": (lambda: Cells(nn.LSTMCell, bias=False), SEQUENCES[:1], "batch"),
    "GRUCell": (lambda: Cells(nn.GRUCell), SEQUENCES[:1], "batch"),
    "RNNCell": (lambda: Cells(nn.RNNCell), SEQUENCES[:1], "batch"),
    "RNNCell, relu": (lambda: Cells(nn.RNNCell, nonlinearity="relu"), SEQUENCES[:1], "batch"),
    "encoder": (Encoder, (PADDED,), "batch"),
    "encoder, as many steps as examples": (lambda: Encoder(True), (PADDED[:STEPS],), "batch"),
    "second derivatives": (Residual, (numbers(B, WIDTH),), "derivatives"),
    "third derivatives": (lambda: Residual(third=True), (numbers(B, WIDTH),), "derivatives"),
}


def setting(name):
    """Return a model in float64, its inputs and targets, and the expected way of `TorchPlan`."""
    torch.manual_seed(3)
    make, inputs, way = MODULES[name]
    module, count = make().double(), len(inputs[0])
    shape = (count, STEPS) if getattr(module, "tags", False) else (count,)
    targets = np.random.default_rng(0).integers(0, CLASSES, shape)
    return hfmpi.TorchModel(module, "cross-entropy"), inputs, targets, way


def risk_of(model, inputs, targets, **options):
    data = hfmpi.Examples(inputs if len(inputs) > 1 else inputs[0], targets)
    return hfmpi.DataParallel(model, Communicator(), **options).on(data, np.arange(data.count))


def rows_of(model, inputs, targets):
    """Return the gradients (B, C, D) of the examples for three random cotangents."""
    data = hfmpi.Examples(inputs if len(inputs) > 1 else inputs[0], targets)
    at = model.linearise(model.initial(0), data.take(np.arange(data.count)))
    u = numbers(at.passes.outputs.shape[0] * 3, at.passes.outputs.shape[1], seed=4)
    out = np.empty((data.count, 3, model.size))
    at.passes.rows(u, out)
    return out


@pytest.mark.parametrize("name", MODULES)
def test_gradients_of_examples_are_those_of_single_examples(name, caplog):
    model, inputs, targets, way = setting(name)
    risk, theta = risk_of(model, inputs, targets), model.initial(0)
    gradient, squared, rows = (
        risk.gradient(theta),
        risk.squared_gradients(theta),
        rows_of(model, inputs, targets),
    )
    factored, factors = risk.factored_gradient(theta)
    assert model.plan.way == way
    assert "one at a time" not in caplog.text
    model.replan(sequential=frozenset({"examples"}))
    expected = risk.squared_gradients(theta)
    for vector in (gradient.vector, squared.vector, factored.vector):
        np.testing.assert_allclose(vector, expected.vector, **TIGHT)
    assert squared.loss == pytest.approx(gradient.loss, rel=1e-12)
    assert factored.loss == pytest.approx(gradient.loss, rel=1e-12)
    np.testing.assert_allclose(squared.squares, expected.squares, **TIGHT)
    np.testing.assert_allclose(rows, rows_of(model, inputs, targets), **TIGHT)
    assert np.isfinite(factors).all()


def factors_in(way, model, inputs, targets):
    """Return the Kronecker factors, computed with one way to separate examples."""
    model.replan(sequential=frozenset(), way=way, unassigned=0, shared=(False,))
    found = risk_of(model, inputs, targets).factored_gradient(model.initial(0))[1]
    assert model.plan.way == way
    return split_factors(model.blocks, found)


class Plain(nn.Module):
    """A module whose layers both ways separate."""

    def __init__(self, kind):
        super().__init__()
        self.table, self.net = nn.Embedding(CLASSES + 1, WIDTH), getattr(nn, kind)(WIDTH, 4, batch_first=True)
        self.top = nn.Linear(4, CLASSES)

    def forward(self, x):
        return self.top(self.net(self.table(x))[0])


@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN"])
def test_factors_are_those_of_the_layers(kind):
    torch.manual_seed(0)
    model, x = hfmpi.TorchModel(Plain(kind).double(), "cross-entropy"), symbols(B, STEPS)
    risk_of(model, (x,), x).squared_gradients(model.initial(0))
    pairs = zip(factors_in("layers", model, (x,), x), factors_in("batch", model, (x,), x), strict=True)
    for (block, *expected), (_, *found) in pairs:
        for ours, theirs in zip(found, expected, strict=True):
            np.testing.assert_allclose(ours, theirs, **TIGHT, err_msg=block.name)


def test_factors_of_packed_sequences_count_their_steps():
    model, inputs, targets, _ = setting("packed LSTM")
    factors = split_factors(
        model.blocks, risk_of(model, inputs, targets).factored_gradient(model.initial(0))[1]
    )
    steps = np.concatenate([x[:n] for x, n in zip(*inputs, strict=True)])
    by_name = {block.name: (a, b) for block, a, b in factors}
    inputs_of = by_name["net.weight_ih_l0"][1]
    np.testing.assert_allclose(inputs_of, steps.T @ steps / LENGTHS.sum(), **TIGHT)


@pytest.mark.parametrize("name", ["second derivatives", "third derivatives"])
def test_factors_of_matrices_in_derivatives_are_those_of_gradients(name, monkeypatch):
    model, inputs, targets, _ = setting(name)
    risk_of(model, inputs, targets).squared_gradients(model.initial(0))
    right = factors_in("expanded", model, inputs, targets)
    found = [factors_in("derivatives", model, inputs, targets)]
    monkeypatch.setattr("hfmpi.frameworks.torch_gradients._factors_of_few", None)
    monkeypatch.setattr("hfmpi.frameworks.torch_gradients.FEW_TERMS", 0)  # from the gradients themselves
    found.append(factors_in("derivatives", model, inputs, targets))
    for each in found:
        for (block, *ours), (_, *theirs) in zip(each, right, strict=True):
            if block.rows > 1 and not block.name.startswith("net.0"):
                for one, other in zip(ours, theirs, strict=True):
                    np.testing.assert_allclose(one, other, **TIGHT, err_msg=block.name)


def test_a_first_batch_of_one_example_decides_nothing(caplog):
    model, inputs, targets, _ = setting("LSTMCell")
    one = risk_of(model, tuple(x[:1] for x in inputs), targets[:1])
    theta = model.initial(0)
    alone = one.squared_gradients(theta)
    np.testing.assert_allclose(alone.squares, alone.vector**2, **TIGHT)
    assert model.plan.unassigned is None
    assert not model.plan.sequential
    risk_of(model, inputs, targets).squared_gradients(theta)
    assert model.plan.way == "batch"
    again = one.squared_gradients(theta)
    np.testing.assert_allclose(again.squares, alone.squares, **TIGHT)
    assert "one at a time" not in caplog.text


def test_lengths_may_change_from_batch_to_batch():
    model, (x, lengths), targets, _ = setting("packed LSTM")
    theta = model.initial(0)
    for order in (np.arange(B), np.roll(np.arange(B), 2), np.zeros(B, int) + 1):
        risk = risk_of(model, (x, lengths[order]), targets)
        found = risk.squared_gradients(theta)
        assert model.plan.way == "batch"
        model.replan(sequential=frozenset({"examples"}))
        np.testing.assert_allclose(found.squares, risk.squared_gradients(theta).squares, **TIGHT)
        model.replan(sequential=frozenset())


@pytest.mark.parametrize("count", [31, 33, 1023, 1100])
def test_many_examples_are_told_apart(count):
    torch.manual_seed(0)
    for kind in (torch.float32, torch.float64):
        module, x = nn.Linear(3, 2).to(kind), torch.randn(count, 3, dtype=kind)
        torch.manual_seed(1)
        order = torch.randperm(count)
        passed = batch.BatchPass(
            lambda p, x, order=order: F.linear(x[order], p["weight"], p["bias"])[order.argsort()],
            dict(module.named_parameters()),
            [],
            [x],
            derivatives=False,
        )
        u = torch.randn(count, 1, 2, dtype=kind)
        gradients, _ = passed.gradients(u)
        expected = u[:, 0, :, None] * x[:, None]
        torch.testing.assert_close(gradients[0].rows(), expected)
        torch.testing.assert_close(gradients[1].rows(), u[:, 0])


def mixing(p, x):
    h = F.linear(x, p["weight"])
    return h + 0.01 * h.mean(0)


def pooled(p, x):
    return F.linear(x.mean(0, keepdim=True), p["weight"]).expand(len(x), -1)


def derived(p, x):
    return F.linear(x, p["weight"].exp())


@pytest.mark.parametrize("together", [False, True])
@pytest.mark.parametrize("function", [mixing, pooled, derived])
def test_rows_of_several_examples_and_other_uses_are_noticed(function, together):
    p = {"weight": torch.randn(2, 3)}
    passed = batch.BatchPass(function, p, [], [torch.randn(6, 3)], derivatives=False, together=together)
    u = torch.randn(6, 1, 2)
    if together and function is not derived:  # the trial on the first batch separates all rows
        passed.gradients(u)
        return
    with pytest.raises(
        RuntimeError, match=r"belongs to several examples|by an operation that is not a layer"
    ):
        passed.gradients(u)


class Copied(nn.Linear):
    """Branches on values and computes with a changed weight, which none of the ways can separate."""

    def forward(self, x):
        return F.linear(x if float(x.detach().square().sum()) >= 0 else 2 * x, self.weight.clone(), self.bias)


class Cached(nn.Module):
    """Looks up tables in a different order in large batches."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Embedding(5, CLASSES), nn.Embedding(6, CLASSES)

    def forward(self, x):
        places, rare = torch.arange(x.shape[1]), bool((x < 0).all())
        if rare or len(x) < 4:
            return (self.a(x) + self.b(places)).sum(1)
        return (self.b(places) + self.a(x)).sum(1)


@pytest.mark.parametrize("make", [lambda: Copied(STEPS, CLASSES), Cached])
def test_what_no_way_separates_is_computed_one_by_one(make, caplog):
    torch.manual_seed(0)
    module = make().double()
    x = symbols(B, STEPS) if isinstance(module, Cached) else numbers(B, STEPS)
    model = hfmpi.TorchModel(module, "cross-entropy")
    risk = risk_of(model, (x,), np.arange(B) % CLASSES)
    found, plain = risk.squared_gradients(model.initial(0)), risk.gradient(model.initial(0))
    assert caplog.text.count("examples are processed one at a time") == 1
    np.testing.assert_allclose(found.vector, plain.vector, **TIGHT)


# Micro-batches -------------------------------------------------------------------------------------


def sizes_of(model, call):
    """Return the numbers of examples in the passes of `call` after the checks of the model."""
    sizes, linearise = [], model._linearise
    model._linearise = lambda theta, examples: sizes.append(examples.size) or linearise(theta, examples)
    call()
    return sizes


def test_the_first_pass_has_micro_batches_that_suit_the_memory():
    x, y = numbers(500, WIDTH), np.zeros((500, 1))
    model = hfmpi.TorchModel(nn.Linear(WIDTH, 1).double(), "squares")
    risk = risk_of(model, (x,), y)
    sizes = sizes_of(model, lambda: risk.gradient(model.initial(0)))
    assert sizes[-1] == 500
    assert risk.owner.local.micro_batch == 1024
    for chosen, most in ((100, 100), (None, 500)):
        fresh = hfmpi.TorchModel(nn.Linear(WIDTH, 1).double(), "squares")
        risk = risk_of(fresh, (x,), y, micro_batch=chosen)
        assert np.isfinite(risk.loss(fresh.initial(0)))
        assert sizes_of(fresh, lambda risk=risk, fresh=fresh: risk.gradient(fresh.initial(0))).pop() == most


def test_large_examples_are_processed_a_few_at_a_time():
    model = hfmpi.TorchModel(nn.Linear(WIDTH, 1), "squares")
    for nbytes, expected in ((1, 1024), (1 << 20, 64), (1 << 22, 32), (1 << 27, 8), (1 << 31, 1)):
        model._fit_micro_batch(nbytes)
        assert model.backend.micro_batch == expected


def test_a_model_that_cannot_be_trained_is_refused_before_its_first_pass():
    model = hfmpi.TorchModel(nn.Sequential(nn.Linear(WIDTH, 2), nn.Dropout()).train(), "squares")
    with pytest.raises(UserError, match=r"call module\.eval"):
        risk_of(model, (numbers(B, WIDTH),), numbers(B, 2)).gradient(model.initial(0))
