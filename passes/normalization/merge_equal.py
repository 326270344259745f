"""Merges equal calls and removes what nothing uses: the last pass before the normalized level."""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch.fx import GraphModule, Node

from tilewright.ir.graph import Level
from tilewright.passes.base import Pass, PassResult
from tilewright.passes.rewrite import Rewriter, erase_dead


@dataclass(frozen=True)
class MergeEqual(Pass):
    """Keeps one of several calls of the same op on the same operands."""

    name: ClassVar[str] = "merge_equal"
    requires: ClassVar[Level] = Level.EXPORTED
    ensures: ClassVar[Level] = Level.NORMALIZED

    def run(self, gm: GraphModule) -> PassResult:
        merged = _merge(Rewriter(gm, self.name))
        dead = erase_dead(gm)
        gm.recompile()
        return PassResult(gm, bool(merged or dead), {"merged": merged, "removed": dead})


def _merge(rw: Rewriter) -> int:
    """Merges calls of the same op on the same operands: nothing in a graph mutates or draws random numbers."""
    seen: dict[Any, Node] = {}
    merged = 0
    for node in list(rw.graph.nodes):
        if node.op not in ("call_function", "get_attr"):
            continue
        key = (node.op, node.target, _frozen(node.args), _frozen(node.kwargs))
        first = seen.setdefault(key, node)
        if first is not node:
            rw.replace(node, first)
            merged += 1
    return merged


def _frozen(value: Any) -> Any:
    """Arguments as a hashable value; numbers of different type stay apart."""
    if isinstance(value, list | tuple):
        return tuple(_frozen(item) for item in value)
    if isinstance(value, dict):
        return tuple(sorted((key, _frozen(item)) for key, item in value.items()))
    return (
        value
        if isinstance(value, Node | torch.dtype | torch.device | type(None))
        else (type(value).__name__, repr(value))
    )
