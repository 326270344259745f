"""QuantizeBlocks: products with weights of 4 bits in groups of 64. It changes numbers, so it runs only on request."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch.fx import GraphModule, Node

from tilewright.ir.facts import TensorType, copy_origin, fact, find_fact, set_fact
from tilewright.ir.graph import Level, get_tensor
from tilewright.ir.layout import Layout
from tilewright.ops.block_linear import BLOCK_LINEAR
from tilewright.ops.blocks import block_format, quantize
from tilewright.ops.expert_blocks import GROUPED_BLOCK_LINEAR
from tilewright.ops.experts import GROUPED_LINEAR
from tilewright.passes.base import Pass, PassResult
from tilewright.passes.rewrite import Rewriter, argument, erase_dead, is_call, operand
from tilewright.passes.weights.quantize_router import why_router

aten = torch.ops.aten
_LEAST = 32  # a weight of fewer rows gains nothing


@dataclass(frozen=True)
class QuantizeBlocks(Pass):
    """Turns linears with a constant weight into ``tilewright::block_linear``, and products of experts likewise.

    Attributes:
        format: a format of ``tilewright.ops.blocks`` that weights are quantized to.
    """

    name: ClassVar[str] = "quantize_blocks"
    requires: ClassVar[Level] = Level.PACKED
    ensures: ClassVar[Level] = Level.PACKED
    format: str = "int4"

    def run(self, gm: GraphModule) -> PassResult:
        """Rewrites ``gm`` in place."""
        rw, made, reasons = Rewriter(gm, self.name), {}, {}
        products = [node for node in gm.graph.nodes if is_call(node, aten.linear.default, GROUPED_LINEAR)]
        for node in products:
            why = why_router(node) or self._why_not(gm, node)
            if why is not None:
                reasons[node.name] = why
                continue
            weight = operand(node, 1)
            if weight not in made:
                made[weight] = self._stored(rw, weight)
            if is_call(node, GROUPED_LINEAR):
                target, rest = GROUPED_BLOCK_LINEAR, node.args[2:]
            else:
                target, rest = BLOCK_LINEAR, (argument(node, 2, "bias"),)
            type_ = fact(node, TensorType)
            product = rw.call(node, target, operand(node), made[weight], *rest, self.format, type=type_)
            set_fact(product, fact(node, Layout))
            rw.replace(node, product)
        count = len(products) - len(reasons)
        if count:
            erase_dead(gm)
            gm.recompile()
        return PassResult(gm, count > 0, {self.format: count} if count else {}, reasons)

    def _why_not(self, gm: GraphModule, node: Node) -> str | None:
        weight = operand(node, 1)
        if weight.op != "get_attr":
            return f"its weight '{weight.name}' is computed"
        n, k = (int(size) for size in fact(weight, TensorType).shape[-2:])
        block = block_format(self.format).block
        if k % block:
            return f"its rows of {k} elements do not divide into blocks of {block}"
        if n < _LEAST:
            return f"its weight [{n}, {k}] is small: rounding the rows would cost more than it saves"
        if fact(node, TensorType).dtype == torch.float64:
            return "it is computed in fp64, and whole numbers are scaled in fp32"
        # Scales and least elements are stored in fp16.
        if not bool(torch.isfinite(get_tensor(gm, weight).half()).all()):
            return "its weight holds infinities or NaN, or numbers beyond fp16, which whole numbers cannot stand for"
        return None

    def _stored(self, rw: Rewriter, weight: Node) -> Node:
        elements = get_tensor(rw.gm, weight)
        rows = quantize(self.format, elements.flatten(0, -2))
        data = rw.constant(weight, rows.view(*elements.shape[:-1], rows.shape[-1]), self.format)
        layout = find_fact(weight, Layout)
        if layout is not None:
            set_fact(data, layout)
        copy_origin(weight, data, self.name)
        return data
