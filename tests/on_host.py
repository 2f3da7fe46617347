"""Networks with NumPy arrays as arguments and results, on any device."""

from typing import Any, NamedTuple

from hfmpi.data.batches import Batch
from hfmpi.networks.network import Network


class Outputs(NamedTuple):
    """A tangent or cotangent of outputs and, for structural damping, of the pre-activations of each layer."""

    outputs: Any
    pre: Any = None


def turned(batch):
    """Exchange the first two axes: the independent implementation reads batches with their time first."""
    arrays = (*batch[:3], getattr(batch, "scales", None))  # scales of units: (layers, B, n)
    inputs, targets, mask, scales = (None if part is None else part.swapaxes(0, 1) for part in arrays)
    return Batch(inputs, targets, mask, inputs.shape[1] - targets.shape[1], unit_scales=scales)


class OnHost:
    """A network whose arguments are copied to its device, and whose results are copied back."""

    def __init__(self, *arguments, **options):
        self.network = Network(*arguments, **options)
        self.backend = self.network.backend
        self.about, self.tape_bytes = self.network.architecture, self.network.tape_bytes

    def device(self, array):
        return None if array is None else self.backend.to_device(array)

    def host(self, array):
        return None if array is None else self.backend.to_host(array)

    def forward(self, theta, batch, structural=False, reuse=None):
        linearise = self.network.linearise_structural if structural else self.network.linearise
        return linearise(self.device(theta), turned(batch), reuse)

    def loss(self, theta, batch):
        return self.network.loss(self.device(theta), turned(batch))

    def _adding(self, function, out, squares=None):
        own = self.device(out), self.device(squares)
        function(*own)
        for mine, theirs in zip((out, squares), own, strict=True):
            if mine is not None:
                mine[...] = self.host(theirs)

    def gradient(self, tape, scale, out, squares=None):
        if squares is None:
            self._adding(lambda g, _: tape.gradient(scale, g), out)
        else:
            self._adding(lambda g, s: tape.squared_gradients(scale, g, s), out, squares)

    def gauss_newton(self, tape, v, scale, structural, out):
        own = self.device(v)
        self._adding(lambda g, _: tape.structural_gauss_newton(own, scale, structural, g), out)

    def jvp(self, tape, v, pre=False):
        outputs, pre_activations = tape.passes.tangents(self.device(v), pre)
        return Outputs(self.host(outputs), tuple(map(self.host, pre_activations)))

    def vjp(self, tape, u, out):
        cotangents = self.device(u.outputs)
        self._adding(lambda g, _: tape.vjp(cotangents, g), out)

    def advance(self, theta, state, inputs):
        state, outputs = self.network.advance(self.device(theta), state, self.device(inputs))
        return state, self.host(outputs)
