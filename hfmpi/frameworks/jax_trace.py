"""Analysis of the trace of a JAX function: what its outputs depend on, and whether the trace changes."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax import numpy as jnp
from jax.extend.core import Literal

__all__ = ["Draw", "Flow", "fingerprint", "flow", "has_reverse_rules"]

Labels = frozenset[Any]


class Draw(NamedTuple):
    """The label of random numbers of this shape that a function draws."""

    shape: tuple[int, ...]


class Flow(NamedTuple):
    """What a traced function computes from its labelled arguments.

    Attributes
    ----------
    outputs : list of frozenset
        The labels that each output depends on, with a `Draw` for all random numbers among them.
    low : bool
        Whether an operation rounds a number that depends on an argument to less than float64 precision, or
        may do so because JAX does not know its function.
    """

    outputs: list[Labels]
    low: bool


def flow(traced: Any, labels: Sequence[Labels]) -> Flow:
    """Follow the labels of the arguments of a ClosedJaxpr to its outputs."""
    walk = _Walk()
    outputs = walk.run(traced.jaxpr, labels)
    if walk.has_references:
        return Flow([frozenset[Any]().union(*labels)] * len(outputs), True)
    return Flow(outputs, walk.low)


class _Walk:
    """Follows labels. Values that are written to references (`jax.new_ref`) are noticed, but not followed."""

    def __init__(self) -> None:
        self.low = self.has_references = False

    def run(self, jaxpr: Any, labels: Sequence[Labels]) -> list[Labels]:
        """Return the labels of the outputs of a function."""
        nothing: Labels = frozenset()
        known = dict(zip(jaxpr.invars, labels, strict=True))

        def read(atom: Any) -> Labels:
            return nothing if isinstance(atom, Literal) else known.get(atom, nothing)

        for equation in jaxpr.eqns:
            results = self._equation(equation, [read(atom) for atom in equation.invars])
            known |= zip(equation.outvars, results, strict=True)
        return [read(atom) for atom in jaxpr.outvars]

    def _equation(self, equation: Any, args: list[Labels]) -> list[Labels]:
        name, options, inner = equation.primitive.name, equation.params, [*_inner(equation)]
        every = frozenset[Any]().union(*args)
        unknown = "callback" in name and equation.outvars
        self.low |= _of_arguments(every) and bool(unknown or name == "reduce_precision")
        kinds = [kind.__name__ for effect in equation.effects for kind in type(effect).__mro__]
        self.has_references |= "RefEffect" in kinds
        if name == "scan":
            first, last = options["num_consts"], options["num_consts"] + options["num_carry"]

            def step(state: list[Labels]) -> list[Labels]:
                return self.run(inner[0], [*args[:first], *state, *args[last:]])

            state = self._repeat(lambda state: step(state)[: last - first], args[first:last])
            results = [*state, *step(state)[last - first :]]
        elif name == "while":
            cond, body = options["cond_nconsts"], options["cond_nconsts"] + options["body_nconsts"]

            def turn(state: list[Labels]) -> list[Labels]:
                (more,) = self.run(options["cond_jaxpr"].jaxpr, [*args[:cond], *state])
                return [
                    one | more for one in self.run(options["body_jaxpr"].jaxpr, [*args[cond:body], *state])
                ]

            results = self._repeat(turn, args[body:])
        elif name == "cond":
            branches = [self.run(branch, args[1:]) for branch in inner]
            results = [args[0].union(*which) for which in zip(*branches, strict=True)]
        elif (
            len(inner) == 1
            and len(inner[0].invars) == len(args)
            and len(inner[0].outvars) == len(equation.outvars)
        ):
            results = self.run(inner[0], args)
        else:
            for function in inner:
                self.run(function, [every] * len(function.invars))
            results = [every] * len(equation.outvars)
        for var, labels in zip(equation.outvars, results, strict=True):
            self.low |= _of_arguments(labels) and _is_low(var.aval)
        if name in ("random_bits", "rng_bit_generator", "rng_uniform"):
            shapes = [frozenset([Draw(var.aval.shape)]) for var in equation.outvars]
            results = [labels | shape for labels, shape in zip(results, shapes, strict=True)]
        return results

    def _repeat(self, step: Any, state: list[Labels]) -> list[Labels]:
        """Return the labels of a loop's state after any number of steps."""
        while True:
            after = [one | other for one, other in zip(state, step(state), strict=True)]
            if after == state:
                return state
            state = after


def fingerprint(traced: Any) -> bytes:
    """Return a digest of the operations and constants of a ClosedJaxpr that ignores variable names."""
    digest = hashlib.blake2b()
    for part in _parts(traced.jaxpr, traced.consts, {}):
        digest.update(part if isinstance(part, bytes) else repr(part).encode())
    return digest.digest()


def _parts(jaxpr: Any, consts: Sequence[Any], numbers: dict[Any, int]) -> Iterator[Any]:
    for const in consts:
        yield from _bytes(const)
    for equation in jaxpr.eqns:
        yield equation.primitive.name
        for atom in equation.invars:
            if isinstance(atom, Literal):
                yield from _bytes(atom.val)
            else:
                yield numbers.setdefault(atom, len(numbers))
        for var in equation.outvars:
            yield numbers.setdefault(var, len(numbers))
            yield str(var.aval)
        for name, option in sorted(equation.params.items()):
            if _is_plain(option):
                yield name, option
        for value in equation.params.values():
            for function in value if isinstance(value, tuple | list) else (value,):
                opened = _opened(function)
                if opened:
                    yield from _parts(*opened, numbers)


def _bytes(value: Any) -> Iterator[Any]:
    """Yield the dtype, the shape and the values of a constant; nothing for one of a different trace."""
    if isinstance(value, jax.core.Tracer):
        return
    if isinstance(value, jax.Array) and jnp.issubdtype(value.dtype, jax.dtypes.prng_key):
        value = jax.random.key_data(value)
    if isinstance(value, np.ndarray | np.generic | jax.Array | bool | int | float | complex):
        array = np.asarray(value)
        yield array.dtype.str, array.shape
        yield array.tobytes()


def has_reverse_rules(traced: Any) -> bool:
    """Return whether a ClosedJaxpr contains user-defined rules for the reverse pass (`jax.custom_vjp`)."""

    def search(jaxpr: Any) -> bool:
        return any(
            equation.primitive.name.startswith("custom_vjp") or any(map(search, _inner(equation)))
            for equation in jaxpr.eqns
        )

    return search(traced.jaxpr)


def _inner(equation: Any) -> Iterator[Any]:
    """Yield the functions that an operation calls."""
    for value in equation.params.values():
        for function in value if isinstance(value, tuple | list) else (value,):
            opened = _opened(function)
            if opened:
                yield opened[0]


def _opened(function: Any) -> tuple[Any, Sequence[Any]] | None:
    """Return the jaxpr and constants of a function among an operation's options; None for other options."""
    jaxpr = getattr(function, "jaxpr", function)
    return (jaxpr, getattr(function, "consts", ())) if hasattr(jaxpr, "eqns") else None


def _of_arguments(labels: Labels) -> bool:
    return any(not isinstance(label, Draw) for label in labels)


def _is_low(aval: Any) -> bool:
    dtype = getattr(aval, "dtype", None)
    return (
        dtype is not None
        and bool(jnp.issubdtype(dtype, jnp.inexact))
        and dtype not in (np.float64, np.complex128)
    )


def _is_plain(value: Any) -> bool:
    if isinstance(value, tuple):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, bool | int | float)
