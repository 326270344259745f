"""Strides of values through views: which views are free, and which need a copy.

Inputs, weights and the results of computing ops are contiguous. A free view only changes shape, strides and offset.
Sizes are
sympy expressions, so two sizes count as equal only when their difference simplifies to zero.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import sympy
import torch
from torch.fx import Node

from tilewright.errors import TilewrightError
from tilewright.ir.facts import SizeValue, TensorType, fact, where
from tilewright.ir.sizes import Size, contiguous_strides

aten = torch.ops.aten


@dataclass(frozen=True)
class Strided:
    """Shape, strides and offset, in elements, of a window into contiguous memory."""

    shape: tuple[Size, ...]
    strides: tuple[Size, ...]
    offset: Size = 0


def same_size(a: Size, b: Size) -> bool:
    """Whether two sizes are equal for all values of their symbols, as far as can be shown."""
    if a == b:
        return True
    return not (isinstance(a, int) and isinstance(b, int)) and _difference_is_zero(a, b)


@lru_cache(maxsize=4096)
def _difference_is_zero(a: Size, b: Size) -> bool:
    return bool(sympy.expand(sympy.sympify(a) - sympy.sympify(b)) == 0)


def same_sizes(a: Sequence[Size], b: Sequence[Size]) -> bool:
    """Whether two shapes are equal for all values of their symbols."""
    return len(a) == len(b) and all(same_size(x, y) for x, y in zip(a, b, strict=True))


def contiguous(shape: Sequence[Size]) -> Strided:
    """Row-major layout of a whole value."""
    return Strided(tuple(shape), contiguous_strides(shape))


def is_contiguous(layout: Strided) -> bool:
    """Whether the elements lie in row-major order without gaps (axes of size 1 do not count)."""
    expected = contiguous_strides(layout.shape)
    triples = zip(layout.shape, layout.strides, expected, strict=True)
    return all(same_size(size, 1) or same_size(stride, want) for size, stride, want in triples)


def size_argument(arg: Any) -> Size:
    """An op's size argument as a size: an int, or a node that carries ``SizeValue``."""
    return fact(arg, SizeValue).value if isinstance(arg, Node) else int(arg)


def reshape(layout: Strided, shape: Sequence[Size]) -> Strided | None:
    """The window under another shape, or None when that needs a copy.

    Axes are merged into runs that one stride can walk; each run must split evenly into new axes.
    """
    if is_contiguous(layout):
        return Strided(tuple(shape), contiguous_strides(shape), layout.offset)
    runs = _runs(layout)
    strides: list[Size] = []
    axis = len(shape) - 1
    for length, step in reversed(runs):
        covered: Size = 1
        while axis >= 0 and not same_size(covered, length):
            strides.append(step * covered)
            covered = covered * shape[axis]
            axis -= 1
        if not same_size(covered, length):
            return None
    while axis >= 0 and same_size(shape[axis], 1):
        strides.append(1)
        axis -= 1
    return Strided(tuple(shape), tuple(reversed(strides)), layout.offset) if axis < 0 else None


def _runs(layout: Strided) -> list[tuple[Size, Size]]:
    """(length, innermost stride) of each maximal group of axes that one stride walks, outermost first."""
    runs: list[tuple[Size, Size]] = []
    for size, stride in zip(layout.shape, layout.strides, strict=True):
        if same_size(size, 1):
            continue
        if runs and same_size(runs[-1][1], stride * size):
            runs[-1] = (runs[-1][0] * size, stride)
        else:
            runs.append((size, stride))
    return runs


def row_stride(layout: Strided) -> Size | None:
    """Stride of the leading axes taken as one axis of rows, or None when no single stride walks them.

    A matrix operand [.., K] needs this, and unit stride along K.
    """
    if not layout.shape or not (same_size(layout.strides[-1], 1) or same_size(layout.shape[-1], 1)):
        return None
    rows = _runs(Strided(layout.shape[:-1], layout.strides[:-1]))
    if not rows:
        return layout.shape[-1]
    return rows[0][1] if len(rows) == 1 else None


def apply_view(node: Node, layout: Strided) -> Strided | None:
    """Layout of a view node's result, given that of its operand; None when the view needs a copy.

    Raises:
        TilewrightError: the op is not a view known here.
    """
    rule = _RULES.get(node.target)
    if rule is None:
        raise TilewrightError(f"no stride rule for view {node.target}", where=where(node))
    return rule(node, layout)


def has_view_rule(target: Any) -> bool:
    """Whether ``apply_view`` knows the op; a ``cat`` is never a view of one tensor."""
    return target in _RULES


def argument(node: Node, position: int, name: str, default: Any = None) -> Any:
    """An op's argument by position or name."""
    return node.args[position] if len(node.args) > position else node.kwargs.get(name, default)


def _permute(node: Node, layout: Strided) -> Strided:
    dims = [int(d) % len(layout.shape) for d in argument(node, 1, "dims")]
    return Strided(tuple(layout.shape[d] for d in dims), tuple(layout.strides[d] for d in dims), layout.offset)


def _unsqueeze(node: Node, layout: Strided) -> Strided:
    rank = len(layout.shape)
    dim = int(argument(node, 1, "dim")) % (rank + 1)
    step = layout.shape[dim] * layout.strides[dim] if dim < rank else 1
    shape, strides = list(layout.shape), list(layout.strides)
    shape.insert(dim, 1)
    strides.insert(dim, step)
    return Strided(tuple(shape), tuple(strides), layout.offset)


def _squeeze(node: Node, layout: Strided) -> Strided:
    rank = len(layout.shape)
    dims = {int(d) % rank for d in argument(node, 1, "dim")} if rank else set()
    kept = [axis for axis in range(rank) if axis not in dims or not same_size(layout.shape[axis], 1)]
    return Strided(tuple(layout.shape[a] for a in kept), tuple(layout.strides[a] for a in kept), layout.offset)


def _expand(node: Node, layout: Strided) -> Strided:
    shape = fact(node, TensorType).shape
    added = len(shape) - len(layout.shape)
    strides: list[Size] = [0] * added
    for size, old, stride in zip(shape[added:], layout.shape, layout.strides, strict=True):
        strides.append(stride if same_size(size, old) else 0)
    return Strided(shape, tuple(strides), layout.offset)


def _slice(node: Node, layout: Strided) -> Strided:
    shape = fact(node, TensorType).shape
    dim = int(argument(node, 1, "dim", 0)) % len(layout.shape)
    first = argument(node, 2, "start")
    start = 0 if first is None else size_argument(first)
    start = layout.shape[dim] + start if isinstance(start, int) and start < 0 else start
    step = int(argument(node, 4, "step", 1))
    strides = tuple(s * step if axis == dim else s for axis, s in enumerate(layout.strides))
    return Strided(shape, strides, layout.offset + start * layout.strides[dim])


def _select(node: Node, layout: Strided) -> Strided:
    dim = int(argument(node, 1, "dim")) % len(layout.shape)
    index = size_argument(argument(node, 2, "index"))
    index = layout.shape[dim] + index if isinstance(index, int) and index < 0 else index
    keep = [axis for axis in range(len(layout.shape)) if axis != dim]
    shape, strides = tuple(layout.shape[a] for a in keep), tuple(layout.strides[a] for a in keep)
    return Strided(shape, strides, layout.offset + index * layout.strides[dim])


def _reshape(node: Node, layout: Strided) -> Strided | None:
    return reshape(layout, fact(node, TensorType).shape)


_RULES: dict[Any, Callable[[Node, Strided], Strided | None]] = {
    aten.permute.default: _permute,
    aten.unsqueeze.default: _unsqueeze,
    aten.squeeze.dims: _squeeze,
    aten.expand.default: _expand,
    aten.slice.Tensor: _slice,
    aten.select.int: _select,
    aten.reshape.default: _reshape,
}
