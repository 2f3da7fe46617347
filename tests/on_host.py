"""Networks that take and give NumPy arrays, whatever their device."""

from hfmpi.models.network import Network, Outputs


class OnHost:
    """A network; every array is carried to its device and back."""

    def __init__(self, *arguments):
        self.network = Network(*arguments)
        self.backend = self.network.backend
        self.cell, self.tape_bytes = self.network.cell, self.network.tape_bytes

    def device(self, array):
        return None if array is None else self.backend.to_device(array)

    def host(self, array):
        return None if array is None else self.backend.to_host(array)

    def forward(self, theta, *arguments, **options):
        return self.network.forward(self.device(theta), *arguments, **options)

    def loss(self, theta, batch):
        return self.network.loss(self.device(theta), batch)

    def _adding(self, function, out, squares=None):
        own = self.device(out), self.device(squares)
        function(*own)
        for mine, theirs in zip((out, squares), own, strict=True):
            if mine is not None:
                mine[...] = self.host(theirs)

    def gradient(self, tape, scale, out, squares=None):
        self._adding(lambda g, s: self.network.gradient(tape, scale, g, s), out, squares)

    def gauss_newton(self, tape, v, scale, structural, out):
        own = self.device(v)
        self._adding(lambda g, _: self.network.gauss_newton(tape, own, scale, structural, g), out)

    def jvp(self, tape, v, pre=False):
        return Outputs(*map(self.host, self.network.jvp(tape, self.device(v), pre)))

    def vjp(self, tape, u, out):
        own = Outputs(*map(self.device, u))
        self._adding(lambda g, _: self.network.vjp(tape, own, g), out)

    def advance(self, theta, state, inputs):
        state, logits = self.network.advance(self.device(theta), state, self.device(inputs))
        return state, self.host(logits)
