"""RecognizeTopK: the k largest along the last axis as two ops with one result each."""

import operator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch.fx import GraphModule, Node

from tilewright.ir.graph import Level
from tilewright.ops.selection import TOP_INDICES
from tilewright.passes.base import Pass, PassResult
from tilewright.passes.rewrite import Rewriter, argument, dtype_of, erase_dead, is_call, operand, rank_of

aten = torch.ops.aten


@dataclass(frozen=True)
class RecognizeTopK(Pass):
    """Turns ``topk`` into ``tilewright::top_indices`` and a ``gather`` of the values at these places. Exact.

    Of equal elements torch may choose any; after this pass the one further left comes first. A ``topk`` of the smallest
    elements or along another axis stays, as does one of integers.
    """

    name: ClassVar[str] = "recognize_top_k"
    requires: ClassVar[Level] = Level.EXPORTED
    ensures: ClassVar[Level] = Level.EXPORTED

    def run(self, gm: GraphModule) -> PassResult:
        """Rewrites ``gm`` in place."""
        rw = Rewriter(gm, self.name)
        found = 0
        for node in [node for node in gm.graph.nodes if is_call(node, aten.topk.default) and _fits(node)]:
            found += 1
            x, axis = operand(node), rank_of(operand(node)) - 1
            indices = rw.call(node, TOP_INDICES, x, operand(node, 1))
            values = rw.call(node, aten.gather.default, x, axis, indices)
            for item in list(node.users):
                rw.replace(item, (values, indices)[operand(item, 1)])
        if found:
            erase_dead(gm)
            gm.recompile()
        return PassResult(gm, found > 0, {"top_k": found} if found else {})


def _fits(node: Node) -> bool:
    x, largest = operand(node), argument(node, 3, "largest", True)
    rank = rank_of(x)
    if rank == 0 or not largest or not dtype_of(x).is_floating_point or not isinstance(operand(node, 1), int):
        return False
    only_items = all(is_call(user, operator.getitem) for user in node.users)
    return only_items and int(argument(node, 2, "dim", -1)) % rank == rank - 1
