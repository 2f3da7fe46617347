"""Blocks of small random modules, both correct and defective, and defects of data, for modules.py.

A block maps h (B, W) or (B, T, W) to the same shape; a function creates it from a `random.Random`.
"""

import random
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

WIDTH = 4
DEFECTS = {}
"""Defects by (family, name)."""


class Defect(NamedTuple):
    """A defect of a module or of data.

    Attributes
    ----------
    verdict : str
        What hfmpi must do: "train", "refuse", or "" if either is correct, as long as the results of training
        agree with the reference.
    fits : callable
        Whether the defect is possible in a trial.
    block : callable or None
        Creates the block.
    spoil : callable
        Changes the trial.
    """

    verdict: str
    fits: Callable[[Any], Any] = lambda t: True
    block: Callable[[random.Random], nn.Module] | None = None
    spoil: Callable[[Any], None] = lambda t: None


class Layer(nn.Module):
    """A function (layer, h) -> h with its parts; parts whose names start with "buffer" are buffers."""

    def __init__(self, function, **parts):
        super().__init__()
        self.function = function
        for name, part in parts.items():
            if name.startswith("buffer"):
                self.register_buffer(name, part)
            else:
                setattr(self, name, part)

    def forward(self, h):
        return self.function(self, h)


def linear():
    return nn.Linear(WIDTH, WIDTH)


def constant(r, *shape):
    """Return the same numbers in float32 and float64."""
    values = [r.gauss(0, 0.5) for _ in range(int(np.prod(shape)))]
    return torch.tensor(np.float32(values).reshape(shape), dtype=torch.get_default_dtype())


def fixed(block, training, later=None):
    """Fix the training mode of a block; `later` is its mode after the model is created."""
    block.mode, block.later = training, training if later is None else later
    return block


def recurrent(r, **options):
    kind = r.choice([nn.LSTM, nn.GRU, nn.RNN])
    return Layer(lambda s, h: h + s.net(h)[0], net=kind(WIDTH, WIDTH, **options))


def encoder(r, dropout=0.0, batch_first=True):
    return nn.TransformerEncoderLayer(
        WIDTH, 2, 5, dropout, r.choice(["relu", "gelu"]), batch_first=batch_first, norm_first=r.random() < 0.5
    )


def flat(s, h):
    """Apply a layer to rows (N, W)."""
    return s.net(h.reshape(-1, WIDTH)).view(h.shape)


def positions(s, h):
    """Add a value that depends on the step, from a cache by length."""
    if h.ndim < 3:
        return h
    if h.shape[1] not in s.cache:
        s.cache[h.shape[1]] = torch.linspace(-1, 1, h.shape[1], dtype=h.dtype)[:, None]
    return h + s.scale * s.cache[h.shape[1]]


HEALTHY = {
    "linear": lambda r: nn.Sequential(
        linear(), r.choice([nn.Tanh, nn.ReLU, nn.GELU, nn.SiLU, nn.Softplus])()
    ),
    "residual": lambda r: Layer(lambda s, h: h + s.b(torch.tanh(s.a(h))), a=linear(), b=linear()),
    "gate": lambda r: Layer(lambda s, h: s.a(h).sigmoid() * s.b(h), a=linear(), b=linear()),
    "softmax": lambda r: Layer(lambda s, h: h + s.a(h).softmax(-1), a=linear()),
    "norm": lambda r: r.choice([nn.LayerNorm, nn.RMSNorm])(WIDTH),
    "group norm": lambda r: Layer(flat, net=nn.GroupNorm(1, WIDTH)),
    "PReLU": lambda r: nn.PReLU(),
    "one element": lambda r: Layer(
        lambda s, h: h * s.scale.reshape(()) + s.shift.squeeze(),
        scale=nn.Parameter(torch.ones(r.choice([(1,), (1, 1), ()]))),
        shift=nn.Parameter(torch.zeros(1, 1)),
    ),
    "frozen": lambda r: linear().requires_grad_(False),
    "unused": lambda r: Layer(lambda s, h: s.a(h), a=linear(), b=linear()),
    "buffer": lambda r: Layer(lambda s, h: h @ s.buffer, buffer=constant(r, WIDTH, WIDTH)),
    "flat": lambda r: Layer(
        lambda s, h: torch.tanh(h @ s.p[:16].view(4, 4) + s.p[16:]), p=nn.Parameter(torch.randn(20) / 2)
    ),
    "parameter list": lambda r: Layer(
        lambda s, h: sum(h.roll(i, -1) * p for i, p in enumerate(s.ps)),
        ps=nn.ParameterList([torch.randn(WIDTH) for _ in range(3)]),
    ),
    "weight norm": lambda r: parametrizations.weight_norm(linear()),
    "spectral norm": lambda r: fixed(parametrizations.spectral_norm(linear()), False),
    "orthogonal": lambda r: parametrizations.orthogonal(
        linear(), orthogonal_map=r.choice(["matrix_exp", "cayley"])
    ),
    "fixed statistics": lambda r: fixed(Layer(flat, net=nn.BatchNorm1d(WIDTH)), False),
    "dropout, eval": lambda r: fixed(nn.Dropout(0.5), False),
    "positions": lambda r: Layer(positions, scale=nn.Parameter(torch.ones(WIDTH)), cache={}),
    "straight through": lambda r: Layer(lambda s, h: h + (s.a(h).round() - s.a(h)).detach(), a=linear()),
    "Fourier": lambda r: Layer(
        lambda s, h: h + torch.fft.irfft(torch.fft.rfft(h) * s.p, WIDTH), p=nn.Parameter(torch.randn(3))
    ),
}
SEQUENCES = {
    "recurrent": lambda r: recurrent(r, batch_first=True),
    "two layers": lambda r: Layer(lambda s, h: s.net(h)[0], net=nn.LSTM(WIDTH, WIDTH, 2, batch_first=True)),
    "bidirectional": lambda r: Layer(
        lambda s, h: s.net(h)[0], net=nn.GRU(WIDTH, 2, batch_first=True, bidirectional=True)
    ),
    "convolution": lambda r: Layer(
        lambda s, h: s.net(h.transpose(1, 2)).transpose(1, 2).tanh(),
        net=nn.Conv1d(WIDTH, WIDTH, 3, padding=1),
    ),
    "attention": lambda r: Layer(
        lambda s, h: h + s.net(h, h, h, need_weights=False)[0],
        net=nn.MultiheadAttention(WIDTH, 2, batch_first=True),
    ),
    "encoder": lambda r: encoder(r),
    "encoder, eval": lambda r: fixed(encoder(r, 0.1), False),
}


def register(family, verdict, blocks, fits=lambda t: True):
    for name, block in blocks.items():
        DEFECTS[family, name] = Defect(verdict, fits, block)


def has_steps(t):
    return t.steps


# Shared -----------------------------------------------------------------------------------------


def chain(s, h):
    """Apply all layers of a list or dict."""
    for layer in s.layers.values() if isinstance(s.layers, nn.ModuleDict) else s.layers:
        h = h + layer(h).tanh()
    return h


def pair(r, **parts):
    """Return two layers, a and then b."""
    return Layer(lambda s, h: h + s.b(torch.tanh(s.a(h))), a=linear(), b=linear(), **parts)


def changed(change):
    """Return a function that creates a pair of layers and changes it."""

    def make(r):
        block = pair(r)
        change(block)
        return block

    return make


def several(layer):
    return Layer(chain, layers=nn.ModuleList([layer] * 3))


def tie(s):
    s.b.weight = s.a.weight


def again(s):
    s.a.register_parameter("again", s.a.weight)


def shared(make):
    """Return a function that creates a block with one layer in several places."""
    return lambda r: make(linear())


register("shared", "train", {
    "twice in Sequential": shared(lambda a: nn.Sequential(a, nn.Tanh(), a)),
    "ModuleList * 3": shared(several),
    "ModuleDict, two names": shared(lambda a: Layer(chain, layers=nn.ModuleDict({"a": a, "b": a}))),
    "nested": shared(lambda a: Layer(chain, layers=nn.ModuleList([a, nn.Sequential(a, linear())]))),
    "tied Parameter": changed(tie),
    "tied, transposed": shared(
        lambda a: Layer(lambda s, h: F.linear(torch.tanh(s.a(h)), s.a.weight.t()), a=a)
    ),
    "two names in one layer": changed(again),
    "list of layers": shared(lambda a: Layer(chain, a=a, layers=[a, a])),
    "weight norm": shared(lambda a: several(parametrizations.weight_norm(a))),
})  # fmt: skip
register("shared", "train", {
    "recurrent": lambda r: several(recurrent(r, batch_first=True)),
    "encoder": lambda r: several(encoder(r)),
}, has_steps)  # fmt: skip

# Aliased ----------------------------------------------------------------------------------------


def parameter(of, trained=True):
    """Return a function that creates a weight in the memory of another weight."""

    def change(s):
        s.b.weight = nn.Parameter(of(s.a.weight.data), requires_grad=trained)

    return changed(change)


def halves(one, other):
    """Return a function that creates a layer with two Parameters that are views of one tensor."""

    def make(r):
        both = torch.randn(20)
        return Layer(
            lambda s, h: h @ s.p.reshape(4, -1)[:, :1] + h * s.q.reshape(4, -1)[:, 0],
            p=nn.Parameter(both[one]), q=nn.Parameter(both[other]),
        )  # fmt: skip

    return make


def unregistered(r):
    weight = constant(r, WIDTH, WIDTH)
    return Layer(lambda s, h: s.a(h) + h @ s.others[0], a=linear(), others=[weight])


def data_of_other(s, h):
    s.b.weight.data = s.a.weight.data
    return s.b(torch.tanh(s.a(h)))


def copy_of_other(s, h):
    with torch.no_grad():
        s.b.weight.copy_(s.a.weight)
    return s.b(torch.tanh(s.a(h)))


def assigned(s, h):
    s.b.weight = s.a.weight
    return s.b(torch.tanh(s.a(h)))


def beside(function, **parts):
    """Return a function that creates a layer (a, b) with parts that are created from a."""

    def make(r):
        a = linear()
        a.weight.data.copy_(constant(r, WIDTH, WIDTH))
        return Layer(function, a=a, b=linear(), **{name: part(a) for name, part in parts.items()})

    return make


register("aliased", "", {
    "Parameter(weight.data)": parameter(lambda w: w),
    "Parameter(weight.data.t())": parameter(lambda w: w.t()),
    "a part": beside(lambda s, h: s.a(h) + s.p, p=lambda a: nn.Parameter(a.weight.data[1])),
    "a column": beside(lambda s, h: s.a(h) * s.p, p=lambda a: nn.Parameter(a.weight.data[:, 1])),
    "overlapping parts": halves(slice(0, 12), slice(8, 20)),
    "interleaved parts": halves(slice(0, 8, 2), slice(1, 9, 2)),
    "expanded": lambda r: Layer(lambda s, h: h * s.p, p=nn.Parameter(torch.ones(1).expand(WIDTH))),
    "with a buffer": beside(lambda s, h: s.a(h) @ s.buffer, buffer=lambda a: a.weight.data),
    "with a frozen Parameter": parameter(lambda w: w, False),
    "list of Parameters": beside(lambda s, h: s.a(h) @ s.p[0], p=lambda a: [a.weight]),
    "only a list of Parameters": beside(lambda s, h: s.b(F.linear(h, s.p[0])), p=lambda a: [a.weight]),
    "in a closure": shared(lambda a: Layer(lambda s, h: F.linear(s.a(h), a.weight), a=a)),
    "plain tensor": beside(lambda s, h: s.a(h) @ s.p, p=lambda a: a.weight.detach()),
    "plain tensor with a graph": beside(lambda s, h: s.b(h @ s.p), p=lambda a: 2 * a.weight),
    "not registered": unregistered,
    ".data of another in forward": beside(data_of_other),
    "copied in forward": beside(copy_of_other),
    "assigned in forward": beside(assigned),
})  # fmt: skip
register("aliased", "train", {"parts without overlap": halves(slice(0, 12), slice(12, 20))})

# Order-dependent --------------------------------------------------------------------------------


def small(function):
    """Return a function that creates a layer which adds a function of h, scaled by a random factor."""

    def make(r):
        part = r.choice([0.5, 0.005, 0.0001])
        return Layer(lambda s, h: s.a(h) + part * function(s.a(h)), a=linear())

    return make


def larger_than(r):
    size = r.randint(2, 5)
    return Layer(lambda s, h: h if len(h) <= size else h + 0.1 * h.mean(0))


register("order", "", {
    "batch mean": small(lambda h: h.mean(0)),
    "batch maximum": small(lambda h: h.amax(0)),
    "neighbour": small(lambda h: h.roll(1, 0)),
    "neighbour, detached": small(lambda h: h.detach().roll(-1, 0)),
    "cumsum": small(lambda h: h.cumsum(0)),
    "flip": small(lambda h: h.flip(0)),
    "sort": small(lambda h: h.sort(0).values),
    "softmax": small(lambda h: h.softmax(0)),
    "norm of the batch": small(lambda h: h / h.norm()),
    "place in the batch": small(lambda h: torch.arange(len(h), dtype=h.dtype).view(-1, *[1] * (h.ndim - 1))),
    "size of the batch": small(lambda h: h / len(h)),
    "the last example": small(lambda h: torch.cat([0 * h[:-1], h[:1]])),
    "from the third example on": small(lambda h: torch.cat([0 * h[:2], h[2:].cumsum(0)])),
    "batches larger than k": larger_than,
    "BatchNorm, train": lambda r: fixed(Layer(flat, net=nn.BatchNorm1d(WIDTH)), True),
    "BatchNorm without statistics": lambda r: fixed(
        Layer(flat, net=nn.BatchNorm1d(WIDTH, track_running_stats=False)), False
    ),
    "batch_first forgotten": recurrent,
})  # fmt: skip
register("order", "", {
    "encoder without batch_first": lambda r: encoder(r, batch_first=False),
    "reshape for transpose": lambda r: Layer(
        lambda s, h: s.net(h.reshape(h.shape[1], len(h), -1))[0].reshape(h.shape), net=nn.GRU(WIDTH, WIDTH)
    ),
}, has_steps)  # fmt: skip

# Stateful ---------------------------------------------------------------------------------------


def counter(s, h):
    s.n += 1
    return h * (1 + 0.01 * s.n)


def warm_up(s, h):
    s.n += 1
    return h if s.n < s.first else 1.1 * h


def kept(s, h):
    before, s.before = s.before, h.detach().mean()
    return h + 0.1 * before


def running(s, h):
    s.buffer.mul_(0.9).add_(0.1 * h.detach().mean())
    return h + s.used * s.buffer


def running_data(s, h):
    s.buffer.data.copy_(0.9 * s.buffer + 0.1 * h.detach().mean())
    return h + s.buffer


def new_buffer(s, h):
    s.buffer = 0.9 * s.buffer + 0.1 * h.detach().mean()
    return h + s.buffer


def clamped(s, h):
    with torch.no_grad():
        s.a.weight.clamp_(-0.1, 0.1)
    return s.a(h)


def normed(s, h):
    s.a.weight.data.div_(s.a.weight.data.norm(dim=1, keepdim=True))
    return s.a(h)


def by_size(s, h):
    s.cache.setdefault(len(h), h.detach())
    return h + 0.1 * s.cache[len(h)]


def old_weight(s, h):
    if not s.cache:
        s.cache.append(s.a.weight.detach().softmax(0).clone())
    return s.a(h) + h @ s.cache[0]


def in_place(r):
    block = Layer(lambda s, x: x.copy_(x.flip(1)))
    block.on_inputs = True
    return block


def states(function, **parts):
    return lambda r: Layer(function, a=linear(), **{name: make(r) for name, make in parts.items()})


register("stateful", "", {
    "counter": states(counter, n=lambda r: 0),
    "counter, late": states(warm_up, n=lambda r: 0, first=lambda r: r.randint(2, 6)),
    "counter that is a buffer": states(counter, buffer=lambda r: torch.zeros(()), n=lambda r: 0),
    "hidden state kept": states(kept, before=lambda r: torch.zeros(())),
    "buffer changed": states(running, buffer=lambda r: torch.zeros(()), used=lambda r: 1),
    "buffer changed, not used": states(running, buffer=lambda r: torch.zeros(()), used=lambda r: 0),
    "buffer.data changed": states(running_data, buffer=lambda r: torch.zeros(())),
    "buffer assigned": states(new_buffer, buffer=lambda r: torch.zeros(())),
    "weight clamped": states(clamped),
    "weight.data normalised": states(normed),
    "max_norm": lambda r: Layer(
        lambda s, h: h + s.table((h.detach().sum(-1) > 0).long()), table=nn.Embedding(2, WIDTH, max_norm=0.5)
    ),
    "inputs in place": in_place,
    "h in place": states(lambda s, h: s.a(h.mul_(0.5))),
    "cache by batch size": states(by_size, cache=lambda r: {}),
    "weight cached": states(old_weight, cache=lambda r: []),
    "without gradients": states(lambda s, h: s.a(h) if torch.is_grad_enabled() else 1.01 * s.a(h)),
    "requires_grad of a weight": states(lambda s, h: s.a(h) if s.a.weight.requires_grad else 1.01 * s.a(h)),
    "type of a weight": states(lambda s, h: (1 + 0.01 * isinstance(s.a.weight, nn.Parameter)) * s.a(h)),
    "spectral norm, train": lambda r: fixed(parametrizations.spectral_norm(linear()), True),
})  # fmt: skip
register("stateful", "refuse", {"train() later": lambda r: fixed(nn.Dropout(0.5), False, True)})
register("stateful", "train", {"eval() later": lambda r: fixed(nn.Dropout(0.5), True, False)})

# Stochastic -------------------------------------------------------------------------------------


def drop_path(s, h):
    return h + s.a(h) * (torch.rand(len(h), *[1] * (h.ndim - 1)) > s.rate)


def seeded(s, h):
    torch.manual_seed(0)
    return h * (1 + 0.1 * torch.rand(h.shape))


def generator(s, h):
    return h + 0.1 * torch.rand(h.shape, generator=torch.Generator().manual_seed(0))


def seldom(s, h):
    return 1.1 * h if random.random() < s.rate else h


RATES = {"rate": lambda r: r.choice([0.3, 0.05, 0.01])}
register("stochastic", "refuse", {
    "dropout": lambda r: fixed(nn.Dropout(r.choice([0.5, 0.05, 0.01])), True),
    "F.dropout": states(lambda s, h: F.dropout(s.a(h), s.rate), **RATES),
    "drop path": states(drop_path, **RATES),
    "seed in forward": states(seeded),
    "generator in forward": states(generator),
    "RReLU": lambda r: fixed(nn.RReLU(), True),
    "noise of NumPy": states(lambda s, h: h * (1 + s.rate * np.random.rand()), **RATES),  # noqa: NPY002
    "noise of Python": states(lambda s, h: h * (1 + s.rate * random.random()), **RATES),
    "seldom, Python": states(seldom, **RATES),
    "Gumbel": states(lambda s, h: h + F.gumbel_softmax(s.a(h))),
})  # fmt: skip
register("stochastic", "refuse", {
    "between the layers of an LSTM": lambda r: fixed(Layer(
        lambda s, h: s.net(h)[0], net=nn.LSTM(WIDTH, WIDTH, 2, batch_first=True, dropout=0.3)
    ), True),
    "encoder": lambda r: fixed(encoder(r, r.choice([0.1, 0.01])), True),
}, has_steps)  # fmt: skip

# Data: t.x, t.y, t.mask and t.valid are arrays; t.scored (N, ...) marks the targets that count ---


def of_data(verdict, fits=lambda t: True):
    def decorate(function):
        DEFECTS["data", function.__name__.replace("_", " ")] = Defect(verdict, fits, None, function)
        return function

    return decorate


def symbols(t):
    return t.loss == "cross-entropy"


def numbers(t):
    return not symbols(t)


def late(t):
    """Return the index of a scored target in one of the last examples."""
    index = (t.n - 1 - t.r.randrange(3), *(t.r.randrange(size) for size in t.scored.shape[1:]))
    t.mask = None
    t.scored[...] = True
    return index


@of_data("refuse", symbols)
def label_too_large(t):
    t.y[late(t)] = t.outputs


@of_data("refuse", symbols)
def label_of_minus_1(t):
    t.y[late(t)] = -1


@of_data("", symbols)
def label_of_minus_100(t):
    at = late(t)
    t.y[at], t.scored[at] = -100, False


@of_data("refuse", symbols)
def labels_of_type_float(t):
    t.y = t.y.astype(float)


@of_data("train", lambda t: t.mask is not None)
def missing_under_the_mask(t):
    t.y[~t.scored] = -100 if symbols(t) else np.nan


@of_data("", numbers)
def nan_target(t):
    at = late(t)
    t.y[at], t.scored[at] = np.nan, False


@of_data("", lambda t: t.mask is None)
def masked_array(t):
    at = late(t)
    hidden = np.zeros(t.y.shape, bool)
    hidden[at] = True
    t.y[at], t.scored[at] = 1, False
    t.y = np.ma.masked_array(t.y, hidden)


@of_data("refuse", lambda t: t.kind in ("vectors", "series"))
def masked_inputs(t):
    t.x = np.ma.masked_array(t.x, np.random.default_rng(0).random(t.x.shape) < 0.1)


@of_data("refuse", lambda t: t.loss == "bernoulli")
def bernoulli_targets(t):
    how = t.r.choice(["signs", "bytes", "one of 1.5"])
    if how == "one of 1.5":
        t.y[late(t)] = 1.5
    else:
        t.y = np.sign(t.y - 0.5) if how == "signs" else np.round(255 * t.y)


@of_data("", lambda t: symbols(t) and t.steps and not t.pooled and t.steps != t.outputs)
def class_axis_second(t):
    t.end, t.rows = lambda z: z.movedim(-1, 1), lambda z: z.movedim(1, -1)


@of_data("refuse", lambda t: t.steps and not t.pooled)
def one_target_less(t):
    t.y, t.mask = t.y[:, 1:], None


@of_data("refuse", lambda t: t.loss == "squares" and not t.steps and t.outputs > 1)
def one_number_of_several_outputs(t):
    t.y = t.y[:, 0]


@of_data("refuse")
def validation(t):
    x, y, mask = (t.x[0][:4], t.x[1][:4]) if isinstance(t.x, tuple) else t.x[:4], t.y[:4].copy(), t.scored[:4]
    how = t.r.choice(["values", "nothing scored", "shape"])
    if how == "values":
        y[3], mask = t.outputs if symbols(t) else np.nan, np.ones_like(mask)
    elif how == "shape":
        y, mask = y[:3], mask[:3]
    t.valid = x, y, (mask & (how != "nothing scored")).astype(int)


@of_data("refuse")
def mask(t):
    t.mask = t.r.choice([np.zeros_like(t.scored), 0.5 * np.ones(t.scored.shape), np.ones((t.n, 7))])


@of_data("refuse", lambda t: t.kind in ("vectors", "series", "images"))
def infinite_input(t):
    t.x[t.n - 1], t.options["gradient_batch"] = np.inf, t.n


@of_data("refuse")
def fewer_targets(t):
    t.y, t.mask = t.y[:-1], None
