"""The models of model_passes.py's second table, each with the plain gradient of its framework.

A plain gradient is what a training loop without hfmpi computes: the outputs, the mean loss and its gradient,
by one forward and one backward pass in PyTorch, or by `jax.jit(jax.value_and_grad(...))`.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence

import hfmpi


class Contestant(NamedTuple):
    """A model and its plain gradient.

    Attributes
    ----------
    name : str
    data : hfmpi.Examples
    make : callable
        Creates the model.
    plain : callable
        Computes the plain gradient.
    """

    name: str
    data: hfmpi.Examples
    make: Callable[[], object]
    plain: Callable[[], object]


class PackedLSTM(nn.Module):
    """Reads sequences of different lengths and classifies the last state."""

    def __init__(self):
        super().__init__()
        self.lstm, self.top = nn.LSTM(16, 64, batch_first=True), nn.Linear(64, 10)

    def forward(self, x, lengths):
        packed = pack_padded_sequence(x, lengths.cpu(), batch_first=True, enforce_sorted=False)
        return self.top(self.lstm(packed)[1][0][-1])


class CellLoop(nn.Module):
    """Calls an LSTMCell step by step."""

    def __init__(self):
        super().__init__()
        self.cell, self.top = nn.LSTMCell(16, 64), nn.Linear(64, 10)

    def forward(self, x):
        state = None
        for step in x.unbind(1):
            state = self.cell(step, state)
        return self.top(state[0])


class EncoderLayer(nn.Module):
    """Attention and a feed-forward network, each followed by a norm, as in BERT."""

    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))
        self.mixed, self.norm = nn.Linear(width, width), nn.LayerNorm(width)
        self.wide, self.narrow = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.last_norm = nn.LayerNorm(width)

    def forward(self, x, mask):
        q, k, v = (f(x).unflatten(2, (self.heads, -1)).transpose(1, 2) for f in self.projections())
        attended = nn.functional.scaled_dot_product_attention(q, k, v, mask)
        x = self.norm(x + self.mixed(attended.transpose(1, 2).flatten(2)))
        return self.last_norm(x + self.narrow(nn.functional.gelu(self.wide(x))))

    def projections(self):
        return self.query, self.key, self.value


class Encoder(nn.Module):
    """The computation of BERT: tables of symbols, positions and types, masked attention, the first state.

    As in Hugging Face's implementation, the mask is omitted if no symbol is padding, which depends on values.
    """

    def __init__(self, symbols=200, width=64, layers=2, length=32):
        super().__init__()
        self.symbols, self.positions = nn.Embedding(symbols, width), nn.Embedding(length, width)
        self.types, self.norm = nn.Embedding(2, width), nn.LayerNorm(width)
        self.layers = nn.ModuleList(EncoderLayer(width, 4) for _ in range(layers))
        self.pooler, self.top = nn.Linear(width, width), nn.Linear(width, 5)
        self.register_buffer("ids", torch.arange(length)[None])

    def forward(self, x, attention):
        where, kinds = self.ids[:, : x.shape[1]], torch.zeros_like(x)
        h = self.norm(self.symbols(x) + self.types(kinds) + self.positions(where))
        mask = None if torch.all(attention == 1) else attention.bool()[:, None, None, :]
        for layer in self.layers:
            h = layer(h, mask)
        return self.top(torch.tanh(self.pooler(h[:, 0])))


class Residual(nn.Module):
    """The residual of Burgers' equation for a network u, whose derivatives it computes."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(
            *(nn.Linear(2, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh()),
            nn.Linear(64, 1),
        )

    def forward(self, x):
        x.requires_grad_(True)
        u = self.net(x)
        first = torch.autograd.grad(u.sum(), x, create_graph=True)[0]
        second = torch.autograd.grad(first[:, 0].sum(), x, create_graph=True)[0]
        return first[:, 1:] + u * first[:, :1] - 0.01 * second[:, :1]


def in_torch():
    """Yield the models in PyTorch."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((200, 30, 16), np.float32)
    lengths, classes = rng.integers(5, 31, 200), rng.integers(0, 10, 200)
    torch.manual_seed(0)
    yield of_torch("packed LSTM", PackedLSTM(), (x, lengths), classes)
    yield of_torch("LSTMCell, 20 steps", CellLoop(), (x[:, :20],), classes)
    tokens, sizes = rng.integers(1, 200, (100, 24)), rng.integers(8, 25, 100)
    attention = (np.arange(24) < sizes[:, None]).astype(np.int64)
    yield of_torch("attention encoder", Encoder(), (tokens, attention), rng.integers(0, 5, 100))
    try:
        from transformers import BertConfig, BertForSequenceClassification
    except ImportError:
        print("Hugging Face BERT is left out: pip install transformers")
    else:
        yield of_torch(
            "Hugging Face BERT",
            bert(BertConfig, BertForSequenceClassification),
            (tokens, attention),
            rng.integers(0, 5, 100),
        )
    points = rng.uniform(-1, 1, (1000, 2)).astype(np.float32)
    yield of_torch("PINN by autograd", Residual(), (points,), np.zeros((1000, 1), np.float32))


def bert(config, kind):
    """Return a small BERT as a module with two inputs and one output."""

    class Logits(nn.Module):
        def __init__(self):
            super().__init__()
            sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
            self.bert = kind(config(vocab_size=200, intermediate_size=256, num_labels=5, **sizes))

        def forward(self, x, attention):
            return self.bert(input_ids=x, attention_mask=attention).logits

    return Logits().eval()


def of_torch(name, module, inputs, targets):
    """Return the contestant for a PyTorch module."""
    symbols = targets.dtype.kind == "i"
    tensors, goals = [torch.from_numpy(np.ascontiguousarray(x)) for x in inputs], torch.from_numpy(targets)
    parameters = [*module.parameters()]
    loss = nn.functional.cross_entropy if symbols else nn.functional.mse_loss

    def plain():
        return torch.autograd.grad(loss(module(*(x.clone() for x in tensors)), goals), parameters)

    data = hfmpi.Examples(inputs if len(inputs) > 1 else inputs[0], targets)
    kind = "cross-entropy" if symbols else "squares"
    return Contestant(f"{name}, PyTorch", data, lambda: hfmpi.TorchModel(module, kind), plain)


def in_jax():
    """Yield the models in JAX."""
    rng = np.random.default_rng(0)

    def normal(*shape):
        return (rng.standard_normal(shape) / np.sqrt(shape[0])).astype(np.float32)

    def mlp(width, examples, name):
        params = {"a": normal(64, width), "b": normal(width, width), "c": normal(width, 10)}
        x, y = normal(examples, 64), rng.integers(0, 10, examples)
        return of_jax(name, perceptron, params, x, y)

    yield mlp(64, 64, "MLP, small")
    yield mlp(512, 512, "MLP")
    params = {"in": normal(32, 128), "rec": normal(128, 128), "bias": np.zeros(128, np.float32)}
    params["out"] = normal(128, 32)
    x, y = normal(64, 50, 32), rng.integers(0, 32, (64, 50))
    yield of_jax("RNN by scan", rnn, params, x, y)
    sizes = {"q": (128, 128), "k": (128, 128), "v": (128, 128), "o": (128, 128), "w": (128, 512)}
    params = {name: normal(*size) for name, size in sizes.items()} | {"n": normal(512, 128)}
    params |= {"scale": np.ones((2, 128), np.float32), "out": normal(128, 32)}
    x, y = normal(64, 32, 128), rng.integers(0, 32, (64, 32))
    yield of_jax("transformer block", block, params, x, y)


def perceptron(p, x):
    from jax import numpy as jnp

    return jnp.tanh(jnp.tanh(x @ p["a"]) @ p["b"]) @ p["c"]


def rnn(p, x):
    import jax
    from jax import numpy as jnp

    def step(h, a):
        h = jnp.tanh(a + h @ p["rec"])
        return h, h

    _, states = jax.lax.scan(
        step, jnp.zeros((len(x), 128), x.dtype), (x @ p["in"] + p["bias"]).swapaxes(0, 1)
    )
    return states.swapaxes(0, 1) @ p["out"]


def block(p, x):
    import jax
    from jax import numpy as jnp

    def norm(x, scale):
        x = x - x.mean(-1, keepdims=True)
        return scale * x / jnp.sqrt((x * x).mean(-1, keepdims=True) + 1e-5)

    q, k, v = ((x @ p[name]).reshape(*x.shape[:2], 4, 32) for name in "qkv")
    weights = jax.nn.softmax(jnp.einsum("bqhd,bkhd->bhqk", q, k) / 32**0.5)
    attended = jnp.einsum("bhqk,bkhd->bqhd", weights, v).reshape(x.shape)
    x = norm(x + attended @ p["o"], p["scale"][0])
    x = norm(x + jax.nn.gelu(x @ p["w"]) @ p["n"], p["scale"][1])
    return x @ p["out"]


def of_jax(name, function, params, x, y):
    """Return the contestant for a JAX function."""
    import jax
    from jax import numpy as jnp

    def loss(params, x, y):
        logs = jax.nn.log_softmax(function(params, x))
        return -jnp.take_along_axis(logs, y[..., None], -1).mean()

    gradient = jax.jit(jax.value_and_grad(loss))

    def plain():
        return jax.block_until_ready(gradient(params, x, y))

    make = lambda: hfmpi.JaxModel(function, params, "cross-entropy")  # noqa: E731
    return Contestant(f"{name}, JAX", hfmpi.Examples(x, y), make, plain)
