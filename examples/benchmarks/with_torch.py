"""The same LSTM in PyTorch: `nn.LSTM`, and Gauss-Newton products by double backward.

J v is the derivative of J' u along v (the "double backward trick"), as curvlinops and PyTorchHessianFree
take it. Those build the graph of J' u anew for every product; here it is built once and kept.
"""

import torch
from torch import nn

NAME = f"PyTorch {torch.__version__}"


class Contestant:
    """LSTM only: PyTorch has no mLSTM of its own."""

    def __init__(self, cell, theta, inputs, targets):
        if cell.name != "lstm":
            raise ValueError(f"PyTorch has no {cell.name}")
        torch.set_num_threads(1)
        self.layout, n, v = cell.layout, cell.hidden, cell.vocabulary
        self.recurrent, self.output = nn.LSTM(v, n), nn.Linear(n, v)
        # PyTorch's gates lie in the order i, f, u, o, and its matrices act from the left.
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
        self.inputs = nn.functional.one_hot(torch.from_numpy(inputs).long(), v).float()
        self.targets = torch.from_numpy(targets).long().reshape(-1)

        outputs = self._logits()
        self.probabilities = outputs.detach().softmax(1)
        self.outputs, self.u = outputs, torch.zeros_like(outputs, requires_grad=True)
        self.pulled = torch.autograd.grad(outputs, self.parameters, self.u, create_graph=True)

    def _logits(self):
        hidden, _ = self.recurrent(self.inputs)
        return self.output(hidden).reshape(-1, self.output.out_features)

    def gradient(self):
        """Give loss and gradient."""
        loss = nn.functional.cross_entropy(self._logits(), self.targets)
        return loss.item(), torch.autograd.grad(loss, self.parameters)

    def product(self, v):
        """Give G v."""
        (u,) = torch.autograd.grad(self.pulled, self.u, v, retain_graph=True)
        u = self.probabilities * (u - (self.probabilities * u).sum(1, keepdim=True)) / len(self.targets)
        return torch.autograd.grad(self.outputs, self.parameters, u, retain_graph=True)

    def vector(self, v):
        """Give a vector as this library wants it: one tensor a parameter."""
        p = {name: torch.from_numpy(view.copy()) for name, view in self.layout.views(v).items()}
        turned = [p["W_x"].T[self.order], p["W_h"].T[self.order], p["b"][self.order], p["W_o"].T, p["b_o"]]
        return [tensor.contiguous() for tensor in turned]
