"""Small random PyTorch modules with random defects: refused with a message, or trained correctly.

    python examples/faults/modules.py [--trials 300] [--seed 0] [--only NUMBER ...] [--family WORD]

A trial draws a module of a few blocks, its data and, except for about a tenth, a defect (defects.py); every
fourth of these has a second one. It trains the module for three steps in small micro-batches. Two outcomes
are correct. (1) A UserError of one line, but not for a correct module, and for bad data not after a step. (2)
A result that a dense reference in float64, outside of hfmpi, confirms: the same module, built again in
float64, on all examples in one batch, differentiated by PyTorch's autograd in the parameters into which
`write_back` copies theta. The reference itself decides whether the module has a well-defined loss: its
outputs must be the same for single examples, in a different order, in a second call and without gradients. In
both cases the module and the caller's arrays must be unchanged, bit for bit. `--only` runs single trials and
prints modules and tracebacks. The exit code is 0 if all of this held.
"""

import argparse
import collections
import contextlib
import random
import shlex
import signal
import sys
import tempfile
import time
import traceback
import warnings
from pathlib import Path

import numpy as np
import torch
from defects import DEFECTS, HEALTHY, SEQUENCES, WIDTH, Layer
from torch import nn
from torch.nn import functional as F

import hfmpi
from hfmpi.errors import UserError
from hfmpi.parallel.communicator import Communicator

LIMIT = 60  # seconds per trial
TOLERANCE = {"float32": 1e-4, "float64": 1e-8}  # relative difference of numbers that count as equal
DEPENDENT = 1e-10  # relative difference of the reference's outputs that is larger than rounding
KINDS = "vectors", "series", "symbols", "images", "two inputs"
FIRST_ORDER, SECOND_ORDER = ("adam", "soap", "muon"), ("bhf-short", "subspace", "shf")
HEALTHY_TRIALS = 12
ALL = [None] * HEALTHY_TRIALS + list(DEFECTS)  # every defect occurs before one is repeated


def product(s, x):
    return s.a(x[0]) * s.b(x[1])


class Net(nn.Module):
    """Inputs -> features -> blocks -> outputs."""

    def __init__(self, trial, r):
        super().__init__()
        kinds = [HEALTHY, SEQUENCES] if trial.steps else [HEALTHY]
        layers = [r.choice(list(r.choice(kinds).values()))(r) for _ in range(r.randint(1, 2))]
        for name in trial.defects:
            if DEFECTS[name].block:
                layers.insert(r.randint(0, len(layers)), DEFECTS[name].block(r))
        self.first = nn.ModuleList([layer for layer in layers if hasattr(layer, "on_inputs")])
        self.blocks = nn.ModuleList([layer for layer in layers if not hasattr(layer, "on_inputs")])
        self.stem = {
            "vectors": lambda: nn.Linear(3, WIDTH),
            "series": lambda: nn.Linear(3, WIDTH),
            "symbols": lambda: nn.Embedding(5, WIDTH),
            "images": lambda: nn.Sequential(nn.Conv2d(1, 2, 3), nn.Tanh(), nn.Flatten(), nn.Linear(8, WIDTH)),
            "two inputs": lambda: Layer(product, a=nn.Linear(3, WIDTH), b=nn.Linear(2, WIDTH)),
        }[trial.kind]()
        self.head, self.pooled, self.end = nn.Linear(WIDTH, trial.outputs), trial.pooled, trial.end

    def forward(self, *x):
        for layer in self.first:
            x = layer(x[0]), *x[1:]
        h = self.stem(x if len(x) > 1 else x[0])
        for block in self.blocks:
            h = block(h)
        return self.end(self.head(h.mean(1) if self.pooled else h))


class Trial:
    """A module, data and options, all determined by seed and number.

    Attributes
    ----------
    defects : list of (family, name)
    verdict : str
        The expected outcome: "train", "refuse", or "" if the reference decides.
    x, y, mask, valid
        The arguments of `hfmpi.train`.
    scored : (N, ...) bool
        Which targets count.
    end, rows : callable
        The final operation of the module, and the function that converts its result to (N, ..., O).
    """

    def __init__(self, seed, number):
        self.seed, self.number = seed, number
        r = self.r = random.Random(f"{seed} {number}")
        first = ALL[number % len(ALL)]
        while True:
            self._draw(r)
            self.defects = [first] if first else []
            if first and r.random() < 0.25:
                self.defects.append(r.choice(ALL[HEALTHY_TRIALS:]))
            data = [family == "data" for family, _ in self.defects]
            if sum(data) < 2 and all(DEFECTS[name].fits(self) for name in self.defects):
                break
        if any(data):  # invalid examples may come late
            self.valid, self.options["gradient_batch"] = None, self.n // 3
            if "curvature_batch" in self.options:
                self.options["curvature_batch"] = self.n // 3
        for name in self.defects:
            DEFECTS[name].spoil(self)
        verdicts = {DEFECTS[name].verdict for name in self.defects}
        self.verdict = "refuse" if "refuse" in verdicts else "train" if verdicts <= {"train"} else ""

    def _draw(self, r):
        numbers = np.random.default_rng(r.randrange(2**32))
        self.dtype, self.kind = r.choice(["float32", "float64"]), r.choice(KINDS)
        self.loss, self.n = r.choice(["cross-entropy", "squares", "bernoulli"]), r.randint(12, 20)
        self.steps = r.randint(3, 5) if self.kind in ("series", "symbols") else 0
        self.pooled = bool(self.steps) and r.random() < 0.3
        self.outputs, self.end, self.rows = r.randint(2, 3), nn.Identity(), nn.Identity()
        shape = (self.n, self.steps) if self.steps and not self.pooled else (self.n,)
        if self.loss != "cross-entropy" and len(shape) == 1 and r.random() < 0.2:
            self.outputs, self.end = 1, r.choice([nn.Identity(), nn.Flatten(0)])
        self.x = {
            "vectors": lambda: numbers.standard_normal((self.n, 3)),
            "series": lambda: numbers.standard_normal((self.n, self.steps, 3)),
            "symbols": lambda: numbers.integers(0, 5, (self.n, self.steps)),
            "images": lambda: numbers.standard_normal((self.n, 1, 4, 4)),
            "two inputs": lambda: tuple(numbers.standard_normal((self.n, size)) for size in (3, 2)),
        }[self.kind]()
        self.y = {
            "cross-entropy": lambda: numbers.integers(0, self.outputs, shape),
            "squares": lambda: numbers.standard_normal((*shape, self.outputs)),
            "bernoulli": lambda: numbers.random((*shape, self.outputs)),
        }[self.loss]()
        self.scored, self.mask, self.valid = np.ones(shape, bool), None, None
        if r.random() < 0.35:
            self.scored[: self.n // 4] = numbers.random(self.scored[: self.n // 4].shape) < 0.5
            self.mask = self.scored.astype(r.choice([int, float, bool]))
        if r.random() < 0.3:
            self.valid = self.x, self.y, self.scored.astype(int)
        self.tensors = r.random() < 0.2
        optimizer = r.choice(FIRST_ORDER + SECOND_ORDER)
        self.options = {"optimizer": optimizer, "gradient_batch": self.n, "max_steps": 3}
        self.options["micro_batch"] = r.randint(2, 5)
        if optimizer in SECOND_ORDER:
            self.options["curvature_batch"] = r.choice([self.n, self.n // 2])
        if optimizer in ("bhf-short", "shf"):
            self.options["settings"] = {"cg_max_steps": 4}

    @property
    def title(self):
        """The defects with their families."""
        return " + ".join(f"{family}: {name}" for family, name in self.defects) or "healthy"

    def build(self, dtype):
        """Build the module, in the modes that it has when the model is created."""
        r, before = random.Random(f"{self.seed} {self.number} module"), torch.get_default_dtype()
        torch.manual_seed(self.number)
        torch.set_default_dtype(getattr(torch, dtype))
        try:
            net = Net(self, r).train(r.random() < 0.5)
        finally:
            torch.set_default_dtype(before)
        for block in net.blocks:
            block.train(getattr(block, "mode", net.training))
        return net

    # hfmpi ---------------------------------------------------------------------------------------

    def run(self):
        """Return "trained" or "refused"; raise an AssertionError otherwise."""
        self.net = self.build(self.dtype)
        data = [self.x, self.y] if self.mask is None else [self.x, self.y, self.mask]
        if self.tensors and not any(isinstance(part, (tuple, np.ma.MaskedArray)) for part in data):
            data = [torch.from_numpy(part) for part in data]
        data, copies = tuple(data), copied((data, self.valid))
        self.start = {name: t.detach().clone() for name, t in tensors(self.net)}
        before, after = list(identities(self.net)), self.build(self.dtype)
        self._settle(after)
        modes = [module.training for module in after.modules()]
        torch.manual_seed(self.number)
        random.seed(self.number)
        np.random.seed(self.number)  # noqa: NPY002
        with tempfile.TemporaryDirectory() as folder:
            history = Path(folder) / "run" / "history.jsonl"
            try:
                model = hfmpi.TorchModel(self.net, self.loss)
                if self.r.random() < 0.5 and self._changes(self.net):
                    with contextlib.suppress(UserError):  # defects of later calls must be detected too
                        hfmpi.train(model, data, quiet=True, **{**self.options, "max_steps": 1})
                self._settle(self.net)
                self.result = hfmpi.train(
                    model, data, self.valid, out=history.parent, quiet=True, **self.options
                )
                self.said = "trained"
            except UserError as error:
                self.result, self.said = None, str(error)
            steps = len(history.read_text().splitlines()) if history.exists() else 0
        assert list(identities(self.net)) == before, "the module was changed: parameters or flags"
        self._unchanged("the module was changed: values")
        assert same(copies, copied((data, self.valid))), "the caller's arrays were changed"
        if self.result is None:
            assert 0 < len(self.said) < 500, f"not one sentence: {self.said!r}"
            assert "\n" not in self.said, f"not one sentence: {self.said!r}"
            assert self.verdict != "train", f"refused a correct module: {self.said}"
            late = steps and self.options["gradient_batch"] < self.n
            assert not late, f"refused after {steps} steps: {self.said}"
            return "refused"
        assert [module.training for module in self.net.modules()] == modes, "the training modes were changed"
        assert self.verdict != "refuse", "trained without an error"
        self._independent(self.start)
        self._judge(model, hfmpi.Examples(*data))
        return "trained"

    def _settle(self, net):
        """Set the training modes that apply after the model is created."""
        for block in self._changes(net):
            block.train(block.later)

    def _changes(self, net):
        """Return the blocks whose training mode changes after the model is created."""
        return [block for block in net.blocks if getattr(block, "later", block.training) != block.training]

    def _unchanged(self, words):
        changed = [name for name, t in tensors(self.net) if not torch.equal(t, self.start[name])]
        assert not changed, f"{words} of {', '.join(changed)}"

    # The reference -------------------------------------------------------------------------------

    def reference(self, values):
        """Return the module in float64 with these values."""
        net = self.build("float64")
        self._settle(net)
        put(net, values)
        return net

    def inputs(self, indices):
        """Return the inputs that the module gets, in float64."""
        x = self.x if isinstance(self.x, tuple) else (self.x,)
        cast = lambda a: a.astype(self.dtype).astype("float64") if a.dtype.kind == "f" else a  # noqa: E731
        return [torch.from_numpy(cast(a)[indices]) for a in x]

    def outputs_of(self, net, indices):
        """Return the outputs (len(indices), ..., O)."""
        z = self.rows(net(*self.inputs(indices)))
        return z.reshape(*self.scored[indices].shape, self.outputs)

    def _independent(self, values):
        dependent = self.dependent(values)
        assert dependent <= DEPENDENT, f"trained without an error: outputs differ by {dependent:.1e}"

    def dependent(self, values):
        """Return the largest relative difference of outputs in other batches, orders and modes."""
        net, every, single = self.reference(values), np.arange(self.n), range(self.n)
        try:
            with torch.no_grad():
                whole = self.outputs_of(net, every)
                others = [
                    torch.cat([self.outputs_of(net, [i]) for i in single]),
                    torch.cat([self.outputs_of(net, every[i : i + 3]) for i in range(0, self.n, 3)]),
                    self.outputs_of(net, every[::-1].copy()).flip(0),
                    self.outputs_of(net, every),
                ]
            others.append(self.outputs_of(net, every).detach())
        except (RuntimeError, ValueError, IndexError):
            return float("inf")
        return max(float((whole - other).abs().max() / whole.abs().max()) for other in others)

    def losses(self, z):
        """Return the losses (N,) and the scored outputs (N, O) of all examples."""
        scored, y = torch.from_numpy(self.scored), np.ma.getdata(self.y)
        if self.loss == "cross-entropy":
            y, z = torch.from_numpy(y.reshape(scored.shape))[scored], z[scored]
            return F.cross_entropy(z, y, reduction="none"), z
        y = torch.from_numpy(y.astype(self.dtype).astype("float64")).view(z.shape)[scored]
        z = z[scored]
        if self.loss == "squares":
            return F.mse_loss(z, y, reduction="none").sum(-1) / 2, z
        return F.binary_cross_entropy_with_logits(z, y, reduction="none").sum(-1), z

    def values(self, theta):
        """Return the tensors of the module for theta by name, in float64."""
        theta = torch.from_numpy(np.float64(theta))
        return {
            name: torch.where(moved, theta[at.clamp(0, len(theta) - 1)], self.start[name].double())
            for name, (moved, at) in self.places.items()
        }

    def close(self, name, ours, right, terms=None):
        """Assert that numbers are equal up to rounding; `terms` are those of a sum that may cancel."""
        ours, right = np.asarray(ours, float), np.asarray(right, float)
        difference = np.abs(ours - right).max() / (np.abs(right if terms is None else terms).max() + 1e-3)
        assert difference <= TOLERANCE[self.dtype], f"wrong {name}: relative difference {difference:.1e}"

    def _judge(self, model, examples):
        """Compare all numbers with those of the reference."""
        low, high = ({}, {})
        for first, found in ((0, low), (model.size, high)):  # where theta is copied to
            model.write_back(np.arange(first, first + model.size, dtype=self.dtype))
            found |= {name: t.detach().double().clone() for name, t in tensors(self.net)}
        self.places = {name: (high[name] - low[name] == model.size, low[name].long()) for name in low}
        put(self.net, self.start)
        start, end, every = model.initial(0), self.result.theta, np.arange(self.n)
        same_start = all(torch.equal(t, self.start[name].double()) for name, t in self.values(start).items())
        assert same_start, "wrong initial parameters"
        history = [record["loss"] for record in self.result.history]
        right = self.risk(self.values(end))
        if self.options["gradient_batch"] == self.n:
            self.close("loss at the start", history[0], self.risk(self.values(start)))
        self.close("loss", model.loss(end, examples.take(every)) / examples.scored(every), right)
        if self.valid:
            self.close("validation loss", self.result.valid_loss, right)
        near = start + 0.1 * np.random.default_rng(self.number).standard_normal(model.size)
        near = near.astype(self.dtype)
        self._independent(self.values(near))
        self._judge_derivatives(model, examples, near)
        self._unchanged("passes changed values of the module")
        model.write_back(end)
        now = {name: t.detach().double() for name, t in tensors(self.net)}
        self.close("loss after write_back", right, self.risk(now))
        if self.options["gradient_batch"] == self.n and self.options["optimizer"] in SECOND_ORDER:
            worse = right > min(history) + TOLERANCE[self.dtype] * (1 + min(history))
            assert not worse, (
                f"the result is worse than an earlier theta: loss {right:.6g} after {min(history):.6g}"
            )

    def _judge_derivatives(self, model, examples, theta):
        """Compare gradient, squared gradients, G v and V G V' on all examples."""
        every, before = np.arange(self.n), theta.copy()
        gradient, jacobian, hessian, each = self.dense(theta)
        v = np.random.default_rng(0).standard_normal((3, theta.size)).astype(self.dtype)
        along = np.einsum("nod,cd->cno", jacobian, np.float64(v))
        curved = np.einsum("nop,cnp->cno", hessian, along)
        owner = hfmpi.DataParallel(model, Communicator(), micro_batch=self.options["micro_batch"])
        risk = owner.on(examples, every)
        self.close("loss near the start", risk.loss(theta), self.risk(self.values(theta)))
        squared, terms = risk.squared_gradients(theta), np.abs(each).sum(0)
        self.close("gradient", risk.gradient(theta).vector, gradient, terms)
        self.close("gradient with squares", squared.vector, gradient, terms)
        self.close("squares of gradients", squared.squares, self.n * (each**2).sum(0))
        product = risk.gauss_newton(theta)(v[0])
        self.close("Gauss-Newton product", product, np.einsum("nod,no->d", jacobian, curved[0]))
        self.close("V G V'", risk.project(theta)(v), np.einsum("cno,dno->cd", along, curved))
        assert np.array_equal(theta, before), "passes changed theta"

    def risk(self, values):
        """Return the mean loss of the scored outputs of all examples."""
        return float(
            self.losses(self.outputs_of(self.reference(values), np.arange(self.n)))[0].mean().detach()
        )

    def dense(self, theta):
        """Return gradient (D,), J (N, O, D), H (N, O, O) of the mean loss, and per-example gradients."""
        net = self.reference(self.values(theta))
        leaves = {name: p for name, p in net.named_parameters() if p.requires_grad}
        losses, z = self.losses(self.outputs_of(net, np.arange(self.n)))

        def back(value):
            total = torch.zeros(theta.size, dtype=torch.float64)
            grads = torch.autograd.grad(value, leaves.values(), retain_graph=True, allow_unused=True)
            for (moved, at), g in zip((self.places[name] for name in leaves), grads, strict=True):
                if g is not None:
                    total.index_add_(0, at[moved], g[moved])
            return total.numpy()

        gradient, jacobian = back(losses.mean()), np.stack([back(value) for value in z.reshape(-1)])
        jacobian = jacobian.reshape(*z.shape, -1)
        (u,) = torch.autograd.grad(losses.mean(), z, create_graph=True)
        hessian = [torch.autograd.grad(row.sum(), z, retain_graph=True)[0].numpy() for row in u.T]
        each = np.zeros((self.n, theta.size))
        np.add.at(each, np.nonzero(self.scored)[0], np.einsum("no,nod->nd", u.detach().numpy(), jacobian))
        return gradient, jacobian, np.stack(hessian, 1), each


def tensors(net):
    """Iterate over all parameters and buffers by name."""
    yield from net.named_parameters(remove_duplicate=False)
    yield from net.named_buffers(remove_duplicate=False)


def put(net, values):
    """Copy values into a module by name; of expanded axes, only the first entry."""
    with torch.no_grad():
        for name, t in tensors(net):
            first = tuple(slice(None) if stride else slice(1) for stride in t.stride())
            t[first].copy_(values[name][first])


def identities(net):
    """Yield the properties of a module, other than values, that must not change."""
    for name, p in net.named_parameters(remove_duplicate=False):
        yield name, id(p), type(p), p.requires_grad, p.grad is None
    yield [name for name, _ in net.named_buffers(remove_duplicate=False)]


def copied(data):
    """Copy nested tuples of arrays and tensors as arrays."""
    if isinstance(data, (tuple, list)):
        return [copied(part) for part in data]
    return None if data is None else np.array(data)


def same(a, b):
    """Return whether two copies are equal."""
    if isinstance(a, list):
        return all(same(x, y) for x, y in zip(a, b, strict=True))
    return a is None or np.array_equal(a, b, equal_nan=a.dtype.kind == "f")


def attempt(trial, details=False):
    """Run a trial; return "trained", "refused" or "failed", and what failed."""
    try:
        end, failure = trial.run(), ""
    except Exception as error:
        end, failure = "failed", str(error).replace("\n", " ")
        if not isinstance(error, AssertionError):
            frame = traceback.extract_tb(error.__traceback__)[-1]
            failure = f"{type(error).__name__}: {failure[:150]} ({Path(frame.filename).name}:{frame.lineno})"
        if details:
            traceback.print_exc()
    if details:
        print(trial.net, {name: getattr(trial, name) for name in SHOWN}, getattr(trial, "said", ""), sep="\n")
    return end, failure


def timeout(*_):
    raise TimeoutError(f"{LIMIT} s exceeded")


SHOWN = "kind", "dtype", "loss", "n", "steps", "pooled", "outputs", "options", "verdict", "tensors"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trials", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, nargs="*", default=[], metavar="NUMBER")
    parser.add_argument("--family", default="", help="run trials with this word in the name of a defect")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    signal.signal(signal.SIGALRM, timeout)
    rows, failures, begin = collections.defaultdict(collections.Counter), [], time.monotonic()
    for number in options.only or range(options.trials):
        trial = Trial(options.seed, number)
        if options.family in trial.title:
            signal.alarm(LIMIT)
            end, failure = attempt(trial, bool(options.only))
            signal.alarm(0)
            rows[trial.defects[0][0] if trial.defects else "healthy"][end] += 1
            if failure:
                failures.append((trial.title, number, failure))
    for title, number, failure in sorted(failures):
        print(f"FAILED {title}: trial {number}: {failure}")
    print(shlex.join(["python", *sys.argv]))
    print(f"hfmpi {hfmpi.__version__}, PyTorch {torch.__version__}, NumPy {np.__version__}")
    print("| first defect | trials | trained | refused | failed |\n|---|---:|---:|---:|---:|")
    for family, row in rows.items():
        print(f"| {family} | {row.total()} | {row['trained']} | {row['refused']} | {row['failed']} |")
    count = sum(row.total() for row in rows.values())
    print(f"{count} trials, {len(failures)} failed; {time.monotonic() - begin:.0f} s")
    sys.exit(bool(failures))


if __name__ == "__main__":
    main()
