"""Generate texts with a network of symbols."""

from __future__ import annotations

import os
import sys

import numpy as np

from hfmpi.backends.base import Array
from hfmpi.errors import UserError
from hfmpi.networks.network import Network, State

__all__ = ["sample"]


def sample(
    network: Network, theta: Array, symbols: bytes, length: int, prime: bytes, temperature: float, seed: int
) -> bytes:
    """Generate a text of `length` symbols that continues a prime.

    Parameters
    ----------
    network : Network
    theta : (D,)
    symbols : bytes
        The byte of each symbol.
    length : int
        The number of symbols to draw, one byte each.
    prime : bytes
        The text that the network reads first; it may be empty.
    temperature : float
        Divides the logits; 0 selects the most probable symbol.
    seed : int

    Returns
    -------
    bytes
        The text without the prime.

    Raises
    ------
    UserError
        If the prime contains a character (in the locale's encoding) that is not in the vocabulary, or the
        logits are not finite.
    """
    ids = {byte: i for i, byte in enumerate(symbols)}
    unknown = sorted({c for c in os.fsdecode(prime) if not ids.keys() >= set(os.fsencode(c))})
    if unknown:
        # A byte that is not a character in the locale's encoding is shown as \x.., which shells accept.
        names = (repr(c if c.isprintable() else os.fsencode(c)).removeprefix("b") for c in unknown)
        hint = "" if "".join(unknown).isascii() else f" in the encoding {sys.getfilesystemencoding()}"
        raise UserError(f"the network does not know the character(s) {' '.join(names)}{hint}")
    rng = np.random.Generator(np.random.PCG64(seed))
    backend = network.backend
    # Without a prime the text starts like a training sequence: from a zero state and a random first symbol.
    read = [ids[b] for b in prime] or [int(rng.integers(len(symbols)))]
    state: tuple[State, ...] | None = None
    written = bytearray()
    for _ in range(length):
        inputs = backend.to_device(np.array(read, np.int32)[:, np.newaxis])
        with np.errstate(all="ignore"):  # an overflow makes the logits infinite, which is checked
            state, outputs = network.advance(theta, state, inputs)
        logits = backend.to_host(outputs)[0].astype(np.float64)
        if not np.isfinite(logits).all():
            raise UserError("the predictions are not finite: the parameters of the network are too large")
        symbol = draw(logits, temperature, rng)
        written.append(symbols[symbol])
        read = [symbol]
    return bytes(written)


def draw(logits: np.ndarray, temperature: float, rng: np.random.Generator) -> int:
    """Draw a symbol from softmax(logits / temperature), or the most probable one at temperature 0."""
    if temperature == 0:
        return int(logits.argmax())
    with np.errstate(over="ignore"):  # the temperature may be close to 0
        p = np.exp((logits - logits.max()) / temperature)
    return int(np.searchsorted(np.cumsum(p), rng.random() * p.sum(), side="right").clip(0, len(p) - 1))
