"""The methods of peers.py: those of hfmpi and of other libraries, on the same network, start and data.

A method counts its passes over the training set by their kind, independent of the passes that its library
executes: forward 1, loss with gradient 3, J v 2, G v 4. `sequential` counts the passes that must be
sequential if independent vectors share one pass (hfmpi.measure.cost: P_D over the examples, and P_I).
"""

from contextlib import nullcontext
from itertools import repeat
from types import MappingProxyType

import numpy as np
import torch
from torch import nn

import hfmpi
from hfmpi.measure.cost import Counts, executed
from hfmpi.objective.data_parallel import step_objectives
from hfmpi.optim.presets import preset
from hfmpi.parallel.communicator import Communicator


class Method:
    """One method on a problem, with initial weights and one value of its setting.

    Attributes
    ----------
    setting, candidates : str, tuple
        The tuned setting, and its values.
    warm_up : int
        Steps until everything is compiled.
    recurrent : bool
        Whether the method supports recurrent networks.
    passes, sequential : float
        The number of all passes, and of sequential passes, since `start`.
    """

    setting, candidates, warm_up, recurrent = "damping", (1.0, 0.1, 0.01), 1, True

    def __init__(self, problem, weights, value):
        self.problem, self.weights, self.value = problem, weights, value

    def start(self):
        """Return to the initial state."""
        self.passes, self.sequential, self.number = 0.0, 0.0, 0

    def count(self, passes, sequential=None):
        """Add passes; all of them are sequential unless `sequential` is set."""
        self.passes += passes
        self.sequential += passes if sequential is None else sequential

    def loss(self):
        """Return the mean training loss, whose evaluation is not counted."""
        raise NotImplementedError


class Hfmpi(Method):
    """A preset with the full set as its gradient batch, and fractions `curvature` in turn for products."""

    name, curvature, changes = "bhf-short", 1.0, MappingProxyType({})

    def __init__(self, problem, weights, value):
        super().__init__(problem, weights, value)
        self.cases = hfmpi.Examples(problem.x, problem.y)
        self.part = round(self.curvature * self.cases.count)
        self.model = self.made()
        self.owner = hfmpi.DataParallel(self.model, Communicator(), micro_batch=self.cases.count)
        self.optimizer = preset(self.name, **{self.setting: value}, **self.changes).optimizer

    def made(self):
        return hfmpi.TorchModel(self.problem.module(self.weights), "cross-entropy")

    def start(self):
        super().start()
        self.theta = self.model.initial(0).astype(np.float32)
        self.state = self.optimizer.init(self.theta, self.model.blocks)

    def step(self):
        objectives = step_objectives(self.owner, self.cases, 0, self.number, self.cases.count, self.part)
        self.theta, self.state, report = self.optimizer.step(self.theta, self.state, objectives)
        self.number += 1
        p_d, p_i = executed(Counts(**vars(report.work)), self.cases.count, self.part)
        self.count(p_d / self.cases.count, p_i)

    def loss(self):
        return self.model.loss(self.theta, self.cases.take(np.arange(self.cases.count))) / self.cases.count


class HfmpiJax(Hfmpi):
    """The same with a JAX function."""

    def made(self):
        return hfmpi.JaxModel(self.problem.function, self.weights, "cross-entropy")


class Torch(Method):
    """A PyTorch module and its loss."""

    def __init__(self, problem, weights, value):
        super().__init__(problem, weights, value)
        self.module, self.criterion = problem.module(weights), nn.CrossEntropyLoss()
        self.parameters = list(self.module.parameters())
        self.x, self.y = torch.from_numpy(problem.x), torch.from_numpy(problem.y)

    def start(self):
        super().start()
        self.module.load_state_dict({name: torch.from_numpy(p) for name, p in self.weights.items()})

    def forward(self):
        outputs = self.module(self.x)
        return self.criterion(outputs, self.y), outputs

    def loss(self):
        with torch.no_grad():
            return self.forward()[0].item()


class TorchAdam(Torch):
    """Adam, a method without curvature, for reference."""

    setting, candidates = "rate", (0.1, 0.03, 0.01)

    def start(self):
        super().start()
        self.optimizer = torch.optim.Adam(self.parameters, lr=self.value)

    def step(self):
        self.optimizer.zero_grad()
        self.forward()[0].backward()
        self.optimizer.step()
        self.count(3)


class PyTorchHessianFree(Torch):
    """`HessianFree.step(forward)`, as in the README of the library."""

    iterations = 250  # its default

    def start(self):
        from hessianfree.optimizer import HessianFree

        super().start()
        self.optimizer = HessianFree(self.parameters, damping=self.value, cg_max_iter=self.iterations)
        product = self.optimizer._Gv

        def counted(*given):
            self.count(4)
            return product(*given)

        self.optimizer._Gv = counted

    def step(self):
        self.optimizer.step(self._counted)
        self.count(2)  # it uses the gradient of its first forward pass

    def _counted(self):
        self.count(1)
        return self.forward()


class Curvlinops(Torch):
    """`GGNLinearOperator` with SciPy's CG in a user-written training loop, because the library has none.

    lambda follows the reduction ratio as in the other methods, and a step that raises the loss is rejected.
    """

    iterations = 10

    def start(self):
        super().start()
        self.damping = self.value

    def step(self):
        from scipy.sparse.linalg import LinearOperator, cg

        loss = self.forward()[0]
        g = torch.cat([p.reshape(-1) for p in torch.autograd.grad(loss, self.parameters)]).numpy()
        with self._forward_mode():
            curvature = self._curvature()

            def damped(v):
                self.count(4)
                return curvature @ v + np.float32(self.damping) * v

            operator = LinearOperator(curvature.shape, damped, dtype=np.float32)
            p, _ = cg(operator, -g, maxiter=self.iterations)
            promised = g @ p + p @ damped(p) / 2
        before = nn.utils.parameters_to_vector(self.parameters).detach()
        nn.utils.vector_to_parameters(before + torch.from_numpy(p), self.parameters)
        change = self.loss() - loss.item()
        self.count(3 + 1)
        if not change / promised > 0.25:
            self.damping *= 1.5
        elif change / promised > 0.75:
            self.damping /= 1.5
        if not change < 0:
            nn.utils.vector_to_parameters(before, self.parameters)

    def _curvature(self):
        from curvlinops import GGNLinearOperator

        operator = GGNLinearOperator(
            self.module, self.criterion, self.parameters, [(self.x, self.y)], check_deterministic=False
        )
        return operator.to_scipy(np.float32)

    def _forward_mode(self):
        """Disable the fused LSTM for products, because it has no forward mode."""
        return torch.backends.mkldnn.flags(enabled=False) if self.problem.recurrent else nullcontext()


class KfacJax(Method):
    """The optimizer as in the README of the library: learning rate, momentum and damping adapt."""

    warm_up, recurrent = 6, False

    def __init__(self, problem, weights, value):
        import jax
        import kfac_jax

        super().__init__(problem, weights, value)

        def loss(params, batch):
            logits = problem.function(params, batch[0])
            kfac_jax.register_softmax_cross_entropy_loss(logits, batch[1])
            rows = jax.nn.log_softmax(logits)
            return -jax.numpy.mean(jax.numpy.take_along_axis(rows, batch[1][:, None], axis=1))

        self.optimizer = kfac_jax.Optimizer(
            jax.value_and_grad(loss),
            l2_reg=0.0,
            use_adaptive_learning_rate=True,
            use_adaptive_momentum=True,
            use_adaptive_damping=True,
            initial_damping=value,
        )
        self.jax, self.evaluate = jax, jax.jit(loss)
        self.batch = jax.numpy.asarray(problem.x), jax.numpy.asarray(problem.y)

    def start(self):
        super().start()
        self.key = self.jax.random.PRNGKey(0)
        self.params = self.jax.tree_util.tree_map(self.jax.numpy.array, self.weights)
        self.state = self.optimizer.init(self.params, self.key, self.batch)
        self.count(3 * 10, 3)  # its burn-in, which evaluates the curvature at one point

    def step(self):
        self.key, key = self.jax.random.split(self.key)
        self.params, self.state, _ = self.optimizer.step(
            self.params, self.state, key, data_iterator=repeat(self.batch), global_step_int=self.number
        )
        self.number += 1
        # The gradient, that of sampled targets, J v of two directions, and a loss for the damping.
        self.count(3 + 3 + 2 * 2 + (self.number % 5 == 0), 3 + 2 + (self.number % 5 == 0))

    def loss(self):
        return float(self.evaluate(self.params, self.batch))


class Short(PyTorchHessianFree):
    """With the same number of iterations as bhf-short."""

    iterations = 10


class Plain(Hfmpi):
    """Without the preconditioner, whose squared per-example gradients take the time of many passes."""

    changes = MappingProxyType({"preconditioner": "none"})


class Quarter(Plain):
    """With products on a quarter of the examples, a different one in each step."""

    curvature = 0.25


class Soap(Hfmpi):
    """Without products: one gradient per step, scaled in the eigenbasis of its second moments."""

    name, curvature, setting, candidates = "soap", 0, "rate", (0.3, 0.1, 0.03)


class Subspace(Hfmpi):
    """The preset: no products, but J V of about a hundred directions in one pass."""

    name, candidates = "subspace", (0.01, 1e-3, 1e-4)


class SubspaceWhole(Subspace):
    """With six full directions, not cut into parts, and their curvature on a quarter: for few cores."""

    curvature, changes = 0.25, MappingProxyType({"cut": False})


class SubspaceJax(Subspace, HfmpiJax):
    """The preset with a JAX function, which is compiled again while the number of last steps grows."""

    warm_up = 5


class SubspaceWholeJax(SubspaceWhole, HfmpiJax):
    """The same with a JAX function."""

    warm_up = 5


METHODS = {
    "hfmpi soap": Soap,
    "hfmpi subspace": Subspace,
    "hfmpi subspace, not cut, curvature on a quarter": SubspaceWhole,
    "hfmpi subspace, JAX": SubspaceJax,
    "hfmpi subspace, not cut, curvature on a quarter, JAX": SubspaceWholeJax,
    "hfmpi bhf-short": Hfmpi,
    "hfmpi bhf-short, no preconditioner": Plain,
    "hfmpi bhf-short, no preconditioner, curvature on a quarter": Quarter,
    "hfmpi bhf-short, JAX": HfmpiJax,
    "PyTorchHessianFree": PyTorchHessianFree,
    "PyTorchHessianFree, 10 iterations": Short,
    "curvlinops and SciPy's CG, 10 iterations": Curvlinops,
    "kfac-jax": KfacJax,
    "torch.optim.Adam": TorchAdam,
}
