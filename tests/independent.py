"""A plain, slow, independent implementation of the four cells, for tests only.

One sequence, one step, one formula at a time, straight from the paper; it shares no code with hfmpi and
accepts complex parameters, so that complex-step differentiation gives derivatives to rounding:
J v = Im f(theta + i h v) / h without any subtraction.
"""

import numpy as np

STEP = 1e-30


def sigmoid(a):
    return 1 / (1 + np.exp(-a))


def split(theta, cell):
    n, v = cell.hidden, cell.vocabulary
    k = 4 * n if cell.gated else n
    shapes = [("W_mx", (v, n)), ("W_mh", (n, n))] if cell.multiplicative else []
    shapes += [("W_x", (v, k)), ("W_h", (n, k)), ("b", (k,)), ("W_o", (n, v))]
    shapes += [("b_o", (v,))] if cell.variant == "standard" else []
    out, at = {}, 0
    for name, shape in shapes:
        size = int(np.prod(shape))
        out[name] = theta[at : at + size].reshape(shape)
        at += size
    assert at == len(theta)
    return out


def run(theta, cell, batch):
    """Logits (T, B, V) and pre-activations (L, B, K)."""
    p, n = split(theta, cell), cell.hidden
    steps, size = batch.inputs.shape
    logits = np.zeros((steps, size, cell.vocabulary), theta.dtype)
    pre = np.zeros((steps, size, len(p["b"])), theta.dtype)
    for b in range(size):
        h, c = np.zeros(n, theta.dtype), np.zeros(n, theta.dtype)
        for t in range(steps):
            x = np.eye(cell.vocabulary)[batch.inputs[t, b]]
            source = (x @ p["W_mx"]) * (h @ p["W_mh"]) if cell.multiplicative else h
            a = x @ p["W_x"] + source @ p["W_h"]
            if cell.variant == "standard":
                a = a + p["b"]
            else:
                a = a + np.concatenate([p["b"][: 3 * n], np.zeros(n)])
            if not cell.gated:
                h = np.tanh(a)
            else:
                i, f, o = sigmoid(a[:n]), sigmoid(a[n : 2 * n]), sigmoid(a[2 * n : 3 * n])
                u = a[3 * n :] if cell.variant == "krause" else np.tanh(a[3 * n :])
                c = f * c + i * u
                h = np.tanh(o * c + p["b"][3 * n :]) if cell.variant == "krause" else o * np.tanh(c)
            pre[t, b] = a
            logits[t, b] = h @ p["W_o"] + p.get("b_o", 0)
    return logits[steps - len(batch.targets) :], pre


def loss(theta, cell, batch):
    """Give the summed loss in nats."""
    logits, _ = run(theta, cell, batch)
    total = 0
    for t, b in np.ndindex(*batch.targets.shape):
        z = logits[t, b]
        total = total + np.log(np.sum(np.exp(z))) - z[batch.targets[t, b]]
    return total


def gradient(theta, cell, batch):
    columns = (loss(theta + 1j * STEP * e, cell, batch).imag / STEP for e in np.eye(len(theta)))
    return np.array(list(columns))


def jacobians(theta, cell, batch):
    """Dense Jacobians of the logits (T B V, D) and of the pre-activations (L B K, D)."""
    columns = [run(theta + 1j * STEP * e, cell, batch) for e in np.eye(len(theta))]
    return tuple(np.stack([c[i].imag.reshape(-1) / STEP for c in columns], axis=1) for i in (0, 1))


def structural_weights(theta, cell, batch):
    """Weights of the structural damping term: p (1 - p) of each unit, p its value scaled to (0, 1)."""
    _, pre = run(theta, cell, batch)
    if not cell.gated:
        return 0.25 * (1 - np.tanh(pre) ** 2)
    gates, u = pre[..., : 3 * cell.hidden], pre[..., 3 * cell.hidden :]
    w = sigmoid(gates) * (1 - sigmoid(gates))
    wu = np.full_like(u, 0.25) if cell.variant == "krause" else 0.25 * (1 - np.tanh(u) ** 2)
    return np.concatenate([w, wu], axis=-1)


def gauss_newton(theta, cell, batch, structural=0.0):
    """Dense Gauss-Newton matrix (D, D) of the summed loss."""
    logits, _ = run(theta, cell, batch)
    j, ja = jacobians(theta, cell, batch)
    v = cell.vocabulary
    z = logits.reshape(-1, v)
    p = np.exp(z - z.max(axis=1, keepdims=True))
    p /= p.sum(axis=1, keepdims=True)
    g = np.zeros((len(theta), len(theta)))
    for r, row in enumerate(p):
        block = j[r * v : (r + 1) * v]
        g += block.T @ (np.diag(row) - np.outer(row, row)) @ block
    if structural:
        g += structural * ja.T @ (structural_weights(theta, cell, batch).reshape(-1, 1) * ja)
    return g
