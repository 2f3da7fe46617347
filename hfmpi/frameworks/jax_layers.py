"""Kronecker factors of a function of JAX from what its layers do, for about the work of a gradient.

The function is traced. Wherever it multiplies with a parameter, adds one, scales by one or looks its rows up,
a zero is added to the result: the derivative in this zero is that of the result, and what the parameter met
is kept. Loops (`scan`) and calls of compiled functions are followed. What else a parameter is used for makes
it loose: its factors are those of the gradients of single cases.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
from jax import numpy as jnp
from jax.extend.core import ClosedJaxpr, Literal, jaxpr_as_fun

from hfmpi.models.factors import square
from hfmpi.optim.layout import Block, factor_shape

__all__ = ["Layers"]

CALLS = {
    "jit": "jaxpr",
    "pjit": "jaxpr",
    "closed_call": "call_jaxpr",
    "checkpoint": "jaxpr",
    "remat2": "jaxpr",
}
"""Operations that call a function, and their parameter that has it."""


class _Mark(NamedTuple):
    """That a value is a parameter: as it is (matrix), transposed, or along the last axis, repeated (row)."""

    leaf: int
    form: str


class _Value(NamedTuple):
    value: Any
    mark: _Mark | None = None


class _Use(NamedTuple):
    """What a parameter met.

    Attributes
    ----------
    leaf : int
    kind : str
        product, added, scaled or lookup.
    outputs_are_rows : bool
        Of the parameter's matrix, in a product.
    first : tuple of int
        Axes of a product's outputs in the result, where they are not the last ones.
    """

    leaf: int
    kind: str
    outputs_are_rows: bool = False
    first: tuple[int, ...] = ()


class Layers:
    """The gradient of a function and the sums of its factors, on inputs of some shapes.

    Parameters
    ----------
    function : callable
        (leaves, inputs) -> outputs (N, O).
    blocks : sequence of Block
        Of the leaves.
    leaves, inputs : sequence of arrays
        Of these only shapes and types matter.

    Attributes
    ----------
    loose : frozenset of int
        Leaves without sums.
    """

    def __init__(
        self,
        function: Callable[[Any, Any], Any],
        blocks: Sequence[Block],
        leaves: Sequence[Any],
        inputs: Sequence[Any],
    ) -> None:
        self._blocks, self._shapes = blocks, [leaf.shape for leaf in leaves]
        self._traced = jax.make_jaxpr(function)([*leaves], tuple(inputs))
        walk = _Walk(self._traced, {}, None)
        jax.eval_shape(lambda *given: self._run(walk, *given)[0], [*leaves], tuple(inputs))
        self._inner, self._uses, self._zeros = walk.inner, walk.uses, walk.results
        kinds = {i: {use.kind for use in self._uses if use.leaf == i} for i in range(len(blocks))}
        several = {i for i, found in kinds.items() if len(found) > 1 and not found <= {"scaled", "added"}}
        self.loose = frozenset(walk.loose | several)
        self.sums = jax.jit(self._sums)

    def _run(self, walk: _Walk, leaves: Sequence[Any], inputs: Sequence[Any]) -> tuple[Any, list[Any]]:
        """Give the outputs, and what the parameters met."""
        marked = [_Value(leaf, _first(i, leaf.shape)) for i, leaf in enumerate(leaves)]
        (found,) = walk.run(self._traced.jaxpr, self._traced.consts, [*marked, *map(_Value, inputs)])
        walk.loose |= {found.mark.leaf} if found.mark else set()
        return found.value, walk.kept

    def _sums(self, theta: Any, inputs: Sequence[Any], u: Any) -> tuple[Any, Any]:
        """Give J' u (D,) of u (N, O), and the sums of `hfmpi.models.factors`, 0 for what is loose."""
        leaves = [block.of(theta).reshape(own) for block, own in zip(self._blocks, self._shapes, strict=True)]

        def outputs(leaves: Any, zeros: Any) -> tuple[Any, list[Any]]:
            return self._run(_Walk(self._traced, self._inner, zeros), leaves, inputs)

        zeros = [jnp.zeros(like.shape, like.dtype) for like in self._zeros]
        _, pull, kept = jax.vjp(outputs, leaves, zeros, has_aux=True)
        gradients, backs = pull(u)
        sums, numbers = list[Any](), list[Any]()
        for i, block in enumerate(self._blocks):
            a, b = (jnp.zeros(factor_shape(side), u.dtype) for side in (block.rows, block.columns))
            number = 0
            for use, back, met in zip(self._uses, backs, kept, strict=True):
                if use.leaf == i and i not in self.loose:
                    *own, count = _squares(use, block, back, met)
                    a, b, number = a + own[0], b + own[1], number + count
            sums += [a.reshape(-1), b.reshape(-1)]
            numbers.append(jnp.full(1, number, u.dtype))
        return jnp.concatenate([g.reshape(-1) for g in gradients]), jnp.concatenate(sums + numbers)


def _first(leaf: int, shape: tuple[int, ...]) -> _Mark:
    return _Mark(leaf, "row" if shape and math.prod(shape) == shape[-1] else "matrix")


def _squares(use: _Use, block: Block, back: Any, met: Any) -> tuple[Any, Any, int]:
    """Give the sums for the factors of rows and columns, and the products that they are of."""
    if use.kind == "lookup":
        u, symbols = back.reshape(-1, block.columns), met.reshape(-1)
        counts = jnp.zeros(block.rows, u.dtype).at[symbols].add(1)
        return counts if len(factor_shape(block.rows)) == 1 else jnp.diag(counts), square(u), len(u)
    if use.kind != "product":
        u = (back if use.kind == "added" else back * met).reshape(-1, block.columns)
        return jnp.full((1, 1), len(u), u.dtype), square(u), len(u)
    u = jnp.moveaxis(back, use.first, range(back.ndim - len(use.first), back.ndim))
    outputs, inputs = (block.rows, block.columns)[:: 1 if use.outputs_are_rows else -1]
    both = square(u.reshape(-1, outputs)), square(met.reshape(-1, inputs))
    return *(both if use.outputs_are_rows else both[::-1]), met.size // inputs


class _Walk:
    """Evaluates a traced function, and keeps what parameters met.

    Attributes
    ----------
    traced : ClosedJaxpr
        A function; any, to make others of.
    inner : dict of int
        By the identity of an equation that is a loop: the uses in it.
    zeros : list of arrays, or None
        What is added to the result of each use.
    uses, results, kept : list
        Uses, of what shape and type their results are, and what the parameter met.
    loose : set of int
        Leaves that are used otherwise.
    """

    def __init__(self, traced: Any, inner: dict[int, int], zeros: Sequence[Any] | None) -> None:
        self.traced, self.inner, self.zeros = traced, inner, zeros
        self.uses, self.results, self.kept = list[_Use](), list[Any](), list[Any]()
        self.loose = set[int]()

    def run(self, jaxpr: Any, consts: Sequence[Any], given: Sequence[_Value]) -> list[_Value]:
        """Give the outputs of a function."""
        known: dict[Any, _Value] = dict(zip(jaxpr.constvars, map(_Value, consts), strict=True))
        known |= zip(jaxpr.invars, given, strict=True)

        def read(atom: Any) -> _Value:
            return _Value(atom.val) if isinstance(atom, Literal) else known[atom]

        for equation in jaxpr.eqns:
            found = self._equation(equation, [read(atom) for atom in equation.invars])
            known |= zip(equation.outvars, found, strict=True)
        return [read(atom) for atom in jaxpr.outvars]

    def _equation(self, equation: Any, given: list[_Value]) -> list[_Value]:
        name, marks = equation.primitive.name, [value.mark for value in given if value.mark]
        if name in CALLS and marks:
            called = equation.params[CALLS[name]]
            return self.run(getattr(called, "jaxpr", called), getattr(called, "consts", ()), given)
        if name == "scan" and marks:
            return self._loop(equation, given)
        results = self._evaluated(equation, [value.value for value in given])
        if len(marks) == 1 and name in KNOWN:
            found = KNOWN[name](self, equation.params, given, marks[0], results[0])
            if found is not None:
                return [found]
        self.loose |= {mark.leaf for mark in marks}
        return [*map(_Value, results)]

    def used(self, use: _Use, result: Any, met: Any) -> _Value:
        """Keep what a parameter met, and give the result with its zero."""
        self.uses.append(use)
        self.results.append(jax.ShapeDtypeStruct(result.shape, result.dtype))
        self.kept.append(met)
        return _Value(result if self.zeros is None else result + self.zeros[len(self.uses) - 1])

    def _loop(self, equation: Any, given: list[_Value]) -> list[_Value]:
        about, inner = equation.params, list[_Walk]()
        first, last = about["num_consts"], about["num_consts"] + about["num_carry"]
        consts, state, each = given[:first], given[first:last], given[last:]
        self.loose |= {value.mark.leaf for value in state + each if value.mark}
        zeros, count = None, self.inner.get(id(equation), 0)
        if self.zeros is not None:
            zeros = [*self.zeros[len(self.uses) : len(self.uses) + count]]

        def body(state: Any, at: Any) -> Any:
            each, zeros = at
            walk = _Walk(self.traced, self.inner, zeros)
            inner[:] = [walk]
            found = walk.run(
                about["jaxpr"].jaxpr, about["jaxpr"].consts, [*consts, *map(_Value, state + each)]
            )
            walk.loose |= {value.mark.leaf for value in found if value.mark}
            values = [value.value for value in found]
            return values[: last - first], (values[last - first :], walk.kept)

        state, (each, kept) = jax.lax.scan(
            body,
            [value.value for value in state],
            ([value.value for value in each], zeros),
            length=about["length"],
            reverse=about["reverse"],
            unroll=about["unroll"],
        )
        (walk,) = inner
        self.inner[id(equation)] = len(walk.uses)
        self.uses += [use._replace(first=tuple(axis + 1 for axis in use.first)) for use in walk.uses]
        self.results += [jax.ShapeDtypeStruct((about["length"], *x.shape), x.dtype) for x in walk.results]
        self.kept += kept
        self.loose |= walk.loose
        return [*map(_Value, state + each)]

    def _evaluated(self, equation: Any, values: list[Any]) -> list[Any]:
        """Evaluate an operation, whatever it is."""
        atoms = zip(equation.invars, values, strict=True)
        given = {atom: value for atom, value in atoms if not isinstance(atom, Literal)}
        alone = self.traced.jaxpr.replace(
            constvars=[],
            invars=[*given],
            outvars=equation.outvars,
            eqns=[equation],
            effects=equation.effects,
        )
        return [*jaxpr_as_fun(ClosedJaxpr(alone, ()))(*given.values())]


# Operations on one parameter: what is known of their result, None where they make it loose --------


def _transpose(_: _Walk, about: Any, given: list[_Value], mark: _Mark, result: Any) -> _Value | None:
    if mark.form == "row" or about["permutation"] != (1, 0):
        return None
    return _Value(result, _Mark(mark.leaf, {"matrix": "transposed", "transposed": "matrix"}[mark.form]))


def _convert(_: _Walk, about: Any, given: list[_Value], mark: _Mark, result: Any) -> _Value | None:
    return _Value(result, mark) if given[0].value.dtype == about["new_dtype"] else None


def _broadcast(_: _Walk, about: Any, given: list[_Value], mark: _Mark, result: Any) -> _Value | None:
    last = mark.form == "row" and about["broadcast_dimensions"][-1] == result.ndim - 1
    return _Value(result, mark) if last and result.shape[-1] == given[0].value.shape[-1] else None


def _reshape(_: _Walk, about: Any, given: list[_Value], mark: _Mark, result: Any) -> _Value | None:
    row = mark.form == "row" and result.size == given[0].value.size == result.shape[-1]
    return _Value(result, mark) if row else None


def _add(walk: _Walk, about: Any, given: list[_Value], mark: _Mark, result: Any) -> _Value | None:
    return walk.used(_Use(mark.leaf, "added"), result, None) if mark.form == "row" else None


def _mul(walk: _Walk, about: Any, given: list[_Value], mark: _Mark, result: Any) -> _Value | None:
    (other,) = (one.value for one in given if not one.mark)
    return walk.used(_Use(mark.leaf, "scaled"), result, other) if mark.form == "row" else None


def _dot_general(walk: _Walk, about: Any, given: list[_Value], mark: _Mark, result: Any) -> _Value | None:
    contracted, batched = about["dimension_numbers"]
    at = 0 if given[0].mark else 1  # the parameter's place
    w, x = given[at].value, given[1 - at].value
    own, others = contracted[at], contracted[1 - at]
    rows = tuple(own) == (0,)
    if mark.form == "row" or any(batched) or not (rows or tuple(own) == tuple(range(1, w.ndim))):
        return None
    met = jnp.moveaxis(x, others, range(x.ndim - len(others), x.ndim))
    met = met.reshape(*met.shape[: x.ndim - len(others)], -1)
    outputs_are_rows = rows == (mark.form == "transposed")
    first = tuple(range(w.ndim - len(own))) if at == 0 else ()
    return walk.used(_Use(mark.leaf, "product", outputs_are_rows, first), result, met)


def _gather(walk: _Walk, about: Any, given: list[_Value], mark: _Mark, result: Any) -> _Value | None:
    w, indices, numbers = given[0].value, given[1].value, about["dimension_numbers"]
    if (
        mark.form != "matrix"
        or given[1].mark
        or w.ndim != 2
        or tuple(about["slice_sizes"]) != (1, w.shape[1])
        or tuple(numbers.offset_dims) != (indices.ndim - 1,)
        or tuple(numbers.collapsed_slice_dims) != (0,)
        or tuple(numbers.start_index_map) != (0,)
    ):
        return None
    return walk.used(_Use(mark.leaf, "lookup"), result, indices[..., 0])


KNOWN = {
    "transpose": _transpose,
    "convert_element_type": _convert,
    "broadcast_in_dim": _broadcast,
    "reshape": _reshape,
    "add": _add,
    "mul": _mul,
    "dot_general": _dot_general,
    "gather": _gather,
}
