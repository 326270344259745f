"""One spelling for ops that only move elements; those that move nothing are removed."""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch.fx import GraphModule, Node

from tilewright.ir.facts import TensorType, TupleType, fact
from tilewright.ir.graph import Level, get_tensor
from tilewright.ir.sizes import Size
from tilewright.passes.base import Pass, PassResult
from tilewright.passes.normalization.rule_table import RuleTable
from tilewright.passes.rewrite import Rewriter, argument, is_call, operand, rank_of, shape_of, size_value

aten = torch.ops.aten
_TABLE = RuleTable()
_rule = _TABLE.rule


@dataclass(frozen=True)
class NormalizeViews(Pass):
    """Rewrites views to reshape, permute, unsqueeze, squeeze.dims, expand, slice, select.int and cat, axes from 0."""

    name: ClassVar[str] = "normalize_views"
    requires: ClassVar[Level] = Level.EXPORTED
    ensures: ClassVar[Level] = Level.EXPORTED

    def run(self, gm: GraphModule) -> PassResult:
        return _TABLE.apply(gm, self.name, "views")


def _axis(axis: Any, rank: int) -> int:
    return int(axis) % rank if rank else 0


@_rule(
    aten.contiguous.default, aten.alias.default, aten.detach.default, aten.clone.default, aten.lift_fresh_copy.default,
    aten.lift.default, aten.positive.default, aten.resolve_conj.default,
    aten.resolve_neg.default,
)  # fmt: skip
def _identity(rw: Rewriter, node: Node) -> Node | None:
    return operand(node)


@_rule(aten.dropout.default, aten.native_dropout.default, aten.feature_dropout.default, aten.alpha_dropout.default)
def _dropout(rw: Rewriter, node: Node) -> Node | None:
    return operand(node) if operand(node, 2) is False or operand(node, 1) == 0 else None


@_rule(
    aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.flatten.using_ints, aten.unflatten.int,
    aten.view_as.default, aten.reshape_as.default,
)  # fmt: skip
def _reshape(rw: Rewriter, node: Node) -> Node | None:
    source = operand(node)
    while is_call(source, aten.reshape.default):
        source = operand(source)
    type_ = fact(node, TensorType)
    if type_.shape == shape_of(source):
        return source
    given = (
        operand(node, 1) if node.target in (aten.view.default, aten.reshape.default, aten._unsafe_view.default) else []
    )
    sizes = _size_arguments(rw, node, type_.shape, list(given), source)
    if is_call(node, aten.reshape.default) and node.args == (source, sizes):
        return None
    return rw.call(node, aten.reshape.default, source, sizes, type=type_)


def _size_arguments(rw: Rewriter, node: Node, shape: tuple[Size, ...], given: list[Any], source: Node) -> list[Any]:
    """Sizes as ints where they are constant, else as the nodes given; -1 for at most one size no node stands for."""
    known = [arg for arg in given if isinstance(arg, Node)]
    sizes: list[Any] = []
    missing = [s for s in shape if not isinstance(s, int) and not any(size_value(k) == s for k in known)]
    if len(missing) > 1 and len(given) == len(shape):
        # Sizes that are written in another way than they were inferred: one by one as they were given.
        return [size if isinstance(size, int) else arg for size, arg in zip(shape, given, strict=True)]
    for size in shape:
        if isinstance(size, int):
            sizes.append(size)
            continue
        node_of = next((k for k in known if size_value(k) == size), None)
        if node_of is None and len(missing) == 1:
            sizes.append(-1)
        else:
            sizes.append(node_of if node_of is not None else rw.size(node, size, [source]))
    return sizes


@_rule(
    aten.permute.default, aten.transpose.int, aten.t.default, aten.numpy_T.default, aten.mT.default,
    aten.swapaxes.default, aten.swapdims.default, aten.movedim.int, aten.movedim.intlist,
)  # fmt: skip
def _permute(rw: Rewriter, node: Node) -> Node | None:
    source = operand(node)
    order = _order(node, rank_of(source))
    if is_call(source, aten.permute.default):
        inner = source.args[1]
        order = [inner[i] for i in order]
        source = operand(source)
    if order == sorted(order):
        return source
    if is_call(node, aten.permute.default) and node.args == (source, order):
        return None
    return rw.call(node, aten.permute.default, source, order, type=fact(node, TensorType))


def _order(node: Node, rank: int) -> list[int]:
    """The permutation: axis i of the result is axis order[i] of the operand, read off a tensor of sizes that differ."""
    probe = torch.empty(tuple(range(2, rank + 2)), device="meta")
    move: Any = node.target
    moved: torch.Tensor = move(probe, *node.args[1:])
    return [size - 2 for size in moved.shape]


@_rule(aten.unsqueeze.default)
def _unsqueeze(rw: Rewriter, node: Node) -> Node | None:
    source = operand(node)
    axis = _axis(operand(node, 1), rank_of(source) + 1)
    if axis == operand(node, 1):
        return None
    return rw.call(node, aten.unsqueeze.default, source, axis, type=fact(node, TensorType))


@_rule(aten.squeeze.default, aten.squeeze.dim, aten.squeeze.dims)
def _squeeze(rw: Rewriter, node: Node) -> Node | None:
    source = operand(node)
    shape = shape_of(source)
    wanted = operand(node, 1) if len(node.args) > 1 else list(range(len(shape)))
    wanted = [wanted] if isinstance(wanted, int) else wanted
    axes = sorted({_axis(a, len(shape)) for a in wanted if shape[_axis(a, len(shape))] == 1})
    if not axes:
        return source
    if is_call(node, aten.squeeze.dims) and operand(node, 1) == axes:
        return None
    return rw.call(node, aten.squeeze.dims, source, axes, type=fact(node, TensorType))


@_rule(aten.expand.default, aten.expand_as.default, aten.broadcast_to.default)
def _expand(rw: Rewriter, node: Node) -> Node | None:
    source = operand(node)
    type_ = fact(node, TensorType)
    if type_.shape == shape_of(source):
        return source
    if is_call(node, aten.expand_as.default):
        other = operand(node, 1)
        sizes: list[Any] = [rw.size(node, s, [other]) for s in type_.shape]
    else:
        offset = len(type_.shape) - rank_of(source)
        kept = (None,) * offset + shape_of(source)
        pairs = zip(operand(node, 1), type_.shape, kept, strict=True)
        sizes = [size if isinstance(size, int) else -1 if size == old else arg for arg, size, old in pairs]
    if is_call(node, aten.expand.default) and operand(node, 1) == sizes:
        return None
    return rw.call(node, aten.expand.default, source, sizes, type=type_)


@_rule(aten.repeat.default)
def _repeat(rw: Rewriter, node: Node) -> Node | None:
    """Copies end to end along an axis: an axis of copies in front of it, which is joined with it."""
    source, counts, type_ = operand(node), operand(node, 1), fact(node, TensorType)
    shape = (1,) * (len(counts) - rank_of(source)) + shape_of(source)
    for _ in range(len(counts) - rank_of(source)):
        source = rw.call(node, aten.unsqueeze.default, source, 0)
    wide: list[Any] = []
    for count, size in zip(counts, shape, strict=True):
        if count != 1 and size != 1:
            source = rw.call(node, aten.unsqueeze.default, source, len(wide))
            wide.append(count)
        wide.append(count if count != 1 and size == 1 else -1)
    if wide.count(-1) < len(wide):
        source = rw.call(node, aten.expand.default, source, wide)
    if len(wide) == len(counts):
        return source
    known = shape_of(source)
    sizes = [s if isinstance(s, int) else rw.size(node, s, [source]) if s in known else -1 for s in type_.shape]
    return rw.call(node, aten.reshape.default, source, sizes, type=type_) if sizes.count(-1) < 2 else None


@_rule(aten.repeat_interleave.self_int)
def _repeat_interleave(rw: Rewriter, node: Node) -> Node | None:
    """Each element some times in a row along an axis: an axis of copies behind it, which is joined with it."""
    source, count, axis = operand(node), operand(node, 1), argument(node, 2, "dim")
    if axis is None:
        return None
    axis, type_ = _axis(axis, rank_of(source)), fact(node, TensorType)
    copies = rw.call(node, aten.unsqueeze.default, source, axis + 1)
    copies = rw.call(
        node, aten.expand.default, copies, [-1] * (axis + 1) + [count] + [-1] * (rank_of(copies) - axis - 2)
    )
    sizes = [
        s if isinstance(s, int) else -1 if i == axis else rw.size(node, s, [source]) for i, s in enumerate(type_.shape)
    ]
    return rw.call(node, aten.reshape.default, copies, sizes, type=type_)


@_rule(aten.slice.Tensor)
def _slice(rw: Rewriter, node: Node) -> Node | None:
    source = operand(node)
    axis = _axis(argument(node, 1, "dim", 0), rank_of(source))
    start, end, step = argument(node, 2, "start"), argument(node, 3, "end"), argument(node, 4, "step", 1)
    old, new = shape_of(source)[axis], shape_of(node)[axis]
    start = 0 if start is None else start
    if step == 1 and old == new:  # as many as there are: all of them, wherever the start is counted from
        return source
    if isinstance(old, int) and isinstance(start, int):
        start = max(0, start + old if start < 0 else start)
    if isinstance(new, int) and isinstance(start, int) and start >= 0 and step == 1:
        end = start + new
    elif end is None:
        end = 2**63 - 1
    if node.args == (source, axis, start, end, step):
        return None
    return rw.call(node, aten.slice.Tensor, source, axis, start, end, step, type=fact(node, TensorType))


@_rule(aten.index.Tensor)
def _index(rw: Rewriter, node: Node) -> Node | None:
    """Advanced indexing along one axis by constant neighbours, ``x[:, [-2]]``, is a slice."""
    source, indices = operand(node), list(operand(node, 1))
    given = [(axis, index) for axis, index in enumerate(indices) if index is not None]
    if len(given) != 1 or given[0][1].op != "get_attr" or rank_of(given[0][1]) != 1:
        return None
    (axis, index), size = given[0], shape_of(source)[given[0][0]]
    places = get_tensor(rw.gm, index)
    if not isinstance(size, int) or places.dtype not in (torch.int32, torch.int64) or not 0 < len(places) <= size:
        return None
    start = int(places[0]) % size
    rising = torch.arange(start, start + len(places), dtype=places.dtype, device=places.device)
    if not torch.equal(places % size, rising) or not bool(((places >= -size) & (places < size)).all()):
        return None
    return rw.call(node, aten.slice.Tensor, source, axis, start, start + len(places), 1, type=fact(node, TensorType))


@_rule(aten.select.int)
def _select(rw: Rewriter, node: Node) -> Node | None:
    source = operand(node)
    axis, index = _axis(operand(node, 1), rank_of(source)), operand(node, 2)
    size = shape_of(source)[axis]
    if isinstance(size, int) and isinstance(index, int):
        index %= size
    if node.args == (source, axis, index):
        return None
    return rw.call(node, aten.select.int, source, axis, index, type=fact(node, TensorType))


@_rule(aten.cat.default)
def _cat(rw: Rewriter, node: Node) -> Node | None:
    axis = _axis(argument(node, 1, "dim", 0), rank_of(node))
    # torch takes an empty tensor of one axis beside any others and ignores it.
    parts = [part for part in operand(node) if shape_of(part) != (0,)] or list(operand(node))
    if len(parts) == 1:
        return parts[0]
    if node.args == (parts, axis):
        return None
    return rw.call(node, aten.cat.default, parts, axis, type=fact(node, TensorType))


@_rule(aten.stack.default)
def _stack(rw: Rewriter, node: Node) -> Node | None:
    axis = _axis(argument(node, 1, "dim", 0), rank_of(node))
    parts = [rw.call(node, aten.unsqueeze.default, part, axis) for part in operand(node)]
    return rw.call(node, aten.cat.default, parts, axis, type=fact(node, TensorType))


@_rule(
    aten.split.Tensor, aten.split_with_sizes.default, aten.chunk.default, aten.unbind.int, aten.split.sizes,
    aten.unsafe_split.Tensor, aten.unsafe_chunk.default,
)  # fmt: skip
def _split(rw: Rewriter, node: Node) -> Node | None:
    """Each part that is used becomes a slice (of unbind: a select)."""
    source = operand(node)
    by_one = node.target is aten.unbind.int
    axis = _axis(argument(node, 1 if by_one else 2, "dim", 0), rank_of(source))
    parts = sorted(node.users, key=lambda user: operand(user, 1))
    sizes = [] if by_one else _part_sizes(node, axis)
    if sizes is None:
        return None
    for part in parts:
        index = operand(part, 1)
        type_ = fact(part, TensorType)
        if by_one:
            new = rw.call(part, aten.select.int, source, axis, index, type=type_)
        else:
            start = sum(sizes[:index])
            new = rw.call(part, aten.slice.Tensor, source, axis, start, start + sizes[index], 1, type=type_)
        rw.replace(part, new)
    return None


def _part_sizes(node: Node, axis: int) -> list[int] | None:
    sizes = [item.shape[axis] for item in fact(node, TupleType).items]
    return [int(s) for s in sizes] if all(isinstance(s, int) for s in sizes) else None


@_rule(aten.embedding.default)
def _embedding(rw: Rewriter, node: Node) -> Node | None:
    """The arguments after the indices matter in training only."""
    if len(node.args) == 2 and not node.kwargs:
        return None
    return rw.call(node, aten.embedding.default, *node.args[:2], type=fact(node, TensorType))
