"""Per-example gradients of a parameter from its layers' inputs and output gradients.

For a linear layer with inputs x and output gradients u, the gradient of an example is u' x, one matrix
product over all its steps. It is squared in parts that fit the cache, and not stored for all examples.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch

from hfmpi.models.factors import square
from hfmpi.optim.layout import Block, Part, factor_shape

__all__ = ["ExampleGradients", "factors", "squares"]

FEW = 4
"""Maximum ratio of the arithmetic of matrix products to that of per-example gradients."""

FEW_TERMS = 1
"""Maximum number of terms of a gradient that are multiplied in pairs, per shorter side of its matrix."""

CACHED_NUMBERS = 1 << 17
"""Number of entries of a matrix's per-example gradients that are squared at once on a CPU."""


class Squares:
    """Caches sums of z z' over rows z, because parameters of one layer have the same rows."""

    def __init__(self) -> None:
        self._known = dict[Any, Any]()

    def of(self, parts: Sequence[Any], groups: int = 1) -> Any:
        """Return `hfmpi.models.factors.square` of the rows of tensors (B, n, side).

        The tensors must stay in memory: their addresses identify them.
        """
        key = tuple((z.data_ptr(), z.shape, z.stride()) for z in parts)
        if (key, groups) not in self._known:
            full, shape = self._known.get((key, 1)), factor_shape(parts[0].shape[-1], groups)
            if full is not None and full.ndim == 2 and len(shape) > 1:
                width = shape[-1]  # the blocks are part of the full sums
                blocks = [full[i : i + width, i : i + width] for i in range(0, len(full), width)]
                self._known[key, groups] = full if len(shape) == 2 else torch.stack(blocks)
            else:
                flat = [z.flatten(0, 1) for z in parts]
                self._known[key, groups] = square(torch.cat(flat) if len(flat) > 1 else flat[0], groups)
        return self._known[key, groups]


class ExampleGradients(NamedTuple):
    """The gradients of B examples in the parameter p: the sum of four kinds of terms.

    Attributes
    ----------
    p : tensor
    products : list of ((B, n, O), (B, n, I))
        Pairs of a layer's output gradients u and inputs x: the term is u' x.
    lookups : list of ((B, n, O), (B, n))
        Pairs of the gradients u of rows that were looked up in a table, and the indices of these rows.
    added : list of (B, n, O)
        Output gradients u of a layer that adds p: the term is the sum over n.
    rest : list of (B, ...)
        The gradients from other operations.
    mixed : bool
        Whether the products are of layers and of derivatives of layers, whose factors have no common scale:
        Kronecker factors are then computed from the gradients.
    """

    p: Any
    products: list[tuple[Any, Any]]
    lookups: list[tuple[Any, Any]]
    added: list[Any]
    rest: list[Any]
    mixed: bool = False

    @property
    def _only_kind(self) -> str:
        """The only kind of terms, or an empty string if there are several kinds or none."""
        kinds = [kind for kind in ("products", "lookups", "added", "rest") if getattr(self, kind)]
        return kinds[0] if len(kinds) == 1 and not self.mixed else ""

    def sum(self) -> Any:
        """Return the gradient summed over the examples."""
        total = torch.zeros_like(self.p)
        for u, x in self.products:
            total += u.flatten(0, 1).T @ x.flatten(0, 1)
        for u, indices in self.lookups:
            total.index_add_(0, indices.flatten(), u.flatten(0, 1))
        for u in self.added:
            total += u.sum((0, 1))
        for gradients in self.rest:
            total += gradients.sum(0)
        return total

    def rows(self, start: int = 0, stop: int | None = None) -> Any:
        """Return the gradients (b, ...) of examples start to stop; zeros (1, ...) for an unused parameter."""
        part = slice(start, stop)
        direct = [gradients[part] for gradients in self.rest] + [u[part].sum(1) for u in self.added]
        if not self.products and not self.lookups:
            return sum(direct[1:], direct[0]) if direct else torch.zeros_like(self.p)[None]
        if self.products:
            u, x = _joined([(u[part], x[part]) for u, x in self.products])
            gradients = torch.bmm(u.mT, x) if u.shape[1] > 1 else u.mT * x
        else:
            gradients = self.p.new_zeros(len(self.lookups[0][0][part]), *self.p.shape)
        for u, indices in self.lookups:
            gradients.scatter_add_(1, indices[part].unsqueeze(-1).expand(u[part].shape), u[part])
        for term in direct:
            gradients += term
        return gradients

    def along(self, part: Part, v: Any) -> Any:
        """Return V G' (c, B) for c directions V (c, size) in a part of the parameter; (c, 1) if it is unused.

        With few steps, multiplying inputs and output gradients by V is cheaper than computing the gradients
        G.
        """
        steps = max((u.shape[1] for u, _ in self.products), default=0)
        if self._only_kind == "products" and steps * len(v) <= FEW * (steps + len(v)):
            return sum(_products_along(u, x, part, v) for u, x in self.products)
        found = [v.new_zeros(len(v), 1)]
        for g in self._parts():
            found.append(v @ part.of_block(g.reshape(len(g), *_sides(self.p))).reshape(len(g), -1).T)
        return torch.cat(found[1:], 1) if len(found) > 1 else found[0]

    def squares(self) -> tuple[Any, Any]:
        """Return the sums over the examples of the gradients and of their squares."""
        if self._only_kind == "products" and len(self.products) == 1 and self.products[0][0].shape[1] == 1:
            u, x = (tensor[:, 0] for tensor in self.products[0])
            return u.T @ x, u.square().T @ x.square()
        if self._only_kind == "lookups":
            return self.sum(), self._squared_lookups()
        total, squares = torch.zeros_like(self.p), torch.zeros_like(self.p)
        for part in self._parts():
            rows, ones = part.reshape(len(part), -1), part.new_ones(len(part))  # products sum fastest
            total += (ones @ rows).view(total.shape)
            squares += (ones @ rows.square()).view(total.shape)
        return total, squares

    def _squared_lookups(self) -> Any:
        u, indices = _joined(self.lookups)
        count = len(self.p)
        keys = (indices + count * torch.arange(len(indices), device=indices.device)[:, None]).flatten()
        keys, inverse = keys.unique(return_inverse=True)  # an example may look up a row twice
        sums = u.new_zeros(len(keys), u.shape[2]).index_add_(0, inverse, u.flatten(0, 1))
        return torch.zeros_like(self.p).index_add_(0, keys % count, sums.square())

    def _parts(self) -> Iterator[Any]:
        """Yield the gradients (b, ...) of parts of the examples."""
        if self.products or self.lookups:
            examples = len((self.products + self.lookups)[0][0])
            most = max(1, CACHED_NUMBERS // self.p.numel()) if self.p.device.type == "cpu" else examples
            for start in range(0, examples, most):
                yield self.rows(start, start + most)
        elif self.rest or self.added:
            yield self.rows()

    def factors(self, block: Block, squares: Squares, weights: Any = None) -> tuple[Any, Any, Any]:
        """Return the sums for the factors of rows and columns, and the count by which they are divided.

        With weights (B,), the products of an example's inputs are multiplied by its weight; u must already be
        multiplied by the square roots of the weights.
        """
        kind = self._only_kind
        if weights is not None and kind in ("products", "lookups", "added"):
            return self._weighted_factors(block, kind, weights)
        if kind == "products":
            outputs, inputs = ([*rows] for rows in zip(*self.products, strict=True))
            count = self.p.new_tensor(sum(u.shape[0] * u.shape[1] for u in outputs))
            return squares.of(outputs), squares.of(inputs, block.groups), count
        if kind == "lookups":
            u, indices = (tensor.flatten(0, 1) for tensor in _joined(self.lookups))
            counts = indices.bincount(minlength=block.rows).to(u)
            diagonal = len(factor_shape(block.rows)) == 1
            return counts if diagonal else counts.diag(), square(u, block.groups), u.new_tensor(len(u))
        if kind == "added":
            number = sum(u.shape[0] * u.shape[1] for u in self.added)
            b = squares.of(self.added, block.groups)
            return self.p.new_full((1, 1), number), b, self.p.new_tensor(number)
        if self.mixed and not (self.lookups or self.added or self.rest):
            u, x = _joined(self.products)
            full = len(factor_shape(block.rows)) == len(factor_shape(block.columns)) == 2
            if full and u.shape[1] <= FEW_TERMS * min(block.rows, block.columns):
                return _factors_of_few(u, x)
        a = self.p.new_zeros(factor_shape(block.rows))
        b = self.p.new_zeros(factor_shape(block.columns, block.groups))
        count = self.p.new_zeros(())
        for part in self._parts():
            g = part.reshape(-1, block.rows, block.columns)
            a += square(g.transpose(1, 2).flatten(0, 1))
            b += square(g.flatten(0, 1), block.groups)
            count += g.square().sum()
        return a, b, count

    def _weighted_factors(self, block: Block, kind: str, weights: Any) -> tuple[Any, Any, Any]:
        """Return the result of `factors` for one kind of terms and weights (B,)."""
        if kind == "products":
            u, x = _joined(self.products)
            of_rows = weights.repeat_interleave(x.shape[1])
            x, u = x.flatten(0, 1) * of_rows.sqrt()[:, None], u.flatten(0, 1)
            return square(u), square(x, block.groups), of_rows.sum()
        if kind == "lookups":
            u, indices = _joined(self.lookups)
            of_rows = weights.repeat_interleave(indices.shape[1])
            u, indices = u.flatten(0, 1), indices.flatten(0, 1)
            counts = indices.bincount(of_rows, minlength=block.rows).to(u)
            diagonal = len(factor_shape(block.rows)) == 1
            return counts if diagonal else counts.diag(), square(u, block.groups), of_rows.sum()
        u = torch.cat(self.added, 1)
        count = weights.sum() * u.shape[1]
        return count.reshape(1, 1), square(u.flatten(0, 1), block.groups), count


def _factors_of_few(u: Any, x: Any) -> tuple[Any, Any, Any]:
    """Return the sums of G G', G' G and the squares of G for gradients G = u' x of u (B, n, O), x (B, n, I).

    The products of all pairs of the n terms are cheaper than the gradients G.
    """
    of_u, of_x = torch.bmm(u, u.mT), torch.bmm(x, x.mT)
    a = torch.bmm(of_x, u).flatten(0, 1).T @ u.flatten(0, 1)
    b = torch.bmm(of_u, x).flatten(0, 1).T @ x.flatten(0, 1)
    return a, b, (of_u * of_x).sum()


def _products_along(u: Any, x: Any, part: Part, v: Any) -> Any:
    """Return V (u' x) (c, B) of u (B, n, O) and x (B, n, I), for V (c, size) in a part of the matrix."""
    u, x = u[:, :, part.top : part.bottom], x[:, :, part.left : part.right]
    c, sides = len(v), (u.shape[2], x.shape[2])
    moved = x.flatten(0, 1) @ v.reshape(c * sides[0], sides[1]).T
    return torch.einsum("bnco,bno->cb", moved.view(*u.shape[:2], c, sides[0]), u)


def _sides(p: Any) -> tuple[int, int]:
    """Return the numbers of rows and columns that `hfmpi.frameworks.framework.matrices` gives a parameter."""
    rows = p.shape[0] if p.ndim > 1 else 1
    return rows, p.numel() // max(1, rows)


def squares(parameters: Iterable[ExampleGradients]) -> tuple[list[Any], list[Any]]:
    """Return the sums over examples of the gradients and of the squared gradients, by parameter."""
    totals, squared = zip(*(gradients.squares() for gradients in parameters), strict=True)
    return [*totals], [*squared]


def factors(
    parameters: Iterable[ExampleGradients], blocks: Sequence[Block], weights: Any = None
) -> tuple[list[Any], list[Any]]:
    """Return the gradient summed over examples, and the sums of `hfmpi.models.factors`, in parts.

    The parts follow one another in a vector. They are not copied to one, which would be larger than theta.
    """
    total, sums, counts = list[Any](), list[Any](), list[Any]()
    squares = Squares()
    for block, gradients in zip(blocks, parameters, strict=True):
        a, b, count = gradients.factors(block, squares, weights)
        total.append(gradients.sum())
        sums += [a, b]
        counts.append(count)
    return total, sums + counts


def _joined(pairs: list[tuple[Any, Any]]) -> Any:
    """Concatenate pairs of tensors (B, n, .) along n."""
    return (torch.cat(parts, 1) if len(parts) > 1 else parts[0] for parts in zip(*pairs, strict=True))
