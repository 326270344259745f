"""RoundRows: rows that enter products with stored weights become whole numbers of 8 bits, by blocks of 32.

It changes numbers by half a step of 127 of the largest magnitude in each block, so it is a choice. The rounding is
spelled in ordinary ops, so it joins what the region rule lets it join; what several products read is rounded once.
"""

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch.fx import GraphModule, Node

from tilewright.ir.facts import TensorType, fact, set_fact
from tilewright.ir.graph import Level
from tilewright.ir.layout import Layout
from tilewright.ops.block_linear import BLOCK_LINEAR, BLOCK_LINEAR_INT8, ROUNDED_BLOCK
from tilewright.ops.block_panels import has_panels
from tilewright.ops.blocks import block_format
from tilewright.ops.expert_blocks import GROUPED_BLOCK_LINEAR, GROUPED_BLOCK_LINEAR_INT8
from tilewright.passes.base import Pass, PassResult
from tilewright.passes.rewrite import Rewriter, erase_dead, is_call, operand

aten = torch.ops.aten
CONVERT = torch.ops.prims.convert_element_type.default
_STEPS = 127
_TINY = 1e-30  # stands for the magnitude of a block of zeros: its elements stay zero


@dataclass(frozen=True)
class RoundRows(Pass):
    """Turns ``block_linear`` into ``block_linear_int8`` with the rounding of its rows in front, of experts likewise.

    A product stays in floating point, with the reason, where its format has no whole numbers in blocks along K.
    """

    name: ClassVar[str] = "round_rows"
    requires: ClassVar[Level] = Level.PACKED
    ensures: ClassVar[Level] = Level.PACKED

    def run(self, gm: GraphModule) -> PassResult:
        """Rewrites ``gm`` in place."""
        rounder, reasons = _Rounder(Rewriter(gm, self.name)), {}
        products = [node for node in gm.graph.nodes if is_call(node, BLOCK_LINEAR, GROUPED_BLOCK_LINEAR)]
        for node in products:
            name = str(node.args[-1])
            if has_panels(name):
                rounder.replace(node, name)
            else:
                reasons[node.name] = f"the scale of {name} is for a whole row, not for blocks along it"
        if len(products) > len(reasons):
            erase_dead(gm)
            gm.recompile()
        counts = {"products": len(products) - len(reasons), "rounded": len(rounder.rounded)}
        return PassResult(gm, bool(rounder.rounded), {topic: n for topic, n in counts.items() if n}, reasons)


@dataclass(frozen=True)
class _Rows:
    """Rounded rows: bytes [.., K], scales and sums [.., K / 32]; sums are made for the first format with minimums."""

    values: Node
    scales: Node
    whole: Node


class _Rounder:
    def __init__(self, rw: Rewriter) -> None:
        self.rw = rw
        self.rounded: dict[Node, _Rows] = {}
        self.sums: dict[Node, Node] = {}

    def replace(self, node: Node, name: str) -> None:
        """Replaces one product."""
        x, kind = operand(node), fact(node, TensorType)
        if x not in self.rounded:
            self.rounded[x] = self._round(x, node)
        rows = self.rounded[x]
        sums = self._sums(x, node) if block_format(name).has_minimums else None
        target = GROUPED_BLOCK_LINEAR_INT8 if is_call(node, GROUPED_BLOCK_LINEAR) else BLOCK_LINEAR_INT8
        wide = TensorType(kind.shape, torch.float32)
        layout = replace(fact(node, Layout), pad_value=None)
        result = self.rw.call(node, target, rows.values, *node.args[1:], rows.scales, sums, type=wide)
        set_fact(result, layout)
        if kind.dtype != torch.float32:
            result = self.rw.call(node, CONVERT, result, kind.dtype, type=kind)
            set_fact(result, layout)
        self.rw.replace(node, result)

    def _call(self, before: Node, x: Node, target: Any, type_: TensorType, *args: Any) -> Node:
        made = self.rw.call(before, target, *args, type=type_)
        set_fact(made, replace(fact(x, Layout), pad_value=None))
        return made

    def _round(self, x: Node, before: Node) -> _Rows:
        kind = fact(x, TensorType)
        *lead, k = kind.shape
        sizes = [self.rw.size(before, size, [x]) for size in lead]
        count = int(k) // ROUNDED_BLOCK
        each = TensorType((*lead, count, ROUNDED_BLOCK), torch.float32)
        one = TensorType((*lead, count, 1), torch.float32)

        def call(target: Any, type_: TensorType, *args: Any) -> Node:
            return self._call(before, x, target, type_, *args)

        values = x
        if kind.dtype != torch.float32:
            values = call(CONVERT, TensorType(kind.shape, torch.float32), x, torch.float32)
        blocks = call(aten.reshape.default, each, values, [*sizes, count, ROUNDED_BLOCK])
        most, least = (
            call(reduce, one, blocks, [len(lead) + 1], True) for reduce in (aten.amax.default, aten.amin.default)
        )
        largest = call(aten.maximum.default, one, most, call(aten.neg.default, one, least))
        steps = call(aten.reciprocal.default, one, call(aten.clamp.default, one, largest, _TINY))
        near = call(aten.mul.Tensor, each, blocks, call(aten.mul.Tensor, one, steps, float(_STEPS)))
        whole = call(aten.floor.default, each, call(aten.add.Tensor, each, near, 0.5))
        rounded = call(CONVERT, TensorType(each.shape, torch.int8), whole, torch.int8)
        scales = call(aten.mul.Tensor, one, largest, 1.0 / _STEPS)
        return _Rows(
            call(aten.reshape.default, TensorType(kind.shape, torch.int8), rounded, [*sizes, int(k)]),
            call(aten.squeeze.dims, TensorType((*lead, count), torch.float32), scales, [len(lead) + 1]),
            whole,
        )

    def _sums(self, x: Node, before: Node) -> Node:
        """Sums of the blocks of the rounded rows."""
        if x not in self.sums:
            rows = self.rounded[x]
            scales = operand(rows.scales)
            kind = fact(scales, TensorType)
            after = rows.values.next  # next to the rounding, whose kernel it joins
            total = self._call(after, x, aten.sum.dim_IntList, kind, rows.whole, [len(kind.shape) - 1], True)
            total = self._call(after, x, aten.mul.Tensor, kind, total, scales)
            flat = TensorType(kind.shape[:-1], kind.dtype)
            self.sums[x] = self._call(after, x, aten.squeeze.dims, flat, total, [len(kind.shape) - 1])
        return self.sums[x]
