"""Kronecker factors of a JAX function from its layers, at about the cost of a gradient.

The function is traced. A layer is an operation that multiplies by a parameter, adds one, scales by one or
looks up its rows. A zero is added to the result of each layer: the derivative with respect to this
perturbation is the gradient in the result. The other operand of the layer is recorded. Loops (`scan`) and
calls of compiled functions are followed. A parameter that is used in any other way is unassigned: its factors
are computed from per-example gradients.
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
"""Primitives that call a function, and the name of their option that holds this function."""


class _Mark(NamedTuple):
    """Marks a value as a parameter: unchanged (matrix), transposed, or repeated along the last axis (row)."""

    leaf: int
    form: str


class _Value(NamedTuple):
    value: Any
    mark: _Mark | None = None


class _Layer(NamedTuple):
    """An operation with one parameter.

    Attributes
    ----------
    leaf : int
    kind : str
        product, added, scaled or lookup.
    outputs_are_rows : bool
        Whether the rows of the parameter's matrix are the outputs, for a product.
    first : tuple of int
        The axes of the result that are a product's outputs, unless these are the last axes.
    """

    leaf: int
    kind: str
    outputs_are_rows: bool = False
    first: tuple[int, ...] = ()


class Layers:
    """The gradient of a function and the sums of its Kronecker factors, for inputs of fixed shapes.

    Parameters
    ----------
    function : callable
        (leaves, inputs) -> outputs (N, O).
    blocks : sequence of Block
        The blocks of theta, one for each leaf.
    leaves, inputs : sequence of arrays
        Only their shapes and types matter.

    Attributes
    ----------
    unassigned : frozenset of int
        Leaves whose sums remain 0.
    sums : callable
        (theta, inputs, u) -> J' u (D,) for u (N, O), and the sums of `hfmpi.models.factors`; compiled.
    sums_of_each : callable
        `sums` for several batches at once: inputs, u and the results have an additional first axis.
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
        jax.eval_shape(lambda *args: self._run(walk, *args)[0], [*leaves], tuple(inputs))
        self._counts, self._layers, self._results = walk.counts, walk.layers, walk.results
        kinds = {i: {layer.kind for layer in self._layers if layer.leaf == i} for i in range(len(blocks))}
        mixed = {i for i, of in kinds.items() if len(of) > 1 and not of <= {"scaled", "added"}}
        self.unassigned = frozenset(walk.unassigned | mixed)
        self.sums = jax.jit(self._sums)
        self.sums_of_each = jax.jit(jax.vmap(self._sums, (None, 0, 0)))

    def _run(self, walk: _Walk, leaves: Sequence[Any], inputs: Sequence[Any]) -> tuple[Any, list[Any]]:
        """Return the outputs and the operands of the layers."""
        marked = [_Value(leaf, _first(i, leaf.shape)) for i, leaf in enumerate(leaves)]
        args = [*marked, *map(_Value, inputs)]
        (outputs,) = walk.run(self._traced.jaxpr, self._traced.consts, args)
        walk.unassigned |= {outputs.mark.leaf} if outputs.mark else set()
        return outputs.value, walk.operands

    def _sums(self, theta: Any, inputs: Sequence[Any], u: Any) -> tuple[Any, Any]:
        both = zip(self._blocks, self._shapes, strict=True)
        leaves = [block.of(theta).reshape(shape) for block, shape in both]

        def outputs(leaves: Any, perturbations: Any) -> tuple[Any, list[Any]]:
            return self._run(_Walk(self._traced, self._counts, perturbations), leaves, inputs)

        perturbations = [jnp.zeros(like.shape, like.dtype) for like in self._results]
        _, pull, operands = jax.vjp(outputs, leaves, perturbations, has_aux=True)
        gradients, cotangents = pull(u)
        sums, counts = list[Any](), list[Any]()
        for i, block in enumerate(self._blocks):
            a, b = (jnp.zeros(factor_shape(side), u.dtype) for side in (block.rows, block.columns))
            count = 0
            for layer, cotangent, operand in zip(self._layers, cotangents, operands, strict=True):
                if layer.leaf == i and i not in self.unassigned:
                    more_a, more_b, more = _squares(layer, block, cotangent, operand)
                    a, b, count = a + more_a, b + more_b, count + more
            sums += [a.reshape(-1), b.reshape(-1)]
            counts.append(jnp.full(1, count, u.dtype))
        return jnp.concatenate([g.reshape(-1) for g in gradients]), jnp.concatenate(sums + counts)


def _first(leaf: int, shape: tuple[int, ...]) -> _Mark:
    return _Mark(leaf, "row" if shape and math.prod(shape) == shape[-1] else "matrix")


def _squares(layer: _Layer, block: Block, cotangent: Any, operand: Any) -> tuple[Any, Any, int]:
    """Return the sums of a layer for the factors of rows and columns, and the number of their terms."""
    if layer.kind == "lookup":
        u, symbols = cotangent.reshape(-1, block.columns), operand.reshape(-1)
        counts = jnp.zeros(block.rows, u.dtype).at[symbols].add(1)
        return counts if len(factor_shape(block.rows)) == 1 else jnp.diag(counts), square(u), len(u)
    if layer.kind != "product":
        u = (cotangent if layer.kind == "added" else cotangent * operand).reshape(-1, block.columns)
        return jnp.full((1, 1), len(u), u.dtype), square(u), len(u)
    last = range(cotangent.ndim - len(layer.first), cotangent.ndim)
    u = jnp.moveaxis(cotangent, layer.first, last)
    outputs, inputs = (block.rows, block.columns)[:: 1 if layer.outputs_are_rows else -1]
    both = square(u.reshape(-1, outputs)), square(operand.reshape(-1, inputs))
    return *(both if layer.outputs_are_rows else both[::-1]), operand.size // inputs


class _Walk:
    """Evaluates a traced function one operation at a time, and records its layers.

    Attributes
    ----------
    traced : ClosedJaxpr
        A template for functions that consist of one equation.
    counts : dict of int to int
        The number of layers in each loop, by the identity of the loop's equation.
    perturbations : list of arrays, or None
        Added to the results of the layers.
    layers, results, operands : list
        The layers, the shapes and dtypes of their results, and their other operands.
    unassigned : set of int
        Leaves that are not only used by layers.
    """

    def __init__(self, traced: Any, counts: dict[int, int], perturbations: Sequence[Any] | None) -> None:
        self.traced, self.counts, self.perturbations = traced, counts, perturbations
        self.layers, self.results, self.operands = list[_Layer](), list[Any](), list[Any]()
        self.unassigned = set[int]()

    def run(self, jaxpr: Any, consts: Sequence[Any], args: Sequence[_Value]) -> list[_Value]:
        """Evaluate a function and return its outputs."""
        values: dict[Any, _Value] = dict(zip(jaxpr.constvars, map(_Value, consts), strict=True))
        values |= zip(jaxpr.invars, args, strict=True)

        def read(atom: Any) -> _Value:
            return _Value(atom.val) if isinstance(atom, Literal) else values[atom]

        for equation in jaxpr.eqns:
            results = self._equation(equation, [read(atom) for atom in equation.invars])
            values |= zip(equation.outvars, results, strict=True)
        return [read(atom) for atom in jaxpr.outvars]

    def record(self, layer: _Layer, result: Any, operand: Any) -> _Value:
        """Record a layer; return its result plus the perturbation."""
        self.layers.append(layer)
        self.results.append(jax.ShapeDtypeStruct(result.shape, result.dtype))
        self.operands.append(operand)
        if self.perturbations is not None:
            result = result + self.perturbations[len(self.layers) - 1]
        return _Value(result)

    def _equation(self, equation: Any, args: list[_Value]) -> list[_Value]:
        name, marks = equation.primitive.name, [value.mark for value in args if value.mark]
        if name in CALLS and marks:
            called = equation.params[CALLS[name]]
            return self.run(getattr(called, "jaxpr", called), getattr(called, "consts", ()), args)
        if name == "scan" and marks:
            return self._loop(equation, args)
        results = self._evaluate(equation, [value.value for value in args])
        if len(marks) == 1 and name in RULES:
            value = RULES[name](self, equation.params, args, marks[0], results[0])
            if value is not None:
                return [value]
        self.unassigned |= {mark.leaf for mark in marks}
        return [*map(_Value, results)]

    def _loop(self, equation: Any, args: list[_Value]) -> list[_Value]:
        options, inner = equation.params, list[_Walk]()
        first, last = options["num_consts"], options["num_consts"] + options["num_carry"]
        consts, state, steps = args[:first], args[first:last], args[last:]
        self.unassigned |= {value.mark.leaf for value in state + steps if value.mark}
        perturbations, count = None, self.counts.get(id(equation), 0)
        if self.perturbations is not None:
            perturbations = [*self.perturbations[len(self.layers) : len(self.layers) + count]]

        def body(state: Any, step: Any) -> Any:
            values, perturbations = step
            walk = _Walk(self.traced, self.counts, perturbations)
            inner[:] = [walk]
            function = options["jaxpr"]
            results = walk.run(function.jaxpr, function.consts, [*consts, *map(_Value, state + values)])
            walk.unassigned |= {value.mark.leaf for value in results if value.mark}
            values = [value.value for value in results]
            return values[: last - first], (values[last - first :], walk.operands)

        state, (steps, operands) = jax.lax.scan(
            body,
            [value.value for value in state],
            ([value.value for value in steps], perturbations),
            length=options["length"],
            reverse=options["reverse"],
            unroll=options["unroll"],
        )
        (walk,) = inner
        self.counts[id(equation)] = len(walk.layers)
        self.layers += [
            layer._replace(first=tuple(axis + 1 for axis in layer.first)) for layer in walk.layers
        ]
        length = options["length"]
        self.results += [jax.ShapeDtypeStruct((length, *x.shape), x.dtype) for x in walk.results]
        self.operands += operands
        self.unassigned |= walk.unassigned
        return [*map(_Value, state + steps)]

    def _evaluate(self, equation: Any, values: list[Any]) -> list[Any]:
        """Evaluate an operation that is not a layer."""
        atoms = zip(equation.invars, values, strict=True)
        args = {atom: value for atom, value in atoms if not isinstance(atom, Literal)}
        function = self.traced.jaxpr.replace(
            constvars=[],
            invars=[*args],
            outvars=equation.outvars,
            eqns=[equation],
            effects=equation.effects,
        )
        return [*jaxpr_as_fun(ClosedJaxpr(function, ()))(*args.values())]


# Rules of operations on one parameter: the result, or None if the parameter becomes unassigned ------


def _transpose(_: Any, options: Any, args: list[_Value], mark: _Mark, result: Any) -> _Value | None:
    if mark.form == "row" or options["permutation"] != (1, 0):
        return None
    return _Value(result, _Mark(mark.leaf, {"matrix": "transposed", "transposed": "matrix"}[mark.form]))


def _convert(_: Any, options: Any, args: list[_Value], mark: _Mark, result: Any) -> _Value | None:
    return _Value(result, mark) if args[0].value.dtype == options["new_dtype"] else None


def _broadcast(_: Any, options: Any, args: list[_Value], mark: _Mark, result: Any) -> _Value | None:
    last = mark.form == "row" and options["broadcast_dimensions"][-1] == result.ndim - 1
    return _Value(result, mark) if last and result.shape[-1] == args[0].value.shape[-1] else None


def _reshape(_: Any, options: Any, args: list[_Value], mark: _Mark, result: Any) -> _Value | None:
    row = mark.form == "row" and result.size == args[0].value.size == result.shape[-1]
    return _Value(result, mark) if row else None


def _add(walk: _Walk, options: Any, args: list[_Value], mark: _Mark, result: Any) -> _Value | None:
    return walk.record(_Layer(mark.leaf, "added"), result, None) if mark.form == "row" else None


def _mul(walk: _Walk, options: Any, args: list[_Value], mark: _Mark, result: Any) -> _Value | None:
    (other,) = (one.value for one in args if not one.mark)
    return walk.record(_Layer(mark.leaf, "scaled"), result, other) if mark.form == "row" else None


def _dot_general(walk: _Walk, options: Any, args: list[_Value], mark: _Mark, result: Any) -> _Value | None:
    contracted, batched = options["dimension_numbers"]
    side = 0 if args[0].mark else 1  # the operand that is the parameter
    w, x = args[side].value, args[1 - side].value
    axes_w, axes_x = contracted[side], contracted[1 - side]
    rows = tuple(axes_w) == (0,)
    if mark.form == "row" or any(batched) or not (rows or tuple(axes_w) == tuple(range(1, w.ndim))):
        return None
    x = jnp.moveaxis(x, axes_x, range(x.ndim - len(axes_x), x.ndim))
    x = x.reshape(*x.shape[: x.ndim - len(axes_x)], -1)
    outputs_are_rows = rows == (mark.form == "transposed")
    first = tuple(range(w.ndim - len(axes_w))) if side == 0 else ()
    return walk.record(_Layer(mark.leaf, "product", outputs_are_rows, first), result, x)


def _gather(walk: _Walk, options: Any, args: list[_Value], mark: _Mark, result: Any) -> _Value | None:
    w, indices, numbers = args[0].value, args[1].value, options["dimension_numbers"]
    if (
        mark.form != "matrix"
        or args[1].mark
        or w.ndim != 2
        or tuple(options["slice_sizes"]) != (1, w.shape[1])
        or tuple(numbers.offset_dims) != (indices.ndim - 1,)
        or tuple(numbers.collapsed_slice_dims) != (0,)
        or tuple(numbers.start_index_map) != (0,)
    ):
        return None
    return walk.record(_Layer(mark.leaf, "lookup"), result, indices[..., 0])


RULES = {
    "transpose": _transpose,
    "convert_element_type": _convert,
    "broadcast_in_dim": _broadcast,
    "reshape": _reshape,
    "add": _add,
    "mul": _mul,
    "dot_general": _dot_general,
    "gather": _gather,
}
