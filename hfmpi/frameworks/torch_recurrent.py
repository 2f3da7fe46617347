"""PyTorch's recurrent networks and cells as sequences of products and element-wise operations.

PyTorch defines the networks for its compiler, in a private module that may change. Without it
no networks are supported.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

__all__ = ["CELLS", "PACKED", "UNPACKED", "recurrent_networks"]

Linear = Callable[[Any, Any, Any], Any]


def recurrent_networks(form: str) -> dict[Any, Any]:
    """Return networks by PyTorch's function, for plain ('input') or packed ('data') sequences."""
    try:
        from torch._decomp import get_decompositions

        aten = torch.ops.aten
        kinds = [getattr(kind, form) for kind in (aten.lstm, aten.gru, aten.rnn_tanh, aten.rnn_relu)]
        steps = get_decompositions(kinds)
        return {getattr(torch, op._schema.name.removeprefix("aten::")): run for op, run in steps.items()}
    except (ImportError, AttributeError):
        return {}


def _lstm_cell(
    linear: Linear, x: Any, state: Any, w_x: Any, w_h: Any, b_x: Any = None, b_h: Any = None
) -> Any:
    h, c = state
    i, f, g, o = (linear(x, w_x, b_x) + linear(h, w_h, b_h)).chunk(4, 1)
    c = f.sigmoid() * c + i.sigmoid() * g.tanh()
    return o.sigmoid() * c.tanh(), c


def _gru_cell(linear: Linear, x: Any, h: Any, w_x: Any, w_h: Any, b_x: Any = None, b_h: Any = None) -> Any:
    of_x, of_h = linear(x, w_x, b_x).chunk(3, 1), linear(h, w_h, b_h).chunk(3, 1)
    r, z = ((a + b).sigmoid() for a, b in zip(of_x[:2], of_h[:2], strict=True))
    new = (of_x[2] + r * of_h[2]).tanh()
    return (h - new) * z + new


def _rnn_cell(function: Any) -> Any:
    def run(linear: Linear, x: Any, h: Any, w_x: Any, w_h: Any, b_x: Any = None, b_h: Any = None) -> Any:
        return function(linear(x, w_x, b_x) + linear(h, w_h, b_h))

    return run


UNPACKED, PACKED = recurrent_networks("input"), recurrent_networks("data")

CELLS = {
    torch.lstm_cell: _lstm_cell,
    torch.gru_cell: _gru_cell,
    torch.rnn_tanh_cell: _rnn_cell(torch.tanh),
    torch.rnn_relu_cell: _rnn_cell(torch.relu),
}
"""Implementations of cells by PyTorch's function: (linear, input, state, matrices, vectors) -> new state."""
