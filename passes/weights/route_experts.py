"""RouteExperts: products of experts get tables of the rows that each expert has."""

import operator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch.fx import GraphModule, Node

from tilewright.ir.facts import TensorType, TupleType, copy_origin, fact, set_fact
from tilewright.ir.graph import Level
from tilewright.ir.layout import Layout, LayoutKind
from tilewright.ops.expert_blocks import EXPERT_BLOCK_LINEAR, GROUPED_BLOCK_LINEAR
from tilewright.ops.experts import EXPERT_LINEAR, GROUPED_LINEAR, ROUTE
from tilewright.passes.base import Pass, PassResult
from tilewright.passes.rewrite import Rewriter, operand

_TABLE = Layout(LayoutKind.TABLE)
_GROUPED = {EXPERT_LINEAR: GROUPED_LINEAR, EXPERT_BLOCK_LINEAR: GROUPED_BLOCK_LINEAR}


@dataclass(frozen=True)
class RouteExperts(Pass):
    """Turns ``expert_linear`` into ``grouped_linear``, and that with weights in blocks likewise. Exact.

    Products of rows with the same experts share one table.

    Until here a product of experts works row by row, so it packs like any other row-wise op. From here on its kernel
    goes expert by expert: it reads each weight once, and those of experts without a row not at all.
    """

    name: ClassVar[str] = "route_experts"
    requires: ClassVar[Level] = Level.PACKED
    ensures: ClassVar[Level] = Level.PACKED

    def run(self, gm: GraphModule) -> PassResult:
        """Rewrites ``gm`` in place."""
        rw = Rewriter(gm, self.name)
        tables: dict[tuple[Node, int], tuple[Node, Node]] = {}
        found = [node for node in gm.graph.nodes if node.op == "call_function" and node.target in _GROUPED]
        for node in found:
            x, weight, experts = (operand(node, place) for place in range(3))
            key = experts, int(fact(weight, TensorType).shape[0])
            if key not in tables:
                tables[key] = _route(rw, node, *key)
            rest = node.args[3:]  # the format of a weight in blocks
            type_ = fact(node, TensorType)
            made = rw.call(node, _GROUPED[node.target], x, weight, experts, *tables[key], *rest, type=type_)
            set_fact(made, fact(node, Layout))
            rw.replace(node, made)
        gm.recompile()
        counts = {"products": len(found), "tables": len(tables)}
        return PassResult(gm, bool(found), {topic: count for topic, count in counts.items() if count})


def _route(rw: Rewriter, before: Node, experts: Node, count: int) -> tuple[Node, Node]:
    kinds = TensorType((count + 1,), torch.int32), TensorType(fact(experts, TensorType).shape, torch.int32)
    with rw.graph.inserting_before(before):
        made = rw.graph.call_function(ROUTE, (experts, count))
        items = [rw.graph.call_function(operator.getitem, (made, place)) for place in range(len(kinds))]
    set_fact(made, TupleType(kinds))
    for node, kind in zip(items, kinds, strict=True):
        set_fact(node, kind)
        set_fact(node, _TABLE)
    for node in (made, *items):
        copy_origin(experts, node, rw.name)
    return items[0], items[1]
