"""The tile-dependence rule: a consumer joins a region when each of its tiles needs exactly one tile of its producer.

Source: DeepSpeed Inference (SC'22), section III.A: an iteration space may be split into tiles only along axes without a
dependency across tiles; axes with one stay inside one program.

For each operand of an op, ``operand_reads`` says how one element of the result reads each axis of the operand. The rule
itself, ``why_not_one_tile``, knows nothing of ops.
"""

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch
from torch.fx import Node

from tilewright.ir.facts import TensorType, find_fact
from tilewright.ir.sizes import Size
from tilewright.ir.views import argument, same_size
from tilewright.ops import Flow, traits_of
from tilewright.ops.head_linear import HEAD_LINEAR

aten = torch.ops.aten
packing = torch.ops.tilewright


class Access(Enum):
    """How an element of the result reads one axis of an operand."""

    SAME = "same"  # at the index of one of the result's axes
    FIRST = "first"  # the axis has size 1 and is broadcast
    WHOLE = "whole"  # all along the axis
    MOVED = "moved"  # at another index, known in advance
    LOOKED_UP = "looked_up"  # at an index known only at run time


@dataclass(frozen=True)
class AxisRead:
    """Access along one axis of an operand; for SAME, the axis of the result it goes with."""

    access: Access
    axis: int | None = None


@dataclass(frozen=True)
class OperandRead:
    """How ``consumer`` reads one of its operands, by the operand's axes."""

    operand: Node
    axes: tuple[AxisRead, ...]


WHOLE = AxisRead(Access.WHOLE)
FIRST = AxisRead(Access.FIRST)
MOVED = AxisRead(Access.MOVED)
LOOKED_UP = AxisRead(Access.LOOKED_UP)


_WEIGHT = 1  # position of the weight of products of experts


def same(axis: int) -> AxisRead:
    """Read at the index of the result's ``axis``."""
    return AxisRead(Access.SAME, axis)


def shape_of(node: Node | None) -> tuple[Size, ...] | None:
    """Shape of a tensor node; None for anything else."""
    kind = find_fact(node, TensorType) if node is not None else None
    return kind.shape if kind else None


def operand_reads(consumer: Node) -> list[OperandRead]:
    """How the op reads each tensor operand. An operand used twice appears twice."""
    rule = _BY_TARGET.get(consumer.target) or _BY_FLOW.get(traits_of(consumer.target).flow, _unknown)
    return rule(consumer)


def why_not_one_tile(consumer: Node, read: OperandRead, split: int) -> str | None:
    """The rule. The first ``split`` axes of the operand and of the result are divided among programs in the same way.

    Returns:
        None when each tile of ``consumer`` needs exactly one tile of the operand, else a sentence that says why not.
    """
    name = read.operand.name
    for axis, how in enumerate(read.axes):
        if how.access is Access.LOOKED_UP:
            return (
                f"'{consumer.name}' reads '{name}' at places known only at run time, so its tiles need any tile of it"
            )
        if how.access is Access.MOVED:
            return f"'{consumer.name}' reads '{name}' at other places along axis {axis}, which other tiles may hold"
        if how.access is Access.SAME and how.axis != axis:
            return f"'{consumer.name}' moves axis {axis} of '{name}', so a tile of one is not a tile of the other"
        if axis >= split:
            continue
        if how.access is Access.WHOLE:
            return f"'{consumer.name}' needs all of axis {axis} of '{name}', which is divided among programs"
        if how.access is Access.FIRST:
            return f"'{name}' is broadcast along axis {axis} by '{consumer.name}': each tile would compute it again"
    return None


def _tensors(value: Any) -> list[Node]:
    if isinstance(value, Node):
        return [value] if shape_of(value) is not None else []
    if isinstance(value, (list, tuple)):
        return [node for item in value for node in _tensors(item)]
    return []


def _operands(node: Node) -> list[Node]:
    return [operand for arg in (*node.args, *node.kwargs.values()) for operand in _tensors(arg)]


def _shape(node: Node) -> tuple[Size, ...]:
    return shape_of(node) or ()


def _broadcast(operand: Node, result: tuple[Size, ...]) -> OperandRead:
    """Axes aligned from the right, as broadcasting does."""
    shape = _shape(operand)
    shift = len(result) - len(shape)
    axes = tuple(
        same(axis + shift) if same_size(size, result[axis + shift]) else FIRST for axis, size in enumerate(shape)
    )
    return OperandRead(operand, axes)


def _pointwise(node: Node) -> list[OperandRead]:
    result = _shape(node)
    return [_broadcast(operand, result) for operand in _operands(node)]


def _all_whole(operand: Node) -> OperandRead:
    return OperandRead(operand, (WHOLE,) * len(_shape(operand)))


def _last_axis(node: Node) -> list[OperandRead]:
    x, *others = _operands(node)
    rank = len(_shape(x))
    return [OperandRead(x, (*map(same, range(rank - 1)), WHOLE)), *map(_all_whole, others)]


def _contract(node: Node) -> list[OperandRead]:
    x, weight, *rest = _operands(node)
    last = len(_shape(node)) - 1
    columns = LOOKED_UP if node.target is HEAD_LINEAR else same(last)  # the weight's rows are those of all heads
    reads = [OperandRead(x, (*map(same, range(last)), WHOLE)), OperandRead(weight, (columns, WHOLE))]
    # What has the axes of x is of its rows, like the scales of rounded ones; the rest is of the columns.
    return reads + [
        OperandRead(operand, (*map(same, range(last)), WHOLE) if len(_shape(operand)) > 1 else (same(last),))
        for operand in rest
    ]


def _grouped(node: Node) -> list[OperandRead]:
    shape, rows = _shape(node), traits_of(node.target).row_args
    last = len(shape) - 1
    reads = []
    for place, operand in enumerate(node.args):
        if not isinstance(operand, Node):
            continue
        own = _shape(operand)
        if place == _WEIGHT:
            reads.append(OperandRead(operand, (LOOKED_UP, same(last), WHOLE)))
        elif place not in rows:  # tables of the rows, and what each expert has besides its weight
            reads.append(OperandRead(operand, (LOOKED_UP,) * len(own)))
        elif len(own) == last:
            reads.append(OperandRead(operand, tuple(map(same, range(last)))))
        else:
            reads.append(OperandRead(operand, (*_broadcast(operand, (*shape[:last], own[-1])).axes[:last], WHOLE)))
    return reads


def _gather(node: Node) -> list[OperandRead]:
    """Along the last axis of ``x`` anything may be read, in the row itself."""
    x, index = _operands(node)
    last = len(_shape(node)) - 1
    return [OperandRead(x, (*map(same, range(last)), WHOLE)), OperandRead(index, tuple(map(same, range(last + 1))))]


def _lookup(node: Node) -> list[OperandRead]:
    table, ids = _operands(node)[:2]
    last = len(_shape(node)) - 1
    return [OperandRead(table, (LOOKED_UP, same(last))), OperandRead(ids, tuple(map(same, range(last))))]


def reduced_axes(node: Node) -> tuple[int, ...]:
    """Axes that a REDUCE op reduces, counted from 0."""
    rank = len(_shape(_operands(node)[0]))
    position = traits_of(node.target).axes_arg or 1
    axes = argument(node, position, "dim")
    if axes is None or axes == []:
        return tuple(range(rank))
    return tuple(sorted(int(a) % rank for a in ([axes] if isinstance(axes, int) else axes)))


def reduces_last(node: Node) -> bool:
    """Whether a REDUCE op reduces the last axis, so that its elements lie next to one another."""
    return len(_shape(_operands(node)[0])) - 1 in reduced_axes(node)


def _reduce(node: Node) -> list[OperandRead]:
    x = _operands(node)[0]
    rank, reduced = len(_shape(x)), reduced_axes(node)
    keeps = len(_shape(node)) == rank
    kept = [axis for axis in range(rank) if axis not in reduced]
    place = {axis: axis if keeps else index for index, axis in enumerate(kept)}
    return [OperandRead(x, tuple(WHOLE if axis in reduced else same(place[axis]) for axis in range(rank)))]


def _unknown(node: Node) -> list[OperandRead]:
    return [OperandRead(operand, (LOOKED_UP,) * len(_shape(operand))) for operand in _operands(node)]


def _permute(node: Node) -> list[OperandRead]:
    x = _operands(node)[0]
    rank = len(_shape(x))
    dims = [int(d) % rank for d in argument(node, 1, "dims")]
    return [OperandRead(x, tuple(same(dims.index(axis)) for axis in range(rank)))]


def _reshape(node: Node) -> list[OperandRead]:
    """Axes of equal size from the left stay, up to those of size 1; where sizes differ, elements move."""
    x = _operands(node)[0]
    old, new = _shape(x), _shape(node)
    axes: list[AxisRead] = []
    target = 0
    for axis, size in enumerate(old):
        if same_size(size, 1):
            axes.append(FIRST)
            continue
        while target < len(new) and same_size(new[target], 1):
            target += 1
        if target == len(new) or not same_size(size, new[target]):
            return [OperandRead(x, tuple(axes) + (MOVED,) * (len(old) - axis))]
        axes.append(same(target))
        target += 1
    return [OperandRead(x, tuple(axes))]


def _unsqueeze(node: Node) -> list[OperandRead]:
    x = _operands(node)[0]
    rank = len(_shape(x))
    dim = int(argument(node, 1, "dim")) % (rank + 1)
    return [OperandRead(x, tuple(same(axis + (axis >= dim)) for axis in range(rank)))]


def _slice(node: Node) -> list[OperandRead]:
    """A slice reads other places, also when it starts at 0: the result then has fewer tiles."""
    x = _operands(node)[0]
    rank = len(_shape(x))
    dim = int(argument(node, 1, "dim", 0)) % rank
    return [OperandRead(x, tuple(MOVED if axis == dim else same(axis) for axis in range(rank)))]


def _select(node: Node) -> list[OperandRead]:
    x = _operands(node)[0]
    rank = len(_shape(x))
    dim = int(argument(node, 1, "dim")) % rank
    return [OperandRead(x, tuple(MOVED if axis == dim else same(axis - (axis > dim)) for axis in range(rank)))]


def _cat(node: Node) -> list[OperandRead]:
    operands = _tensors(node.args[0])
    dim = int(argument(node, 1, "dim", 0)) % len(_shape(node))
    ranks = [len(_shape(operand)) for operand in operands]
    return [
        OperandRead(operand, tuple(MOVED if axis == dim else same(axis) for axis in range(rank)))
        for operand, rank in zip(operands, ranks, strict=True)
    ]


def _gather_rows(node: Node) -> list[OperandRead]:
    x, row_index = _operands(node)
    tail = (same(axis - 1) for axis in range(2, len(_shape(x))))
    return [OperandRead(x, (LOOKED_UP, LOOKED_UP, *tail)), OperandRead(row_index, (same(0),))]


def _scatter_rows(node: Node) -> list[OperandRead]:
    x, row_index, valid = _operands(node)
    tail = (same(axis + 1) for axis in range(1, len(_shape(x))))
    return [
        OperandRead(x, (LOOKED_UP, *tail)),
        OperandRead(row_index, (LOOKED_UP,)),
        OperandRead(valid, (same(0), same(1))),
    ]


def _select_rows(node: Node) -> list[OperandRead]:
    x, rows, *_ = _operands(node)
    tail = (same(axis) for axis in range(1, len(_shape(x))))
    return [OperandRead(x, (LOOKED_UP, *tail)), OperandRead(rows, (same(0),))]


def _column(node: Node) -> list[OperandRead]:
    x, column = _operands(node)
    tail = (same(axis - 1) for axis in range(2, len(_shape(x))))
    return [OperandRead(x, (same(0), LOOKED_UP, *tail)), OperandRead(column, (same(0),))]


_Rule = Callable[[Node], list[OperandRead]]
_BY_FLOW: dict[Flow, _Rule] = {
    Flow.POINTWISE: _pointwise,
    Flow.LAST_AXIS: _last_axis,
    Flow.CONTRACT: _contract,
    Flow.GROUPED: _grouped,
    Flow.LOOKUP: _lookup,
    Flow.COLUMN: _column,
    Flow.REDUCE: _reduce,
}
_BY_TARGET: dict[Any, _Rule] = {
    aten.permute.default: _permute,
    aten.unsqueeze.default: _unsqueeze,
    aten.squeeze.dims: _reshape,
    aten.expand.default: _pointwise,
    aten.reshape.default: _reshape,
    aten.slice.Tensor: _slice,
    aten.select.int: _select,
    aten.cat.default: _cat,
    aten.gather.default: _gather,
    packing.gather_rows.default: _gather_rows,
    packing.scatter_rows.default: _scatter_rows,
    packing.select_rows.default: _select_rows,
    packing.take_rows.default: _select_rows,
}
