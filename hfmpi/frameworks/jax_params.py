"""The params of a JAX function: which arrays are trained, and how the pytree is rebuilt from theta."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax import numpy as jnp

from hfmpi.errors import UserError, shown
from hfmpi.frameworks.framework import first_line

__all__ = ["Params"]

STATISTICS = frozenset({"batch_stats", "running_mean", "running_var", "moving_mean", "moving_variance"})
"""Names of running statistics, which are not trained by default."""

MOST_NAMES = 4
"""The maximum number of arrays that a note names."""


class Params:
    """A pytree, or a module of equinox or flax.nnx, some arrays of which are trained.

    By default these are the arrays of real numbers, except running statistics: of the variables of a flax
    module only the collection "params", of flax.nnx modules only `nnx.Param`.

    Parameters
    ----------
    params : pytree
    trained : callable or pytree of bool, optional
        See `hfmpi.JaxModel`.

    Attributes
    ----------
    shapes : list of (name, shape)
        The names and shapes of the trained arrays.
    start : (D,) float32 or float64
        The values of the trained arrays.
    random : list of int
        The leaves that hold the random state of flax.nnx modules.

    Raises
    ------
    UserError
        If there is no array to train, an array cannot be trained, or `trained` does not fit the params.
    """

    def __init__(self, params: Any, trained: Any = None) -> None:
        nnx: Any = sys.modules.get("flax.nnx")  # an optional package: users of such a module have imported it
        modules, variables = (nnx.Module, nnx.Variable) if nnx else ((), ())
        self._graph, tree = None, params
        try:
            if any(isinstance(part, modules) for part in _leaves(params, lambda x: isinstance(x, modules))):
                self._graph, tree = nnx.split(params)
            paths, self._tree = jax.tree_util.tree_flatten_with_path(tree)
        except (TypeError, ValueError) as error:  # keys that cannot be sorted
            raise UserError(f"params must be a JAX pytree: {first_line(error)}") from None
        kinds, self._names = list[Any](), list[str]()
        for path, part in _flat(tree, lambda x: isinstance(x, variables)):
            inner = _flat(part) if isinstance(part, variables) else [((), part)]
            for below, _ in inner:
                kinds.append(type(part) if isinstance(part, variables) else None)
                self._names.append(_name(path if len(inner) == 1 else path + below))
        for i in _repeated(self._names):  # a user-defined pytree may use a key twice
            self._names[i] += f"<{i}>"
        self._kinds = ["" if kind is None else kind.__name__ for kind in kinds]
        self.random = [i for i, kind in enumerate(kinds) if kind and issubclass(kind, nnx.RngState)]
        leaves = [leaf for _, leaf in paths]
        inexact = [i for i, leaf in enumerate(leaves) if _has_type(leaf, jnp.inexact) and leaf.size]
        collections = isinstance(params, Mapping) and "params" in params and len(params) > 1
        collections = collections and all(isinstance(part, Mapping) for part in params.values())
        statistics = {
            i
            for i in inexact
            if STATISTICS.intersection(map(_key, paths[i][0]))
            or (collections and _key(paths[i][0][0]) != "params")
            or (kinds[i] and not issubclass(kinds[i], nnx.Param))
        }
        if trained is None:
            self._trained = [i for i in inexact if i not in statistics]
        else:
            self._trained = self._chosen(trained, tree, leaves, inexact)
        others = [i for i, a in enumerate(leaves) if _has_numbers(a)]
        self._check_types(leaves, others)
        self.shapes = [(self._names[i].strip("."), tuple(leaves[i].shape)) for i in self._trained]
        self.start = np.concatenate([np.asarray(leaves[i]).reshape(-1) for i in self._trained])
        self._ends = np.cumsum([leaves[i].size for i in self._trained])[:-1]
        self.notes = self._made_notes(inexact, others, statistics)
        self._leaves = [None if i in self._trained else _fixed(leaf) for i, leaf in enumerate(leaves)]

    def __getstate__(self) -> dict[str, Any]:
        """Return the state with a pytree instead of a treedef, because copies of treedefs are not equal."""
        skeleton = jax.tree_util.tree_unflatten(self._tree, range(self._tree.num_leaves))
        return {**self.__dict__, "_tree": skeleton}

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        self.__dict__.update(state)
        self._tree = jax.tree_util.tree_structure(self._tree)
        self._leaves = [*map(_fixed, self._leaves)]  # copies of read-only arrays are writable

    @property
    def state(self) -> list[Any]:
        """The values of the leaves `random`."""
        return [self._leaves[i] for i in self.random]

    def split(self, theta: Any) -> list[Any]:
        """Split theta (D,) into the trained arrays."""
        parts = zip(jnp.split(theta, self._ends), self.shapes, strict=True)
        return [part.reshape(shape) for part, (_, shape) in parts]

    def joined(self, arrays: Sequence[Any]) -> Any:
        """Return the params with these trained arrays and with all leaves that are not trained."""
        return self._merged(self._filled(arrays))

    def theta(self, params: Any) -> np.ndarray:
        """Return theta (D,), a new array, from the trained arrays of a pytree with the structure of params.

        Raises
        ------
        UserError
            If the pytree has a different structure, or JAX is compiling a function.
        """
        leaves = self._like(params)
        arrays = [leaves[i] for i in self._trained]
        if any(isinstance(array, jax.core.Tracer) for array in arrays):
            raise UserError(
                "a step runs on the host and cannot be compiled: call update outside of functions that "
                "jax.jit compiles"
            )
        for array, (name, shape) in zip(arrays, self.shapes, strict=True):
            if np.shape(array) != shape:
                raise UserError(f"params{name} has shape {np.shape(array)}, but it had {shape} before")
        found: np.ndarray = np.concatenate([np.asarray(array).reshape(-1) for array in arrays])
        return found.astype(self.start.dtype, copy=False)

    def updates(self, params: Any, theta: np.ndarray) -> Any:
        """Return the update that changes a pytree with the structure of params to that of theta (D,).

        Other arrays get zeros, other leaves None.
        """
        before = self._like(params)
        after = dict(zip(self._trained, self.split(jnp.asarray(theta)), strict=True))
        changes = [
            after[i] - leaf
            if i in after
            else jnp.zeros_like(leaf)
            if isinstance(leaf, np.ndarray | jax.Array)
            else None
            for i, leaf in enumerate(before)
        ]
        return jax.tree_util.tree_unflatten(self._tree, changes)

    def _like(self, params: Any) -> list[Any]:
        """Return the leaves of a pytree; raise a UserError if its structure is not that of params."""
        tree = params if self._graph is None else sys.modules["flax.nnx"].split(params)[1]
        leaves, form = jax.tree_util.tree_flatten(tree)
        if form != self._tree:
            raise UserError("params must have the structure of those from which the model was created")
        return list(leaves)

    def call(
        self,
        apply: Callable[..., Any],
        arrays: Sequence[Any],
        inputs: Sequence[Any],
        random: Sequence[Any] = (),
        double: bool = False,
        changes: dict[int, Any] | None = None,
    ) -> Any:
        """Return the outputs of `apply` for these trained arrays and inputs.

        Parameters
        ----------
        apply : callable
        arrays : sequence of arrays
            The trained arrays.
        inputs : sequence of (B, ...)
        random : sequence of arrays
            Values that replace the leaves `self.random`.
        double : bool
            Whether the other arrays of real numbers are converted to float64.
        changes : dict, optional
            Receives the new value of each leaf that the call changed in a flax.nnx module, except random
            state. The module itself does not keep these changes.
        """
        leaves = self._filled(arrays)
        if double:
            leaves = [_double(leaf) if _has_type(leaf, jnp.floating) else leaf for leaf in leaves]
        for i, leaf in zip(self.random, random, strict=False):
            leaves[i] = leaf
        params = self._merged(leaves)
        outputs = apply(params, *inputs)
        if self._graph is not None and changes is not None:
            after = {_name(path): leaf for path, leaf in _flat(sys.modules["flax.nnx"].split(params)[1])}
            for i, (path, before) in enumerate(_flat(jax.tree_util.tree_unflatten(self._tree, leaves))):
                if after.get(_name(path)) is not before and i not in self.random:
                    changes[i] = after.get(_name(path))
        return outputs

    def check_changes(self, arrays: Sequence[Any], changes: Mapping[int, Any]) -> None:
        """Raise a UserError if `call` reported changes of values."""
        before = self._filled(arrays)
        for i, after in changes.items():
            if not np.array_equal(before[i], after, equal_nan=True):
                raise UserError(
                    f"the module changes {self._names[i]} ({self._kinds[i]}) when it is called, as batch "
                    "statistics do: call its method eval() before you create the model"
                )

    def _filled(self, arrays: Sequence[Any]) -> list[Any]:
        leaves = list(self._leaves)
        for i, array in zip(self._trained, arrays, strict=True):
            leaves[i] = array
        return leaves

    def _merged(self, leaves: Sequence[Any]) -> Any:
        tree = jax.tree_util.tree_unflatten(self._tree, leaves)
        return tree if self._graph is None else sys.modules["flax.nnx"].merge(self._graph, tree)

    def _chosen(self, trained: Any, tree: Any, leaves: Sequence[Any], inexact: Sequence[int]) -> list[int]:
        """Return the leaves of `inexact` that the user selects for training."""
        wanted = (
            "trained must be a function (path, array) -> bool, or a tree of bools with the structure of "
            "params or of their upper levels"
        )
        flags = dict[int, Any]()
        if callable(trained) and jax.tree_util.all_leaves([trained]):
            for i in inexact:
                try:
                    flags[i] = trained(self._names[i].strip("."), leaves[i])
                except Exception as error:
                    raise UserError(
                        f"{wanted}: for params{self._names[i]} it raised {type(error).__name__}: "
                        f"{first_line(error)}"
                    ) from error
        else:
            every = list[Any]()
            try:
                jax.tree_util.tree_map(
                    lambda flag, part: every.extend([flag] * len(_leaves(part))), trained, tree
                )
            except (TypeError, ValueError) as error:
                raise UserError(f"{wanted}: {first_line(error)}") from None
            flags = dict(enumerate(every))
        for i, flag in flags.items():
            if not isinstance(flag, bool | np.bool_):
                raise UserError(f"{wanted}, not {shown(flag)} for params{self._names[i]}")
        return [i for i in inexact if flags[i]]

    def _check_types(self, leaves: Sequence[Any], others: Sequence[int]) -> None:
        """Raise a UserError unless the trained arrays are all float32 or all float64, as JAX supports."""
        if not self._trained:
            hint = f": {self.listed(others)} must be arrays of NumPy or JAX" if others else ""
            raise UserError(f"params contain no array of real numbers to train{hint}")
        types = dict[str, str]()
        for i in self._trained:
            types.setdefault(str(leaves[i].dtype), f"params{self._names[i]}")
        for kind, name in types.items():
            if kind.startswith("complex"):
                raise UserError(
                    f"{name} is {kind}, and complex numbers cannot be trained: use separate arrays for the "
                    "real and imaginary parts, or freeze it with `trained`"
                )
            if kind not in ("float32", "float64"):
                raise UserError(
                    f"{name} is {kind}, but params must be float32 or float64: convert it, or freeze it with "
                    "`trained`"
                )
        if len(types) > 1:
            examples = ", ".join(f"{name} is {kind}" for kind, name in sorted(types.items()))
            raise UserError(
                f"params must all be float32 or all be float64, not {', '.join(sorted(types))}: {examples}"
            )
        if "float64" in types and not jax.config.jax_enable_x64:
            raise UserError(
                "params are float64, but JAX computes in float32: call jax.config.update('jax_enable_x64', "
                "True)"
            )

    def _made_notes(self, inexact: Sequence[int], others: Sequence[int], statistics: set[int]) -> list[str]:
        """Return notes on what is trained, unless that is everything."""
        notes, untrained = list[str](), sorted({*inexact, *others}.difference(self._trained))
        if untrained:
            hint = " (only NumPy and JAX arrays can be trained)" if others else ""
            notes.append(
                f"Note: theta consists of the {self.start.size:,} numbers in {self.listed(self._trained)}; "
                f"not trained: {self.listed(untrained)}{hint}."
            )
        both = sorted(statistics.intersection(self._trained))
        if both:
            notes.append(
                f"Note: `trained` includes arrays that look like running statistics: {self.listed(both)}."
            )
        return notes

    def listed(self, which: Sequence[int]) -> str:
        """Return the names of leaves for a message, shortened if there are many."""
        names = [f"params{self._names[i]}" for i in which[:MOST_NAMES]]
        more = len(which) - len(names)
        return ", ".join(names) + (f" and {more} more" if more else "")

    def unused(self, used: set[int]) -> str:
        """Return the names of the trained arrays whose indices in theta are not in `used`."""
        return self.listed([i for k, i in enumerate(self._trained) if k not in used])


def _flat(tree: Any, is_leaf: Callable[[Any], bool] | None = None) -> list[tuple[Any, Any]]:
    return list(jax.tree_util.tree_flatten_with_path(tree, is_leaf)[0])


def _leaves(tree: Any, is_leaf: Callable[[Any], bool] | None = None) -> list[Any]:
    return list(jax.tree_util.tree_leaves(tree, is_leaf))


def _name(path: Any) -> str:
    return str(jax.tree_util.keystr(path))


def _repeated(names: Sequence[str]) -> list[int]:
    """Return the indices of names that occur earlier in the list."""
    first = {name: i for i, name in reversed([*enumerate(names)])}
    return [i for i, name in enumerate(names) if first[name] != i]


def _key(entry: Any) -> Any:
    """Return the key or the name of an entry of a path."""
    key = getattr(entry, "key", getattr(entry, "name", None))
    return key if isinstance(key, str) else None


def _has_type(leaf: Any, kind: Any) -> bool:
    return isinstance(leaf, np.ndarray | np.generic | jax.Array) and bool(jnp.issubdtype(leaf.dtype, kind))


def _has_numbers(leaf: Any) -> bool:
    """Return whether a leaf that is not a NumPy or JAX array may have been meant as real numbers."""
    array = isinstance(leaf, np.ndarray | np.generic | jax.Array)
    return not array and (
        type(leaf) in (float, complex) or (hasattr(leaf, "dtype") and hasattr(leaf, "shape"))
    )


def _double(array: Any) -> Any:
    return array if array.dtype == np.float64 else jnp.asarray(array, np.float64)


def _fixed(leaf: Any) -> Any:
    """Return a leaf that neither the function nor the user can change after the model was created."""
    if isinstance(leaf, np.ndarray):
        leaf = leaf.copy()
        leaf.flags.writeable = False
    return leaf
