"""Folds constants, merges equal calls, removes what nothing uses; the result is a normalized graph."""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch.fx import GraphModule, Node

from tilewright.ir.facts import TensorType, TupleType, find_fact
from tilewright.ir.graph import Level, get_tensor
from tilewright.ops import Flow, traits_of
from tilewright.passes.base import Pass, PassResult
from tilewright.passes.rewrite import Rewriter, erase_dead, shape_of

_SMALL = 1 << 16
_VIEWS = frozenset({"aten.permute.default", "aten.unsqueeze.default", "aten.squeeze.dims", "aten.reshape.default"})


@dataclass(frozen=True)
class Simplify(Pass):
    """Folds, merges and removes; the last pass before the normalized level."""

    name: ClassVar[str] = "simplify"
    requires: ClassVar[Level] = Level.EXPORTED
    ensures: ClassVar[Level] = Level.NORMALIZED

    def run(self, gm: GraphModule) -> PassResult:
        rw = Rewriter(gm, self.name)
        dead = erase_dead(gm)
        folded = sum(_fold(rw, node) for node in list(gm.graph.nodes))
        merged = _merge(rw)
        dead += erase_dead(gm)
        gm.recompile()
        return PassResult(gm, bool(folded or merged or dead), {"folded": folded, "merged": merged, "removed": dead})


def _fold(rw: Rewriter, node: Node) -> bool:
    """Computes a call whose operands are all constants, if the result is a view or small."""
    if node.op != "call_function" or find_fact(node, TensorType) is None or find_fact(node, TupleType) is not None:
        return False
    operands = node.all_input_nodes
    flow = traits_of(node.target).flow
    if not operands or any(n.op != "get_attr" for n in operands) or flow in (Flow.OTHER, Flow.LOOKUP, Flow.ATTENTION):
        return False
    shape = shape_of(node)
    if not all(isinstance(size, int) for size in shape):
        return False
    numel = torch.Size(shape).numel()  # type: ignore[arg-type]
    if str(node.target) not in _VIEWS and numel > _SMALL:
        return False
    values = {n: get_tensor(rw.gm, n) for n in operands}
    with torch.no_grad():
        result = node.target(  # type: ignore[operator]
            *torch.fx.node.map_arg(node.args, values.__getitem__),
            **torch.fx.node.map_arg(node.kwargs, values.__getitem__),
        )
    rw.replace(node, rw.constant(node, result))
    return True


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
