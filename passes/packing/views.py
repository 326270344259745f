"""The packed form of each view op: the same movement, once batch and sequence are one axis."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.fx import Node

from tilewright.errors import TilewrightError
from tilewright.ir.facts import TensorType, fact, where
from tilewright.ir.layout import Layout, LayoutKind, packed_type, rest_axes
from tilewright.passes.layout.axes import positional, shape_of, tensor_operands
from tilewright.passes.packing.builder import PackingBuilder

aten = torch.ops.aten


def packed_view(
    build: PackingBuilder,
    node: Node,
    rows: Sequence[Node],
    source: Layout,
    layout: Layout,
    plain: Callable[[Node], Node],
) -> Node:
    """Writes the packed form of the view ``node``.

    Args:
        build: adds the nodes.
        node: a view of the old graph with both token axes kept.
        rows: packed forms of its tensor operands.
        source: layout of its first operand.
        layout: layout of its result.
        plain: form in the new graph of the sizes it reads.
    """
    type_ = packed_type(fact(node, TensorType), layout)
    packed = Layout(LayoutKind.PACKED, layout.batch_axis, layout.seq_axis)
    args = positional(node)
    rank = len(shape_of(tensor_operands(node)[0]))

    def packed_axis(axis: int, of: Layout, of_rank: int) -> int:
        return 1 + rest_axes(of_rank, of).index(axis % of_rank)

    def with_args(*new: Any) -> Node:
        return build.packed_call(node, new, {}, type_, (layout.batch_axis, layout.seq_axis))

    if node.target is aten.reshape.default:
        return build.reshape(rows[0], type_.shape, node, packed)
    if node.target is aten.expand.default:
        return build.expand(rows[0], type_.shape, node, packed)
    if node.target is aten.permute.default:
        dims = [int(dim) % rank for dim in args[1]]
        order = [packed_axis(dim, source, rank) for dim in dims if dim not in source.token_axes]
        return build.permute(rows[0], [0, *order], node, packed)
    if node.target is aten.unsqueeze.default:
        return with_args(rows[0], packed_axis(int(args[1]), layout, rank + 1))
    if node.target is aten.squeeze.dims:
        return with_args(rows[0], [packed_axis(int(dim), source, rank) for dim in args[1]])
    if node.target is aten.slice.Tensor:
        bounds = [plain(bound) if isinstance(bound, Node) else bound for bound in args[2:]]
        return with_args(rows[0], packed_axis(int(args[1]), source, rank), *bounds)
    if node.target is aten.select.int:
        index = plain(args[2]) if isinstance(args[2], Node) else args[2]
        return with_args(rows[0], packed_axis(int(args[1]), source, rank), index)
    if node.target is aten.cat.default:
        return with_args(list(rows), packed_axis(int(args[1]), source, rank))
    raise TilewrightError(f"view {node.target} has no packed form", where=where(node))
