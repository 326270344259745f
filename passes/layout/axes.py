"""Where the batch and sequence axes of a value are after a view, a reduction or a broadcast.

A rule answers for both axes at once: the position of each in the result, or None for one that is lost, because elements
of different places meet in it or because one place is cut out.
"""

from collections.abc import Callable, Sequence
from typing import Any

import sympy
import torch
from torch.fx import Node

from tilewright.ir.facts import TensorType, fact, find_fact
from tilewright.ir.sizes import BATCH, SEQ, Size
from tilewright.ir.views import same_size
from tilewright.ops import traits_of

aten = torch.ops.aten
Axes = tuple[int | None, int | None]
NO_AXES: Axes = (None, None)


def shape_of(node: Node) -> tuple[Size, ...]:
    """Shape of a tensor node, from its type."""
    return fact(node, TensorType).shape


def symbols_in(shape: Sequence[Size]) -> set[sympy.Symbol]:
    """Size symbols a shape is made of."""
    return {symbol for size in shape for symbol in getattr(size, "free_symbols", ())}


def positional(node: Node) -> list[Any]:
    """The call's positional arguments with defaults filled in, in the order of the op's schema."""
    schema = getattr(node.target, "_schema", None)
    if schema is None:
        return list(node.args)
    values: list[Any] = []
    for position, parameter in enumerate(schema.arguments):
        if parameter.kwarg_only:
            break
        default = parameter.default_value if parameter.has_default_value() else None
        given = node.args[position] if position < len(node.args) else node.kwargs.get(parameter.name, default)
        values.append(given)
    return values


def tensor_operands(node: Node) -> list[Node]:
    """The tensors a node reads, each once, in order."""
    return [operand for operand in node.all_input_nodes if find_fact(operand, TensorType) is not None]


def worked_axes(node: Node) -> set[int]:
    """Axes of the first tensor operand along which the op mixes elements, counted from 0, by its traits."""
    traits, args = traits_of(node.target), positional(node)
    rank = len(shape_of(tensor_operands(node)[0]))
    if traits.axes_arg is not None:
        named = args[traits.axes_arg]
        axes = [named] if isinstance(named, int) else list(named or range(rank))
        return {int(axis) % max(rank, 1) for axis in axes}
    trailing = len(args[traits.shape_arg]) if traits.shape_arg is not None else 1
    return set(range(rank - trailing, rank))


def axes_by_shape(shape: Sequence[Size]) -> Axes:
    """The axes whose sizes are exactly B and S, where there is one of each kind at most."""
    found = [[axis for axis, size in enumerate(shape) if same_size(size, symbol)] for symbol in (BATCH, SEQ)]
    batch, seq = (axes[0] if len(axes) == 1 else None for axes in found)
    return batch, seq


def move(axes: Axes, place: Callable[[int], int | None]) -> Axes:
    """Both axes through one map of positions."""
    batch, seq = axes
    return (None if batch is None else place(batch)), (None if seq is None else place(seq))


def without(axes: Axes, removed: set[int]) -> Axes:
    """Positions once the ``removed`` axes are gone; a removed one is lost."""
    return move(axes, lambda axis: None if axis in removed else axis - sum(1 for r in removed if r < axis))


def carried_axes(node: Node, source: Node, axes: Axes) -> Axes | None:
    """Where ``axes`` of the view's operand ``source`` are in its result; None for a view without a rule here."""
    rule = _VIEW_RULES.get(node.target)
    if rule is None:
        return None
    return rule(node, shape_of(source), shape_of(node), axes)


def _permute(node: Node, before: Sequence[Size], after: Sequence[Size], axes: Axes) -> Axes:
    dims = [int(dim) % len(before) for dim in positional(node)[1]]
    return move(axes, dims.index)


def _unsqueeze(node: Node, before: Sequence[Size], after: Sequence[Size], axes: Axes) -> Axes:
    dim = int(positional(node)[1]) % len(after)
    return move(axes, lambda axis: axis + (axis >= dim))


def _squeeze(node: Node, before: Sequence[Size], after: Sequence[Size], axes: Axes) -> Axes:
    dims = {int(dim) % len(before) for dim in positional(node)[1]}
    return without(axes, {dim for dim in dims if same_size(before[dim], 1)})


def _expand(node: Node, before: Sequence[Size], after: Sequence[Size], axes: Axes) -> Axes:
    added = len(after) - len(before)
    batch, seq = move(axes, lambda axis: axis + added)
    fresh = [a if axis < added or not same_size(a, before[axis - added]) else 1 for axis, a in enumerate(after)]
    new_batch, new_seq = axes_by_shape(fresh)
    return (new_batch if batch is None else batch), (new_seq if seq is None else seq)


def _slice(node: Node, before: Sequence[Size], after: Sequence[Size], axes: Axes) -> Axes:
    dim = int(positional(node)[1]) % len(before)
    if all(axis != dim for axis in axes):
        by_shape = axes_by_shape([size if axis == dim else 1 for axis, size in enumerate(after)])
        # A table cut to the length of the batch becomes column values.
        return (by_shape[0] if axes[0] is None else axes[0]), (by_shape[1] if axes[1] is None else axes[1])
    return move(axes, lambda axis: None if axis == dim else axis)


def _select(node: Node, before: Sequence[Size], after: Sequence[Size], axes: Axes) -> Axes:
    return without(axes, {int(positional(node)[1]) % len(before)})


def _cat(node: Node, before: Sequence[Size], after: Sequence[Size], axes: Axes) -> Axes:
    dim = int(positional(node)[1]) % len(before)
    return move(axes, lambda axis: None if axis == dim else axis)


def _groups(before: Sequence[Size], after: Sequence[Size]) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Smallest groups of neighbouring axes that a reshape maps to one another; axes of size 1 belong to none."""
    sides = []
    for shape in (before, after):
        axes = [axis for axis, size in enumerate(shape) if not same_size(size, 1)]
        ends: dict[Any, int] = {}
        total: Size = 1
        for count, axis in enumerate(axes, start=1):
            total = sympy.expand(total * shape[axis])
            ends[total] = count
        sides.append((axes, ends))
    (left, left_ends), (right, right_ends) = sides
    groups, start, other = [], 0, 0
    for total, end in left_ends.items():
        if total in right_ends:
            groups.append((tuple(left[start:end]), tuple(right[other : right_ends[total]])))
            start, other = end, right_ends[total]
    return groups


def _reshape(node: Node, before: Sequence[Size], after: Sequence[Size], axes: Axes) -> Axes:
    batch, seq = axes
    groups = _groups(before, after)
    inside = {axis: group for group in groups for axis in group[0]}

    def alone(axis: int | None) -> int | None:
        sources, results = inside.get(axis, ((), ())) if axis is not None else ((), ())
        return results[0] if len(sources) == 1 and len(results) == 1 else None

    if batch is None or seq is None:
        return alone(batch), alone(seq)
    if batch == seq:
        sources, results = inside.get(batch, ((), ()))
        split = [after[axis] for axis in results]
        if len(sources) == 1 and len(results) == 2 and same_size(split[0], BATCH) and same_size(split[1], SEQ):
            return results[0], results[1]
        return alone(batch), alone(batch)
    if inside.get(batch) is inside.get(seq):
        sources, results = inside.get(batch, ((), ()))
        # Rows are numbered sequence by sequence only if the batch is the outer axis of the two.
        return (results[0], results[0]) if sources == (batch, seq) and len(results) == 1 else NO_AXES
    return alone(batch), alone(seq)


_VIEW_RULES: dict[Any, Callable[[Node, Sequence[Size], Sequence[Size], Axes], Axes]] = {
    aten.permute.default: _permute,
    aten.unsqueeze.default: _unsqueeze,
    aten.squeeze.dims: _squeeze,
    aten.expand.default: _expand,
    aten.slice.Tensor: _slice,
    aten.select.int: _select,
    aten.cat.default: _cat,
    aten.reshape.default: _reshape,
}
