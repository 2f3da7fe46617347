"""Texts that a network of symbols writes."""

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
    """Let a network write.

    Parameters
    ----------
    network : Network
    theta : (D,)
    symbols : bytes
        The byte of each symbol.
    length : int
        Symbols to draw, of a byte each.
    prime : bytes
        What it reads first; may be empty.
    temperature : float
        Logits are divided by it; 0 takes the most probable character.
    seed : int

    Raises
    ------
    UserError
        If the prime has a character, in the locale's encoding, that the network does not know, or what the
        network predicts is not finite.
    """
    ids = {byte: i for i, byte in enumerate(symbols)}
    unknown = sorted({c for c in os.fsdecode(prime) if not ids.keys() >= set(os.fsencode(c))})
    if unknown:
        # What is no character in the locale's encoding is a byte, which \x.. names in a shell too.
        names = (repr(c if c.isprintable() else os.fsencode(c)).removeprefix("b") for c in unknown)
        hint = "" if "".join(unknown).isascii() else f", at least not in {sys.getfilesystemencoding()}"
        raise UserError(f"the network does not know the character(s) {' '.join(names)}{hint}")
    rng = np.random.Generator(np.random.PCG64(seed))
    backend = network.backend
    # Without a prime it starts as training sequences do: zero state, some first character.
    read = [ids[b] for b in prime] or [int(rng.integers(len(symbols)))]
    state: tuple[State, ...] | None = None
    written = bytearray()
    for _ in range(length):
        inputs = backend.to_device(np.array(read, np.int32)[:, np.newaxis])
        with np.errstate(all="ignore"):  # what overflows is seen in the logits
            state, found = network.advance(theta, state, inputs)
        logits = backend.to_host(found)[0].astype(np.float64)
        if not np.isfinite(logits).all():
            raise UserError("the parameters are so large that what the network predicts is not finite")
        symbol = draw(logits, temperature, rng)
        written.append(symbols[symbol])
        read = [symbol]
    return bytes(written)


def draw(logits: np.ndarray, temperature: float, rng: np.random.Generator) -> int:
    """Draw a symbol from softmax(logits / temperature), or the most probable one at temperature 0."""
    if temperature == 0:
        return int(logits.argmax())
    with np.errstate(over="ignore"):  # of a temperature near 0
        p = np.exp((logits - logits.max()) / temperature)
    return int(np.searchsorted(np.cumsum(p), rng.random() * p.sum(), side="right").clip(0, len(p) - 1))
