"""The same networks in JAX: jitted `jax.linearize`, then products with J and its transpose.

The implementation follows JAX's documentation: a `lax.scan` over the steps, input rows gathered and logits
computed outside of it, everything under `jit`, and residuals of the linearisation stored between products.
"""

import jax
import jax.numpy as jnp
import numpy as np

NAME = f"JAX {jax.__version__}"
jax.config.update("jax_default_matmul_precision", "float32")  # no TF32 on a GPU


def has_gpu():
    """Return whether JAX runs on a GPU."""
    return jax.default_backend() == "gpu"


class Contestant:
    """LSTM or mLSTM; parameters are named views of hfmpi's flat vector."""

    def __init__(self, about, theta, inputs, targets):
        self.layout, n = about.layout, about.hidden
        self.theta = jnp.asarray(theta)
        self.inputs, self.targets = jnp.asarray(inputs), jnp.asarray(targets)
        size = inputs.shape[1]

        def logits(vector):
            p = self.layout.views(vector)

            def step(carry, rows):
                h, c = carry
                if about.cell.multiplicative:
                    h = rows[1] * (h @ p["W_mh"])
                a = rows[0] + h @ p["W_h"]
                i, f, o = (jax.nn.sigmoid(a[:, k * n : (k + 1) * n]) for k in range(3))
                c = f * c + i * jnp.tanh(a[:, 3 * n :])
                h = o * jnp.tanh(c)
                return (h, c), h

            rows = [(p["W_x"] + p["b"])[self.inputs]]
            if about.cell.multiplicative:
                rows.append(p["W_mx"][self.inputs])
            zero = jnp.zeros((size, n), vector.dtype)
            _, hidden = jax.lax.scan(step, (zero, zero), rows)
            return hidden @ p["W_o"] + p["b_o"]

        def loss(vector):
            rows = jax.nn.log_softmax(logits(vector))
            return -jnp.mean(jnp.take_along_axis(rows, self.targets[..., None], axis=2))

        def product(push, probabilities, v):
            u = push(v)
            u = probabilities * (u - jnp.sum(probabilities * u, axis=2, keepdims=True))
            return jax.linear_transpose(push, v)(u / self.targets.size)[0]

        self._gradient = jax.jit(jax.value_and_grad(loss))
        # The function that linearize returns is a pytree of its residuals, which jit can pass on.
        outputs, self._push = jax.jit(lambda vector: jax.linearize(logits, vector))(self.theta)
        self._probabilities = jax.nn.softmax(outputs)
        self._product = jax.jit(product)

    def gradient(self):
        """Return the loss and its gradient."""
        loss, vector = self._gradient(self.theta)
        return float(loss), vector.block_until_ready()

    def product(self, v):
        """Return G v."""
        return self._product(self._push, self._probabilities, v).block_until_ready()

    def vector(self, v):
        """Return a vector in this library's format."""
        return jnp.asarray(v)

    def flat(self, vector):
        """Return the result as hfmpi's flat vector."""
        return np.asarray(vector)
