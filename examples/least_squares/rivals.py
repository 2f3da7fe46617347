"""The methods that hfmpi is compared with: other libraries in their best form, and short plain methods.

Each is a class with candidates for its settings. `Rival(task, **setting)` prepares and compiles it, and `run`
iterates. It passes its parameters to a `Meter` from time to time, which stops the clock meanwhile. Every
rival uses the task's start, data and loss.
"""

from __future__ import annotations

import importlib
import os
from typing import Any, ClassVar, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from tasks import Task


class NotForTask(Exception):
    """Raised if a method cannot be used for a task; the message states the reason."""


LARGEST = 10**9
"""The maximum number of entries of a Jacobian that is formed."""


class Meter(Protocol):
    """The clock of a run.

    Attributes
    ----------
    count : int
        The number of iterations until the next call of the meter.
    used : float
        The fraction of the time that has passed.
    """

    count: int
    used: float

    def __call__(self, params: Any, steps: int) -> bool:
        """Measure the parameters; return whether the run must end."""


class Rival:
    """The common base: theta as one vector, the residuals r(theta), and the loss r'r / 2.

    Attributes
    ----------
    candidates : tuple of dict
        The settings to try.
    needs : tuple of str
        The modules that must be installed.
    dense : bool
        Whether the method forms the Jacobian or a D x D matrix.
    steps : int
        The number of iterations so far.
    over : bool
        Whether the method has converged.
    """

    candidates: ClassVar[tuple[dict[str, Any], ...]]
    needs: ClassVar[tuple[str, ...]] = ()
    dense: ClassVar[bool] = False

    def __init__(self, task: Task, **setting: Any) -> None:
        self.theta, self.joined = ravel_pytree(jax.tree.map(jnp.asarray, task.params))
        x, y = map(jnp.asarray, task.train)
        rows = y.size // y.shape[-1]
        if self.dense and y.size * self.theta.size > LARGEST:
            raise NotForTask(f"{y.size:,} residuals and {self.theta.size:,} parameters are too many")

        def example(theta: Any, x: Any, y: Any) -> Any:
            return ((task.apply(self.joined(theta), x[None])[0] - y) / rows**0.5).ravel()

        def residuals(theta: Any) -> Any:
            return ((task.apply(self.joined(theta), x) - y) / rows**0.5).ravel()

        def jacobian(theta: Any) -> Any:
            found = jax.vmap(jax.jacrev(example), (None, 0, 0))(theta, x, y)
            return found.reshape(-1, theta.size)

        self.residuals, self.jacobian = residuals, jacobian
        self.loss = lambda theta: 0.5 * jnp.sum(residuals(theta) ** 2)
        self.steps, self.over = 0, False
        self.prepare(**setting)

    def prepare(self, **setting: Any) -> None:
        """Create the initial state and the compiled functions."""
        raise NotImplementedError

    def advance(self, count: int, used: float) -> None:
        """Run `count` iterations, in one compiled loop if the library allows it."""
        raise NotImplementedError

    def run(self, meter: Meter) -> None:
        """Iterate until the meter or the method ends the run."""
        while not self.over:
            self.advance(meter.count, meter.used)
            if meter(self.params, self.steps):
                return

    @property
    def params(self) -> Any:
        """Return the parameters as a pytree."""
        return self.joined(self.theta)


def loop(body: Any) -> Any:
    """Compile `count` calls state -> state; the count is an argument, so that it is compiled once."""
    return jax.jit(lambda state, count: jax.lax.fori_loop(0, count, lambda _, s: body(s), state))


class Adam(Rival):
    """optax.adam for a fraction of the time, then a quasi-Newton method."""

    candidates = (
        {"rate": 1e-2, "share": 0.1},
        {"rate": 1e-2, "share": 0.3},
        {"rate": 3e-3, "share": 0.3},
    )

    def prepare(self, rate: float, share: float) -> None:
        optax = importlib.import_module("optax")
        adam, gradient = optax.adam(rate), jax.grad(self.loss)

        def step(state: Any) -> Any:
            theta, inner = state
            updates, inner = adam.update(gradient(theta), inner)
            return optax.apply_updates(theta, updates), inner

        self.share, self.loop, self.state = share, loop(step), (self.theta, adam.init(self.theta))
        compiled = jax.jit(jax.value_and_grad(self.loss))
        self.value_and_grad = lambda theta: tuple(map(np.array, compiled(theta)))
        self.value_and_grad(self.theta)
        jax.block_until_ready(self.loop(self.state, 1))

    def advance(self, count: int, used: float) -> None:
        self.state = self.loop(self.state, count)
        self.theta = self.state[0].block_until_ready()
        self.steps += count

    def run(self, meter: Meter) -> None:
        while meter.used < self.share:
            self.advance(meter.count, meter.used)
            if meter(self.params, self.steps):
                return
        self.refine(meter)

    def refine(self, meter: Meter) -> None:
        """Run the second phase from theta."""
        raise NotImplementedError


class AdamLbfgs(Adam):
    """optax.adam, then SciPy's L-BFGS-B with JAX's compiled gradient and 100 pairs, as in DeepXDE."""

    needs = "optax", "scipy"

    def refine(self, meter: Meter) -> None:
        optimize = importlib.import_module("scipy.optimize")
        self.left = meter.count

        def after(intermediate_result: Any) -> None:
            self.steps, self.left = self.steps + 1, self.left - 1
            self.theta = intermediate_result.x
            if self.left <= 0:
                if meter(self.params, self.steps):
                    raise StopIteration
                self.left = meter.count

        most = 10**9
        options = {"maxcor": 100, "maxiter": most, "maxfun": most, "maxls": 50, "ftol": 0.0, "gtol": 0.0}
        while True:  # when rounding ends a search, restart without pairs while that helps
            before = self.steps
            found = optimize.minimize(
                self.value_and_grad, np.array(self.theta), jac=True, method="L-BFGS-B", callback=after,
                options=options,
            )  # fmt: skip
            self.theta = found.x
            if found.status == STOPPED:
                return
            if meter(self.params, self.steps) or self.steps - before < 2:
                self.over = True
                return


STOPPED = 99
"""SciPy's status of a run that its callback stopped."""


class AdamBfgs(Adam):
    """optax.adam, then BFGS with the full matrix, in 20 lines: SciPy's takes D^3 operations per iteration.

    The updates are those of Nocedal and Wright (2006, 6.17 and 6.20); the line search is SciPy's for the
    strong Wolfe conditions.
    """

    dense = True
    needs = "optax", "scipy"

    def refine(self, meter: Meter) -> None:
        optimize, blas = map(importlib.import_module, ("scipy.optimize", "scipy.linalg.blas"))
        known = dict[bytes, Any]()

        def at(theta: Any) -> Any:
            key = theta.tobytes()
            if key not in known:
                known[key] = self.value_and_grad(theta)
            return known[key]

        theta = np.array(self.theta)
        value, gradient = at(theta)
        inverse, left, old = None, meter.count, None
        while True:
            p = -gradient if inverse is None else -blas.dsymv(1.0, inverse, gradient)
            rate = optimize.line_search(
                lambda x: at(x)[0], lambda x: at(x)[1], theta, p, gradient, value, old, maxiter=25
            )[0]  # fmt: skip
            if rate is None and inverse is None:
                self.over = True
                meter(self.params, self.steps)
                return
            if rate is None:
                inverse = None  # restart with the gradient
                continue
            s, old = rate * p, value
            value, after = at(theta + s)
            y, theta = after - gradient, theta + s
            known, gradient = {theta.tobytes(): (value, after)}, after
            sy = s @ y
            if inverse is None:
                inverse = np.asfortranarray(np.eye(len(s)) * (sy / (y @ y)))
            along = blas.dsymv(1.0, inverse, y)
            inverse = blas.dsyr2(-1 / sy, s, along, a=inverse, overwrite_a=True)
            inverse = blas.dsyr((1 + y @ along / sy) / sy, s, a=inverse, overwrite_a=True)
            self.theta, self.steps, left = theta, self.steps + 1, left - 1
            if left <= 0:
                if meter(self.params, self.steps):
                    return
                left = meter.count


class AdamOptax(Adam):
    """optax.adam, then optax.lbfgs with its zoom line search and 100 pairs, fully compiled."""

    needs = ("optax",)

    def prepare(self, rate: float, share: float) -> None:
        super().prepare(rate, share)
        optax = importlib.import_module("optax")
        method = optax.lbfgs(memory_size=100)
        value_and_grad = optax.value_and_grad_from_state(self.loss)

        def step(state: Any) -> Any:
            theta, inner = state
            value, gradient = value_and_grad(theta, state=inner)
            updates, inner = method.update(
                gradient, inner, theta, value=value, grad=gradient, value_fn=self.loss
            )
            return optax.apply_updates(theta, updates), inner

        self.begin, self.second = method.init, loop(step)
        jax.block_until_ready(self.second((self.theta, method.init(self.theta)), 1))

    def refine(self, meter: Meter) -> None:
        state, count = (self.theta, self.begin(self.theta)), 1
        while not self.over:
            state = self.second(state, count)
            self.over = bool(jnp.all(state[0] == self.theta))  # the line search has not found a lower loss
            self.theta, self.steps = state[0].block_until_ready(), self.steps + count
            if meter(self.params, self.steps):
                return
            count = min(2 * count, meter.count)


class DenseLm(Rival):
    """Plain Levenberg-Marquardt with the normal equations or the Gram matrix, whichever is smaller.

    lambda is divided by `factor` if the reduction ratio is above 3/4, and multiplied by it if below 1/4. The
    Jacobian is compiled by JAX; products and Cholesky factors use NumPy and SciPy, whose BLAS takes 0.4 of
    the time of JAX's for J' J.
    """

    dense = True
    candidates = ({"factor": 2.0}, {"factor": 4.0}, {"factor": 10.0})
    needs = ("scipy",)

    def prepare(self, factor: float) -> None:
        self.factor, self.damping, self.matrix = factor, 1e-3, None
        self.linearise = jax.jit(lambda theta: (self.residuals(theta), self.jacobian(theta)))
        self.value = jax.jit(self.loss)
        self.theta = np.array(self.theta)
        jax.block_until_ready((self.linearise(self.theta), self.value(self.theta)))

    def advance(self, count: int, used: float) -> None:
        for _ in range(count):
            self.step()
        self.over = self.damping > 1e10
        self.steps += count

    def step(self) -> None:
        """Try a step, and accept it if the loss falls."""
        from scipy.linalg import LinAlgError, cho_factor, cho_solve

        if self.matrix is None:
            self.r, self.jac = map(np.asarray, self.linearise(self.theta))
            self.small = self.jac.shape[1] <= self.jac.shape[0]
            self.matrix = self.jac.T @ self.jac if self.small else self.jac @ self.jac.T
        damped = self.matrix.copy()
        damped.flat[:: len(damped) + 1] += self.damping
        before = 0.5 * self.r @ self.r
        try:
            factors = cho_factor(damped, overwrite_a=True, check_finite=False)
            if self.small:
                p = -cho_solve(factors, self.jac.T @ self.r, check_finite=False)
            else:
                p = -self.jac.T @ cho_solve(factors, self.r, check_finite=False)
            change, after = self.jac @ p, float(self.value(self.theta + p))
            rho = (before - after) / -(self.r @ change + 0.5 * change @ change)
        except LinAlgError:
            after = rho = np.nan
        if not rho > 0.25:
            self.damping *= self.factor
        elif rho > 0.75:
            self.damping /= self.factor
        if after < before:
            self.theta, self.matrix = self.theta + p, None


class Optimistix(Rival):
    """optimistix.LevenbergMarquardt, stepped as in its documentation; QR is its default."""

    dense = True
    candidates = ({"solver": "qr"}, {"solver": "normal-cholesky"}, {"solver": "lm-dogleg"})
    needs = ("optimistix",)

    def prepare(self, solver: str) -> None:
        optx = importlib.import_module("optimistix")
        lx = importlib.import_module("lineax")
        equinox = importlib.import_module("equinox")
        linear = lx.Normal(lx.Cholesky()) if solver == "normal-cholesky" else lx.QR()
        kind = optx.Dogleg if solver == "lm-dogleg" else optx.LevenbergMarquardt
        method = kind(rtol=0.0, atol=0.0, linear_solver=linear)
        fn = lambda theta, _: (self.residuals(theta), None)  # noqa: E731
        shape = jax.eval_shape(self.residuals, self.theta)
        state = method.init(fn, self.theta, None, {}, shape, None, frozenset())
        dynamic, static = equinox.partition(state, equinox.is_array)

        def step(carry: Any) -> Any:
            theta, inner = carry
            theta, inner, _ = method.step(fn, theta, None, {}, equinox.combine(inner, static), frozenset())
            return theta, equinox.filter(inner, equinox.is_array)

        self.loop, self.state = loop(step), (self.theta, dynamic)
        jax.block_until_ready(self.loop(self.state, 1))

    def advance(self, count: int, used: float) -> None:
        self.state = self.loop(self.state, count)
        self.theta = self.state[0].block_until_ready()
        self.steps += count


class DeepXde(Rival):
    """DeepXDE on PyTorch: its Adam, then its L-BFGS (torch.optim.LBFGS, strong Wolfe), as it recommends.

    It uses the same network, start, points and weights, but its own residuals by reverse-mode
    differentiation.
    """

    candidates = (
        {"rate": 1e-2, "share": 0.1},
        {"rate": 1e-2, "share": 0.3},
        {"rate": 1e-3, "share": 0.3},
    )
    needs = "deepxde", "torch"

    def __init__(self, task: Task, rate: float, share: float) -> None:
        if task.pde is None:
            raise NotForTask("DeepXDE only solves differential equations")
        os.environ["DDE_BACKEND"] = "pytorch"
        dde, torch = map(importlib.import_module, self.needs)
        torch.set_num_threads(1)
        dde.config.set_default_float("float64")
        pde, weights = task.pde, [w for w, _ in task.params]
        d = weights[0].shape[0]
        source = torch.as_tensor(pde.interior[1])
        inside = len(pde.interior[0])

        def equation(x: Any, u: Any) -> Any:
            first = [dde.grad.jacobian(u, x, i=0, j=k) for k in range(d)]
            second = [dde.grad.hessian(u, x, i=k, j=k) for k in pde.second]
            residual = pde.residual(u, first, second)
            f = torch.zeros_like(residual)
            f[-inside:] = source  # boundary points come first, and do not count
            return residual - f

        low, high = pde.boundary[0].min(axis=0), pde.boundary[0].max(axis=0)
        data = dde.data.PDE(
            dde.geometry.Hypercube(low, high), equation,
            [dde.icbc.PointSetBC(*pde.boundary)], num_domain=0, num_boundary=0, anchors=pde.interior[0],
        )  # fmt: skip
        net = dde.nn.FNN([d, *(w.shape[1] for w in weights)], "tanh", "Glorot normal")
        with torch.no_grad():
            for layer, (w, b) in zip(net.linears, task.params, strict=True):
                layer.weight.copy_(torch.as_tensor(w.T))
                layer.bias.copy_(torch.as_tensor(b))
        self.dde, self.net, self.share = dde, net, share
        self.model = dde.Model(data, net)
        self.weights = [1.0, pde.weight]
        self.model.compile("adam", lr=rate, loss_weights=self.weights, verbose=0)
        self.steps, self.over, self.refining, self.iterations = 0, False, False, 0

    def advance(self, count: int, used: float) -> None:
        if used < self.share:
            self.model.train(iterations=count, display_every=10**9, verbose=0)
            self.steps += count
            return
        if not self.refining:
            self.refining = True
            self.dde.optimizers.set_LBFGS_options(maxiter=1, ftol=0, gtol=0)
            self.model.compile("L-BFGS", loss_weights=self.weights, verbose=0)
        optimizer, before = self.model.opt, self.iterations
        optimizer.param_groups[0] |= {"max_iter": max(2, count), "max_eval": 2 * count + 50}
        self.model.train(verbose=0)
        self.iterations = optimizer.state_dict()["state"][0]["n_iter"]
        self.steps += self.iterations - before
        self.over = self.iterations - before < 2

    @property
    def params(self) -> Any:
        return [
            (layer.weight.detach().numpy().T.copy(), layer.bias.detach().numpy().copy())
            for layer in self.net.linears
        ]


RIVALS: dict[str, type[Rival]] = {
    "adam-lbfgs": AdamLbfgs,
    "adam-bfgs": AdamBfgs,
    "adam-optax": AdamOptax,
    "dense-lm": DenseLm,
    "optimistix-lm": Optimistix,
    "deepxde": DeepXde,
}
