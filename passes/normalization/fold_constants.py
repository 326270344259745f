"""Computes once, at compile time, what depends on constants alone."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch.fx import GraphModule, Node

from tilewright.ir.facts import TensorType, TupleType, fact, find_fact
from tilewright.ir.graph import Level, get_tensor
from tilewright.ops import Flow, traits_of
from tilewright.passes.base import Pass, PassResult
from tilewright.passes.rewrite import Rewriter, erase_dead, is_call, operand, shape_of

aten = torch.ops.aten
_SMALL = 1 << 16
_VIEWS = frozenset({"aten.permute.default", "aten.unsqueeze.default", "aten.squeeze.dims", "aten.reshape.default"})


@dataclass(frozen=True)
class FoldConstants(Pass):
    """Computes calls whose operands are all constants, where the result is a view of one, small, or no larger than one.

    Numbers that the graph makes itself (``arange``, ``full``) are constants where floats are computed from them, as the
    slopes of heads are. Of integers and bools masks are made, which are proved by their formulas.

    Weights are read when the model is compiled: a change of them afterwards is seen through views, not through what is
    computed here.
    """

    name: ClassVar[str] = "fold_constants"
    requires: ClassVar[Level] = Level.EXPORTED
    ensures: ClassVar[Level] = Level.EXPORTED

    def run(self, gm: GraphModule) -> PassResult:
        rw = Rewriter(gm, self.name)
        folded = sum(_fold(rw, node) or _fold_uniform(rw, node) for node in list(gm.graph.nodes))
        dead = erase_dead(gm)
        gm.recompile()
        return PassResult(gm, bool(folded or dead), {"folded": folded})


def _fold(rw: Rewriter, node: Node) -> bool:
    """Computes a call whose operands are all constants, if the result takes no more memory than they do, or little."""
    if node.op != "call_function" or find_fact(node, TensorType) is None or find_fact(node, TupleType) is not None:
        return False
    operands = node.all_input_nodes
    if not operands or not all(n.op == "get_attr" or _is_made(n) for n in operands) or not _folds(node):
        return False
    shape = shape_of(node)
    if not all(isinstance(size, int) for size in shape):
        return False
    numel = torch.Size(shape).numel()
    values = {n: n.target(*n.args, **n.kwargs) if _is_made(n) else get_tensor(rw.gm, n) for n in operands}  # type: ignore[operator]
    if any(value.is_meta for value in values.values()):
        return False  # contents come later, under the name they have now
    most = max(value.nbytes for value in values.values())
    if str(node.target) not in _VIEWS and numel > _SMALL and numel * fact(node, TensorType).dtype.itemsize > most:
        return False
    with torch.no_grad():
        result = node.target(  # type: ignore[operator]
            *torch.fx.node.map_arg(node.args, values.__getitem__),
            **torch.fx.node.map_arg(node.kwargs, values.__getitem__),
        )
    rw.replace(node, rw.constant(node, result))
    return True


def _is_made(node: Node) -> bool:
    """Whether it is a small tensor of fixed numbers."""
    if node.op != "call_function" or traits_of(node.target).flow is not Flow.CREATE or node.all_input_nodes:
        return False
    return torch.Size(shape_of(node)).numel() <= _SMALL


def _folds(node: Node) -> bool:
    """Whether it may be computed ahead, where all its operands are constants."""
    flow = traits_of(node.target).flow
    pointwise = flow is Flow.POINTWISE or torch.Tag.pointwise in getattr(node.target, "tags", ())
    if any(n.op != "get_attr" for n in node.all_input_nodes):
        return pointwise and fact(node, TensorType).dtype.is_floating_point
    return pointwise or flow not in (Flow.OTHER, Flow.LOOKUP, Flow.ATTENTION)


def _fold_uniform(rw: Rewriter, node: Node) -> bool:
    """Whatever is gathered from a table that holds one value everywhere is that value."""
    if not is_call(node, aten.gather.default, aten.index_select.default):
        return False
    table, index = operand(node), operand(node, 2)
    while is_call(table, aten.expand.default, aten.slice.Tensor, aten.unsqueeze.default):
        table = operand(table)
    if table.op != "get_attr" or not isinstance(index, Node):
        return False
    values = get_tensor(rw.gm, table)
    if values.numel() == 0 or values.dtype.is_floating_point or bool((values != values.reshape(-1)[0]).any()):
        return False
    sizes = [rw.size(node, size, [index]) for size in shape_of(node)]
    value, dtype = values.reshape(-1)[0].item(), values.dtype
    type_ = fact(node, TensorType)
    new = rw.call(node, aten.full.default, sizes, value, type=type_, dtype=dtype, device=values.device)
    rw.replace(node, new)
    return True
