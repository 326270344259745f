"""One op, ``aten.linear``, for every product of rows with a weight."""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch.fx import GraphModule, Node

from tilewright.ir.facts import TensorType, fact
from tilewright.ir.graph import Level, get_tensor
from tilewright.passes.base import Pass, PassResult
from tilewright.passes.rewrite import Rewriter, argument, dtype_of, erase_dead, is_call, operand, rank_of, shape_of

aten = torch.ops.aten


@dataclass(frozen=True)
class RecognizeLinear(Pass):
    """Turns mm, addmm and matmul with a constant [K, N] into linear with the weight as [N, K], with its bias."""

    name: ClassVar[str] = "recognize_linear"
    requires: ClassVar[Level] = Level.EXPORTED
    ensures: ClassVar[Level] = Level.EXPORTED

    def run(self, gm: GraphModule) -> PassResult:
        rw = Rewriter(gm, self.name)
        weights: dict[Node, Node] = {}
        found = 0
        for node in list(gm.graph.nodes):
            new = _linear(rw, node, weights)
            if new is not None:
                rw.replace(node, new)
                found += 1
        found += sum(_unflatten(rw, node) for node in list(gm.graph.nodes))
        found += sum(_join_bias(rw, node) for node in list(gm.graph.nodes))
        dead = erase_dead(gm)
        gm.recompile()
        return PassResult(gm, bool(found or dead), {"linear": found})


def _linear(rw: Rewriter, node: Node, weights: dict[Node, Node]) -> Node | None:
    bias: Any = None
    if is_call(node, aten.mm.default, aten.matmul.default):
        rows, matrix = operand(node), operand(node, 1)
    elif is_call(node, aten.addmm.default):
        bias, rows, matrix = node.args[:3]
        scaled = argument(node, 3, "beta", 1) != 1 or argument(node, 4, "alpha", 1) != 1
        if scaled or rank_of(bias) != 1:
            return None
    else:
        return None
    if rank_of(matrix) != 2 or rank_of(rows) < 2:
        return None
    weight = _weight(rw, matrix, weights)
    if weight is None:
        return None
    args = (rows, weight) if bias is None else (rows, weight, bias)
    return rw.call(node, aten.linear.default, *args, type=fact(node, TensorType))


def _weight(rw: Rewriter, matrix: Node, weights: dict[Node, Node]) -> Node | None:
    """The constant [K, N] as a constant [N, K]; a view, so it shares storage with the model."""
    if is_call(matrix, aten.permute.default) and operand(matrix).op == "get_attr":
        return operand(matrix)
    if matrix.op != "get_attr":
        return None
    if matrix not in weights:
        weights[matrix] = rw.constant(matrix, get_tensor(rw.gm, matrix).t())
    return weights[matrix]


def _unflatten(rw: Rewriter, node: Node) -> bool:
    """reshape(linear(reshape(x, [rows, K])), [.., N]) is linear(x): it takes any leading axes."""
    if not is_call(node, aten.reshape.default) or not is_call(operand(node), aten.linear.default):
        return False
    product = operand(node)
    flat = operand(product)
    if not is_call(flat, aten.reshape.default):
        return False
    source = operand(flat)
    type_ = fact(node, TensorType)
    if shape_of(source)[:-1] != type_.shape[:-1] or shape_of(source)[-1:] != shape_of(flat)[-1:]:
        return False
    if shape_of(product)[-1:] != type_.shape[-1:]:
        return False
    rw.replace(node, rw.call(node, aten.linear.default, source, *product.args[1:], type=type_))
    return True


def _join_bias(rw: Rewriter, node: Node) -> bool:
    """linear(x, w) + b with a constant b [N] and no other use of the product."""
    if not is_call(node, aten.add.Tensor):
        return False
    first, second = operand(node), operand(node, 1)
    for product, bias in ((first, second), (second, first)):
        if not (is_call(product, aten.linear.default) and isinstance(bias, Node) and bias.op == "get_attr"):
            continue
        plain = len(product.args) == 2 and len(product.users) == 1
        if plain and shape_of(bias) == shape_of(node)[-1:] and dtype_of(bias) == dtype_of(product):
            rw.replace(node, rw.call(node, aten.linear.default, *product.args, bias, type=fact(node, TensorType)))
            return True
    return False
