"""A simple, slow, independent implementation of all networks and losses, for tests only.

One sequence, one step, one formula at a time, straight from the papers; it shares no code with hfmpi and
accepts complex parameters, so that complex-step differentiation gives derivatives to rounding:
J v = Im f(theta + i h v) / h without any subtraction. `about` is an architecture, `loss` a name.
"""

import numpy as np

STEP = 1e-30
GROUPS = {"rnn": 1, "mrnn": 1, "lstm": 4, "mlstm": 4, "gru": 3}


def sigmoid(a):
    return 1 / (1 + np.exp(-a))


def split(theta, about):
    """Return a dict of matrices for each layer, and the matrices of the outputs."""
    n, out, at = about.hidden, [], 0

    def take(shape):
        nonlocal at
        at += int(np.prod(shape))
        return theta[at - int(np.prod(shape)) : at].reshape(shape)

    for layer in range(about.layers):
        inputs, k = n if layer else about.inputs, GROUPS[about.name] * n
        names = [("W_mx", (inputs, n)), ("W_mh", (n, n))] if about.name in ("mrnn", "mlstm") else []
        names += [("W_x", (inputs, k)), ("W_h", (n, k)), ("b", (4 * n if about.name == "gru" else k,))]
        out.append({name: take(shape) for name, shape in names})
    names = [("W_o", (n, about.outputs))] + [("b_o", (about.outputs,))] * (about.variant == "standard")
    out.append({name: take(shape) for name, shape in names})
    assert at == len(theta)
    return out


def step(p, about, x, h, c, q=0):
    """Compute one step of a layer: h, c and the pre-activations; q is added to h W_mh."""
    n = about.hidden
    if about.name == "gru":  # columns of W_x: u, r, z; of W_h: r, z, s; biases u, r, z, s
        xu, xr, xz = np.split(x @ p["W_x"], 3)
        hr, hz, hs = np.split(h @ p["W_h"], 3)
        bu, br, bz, bs = np.split(p["b"], 4)
        r, z = sigmoid(xr + hr + br), sigmoid(xz + hz + bz)
        a_u = xu + bu + r * (hs + bs)
        a = np.concatenate([a_u, xr + hr + br, xz + hz + bz])
        u = np.tanh(a_u)
        return (1 - z) * u + z * h, c, a
    source = (x @ p["W_mx"]) * (h @ p["W_mh"] + q) if "W_mx" in p else h
    a = x @ p["W_x"] + source @ p["W_h"]
    a = a + (p["b"] if about.variant == "standard" else np.concatenate([p["b"][: 3 * n], np.zeros(n)]))
    if about.name in ("rnn", "mrnn"):
        return np.tanh(a), c, a
    i, f, o = sigmoid(a[:n]), sigmoid(a[n : 2 * n]), sigmoid(a[2 * n : 3 * n])
    u = a[3 * n :] if about.variant == "krause" else np.tanh(a[3 * n :])
    c = f * c + i * u
    return (np.tanh(o * c + p["b"][3 * n :]) if about.variant == "krause" else o * np.tanh(c)), c, a


def run(theta, about, batch, at=None, other=None, q=()):
    """Return outputs (T, B, O) and pre-activations, a list of (L, B, K) a layer.

    At step and sequence `at` the parameters are `other`, and q, for each layer, is added to h W_mh.
    """
    *layers, top = split(theta, about)
    elsewhere = layers, top
    if at is not None:
        *others, its_top = split(other, about)
    steps, size = batch.inputs.shape[:2]
    outputs = np.zeros((steps, size, about.outputs), theta.dtype)
    pre = [[[None] * size for _ in range(steps)] for _ in layers]
    for b in range(size):
        h = [np.zeros(about.hidden, theta.dtype) for _ in layers]
        c = [np.zeros(about.hidden, theta.dtype) for _ in layers]
        for t in range(steps):
            layers, top = elsewhere if (t, b) != at else (others, its_top)
            read = batch.inputs[t, b]
            x = np.eye(about.inputs)[read] if batch.inputs.ndim == 2 else read
            for i, p in enumerate(layers):
                more = q[i] if len(q) and (t, b) == at else 0
                h[i], c[i], pre[i][t][b] = step(p, about, x, h[i], c[i], more)
                x = h[i] if getattr(batch, "scales", None) is None else h[i] * batch.scales[i, b]
            outputs[t, b] = x @ top["W_o"] + top.get("b_o", 0)
    return outputs[steps - len(batch.targets) :], [np.array(layer) for layer in pre]


def weight(batch, t, b):
    return 1 if batch.mask is None else batch.mask[t, b]


def loss(theta, about, batch, kind="cross-entropy", *elsewhere):
    """Return the summed loss in nats; the parameters are those of `run`."""
    outputs, _ = run(theta, about, batch, *elsewhere)
    total = 0
    for t, b in np.ndindex(*batch.targets.shape[:2]):
        z, y = outputs[t, b], batch.targets[t, b]
        if kind == "cross-entropy":
            own = np.log(np.sum(np.exp(z))) - z[y]
        elif kind == "squares":
            own = np.sum((z - y) ** 2) / 2
        else:
            own = -np.sum(y * np.log(sigmoid(z)) + (1 - y) * np.log(1 - sigmoid(z)))
        total = total + weight(batch, t, b) * own
    return total


def gradient(theta, about, batch, kind="cross-entropy"):
    columns = (loss(theta + 1j * STEP * e, about, batch, kind).imag / STEP for e in np.eye(len(theta)))
    return np.array(list(columns))


def jacobians(theta, about, batch):
    """Return dense Jacobians of the outputs (T B O, D) and of the pre-activations of all layers (., D)."""
    columns = []
    for e in np.eye(len(theta)):
        outputs, pre = run(theta + 1j * STEP * e, about, batch)
        columns.append(
            [a.imag.reshape(-1) / STEP for a in (outputs, np.concatenate([p.ravel() for p in pre]))]
        )
    return tuple(np.stack([c[i] for c in columns], axis=1) for i in (0, 1))


def structural_weights(theta, about, batch):
    """Return the weights of structural damping: p (1 - p) of each unit; p is its value scaled to (0, 1)."""
    found = []
    for pre in run(theta, about, batch)[1]:
        n = about.hidden
        tanh = 0.25 * (1 - np.tanh(pre) ** 2)
        gate = sigmoid(pre) * (1 - sigmoid(pre))
        if about.name == "gru":
            w = np.concatenate([tanh[..., :n], gate[..., n:]], axis=-1)
        elif about.name in ("rnn", "mrnn"):
            w = tanh
        else:
            update = np.full_like(pre, 0.25) if about.variant == "krause" else tanh
            w = np.concatenate([gate[..., : 3 * n], update[..., 3 * n :]], axis=-1)
        found.append(w.reshape(-1))
    return np.concatenate(found)


def gauss_newton(theta, about, batch, structural=0.0, kind="cross-entropy"):
    """Return the dense Gauss-Newton matrix (D, D) of the summed loss."""
    outputs, _ = run(theta, about, batch)
    j, ja = jacobians(theta, about, batch)
    o = about.outputs
    g = np.zeros((len(theta), len(theta)))
    for r, (t, b) in enumerate(np.ndindex(*batch.targets.shape[:2])):
        z, block = outputs[t, b], j[r * o : (r + 1) * o]
        if kind == "cross-entropy":
            p = np.exp(z - z.max()) / np.exp(z - z.max()).sum()
            hessian = np.diag(p) - np.outer(p, p)
        else:
            hessian = np.eye(o) if kind == "squares" else np.diag(sigmoid(z) * (1 - sigmoid(z)))
        g += weight(batch, t, b) * block.T @ hessian @ block
    if structural:
        g += structural * ja.T @ (structural_weights(theta, about, batch)[:, np.newaxis] * ja)
    return g
