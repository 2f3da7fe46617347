"""Modules of users: refused modules, correct results, and that the modules are not changed."""

import contextlib
import copy
import pickle
import threading

import numpy as np
import pytest

import hfmpi
from hfmpi.errors import UserError

torch = pytest.importorskip("torch")
nn, F = torch.nn, torch.nn.functional

RNG = np.random.default_rng(0)
X, Y = RNG.standard_normal((40, 5)), RNG.standard_normal((40, 5))
STEPS, TAGS = RNG.standard_normal((40, 6, 5)), RNG.standard_normal((40, 6, 5))


class Custom(nn.Module):
    """A linear layer whose outputs are changed by a function (module, outputs, inputs) -> outputs."""

    def __init__(self, change=lambda m, z, x: z, width=5, **attributes):
        super().__init__()
        self.low = nn.Linear(5, width)
        self.change = change
        for name, value in attributes.items():
            setattr(self, name, value)

    def forward(self, x):
        return self.change(self, self.low(x), x)


def layers(*changes):
    """Return a network of three layers with a change."""
    torch.manual_seed(0)
    made = nn.Sequential(nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 5))
    for change in changes:
        change(made)
    return made


def double(make):
    """Return the module in float64, created from a fixed seed."""
    torch.manual_seed(0)
    return make().double()


def train(module, data=(X, Y), loss="squares", **options):
    """Train for a step or two; return the model and its result."""
    model = hfmpi.TorchModel(module, loss)
    options = {"optimizer": "bhf-short", "max_steps": 2, "quiet": True} | options
    return model, hfmpi.train(model, data, **options)


def snapshot(module):
    """Return the values of everything that a module holds."""
    return {name: value.clone() for name, value in module.state_dict().items()}


# Examples that depend on one another ---------------------------------------------------------------


class Recurrent(nn.Module):
    """A recurrent network that uses the axis of examples as steps."""

    def __init__(self, kind):
        super().__init__()
        self.net, self.top = kind(5, 4), nn.Linear(4, 5)

    def forward(self, x):
        return self.top(self.net(x)[0])


def last_only(m, z, x):
    return torch.cat([z[:-1], z[-1:] + 0.1 * z[:1]]) if len(z) > 1 else z


def large_batches(m, z, x):
    return z + z.mean(0) if len(z) > 8 else z


DEPENDENT = {
    "RNN": lambda: Recurrent(nn.RNN),
    "LSTM": lambda: Recurrent(nn.LSTM),
    "GRU": lambda: Recurrent(nn.GRU),
    "cumsum": lambda: Custom(lambda m, z, x: z + 0.1 * z.cumsum(0)),
    "place": lambda: Custom(lambda m, z, x: z + 0.05 * torch.arange(len(z)).view(-1, 1, 1)),
    "0.5 % of the mean": lambda: Custom(lambda m, z, x: z + 0.005 * z.mean(0)),
    "1e-6 of the mean": lambda: Custom(lambda m, z, x: z + 1e-6 * z.mean(0)),
    "the neighbour": lambda: Custom(lambda m, z, x: z + 1e-4 * z.roll(1, 0)),
    "the last one": lambda: Custom(last_only),
    "large batches": lambda: Custom(large_batches),
    "a fixed mask": lambda: Custom(
        lambda m, z, x: z * torch.rand(z.shape, generator=torch.Generator().manual_seed(0)).round()
    ),
    "the cache of a batch": lambda: Custom(
        lambda m, z, x: m.cache.setdefault(len(z), z.detach()) + z, cache={}
    ),
}


@pytest.mark.parametrize("name", DEPENDENT)
@pytest.mark.parametrize("kind", [torch.float32, torch.float64])
def test_examples_that_depend_on_one_another_are_refused(name, kind):
    torch.manual_seed(0)
    module = DEPENDENT[name]().to(kind)
    with pytest.raises(UserError, match="depend on the other examples of its batch"):
        train(module, (STEPS, TAGS), optimizer="adam")


def test_a_small_dependence_is_found_where_the_model_computes_in_float32_alone():
    class Single(Custom):
        def forward(self, x):
            return super().forward(x.float())

    for change, refused in ((lambda m, z, x: z, False), (lambda m, z, x: z + 0.005 * z.mean(0), True)):
        context = pytest.raises(UserError, match="depend on") if refused else contextlib.nullcontext()
        with context:
            train(Single(change), optimizer="adam")


@pytest.mark.parametrize("width", [8, 300])
def test_deep_and_wide_modules_are_not_refused_for_their_rounding(width):
    torch.manual_seed(0)
    parts = [nn.Linear(5, width), *(nn.Sequential(nn.Tanh(), nn.Linear(width, width)) for _ in range(9))]
    train(nn.Sequential(*parts, nn.Linear(width, 5)), optimizer="adam")
    attention = nn.TransformerEncoderLayer(5, 1, width, batch_first=True).eval()
    train(attention, (STEPS, TAGS), optimizer="adam")


# What a pass changes, draws or remembers -------------------------------------------------------------


def clamp(m, z, x):
    with torch.no_grad():
        m.low.weight.clamp_(-0.05, 0.05)
    return z


def normalise(m, z, x):
    m.low.weight.data.div_(m.low.weight.data.norm(dim=1, keepdim=True))
    return z


def count(m, z, x):
    m.calls += 1
    return z + m.calls


def carry(m, z, x):
    m.state = z.detach() + (m.state if m.state is not None and m.state.shape == z.shape else 0)
    return z + m.state


def replace(m, z, x):
    m.low.weight = nn.Parameter(m.low.weight * 2)
    return z


def assign(m, z, x):
    m.mean = 0.9 * m.mean + 0.1 * z.detach().mean()
    return z + m.mean


def warm_up(m, z, x):
    m.calls += 1
    return z if m.calls < 500 else 1.1 * z


def warm_up_in_a_list(m, z, x):
    m.calls[0] += 1
    return z if m.calls[0] < 500 else 1.1 * z


def own_generator(m, z, x):
    return z + (torch.rand(len(x), 1, generator=m.numbers) > 0.999)


def hooked(change):
    def forward(m, z, x):
        h = z.tanh()
        if h.requires_grad:
            h.register_hook(change)
        return h

    return forward


class Growing(nn.Module):
    """A module that creates its layer in the first pass."""

    def __init__(self):
        super().__init__()
        self.low = nn.Linear(5, 5)

    def forward(self, x):
        if not hasattr(self, "top"):
            self.top = nn.Linear(5, 5).to(x)
        return self.top(self.low(x))


def data_of_another(m, z, x):
    m.top.weight.data = m.low.weight.data
    return m.top(z)


def cached(m, z, x):
    if not m.cache:
        m.cache.append(m.low.weight.detach().clone())
    return z + x @ m.cache[0]


class Made(Custom):
    """A layer that stores a tensor computed from a parameter, with its graph."""

    def __init__(self):
        super().__init__(lambda m, z, x: z + x @ m.twice)
        self.twice = 2 * self.low.weight

    def double(self):
        super().double()
        self.twice = 2 * self.low.weight
        return self


class Buffered(Custom):
    """A layer that assigns to a buffer in every pass."""

    def __init__(self):
        super().__init__(assign)
        self.register_buffer("mean", torch.zeros(()))


def drop_path(m, z, x):
    return z * (torch.rand(len(z), 1) > 0.1) if m.training else z


CHANGING = {
    "clamp": (lambda: Custom(clamp), "changes its parameters"),
    "normalise": (lambda: Custom(normalise), "changes its parameters"),
    "assign": (lambda: Custom(replace), "assigns to its parameter weight"),
    "count": (lambda: Custom(count, calls=0), "different outputs for the same inputs"),
    "state": (lambda: Custom(carry, state=None), "different outputs for the same inputs"),
    "late in a list": (lambda: Custom(warm_up_in_a_list, calls=[0]), "depend on 0, which its passes change"),
    "generator": (
        lambda: Custom(own_generator, numbers=torch.Generator().manual_seed(0)),
        "draws random numbers in a pass",
    ),
    "generator of NumPy": (
        lambda: Custom(
            lambda m, z, x: z + m.rng.choice([0, 1], p=[0.999, 0.001]), rng=np.random.default_rng(0)
        ),
        "draws random numbers in a pass",
    ),
    "layer made later": (Growing, "draws random numbers in a pass"),
    "hook on the whole batch": (
        lambda: Custom(hooked(lambda g: g - g.mean(0))),
        "is not the sum of its per-example gradients",
    ),
    "hook on the length": (
        lambda: Custom(hooked(lambda g: g / len(g))),
        "is not the sum of its per-example gradients",
    ),
    "infinite derivative": (
        lambda: Custom(lambda m, z, x: torch.where(z > 1e9, z.sqrt(), (z * 0).sqrt())),
        "derivatives of the outputs are not finite",
    ),
    "squeeze": (lambda: Custom(lambda m, z, x: z.squeeze()), "fails on a batch of one example"),
    "late": (lambda: Custom(warm_up, calls=0), "depend on calls, which its passes change"),
    "buffer": (Buffered, "passes change mean, a parameter or buffer"),
    "data": (lambda: Custom(data_of_another, top=nn.Linear(5, 5)), "passes change low.weight"),
    "cache": (lambda: Custom(cached, cache=[]), "accesses a parameter other than by its registered name"),
    "graph": (Made, "accesses a parameter other than by its registered name"),
    "statistics": (lambda: nn.Sequential(nn.Linear(5, 5), nn.BatchNorm1d(5)), r"1 \(BatchNorm1d\) makes"),
    "no statistics": (
        lambda: nn.Sequential(nn.Linear(5, 5), nn.BatchNorm1d(5, track_running_stats=False)).eval(),
        r"1 \(BatchNorm1d without running statistics\) makes",
    ),
    "dropout": (lambda: nn.Sequential(nn.Linear(5, 5), nn.Dropout(0.01)), r"1 \(Dropout\) makes"),
    "RReLU": (lambda: nn.Sequential(nn.Linear(5, 5), nn.RReLU()), r"1 \(RReLU\) makes"),
    "drop path": (lambda: Custom(drop_path), "draws random numbers in a pass"),
    "NumPy": (lambda: Custom(lambda m, z, x: z + 1e-9 * np.random.rand()), "draws random numbers"),  # noqa: NPY002
    "overwritten": (lambda: Custom(lambda m, z, x: z * x.mul_(2)), "modified by an inplace operation"),
    "gradients": (
        lambda: Custom(lambda m, z, x: 1.1 * z if torch.is_grad_enabled() else z),
        "different outputs with and without gradients",
    ),
}


@pytest.mark.parametrize("name", CHANGING)
def test_a_pass_that_is_no_function_is_refused_and_changes_nothing(name):
    make, words = CHANGING[name]
    module = double(make)
    before, model = snapshot(module), hfmpi.TorchModel(module, "squares")
    theta, batch = model.initial(0), hfmpi.Examples(X, Y).take(np.arange(40))
    start = theta.copy()
    for call in (model.loss, model.linearise):
        with pytest.raises(UserError, match=words) as caught:
            call(theta, batch)
        assert len(str(caught.value)) < 220
    with pytest.raises(UserError, match=words):
        train(module)
    assert np.array_equal(theta, start)
    after = snapshot(module)
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    assert all(isinstance(p, nn.Parameter) and p.requires_grad for p in module.parameters())


def test_an_embedding_with_a_largest_norm_is_refused():
    torch.manual_seed(0)
    module = nn.Sequential(nn.Embedding(7, 4, max_norm=0.5), nn.Flatten(), nn.Linear(8, 5))
    with pytest.raises(UserError, match="changes its parameters"):
        train(module, (RNG.integers(0, 7, (40, 2)), Y))


def test_numbers_that_count_and_do_nothing_else_are_no_reason_to_refuse():
    def log(m, z, x):
        m.calls, m.last = m.calls + 1, z.detach()
        return z

    module = Custom(log, calls=0, last=None)
    train(module)
    assert module.calls > 0


def test_a_mode_that_is_set_later_is_found():
    module = nn.Sequential(nn.Linear(5, 5), nn.Dropout(0.5)).eval()
    model, _ = train(module)
    batch = hfmpi.Examples(X, Y).take(np.arange(40))
    theta = model.initial(0).astype(np.float32)
    assert np.isfinite(model.loss(theta, batch))
    module.train()
    with pytest.raises(UserError, match="call module"):
        hfmpi.train(model, (X, Y), optimizer="adam", max_steps=1, quiet=True)
    with pytest.raises(UserError, match="call module"):
        model.loss(theta, batch)
    module.eval()
    assert np.isfinite(model.loss(theta, batch))


def test_a_refusal_leaves_no_trace_and_a_corrected_module_is_trained():
    module, states = Custom(cached, cache=[]), [np.random.get_state(), torch.get_rng_state()]  # noqa: NPY002
    for _ in range(2):
        with pytest.raises(UserError, match="other than by its registered name"):
            train(module)
        assert module.cache == []
    module.change = drop_path
    with pytest.raises(UserError, match="draws random numbers"):
        train(module)
    assert np.array_equal(np.random.get_state()[1], states[0][1])  # noqa: NPY002
    assert torch.equal(torch.get_rng_state(), states[1])
    module.change = lambda m, z, x: z
    train(module)


class Rotary(nn.Module):
    """A buffer that grows to the length of the longest sequence so far."""

    def __init__(self):
        super().__init__()
        self.low = nn.Linear(5, 5)
        self.register_buffer("table", torch.zeros(0, 5))

    def forward(self, x):
        if len(self.table) < x.shape[1]:
            self.table = torch.arange(x.shape[1]).to(x)[:, None].expand(-1, 5).cos()
        return self.low(x) * self.table[: x.shape[1]]


def test_a_buffer_that_caches_what_does_not_change_is_no_reason_to_refuse():
    model, result = train(double(Rotary), (STEPS, TAGS))
    expected = double(Rotary)
    right = 0.5 * (expected(torch.from_numpy(STEPS)) - torch.from_numpy(TAGS)).square().sum(-1).mean()
    assert result.history[0]["loss"] == pytest.approx(right.item(), rel=1e-12)
    hfmpi.train(model, (STEPS, TAGS), optimizer="adam", max_steps=1, quiet=True)


@pytest.mark.parametrize(
    "buffer",
    [
        lambda: torch.eye(5).to_sparse(),
        lambda: torch.randn(2, 4).to(torch.float8_e4m3fn),
        lambda: torch.full((3,), torch.nan),
        lambda: torch.ones(2, dtype=torch.bool),
        lambda: torch.ones(2, dtype=torch.complex64),
    ],
)
def test_buffers_of_all_kinds(buffer):
    module = layers()
    module.register_buffer("extra", buffer())
    train(module)


def test_sparse_products_have_curvature():
    class Graph(nn.Module):
        def __init__(self):
            super().__init__()
            self.low = nn.Linear(5, 5)
            self.register_buffer("edges", torch.eye(6).to_sparse())

        def forward(self, x):
            h = self.low(x).transpose(0, 1).reshape(6, -1)
            return torch.sparse.mm(self.edges, h).view(6, len(x), 5).transpose(0, 1)

    torch.manual_seed(0)
    _, result = train(Graph(), (STEPS, TAGS))
    torch.manual_seed(0)
    _, expected = train(nn.Sequential(nn.Linear(5, 5)), (STEPS, TAGS))
    assert np.allclose(result.theta, expected.theta, atol=1e-4)


def test_a_parameter_that_is_frozen_later_is_found():
    for first in (True, False):
        module = layers()
        module[0].requires_grad_(first)
        model = hfmpi.TorchModel(module, "squares")
        module[0].requires_grad_(not first)
        with pytest.raises(UserError, match="was frozen or unfrozen after creating the model"):
            hfmpi.train(model, (X, Y), optimizer="adam", max_steps=1, quiet=True)


@pytest.mark.parametrize("hook", ["register_hook", "register_post_accumulate_grad_hook"])
def test_hooks_on_parameters_are_refused(hook):
    module = layers()
    getattr(module[0].weight, hook)(lambda g: None)
    with pytest.raises(UserError, match=r"the parameter 0\.weight has a hook"):
        train(module)


def test_what_has_no_effect_is_noted(caplog):
    module = Custom(lambda m, z, x: z + m.others[0](x), spare=nn.Linear(5, 5), others=[nn.Linear(5, 5)])
    train(module)
    assert "do not depend on spare.weight, spare.bias" in caplog.text
    assert "depend on 2 tensors that require gradients but are not parameters" in caplog.text


def test_parameters_that_are_replaced_later_are_found():
    module = layers()
    model, _ = train(module)
    module[2] = nn.Linear(5, 5)
    with pytest.raises(UserError, match="were replaced after creating the model"):
        hfmpi.train(model, (X, Y), optimizer="adam", max_steps=1, quiet=True)


def test_inputs_may_be_overwritten_and_stay_as_they_were():
    x = X.copy()

    class Doubling(Custom):
        def forward(self, x):
            return super().forward(x.mul_(2))

    _, result = train(double(Doubling), (x, Y), optimizer="subspace")
    _, expected = train(double(Custom), (2 * x, Y), optimizer="subspace")
    assert np.array_equal(x, X)
    assert [h["loss"] for h in result.history] == [h["loss"] for h in expected.history]


# Modules in two places, parameters in the same memory ------------------------------------------------


def shared():
    layer = nn.Linear(5, 5)
    return nn.Sequential(layer, nn.Tanh(), layer)


class Albert(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(5, 5)] * 3)

    def forward(self, x):
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return x


class TwoNames(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(5, 5), nn.Tanh())
        self.decoder = nn.ModuleDict({"encoder": self.encoder, "top": nn.Linear(5, 5)})

    def forward(self, x):
        return self.decoder["top"](self.encoder(x) + self.decoder["encoder"](2 * x))


def same_memory():
    return layers(lambda m: setattr(m[2], "weight", nn.Parameter(m[0].weight.data)))


@pytest.mark.parametrize("make", [shared, Albert, TwoNames, same_memory])
@pytest.mark.parametrize("optimizer", ["adam", "bhf-short", "subspace"])
def test_what_is_used_twice_is_one(make, optimizer):
    module = double(make)
    kept, whole = copy.deepcopy(module), torch.from_numpy(X)
    model, result = train(module, optimizer=optimizer)
    parameters = [*module.parameters()]
    assert all(isinstance(p, nn.Parameter) and p.requires_grad for p in parameters)
    assert all(torch.equal(p, q) for p, q in zip(parameters, kept.parameters(), strict=True))
    if optimizer != "adam":  # a step uses all examples
        right = 0.5 * (kept(whole) - torch.from_numpy(Y)).square().sum(1).mean()
        assert result.history[0]["loss"] == pytest.approx(right.item(), rel=1e-12)
    model.write_back(result.theta)
    batch = hfmpi.Examples(X, Y).take(np.arange(40))
    written = 0.5 * (module(whole) - torch.from_numpy(Y)).square().sum()
    assert model.loss(result.theta, batch) == pytest.approx(written.item(), rel=1e-12)
    written.backward()
    unique = {p.data_ptr(): p for p in parameters}.values()
    gradient = np.zeros(model.size)
    model.linearise(result.theta, batch).gradient(1.0, gradient)
    total = sum(abs(np.concatenate([p.grad.reshape(-1) for p in unique])))
    if make is not same_memory:  # each name has a part of PyTorch's gradient
        assert abs(gradient).sum() == pytest.approx(total, rel=1e-10)


def transposed(m):
    m[2].weight = nn.Parameter(m[0].weight.data.T)


def overlapping(m):
    base = torch.randn(8, 5)
    m[0].weight, m[2].weight = nn.Parameter(base[:5]), nn.Parameter(base[3:])


def in_a_buffer(m):
    m.register_buffer("weight", m[0].weight.data)


def frozen(m):
    m[2].weight = nn.Parameter(m[0].weight.data, requires_grad=False)


def expanded(m):
    m[2].bias = nn.Parameter(torch.zeros(1).expand(5))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (transposed, "0.weight and 2.weight share memory"),
        (overlapping, "0.weight and 2.weight share memory"),
        (in_a_buffer, "0.weight shares memory with a buffer"),
        (frozen, "0.weight shares memory with a buffer"),
        (expanded, "entries of the parameter 2.bias share memory"),
    ],
)
def test_other_memory_that_is_shared_is_refused(change, words):
    with pytest.raises(UserError, match=words):
        hfmpi.TorchModel(layers(change), "squares")


def test_parameters_side_by_side_in_one_memory_are_separate():
    base = torch.randn(5, 10)

    def columns(m):
        m[0].weight, m[2].weight = nn.Parameter(base[:, :5]), nn.Parameter(base[:, 5:])

    model, result = train(layers(columns))
    assert model.size == 60
    assert np.isfinite(result.theta).all()


def test_a_parameter_in_a_list_is_refused():
    class Listed(nn.Module):
        def __init__(self):
            super().__init__()
            self.low = nn.Linear(5, 5)
            self.weights = [self.low.weight]

        def forward(self, x):
            return x @ self.weights[0].T + self.low.bias

    module = Listed()
    before = snapshot(module)
    with pytest.raises(UserError, match="accesses a parameter other than by its registered name"):
        train(module)
    assert all(torch.equal(value, before[name]) for name, value in snapshot(module).items())


# Outputs and targets ---------------------------------------------------------------------------------


class Classes(nn.Module):
    """Outputs (N, classes, steps)."""

    def __init__(self, classes=4):
        super().__init__()
        self.net = nn.Conv1d(5, classes, 3, padding=1)

    def forward(self, x):
        return self.net(x.transpose(1, 2))


@pytest.mark.parametrize("classes", [4, 6, 9])
def test_the_class_axis_of_pytorch_is_that_of_its_loss(classes):
    labels = RNG.integers(0, classes, (40, 6))
    labels[3, 2] = labels[39] = -100
    module = double(lambda: Classes(classes))
    right = F.cross_entropy(module(torch.from_numpy(STEPS)), torch.from_numpy(labels)).item()
    _, result = train(module, (STEPS, labels), nn.CrossEntropyLoss())
    assert result.history[0]["loss"] == pytest.approx(right, rel=1e-12)
    if classes != 6:  # as many classes as steps fit in both ways
        with pytest.raises(UserError, match=r"pass the loss as torch\.nn\.CrossEntropyLoss"):
            train(module, (STEPS, abs(labels) % classes), "cross-entropy")


@pytest.mark.parametrize("kind", ["tuple", "Examples", "Arrays"])
@pytest.mark.parametrize("ignored", [0, -100])
def test_ignored_targets_are_not_scored_whatever_holds_them(kind, ignored):
    symbols, labels = RNG.integers(0, 4, (40, 6)), RNG.integers(0, 4, (40, 6))
    labels[RNG.random((40, 6)) < 0.3] = ignored

    class Tagger(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = nn.Sequential(nn.Embedding(4, 5), nn.Linear(5, 4))

        def forward(self, x):
            return self.net(x).transpose(1, 2)

    module, loss = double(Tagger), nn.CrossEntropyLoss(ignore_index=ignored)
    right = loss(module(torch.from_numpy(symbols)), torch.from_numpy(labels)).item()
    made = {"tuple": lambda: (symbols, labels), "Examples": lambda: hfmpi.Examples(symbols, labels)}
    if kind == "Arrays" and ignored < 0:
        with pytest.raises(UserError, match="targets must be symbols 0, 1, 2"):
            hfmpi.Arrays(symbols, labels)
        return
    data = made.get(kind, lambda: hfmpi.Arrays(symbols, labels))()
    _, result = train(module, data, loss)
    assert result.history[0]["loss"] == pytest.approx(right, rel=1e-12)


class Pixels(nn.Module):
    """Bytes are scaled, as in modules for images; times are shifted in float64."""

    def __init__(self):
        super().__init__()
        self.low = nn.Linear(5, 5)

    def forward(self, x):
        x = x / 255 if x.dtype == torch.uint8 else (x - 1.7e9) / 10
        return self.low(x.float())


@pytest.mark.parametrize("x", [RNG.integers(0, 256, (40, 5)).astype(np.uint8), 1.7e9 + 10 * X])
def test_inputs_have_the_types_that_they_were_given_with(x):
    torch.manual_seed(0)
    module = Pixels()
    right = 0.5 * (module(torch.from_numpy(x)).double() - torch.from_numpy(Y)).square().sum(1).mean()
    _, result = train(module, (x, Y))
    assert result.history[0]["loss"] == pytest.approx(right.item(), rel=1e-6)


def test_numbers_that_have_no_place_in_64_bits_are_refused():
    with pytest.raises(UserError, match="which int64 cannot represent"):
        train(Table(), (np.full((40, 2), 2**63 + 5, np.uint64), Y))


def test_burn_in_is_asked_for():
    module, x = double(lambda: Custom()), STEPS
    for data in ((x, TAGS[:, 2:]), (x, TAGS[:, :-1])):
        with pytest.raises(UserError, match=r"outputs of shape .* do not fit .*burn_in=\d"):
            train(module, data)
    _, result = train(module, hfmpi.Examples(x, TAGS[:, 2:], burn_in=2))
    right = 0.5 * (module(torch.from_numpy(x))[:, 2:] - torch.from_numpy(TAGS[:, 2:])).square().sum(-1).mean()
    assert result.history[0]["loss"] == pytest.approx(right.item(), rel=1e-12)
    with pytest.raises(UserError, match="with a burn-in of 3: outputs must be"):
        train(module, hfmpi.Examples(x, TAGS[:, 2:], burn_in=3))


@pytest.mark.parametrize(
    ("loss", "words"),
    [
        (
            lambda: nn.L1Loss(),
            r"MSELoss\(\) or BCEWithLogitsLoss\(\), not PyTorch's L1Loss: pass 'cross-entropy'",
        ),
        (
            lambda: nn.NLLLoss(),
            r"not PyTorch's NLLLoss: torch.nn.CrossEntropyLoss\(\) has the same value on log",
        ),
        (lambda: nn.BCELoss(), r"not PyTorch's BCELoss: return the logits"),
        (lambda: type("Mine", (nn.MSELoss,), {})(), r"not PyTorch's Mine: pass"),
        (
            lambda: nn.CrossEntropyLoss(weight=-torch.ones(5)),
            "weight of torch.nn.CrossEntropyLoss must have a finite number for each class",
        ),
        (
            lambda: nn.CrossEntropyLoss(weight=torch.ones(5), label_smoothing=0.1),
            "weight and label_smoothing of torch.nn.CrossEntropyLoss are not supported together",
        ),
        (lambda: nn.BCEWithLogitsLoss(weight=torch.ones(5)), "weight of torch.nn.BCEWithLogitsLoss is not"),
        (lambda: nn.BCEWithLogitsLoss(pos_weight=torch.ones(2, 5)), r"or one for all, not shape \(2, 5\)"),
        (
            lambda: nn.BCEWithLogitsLoss(pos_weight=-torch.ones(5)),
            "weights of positive targets must be positive",
        ),
        (
            lambda: nn.CrossEntropyLoss(label_smoothing=-0.1),
            r"label smoothing must be in \[0, 1\], not -0.1",
        ),
        (
            lambda: nn.CrossEntropyLoss(reduction="sum"),
            "reduction='sum' of torch.nn.CrossEntropyLoss is not supp",
        ),
        (lambda: nn.MSELoss(reduction="none"), "reduction='none' of torch.nn.MSELoss is not supported"),
    ],
)
def test_options_of_losses_that_would_be_ignored_are_refused(loss, words):
    with pytest.raises(UserError, match=words):
        hfmpi.TorchModel(layers(), loss())


class Table(nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.table, self.top = nn.Embedding(7, 4, **options), nn.Linear(4, 5)

    def forward(self, i):
        return self.top(self.table(i).mean(1))


class Autocast(nn.Linear):
    def forward(self, x):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return super().forward(x)


def made_in_inference_mode():
    with torch.inference_mode():
        return nn.Linear(5, 5)


def scripted():
    return nn.Sequential(torch.jit.script(nn.Linear(5, 5)), nn.Linear(5, 5))


SENTENCES = {
    "scripted": (scripted, X, "a part of the module is scripted"),
    "autocast": (lambda: Autocast(5, 5), X, "returns bfloat16 outputs"),
    "complex": (lambda: Custom(lambda m, z, x: torch.fft.fft(z)), X, "returns complex64 outputs"),
    "NumPy": (lambda: Custom(lambda m, z, x: z.detach().numpy()), X, "must return a tensor"),
    "sparse": (lambda: Table(sparse=True), RNG.integers(0, 7, (40, 2)), "create it with sparse=False"),
    "bytes": (
        layers,
        RNG.integers(0, 256, (40, 5)).astype(np.uint8),
        r"uint8 .*astype\('float32'\)",
    ),
    "width": (layers, X[:, :4], r"fails on inputs float64 \(\d+, 4\): RuntimeError: mat1 and mat2 shapes"),
    "index": (Table, RNG.integers(5, 9, (40, 2)), r"fails on inputs int64 \(\d+, 2\): IndexError"),
    "inference": (made_in_inference_mode, X, r"was created under torch.inference_mode\(\)"),
}


@pytest.mark.filterwarnings("ignore:.*torch.jit")
@pytest.mark.parametrize("name", SENTENCES)
@pytest.mark.parametrize("optimizer", ["adam", "bhf-short"])
def test_what_a_module_cannot_do_is_a_sentence(name, optimizer):
    make, x, words = SENTENCES[name]
    with pytest.raises(UserError, match=words) as caught:
        train(make(), (x, Y), optimizer=optimizer)
    assert "\n" not in str(caught.value)


# What works ------------------------------------------------------------------------------------------


class Physics(nn.Module):
    """A function of x, with its second derivatives: by autograd, or by torch.func."""

    def __init__(self, by_autograd):
        super().__init__()
        self.net, self.by_autograd = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 1)), by_autograd

    def forward(self, x):
        if not self.by_autograd:
            h = torch.func.vmap(torch.func.hessian(lambda p: self.net(p)[0]))(x)
            return (h[:, 0, 0] + h[:, 1, 1] + 1)[:, None]
        x.requires_grad_(True)
        first = torch.autograd.grad(self.net(x).sum(), x, create_graph=True)[0]
        second = [torch.autograd.grad(first[:, i].sum(), x, create_graph=True)[0][:, i] for i in (0, 1)]
        return (second[0] + second[1] + 1)[:, None]


@pytest.mark.filterwarnings("ignore:.*torch.jit")
@pytest.mark.parametrize("optimizer", ["adam", "bhf-short", "subspace"])
def test_derivatives_inside_of_a_module(optimizer):
    x, results = X[:, :2], []
    for by_autograd in (True, False):
        module = double(lambda by_autograd=by_autograd: Physics(by_autograd))
        results.append(train(module, (x, np.zeros(40)), optimizer=optimizer)[1])
        assert not any(p.grad is not None for p in module.parameters())
    assert np.allclose(results[0].theta, results[1].theta, rtol=1e-6)
    right = 0.5 * double(lambda: Physics(True))(torch.from_numpy(x)).square().mean()
    if optimizer != "adam":
        assert results[0].history[0]["loss"] == pytest.approx(right.item(), rel=1e-10)


class Scalars(nn.Module):
    def __init__(self):
        super().__init__()
        self.low, self.a = nn.Linear(5, 5), nn.Parameter(torch.ones(1))
        self.b, self.c = nn.Parameter(torch.tensor(0.5)), nn.Parameter(torch.ones(1, 1, 1))

    def forward(self, x):
        return self.low(x) * self.a.view(()) + self.b.reshape(1) + self.c.squeeze()


@pytest.mark.parametrize("optimizer", ["adam", "soap", "bhf-short", "subspace", "lm"])
def test_parameters_of_one_element(optimizer):
    _, result = train(double(Scalars), optimizer=optimizer, max_steps=4)
    assert optimizer in ("adam", "soap") or result.history[-1]["loss"] < result.history[0]["loss"]
    assert np.isfinite(result.theta).all()


def compiled():
    return torch.compile(layers())


def compiled_inside():
    return nn.Sequential(torch.compile(nn.Linear(5, 5)), nn.Tanh(), nn.Linear(5, 5))


def compiled_in_place():
    made = layers()
    made.compile()
    return made


@pytest.mark.filterwarnings("ignore:.*torch.jit")
@pytest.mark.parametrize(
    "make", [compiled, compiled_inside, compiled_in_place, lambda: nn.DataParallel(layers())]
)
def test_wrapped_modules_are_their_module(make):
    module = make()
    model, result = train(module)
    model.write_back(np.zeros_like(result.theta))
    assert all((p == 0).all() for p in module.parameters())


def test_a_run_inside_of_inference_mode_is_a_run():
    expected = train(double(layers))[1].theta
    module = double(layers)
    for context in (torch.inference_mode, torch.no_grad):
        with context():
            assert np.array_equal(train(module)[1].theta, expected)


def test_models_can_be_pickled_and_copied():
    for make in (shared, lambda: nn.Sequential(nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 5))):
        model, result = train(double(make))
        batch = hfmpi.Examples(X, Y).take(np.arange(9))
        for again in (pickle.loads(pickle.dumps(model)), copy.deepcopy(model)):
            assert again.loss(result.theta, batch) == model.loss(result.theta, batch)
            again.write_back(result.theta)
            assert not torch.equal(next(again.module.parameters()), next(model.module.parameters()))


def test_two_threads_use_one_model():
    models = [hfmpi.TorchModel(double(layers), "squares")]
    models.append(hfmpi.TorchModel(models[0].module, "squares"))  # two models of one module
    batch = hfmpi.Examples(X, Y).take(np.arange(40))
    thetas = [models[0].initial(0) + 0.1 * i for i in range(4)]

    def product(model, theta):
        out = np.zeros_like(theta)
        model.linearise(theta, batch).gauss_newton(theta, 1.0, out)
        return np.append(out, model.loss(theta, batch))

    right, wrong = [product(models[0], theta) for theta in thetas], []

    def work(i):
        for _ in range(30):
            if not np.array_equal(product(models[i % 2], thetas[i]), right[i]):
                wrong.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
