"""The same LSTM in PyTorch: `nn.LSTM`, and Gauss-Newton products by double backward.

J v is the derivative of J' u along v (the "double backward trick"), as in curvlinops and PyTorchHessianFree,
which run the network and build the graph of J' u again for every product. `product_on_kept_graph` does that
once and keeps the graph in memory, which no library offers.
"""

import numpy as np
import torch
from torch import nn

NAME = f"PyTorch {torch.__version__}"


class Contestant:
    """An LSTM only, because PyTorch has no mLSTM."""

    def __init__(self, about, theta, inputs, targets, device="cpu"):
        if about.name != "lstm":
            raise ValueError(f"PyTorch has no {about.name}")
        torch.set_num_threads(1)
        torch.set_default_device(device)
        self.device = device
        self.layout, n, v = about.layout, about.hidden, about.outputs
        self.recurrent, self.output = nn.LSTM(v, n), nn.Linear(n, v)
        # PyTorch's gates have the order i, f, u, o, and its matrices multiply from the left.
        self.order = [*range(2 * n), *range(3 * n, 4 * n), *range(2 * n, 3 * n)]
        self.parameters = [
            self.recurrent.weight_ih_l0,
            self.recurrent.weight_hh_l0,
            self.recurrent.bias_ih_l0,
            self.output.weight,
            self.output.bias,
        ]
        with torch.no_grad():
            for parameter, value in zip(self.parameters, self.vector(theta), strict=True):
                parameter.copy_(value)
            self.recurrent.bias_hh_l0.zero_()
        self.recurrent.bias_hh_l0.requires_grad_(False)
        self.inputs = nn.functional.one_hot(torch.from_numpy(inputs.copy()).long(), v).float().to(device)
        self.targets = torch.from_numpy(targets).long().reshape(-1).to(device)

        self._kept = None

    def _graph(self):
        """Run the network, and a backward pass of a cotangent u with its graph."""
        with torch.backends.cudnn.flags(enabled=False):
            outputs = self._logits()
            u = torch.zeros_like(outputs, requires_grad=True)
            return outputs, u, torch.autograd.grad(outputs, self.parameters, u, create_graph=True)

    def _logits(self):
        hidden, _ = self.recurrent(self.inputs)
        return self.output(hidden).reshape(-1, self.output.out_features)

    def gradient(self):
        """Return the loss and its gradient."""
        loss = nn.functional.cross_entropy(self._logits(), self.targets)
        return loss.item(), self._done(torch.autograd.grad(loss, self.parameters))

    def product(self, v):
        """Return G v."""
        return self._product(v, *self._graph())

    def product_on_kept_graph(self, v):
        """Return G v, using the graph of the first call."""
        self._kept = self._kept or self._graph()
        return self._product(v, *self._kept)

    def _product(self, v, outputs, u, pulled):
        (tangent,) = torch.autograd.grad(pulled, u, v, retain_graph=True)
        p = outputs.detach().softmax(1)
        cotangent = p * (tangent - (p * tangent).sum(1, keepdim=True)) / len(self.targets)
        return self._done(torch.autograd.grad(outputs, self.parameters, cotangent, retain_graph=True))

    def _done(self, result):
        """Wait for the device and return the result."""
        if self.device != "cpu":
            torch.cuda.synchronize()
        return result

    def vector(self, v):
        """Return a vector in this library's format: one tensor per parameter."""
        p = {name: torch.from_numpy(view.copy()) for name, view in self.layout.views(v).items()}
        turned = [p["W_x"].T[self.order], p["W_h"].T[self.order], p["b"][self.order], p["W_o"].T, p["b_o"]]
        return [tensor.contiguous().to(self.device) for tensor in turned]

    def flat(self, tensors):
        """Return the result as hfmpi's flat vector; the order of the gates is its own inverse."""
        w_x, w_h, b, w_o, b_o = (np.asarray(tensor.cpu()) for tensor in tensors)
        named = {"W_x": w_x[self.order].T, "W_h": w_h[self.order].T, "b": b[self.order]}
        named |= {"W_o": w_o.T, "b_o": b_o}
        out = np.empty(self.layout.size, np.float32)
        for name, view in self.layout.views(out).items():
            view[...] = named[name]
        return out
