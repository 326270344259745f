"""Views as maps of indices: where in its source an element of a view lies."""

from collections.abc import Callable
from typing import Any

import torch
from torch.fx import Node

from tilewright.codegen.index import Index, constant, reshape
from tilewright.errors import CodegenError
from tilewright.ir.facts import TensorType, fact, where
from tilewright.ir.sizes import Size

aten = torch.ops.aten


def broadcast(index: tuple[Index, ...], shape: tuple[Size, ...]) -> tuple[Index, ...]:
    """Index into an operand of ``shape`` that broadcasts, from the right, to the tensor indexed by ``index``."""
    kept = index[len(index) - len(shape) :]
    return tuple(constant(0) if size == 1 else part for part, size in zip(kept, shape, strict=True))


def is_view(node: Node) -> bool:
    """Whether the node is a view of one tensor that ``source_index`` knows."""
    return node.target in _RULES


def source_index(
    node: Node, index: tuple[Index, ...], given: dict[str, Any], size_of: Callable[[Any], Size]
) -> tuple[Node, tuple[Index, ...]]:
    """The tensor a view looks into, and the index there.

    Args:
        node: a call of a view op other than ``cat``.
        index: index into the view.
        given: the call's arguments by name.
        size_of: turns a size argument into a size.

    Raises:
        CodegenError: the op is no view that is known here.
    """
    source: Node = given["self"]
    shape = fact(source, TensorType).shape
    rule = _RULES.get(node.target)
    if rule is None:
        raise CodegenError(f"view {node.target} has no kernel", where=where(node))
    return source, rule(index, shape, fact(node, TensorType).shape, given, size_of)


def _reshape(index: Any, shape: Any, new: Any, given: Any, size_of: Any) -> tuple[Index, ...]:
    return reshape(index, shape, new)


def _permute(index: Any, shape: Any, new: Any, given: Any, size_of: Any) -> tuple[Index, ...]:
    places = {int(axis) % len(shape): position for position, axis in enumerate(given["dims"])}
    return tuple(index[places[axis]] for axis in range(len(shape)))


def _unsqueeze(index: Any, shape: Any, new: Any, given: Any, size_of: Any) -> tuple[Index, ...]:
    axis = int(given["dim"]) % len(new)
    return (*index[:axis], *index[axis + 1 :])


def _squeeze(index: Any, shape: Any, new: Any, given: Any, size_of: Any) -> tuple[Index, ...]:
    gone = {int(axis) % len(shape) for axis in given["dim"]}
    left = iter(index)
    return tuple(constant(0) if axis in gone and shape[axis] == 1 else next(left) for axis in range(len(shape)))


def _expand(index: Any, shape: Any, new: Any, given: Any, size_of: Any) -> tuple[Index, ...]:
    return broadcast(index, shape)


def _slice(index: Any, shape: Any, new: Any, given: Any, size_of: Any) -> tuple[Index, ...]:
    axis = int(given["dim"]) % len(shape)
    start = 0 if given["start"] is None else size_of(given["start"])
    if isinstance(start, int) and start < 0:
        start = shape[axis] + start
        start = max(start, 0) if isinstance(start, int) else start
    moved = index[axis] * size_of(given["step"]) + start
    return (*index[:axis], moved, *index[axis + 1 :])


def _select(index: Any, shape: Any, new: Any, given: Any, size_of: Any) -> tuple[Index, ...]:
    axis = int(given["dim"]) % len(shape)
    place = size_of(given["index"])
    if isinstance(place, int) and place < 0:
        place = shape[axis] + place
    return (*index[:axis], constant(place), *index[axis:])


_RULES: dict[Any, Callable[..., tuple[Index, ...]]] = {
    aten.reshape.default: _reshape,
    aten.permute.default: _permute,
    aten.unsqueeze.default: _unsqueeze,
    aten.squeeze.dims: _squeeze,
    aten.expand.default: _expand,
    aten.slice.Tensor: _slice,
    aten.select.int: _select,
}
