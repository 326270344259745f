"""QuantizeLinears: products with weights in whole numbers of 8 bits. It changes numbers, so it runs only on request.

Weights are rounded once, to 127 steps either side of zero for each output channel. The rows that enter a product are
rounded when they are computed, to 127 steps of the largest magnitude in the row. Sums are exact; both scales and the
bias follow in floating point, as the epilogue of the product.
"""

from collections import Counter
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch.fx import GraphModule, Node

from tilewright.ir.facts import TensorType, copy_origin, fact, set_fact
from tilewright.ir.graph import Level, get_tensor
from tilewright.ir.layout import Layout, LayoutKind
from tilewright.ops.expert_blocks import GROUPED_INT8_LINEAR
from tilewright.ops.experts import GROUPED_LINEAR
from tilewright.ops.quantization import INT8_LINEAR
from tilewright.passes.base import Pass, PassResult
from tilewright.passes.rewrite import Rewriter, argument, erase_dead, is_call, operand
from tilewright.passes.weights.quantize_router import why_router

aten = torch.ops.aten
CONVERT = torch.ops.prims.convert_element_type.default
STEPS = 127
_LEAST = 32  # rows of fewer elements, and fewer results, gain nothing
_GROUP = 4  # elements of K that integer products take at a time
_TINY = 1e-30  # stands for the magnitude of a row of zeros: its elements stay zero


@dataclass(frozen=True)
class QuantizeLinears(Pass):
    """Turns linears with a constant weight into ``tilewright::int8_linear``, with the roundings and scales around it.

    Products of experts become ``tilewright::grouped_int8_linear``, which has the scales of weights in it, as each row
    chooses its own. A linear stays in floating point, with the reason, where its weight is computed, is no finite
    matrix, or is so small that nothing is gained, and where it chooses experts. What is read by several linears is
    rounded once.
    """

    name: ClassVar[str] = "quantize_linears"
    requires: ClassVar[Level] = Level.PACKED
    ensures: ClassVar[Level] = Level.PACKED

    def run(self, gm: GraphModule) -> PassResult:
        """Rewrites ``gm`` in place."""
        quantizer = _Quantizer(Rewriter(gm, self.name))
        reasons: dict[str, str] = {}
        counts: Counter[str] = Counter()
        for node in [node for node in gm.graph.nodes if is_call(node, aten.linear.default, GROUPED_LINEAR)]:
            why = why_router(node) or _why_not(gm, node)
            if why is None:
                quantizer.quantize(node)
            else:
                reasons[node.name] = why
            counts["int8" if why is None else "kept"] += 1
        if counts["int8"]:
            erase_dead(gm)
            gm.recompile()
        return PassResult(gm, counts["int8"] > 0, dict(counts), reasons)


def _why_not(gm: GraphModule, node: Node) -> str | None:
    weight = operand(node, 1)
    if weight.op != "get_attr":
        return f"its weight '{weight.name}' is computed"
    n, k = (int(size) for size in fact(weight, TensorType).shape[-2:])
    if n < _LEAST or k < _LEAST:
        return f"its weight [{n}, {k}] is small: rounding the rows would cost more than it saves"
    if k % _GROUP:
        return f"its rows of {k} elements do not divide by {_GROUP}, which integer products take at a time"
    if not bool(torch.isfinite(get_tensor(gm, weight)).all()):
        return "its weight holds infinities or NaN, which whole numbers cannot stand for"
    return None


class _Quantizer:
    def __init__(self, rw: Rewriter) -> None:
        self.rw = rw
        self.rounded: dict[Node, tuple[Node, Node]] = {}
        self.weights: dict[Node, tuple[Node, Node]] = {}

    def quantize(self, node: Node) -> None:
        """Replaces one linear."""
        kind, layout = fact(node, TensorType), fact(node, Layout)
        rows, scale = self._rows(operand(node), node)
        weight, weight_scale = self._weight(node)
        shape, wide = kind.shape, TensorType(kind.shape, torch.float32)

        def call(target: Any, type_: TensorType, *args: Any) -> Node:
            made = self.rw.call(node, target, *args, type=type_)
            set_fact(made, replace(layout, pad_value=None))
            return made

        if is_call(node, GROUPED_LINEAR):
            result = call(GROUPED_INT8_LINEAR, wide, rows, weight, *node.args[2:], weight_scale)
            result, bias = call(aten.mul.Tensor, wide, result, scale), None
        else:
            whole = call(INT8_LINEAR, TensorType(shape, torch.int32), rows, weight)
            result = call(aten.mul.Tensor, wide, call(CONVERT, wide, whole, torch.float32), scale)
            result, bias = call(aten.mul.Tensor, wide, result, weight_scale), argument(node, 2, "bias")
        if isinstance(bias, Node):
            if fact(bias, TensorType).dtype != torch.float32:
                own = fact(bias, Layout)
                bias = call(CONVERT, TensorType(shape[-1:], torch.float32), bias, torch.float32)
                set_fact(bias, own)
            result = call(aten.add.Tensor, wide, result, bias)
        if kind.dtype != torch.float32:
            result = call(CONVERT, kind, result, kind.dtype)
        self.rw.replace(node, result)

    def _rows(self, x: Node, before: Node) -> tuple[Node, Node]:
        """The rows of ``x`` as int8, and the scale of each row in fp32: made for the first linear that reads them."""
        if x in self.rounded:
            return self.rounded[x]
        kind, layout = fact(x, TensorType), replace(fact(x, Layout), pad_value=None)
        each = TensorType(kind.shape, torch.float32)
        one = TensorType((*kind.shape[:-1], 1), torch.float32)

        def call(target: Any, type_: TensorType, *args: Any) -> Node:
            made = self.rw.call(before, target, *args, type=type_)
            set_fact(made, layout)
            return made

        values = x if kind.dtype == torch.float32 else call(CONVERT, each, x, torch.float32)
        # Not as amax of abs: abs would join the product that makes the values, and be stored beside them.
        most, least = (call(reduce, one, values, [-1], True) for reduce in (aten.amax.default, aten.amin.default))
        largest = call(aten.maximum.default, one, most, call(aten.neg.default, one, least))
        steps = call(aten.reciprocal.default, one, call(aten.clamp.default, one, largest, _TINY))
        near = call(aten.mul.Tensor, each, values, call(aten.mul.Tensor, one, steps, float(STEPS)))
        whole = call(aten.floor.default, each, call(aten.add.Tensor, each, near, 0.5))
        rounded = call(CONVERT, TensorType(kind.shape, torch.int8), whole, torch.int8)
        self.rounded[x] = rounded, call(aten.mul.Tensor, one, largest, 1.0 / STEPS)
        return self.rounded[x]

    def _weight(self, node: Node) -> tuple[Node, Node]:
        """The weight as int8 [.., N, K], and the scale of each output channel in fp32 [.., N]."""
        weight = operand(node, 1)
        if weight not in self.weights:
            values = get_tensor(self.rw.gm, weight).detach().float()
            scale = values.abs().amax(dim=-1) / STEPS
            rounded = (values / scale.clamp(min=_TINY)[..., None]).round().to(torch.int8)
            made = self.rw.constant(weight, rounded, "int8"), self.rw.constant(weight, scale, "int8_scale")
            for part in made:
                set_fact(part, Layout(LayoutKind.FREE))
                copy_origin(weight, part, QuantizeLinears.name)
            self.weights[weight] = made
        return self.weights[weight]
