"""One op, ``tilewright::head_linear``, for a product with a weight of each head, the same for all sequences.

In a product of batches [B * H, S, K] @ [B * H, K, N] the right side is then copies of [H, K, N], end to end: relative
positions meet the queries of each head so in DeBERTa.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch.fx import GraphModule, Node

from tilewright.ir.graph import Level, get_tensor
from tilewright.ops.head_linear import HEAD_LINEAR
from tilewright.passes.base import Pass, PassResult
from tilewright.passes.rewrite import Rewriter, dtype_of, erase_dead, is_call, operand, rank_of, shape_of

aten = torch.ops.aten


@dataclass(frozen=True)
class RecognizeHeadLinear(Pass):
    """Turns bmm and matmul with copies of a constant [H, K, N] into a linear of heads, its weight as [H * N, K]."""

    name: ClassVar[str] = "recognize_head_linear"
    requires: ClassVar[Level] = Level.EXPORTED
    ensures: ClassVar[Level] = Level.EXPORTED

    def run(self, gm: GraphModule) -> PassResult:
        rw = Rewriter(gm, self.name)
        weights: dict[tuple[Node, bool], Node] = {}
        found = 0
        for node in list(gm.graph.nodes):
            if is_call(node, aten.bmm.default, aten.matmul.default) and rank_of(node) in (3, 4):
                found += _rewrite(rw, node, weights)
        dead = erase_dead(gm)
        gm.recompile()
        return PassResult(gm, bool(found or dead), {"linear": found})


def _rewrite(rw: Rewriter, node: Node, weights: dict[tuple[Node, bool], Node]) -> bool:
    """Rows become [B, S, H, K], with each head's features behind one another, as a linear has left them."""
    rows, right = operand(node), operand(node, 1)
    turned = is_call(right, aten.permute.default) and _swaps_last(right)
    matrix = operand(right) if turned else right
    # One matrix a head beside [B, H, S, K] is itself the same for all sequences.
    source = matrix if matrix.op == "get_attr" and rank_of(rows) == rank_of(matrix) + 1 else _without_copies(matrix)
    if source is None or rank_of(source) < 3 or rank_of(rows) != rank_of(node) or dtype_of(source) != dtype_of(rows):
        return False
    heads, inner = shape_of(source)[-3], shape_of(source)[-1 if turned else -2]
    if rank_of(rows) == 4 and shape_of(rows)[1] != heads:
        return False
    length = rw.size(node, shape_of(rows)[-2], [rows])
    split = rows if rank_of(rows) == 4 else rw.call(node, aten.reshape.default, rows, [-1, heads, length, inner])
    moved = rw.call(node, aten.permute.default, split, [0, 2, 1, 3])
    product = rw.call(node, HEAD_LINEAR, moved, _weight(rw, source, turned, weights))
    out = rw.call(node, aten.permute.default, product, [0, 2, 1, 3])
    if rank_of(node) == 3:
        out = rw.call(node, aten.reshape.default, out, [-1, length, shape_of(node)[-1]])
    rw.replace(node, out)
    return True


def _swaps_last(node: Node) -> bool:
    rank = rank_of(node)
    return bool(operand(node, 1) == [*range(rank - 2), rank - 1, rank - 2])


def _without_copies(node: Node) -> Node | None:
    """The constant [H, a, b], or [1, H, a, b], whose copies for all sequences, [B, H, a, b] or [B * H, a, b], it is."""
    if is_call(node, aten.reshape.default) and rank_of(node) == 3:
        node = operand(node)
        if not (is_call(node, aten.expand.default) and rank_of(node) == 4):
            return None
    shape = shape_of(node)
    source = operand(node) if is_call(node, aten.expand.default) else node
    while is_call(source, aten.unsqueeze.default) and operand(source, 1) == 0:
        source = operand(source)
    known = source.op == "get_attr" and rank_of(node) == 4 and shape_of(source)[-3:] == shape[1:]
    return source if known and shape_of(source)[:-3] in ((), (1,)) else None


def _weight(rw: Rewriter, source: Node, turned: bool, weights: dict[tuple[Node, bool], Node]) -> Node:
    """[H, N, K], or [H, K, N] where not ``turned``, as [H * N, K]."""
    if (source, turned) not in weights:
        tensor = get_tensor(rw.gm, source)
        tensor = tensor if turned else tensor.transpose(-1, -2)
        weights[source, turned] = rw.constant(source, tensor.reshape(-1, tensor.shape[-1]))
    return weights[source, turned]
