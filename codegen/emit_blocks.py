"""The product of a GEMM whose weight is in a block format: whole numbers multiplied as they are stored.

For each group of a block, its numbers are unpacked to bytes and multiplied with the rows' bytes exactly; the scale of
the group and those of the rows' blocks follow in fp32. Where a format has minimums, they are multiplied with the sums
of the rows' blocks. Rows of floating-point numbers meet the widened numbers instead. A program goes through one panel
of rows of the weight front to back.
"""

from dataclasses import dataclass

import torch
from torch.fx import Node

from tilewright.codegen.builder import ProgramBuilder
from tilewright.codegen.columns import define_columns
from tilewright.codegen.emit_split import define_range
from tilewright.codegen.evaluate import Evaluator
from tilewright.codegen.index import Index
from tilewright.codegen.nodes import arguments
from tilewright.codegen.writer import Var
from tilewright.errors import CodegenError
from tilewright.ir.facts import TensorType, fact, where
from tilewright.ops.block_linear import BLOCK_LINEAR, BLOCK_LINEAR_INT8, ROUNDED_BLOCK
from tilewright.ops.block_panels import PanelForm, has_panels, panel_form
from tilewright.ops.blocks import BlockFormat, block_format
from tilewright.ops.expert_blocks import GROUPED_BLOCK_LINEAR, GROUPED_BLOCK_LINEAR_INT8

PANEL = 64
"""Rows of a panel: four vectors of 16 sums, which hide the latency of the product instruction."""


def is_block_product(node: Node) -> bool:
    """Whether the weight of a product is in a block format."""
    return node.target in (BLOCK_LINEAR, BLOCK_LINEAR_INT8, GROUPED_BLOCK_LINEAR, GROUPED_BLOCK_LINEAR_INT8)


def multiply_blocks(
    evaluator: Evaluator,
    builder: ProgramBuilder,
    anchor: Node,
    rows: tuple[Index, ...],
    k: int,
    parts: int = 1,
    place: str = "tl.program_id(1).to(tl.int64)",
    height: str = "BLOCK_M",
) -> None:
    """Writes ``acc``: the tile's rows times one panel.

    Args:
        anchor: a product for which ``is_block_product``.
        rows: place of the tile's rows along the axes of x but the last.
        k: elements of a row.
        parts: parts of K, of which a program computes the one called ``part``; one is all of K.
        place: number of the panel among those of the weight, as text in 64 bits.
        height: name of the constant with the number of the tile's rows.

    Raises:
        CodegenError: K has no such parts of whole blocks, the rows are in fp64, the format has no panels, or the
            weight is computed.
    """
    given, writer = arguments(anchor), evaluator.writer
    form = block_format(given["format"])
    if not has_panels(form.name):
        raise CodegenError(f"no kernel multiplies weights in {form.name}", where=where(anchor))
    panel = panel_form(form.name)
    writer.reserve("block", "block_ptr", "group", "panel_ptr", "x_block", "numbers", "scale", "minimum", "total")
    panels = _panels(evaluator, builder, anchor, f"blocks:{form.name}:{PANEL}")
    writer.statement(f"panel_ptr = {panels} + {place} * ({k // panel.block * panel.nbytes} * BLOCK_N)")
    writer.statement(f"acc = tl.zeros([{height}, BLOCK_N], tl.float32)")
    rows_of = _Rows(evaluator, anchor, rows, k, height)
    if fact(given["input"], TensorType).dtype == torch.float64:
        raise CodegenError(
            "products in block formats are computed in fp32, and these rows are fp64", where=where(anchor)
        )
    rounded = anchor.target in (BLOCK_LINEAR_INT8, GROUPED_BLOCK_LINEAR_INT8)
    begin, end = "0", str(k // panel.block)
    if parts > 1:
        begin, end = define_range(writer, k // panel.block, 1, parts, anchor)
    with writer.block(f"for block in range({begin}, {end}):"):
        writer.statement(f"block_ptr = panel_ptr + block * ({panel.nbytes} * BLOCK_N)")
        with writer.block(f"for group in range(0, {panel.groups}):"):
            _multiply_group(rows_of, form, panel, rounded)


def _multiply_group(rows: "_Rows", form: BlockFormat, panel: PanelForm, rounded: bool) -> None:
    """Adds the product of one group to ``acc``."""
    writer = rows.evaluator.writer
    start = f"block * {panel.block} + group * {panel.group}"
    x = rows.elements(start, panel.group, rounded)
    writer.statement(f"numbers, scale, minimum = unpack_{form.name.lower()}(block_ptr, group, BLOCK_N)")
    if rounded:
        x_scale, x_sum = rows.scales(f"({start}) // {ROUNDED_BLOCK}")
        writer.statement(f"total = tl.dot({x}, numbers, out_dtype=tl.int32)")
        writer.statement(f"acc += total.to(tl.float32) * scale * {x_scale}")
    else:
        x_sum = f"tl.sum({x}, 1, keep_dims=True)"
        writer.statement(f'total = tl.dot({x}, numbers.to(tl.float32), input_precision="ieee")')
        writer.statement("acc += total * scale")
    if form.has_minimums:
        writer.statement(f"acc -= minimum * {x_sum}")


def _panels(evaluator: Evaluator, builder: ProgramBuilder, anchor: Node, layout: str) -> str:
    node = arguments(anchor)["weight"]
    view = evaluator.inputs.get(node, (None, None))[0]
    if view is None or not builder.is_weight(view.value) or view != builder.whole(view.value):
        raise CodegenError(
            "a weight in a block format is laid out at load time, and this one is computed", where=where(anchor)
        )
    laid_out = builder.whole(builder.weight_layout(view.value, layout))
    return evaluator.writer.pointer(laid_out, torch.uint8, "weight")


@dataclass(frozen=True)
class _Rows:
    """The rows of the tile: elements, and scales and sums of rounded ones, at places along K."""

    evaluator: Evaluator
    anchor: Node
    rows: tuple[Index, ...]
    k: int
    height: str

    def elements(self, start: str, size: int, rounded: bool) -> str:
        """``size`` elements from ``start`` on, [height, size], int8 or fp32."""
        node, writer = arguments(self.anchor)["input"], self.evaluator.writer
        writer.column_names[self.k] = "ks"
        column = define_columns(writer, "ks", self.k, size, start, masked=False)
        index = (*self.rows, column)
        value = self.evaluator.raw(node, index, torch.int8) if rounded else self.evaluator.number(node, index)
        if writer.axes(value.deps) == {0, 1}:
            return value.text
        return writer.emit(value.text, f"tl.broadcast_to({value.text}, [{self.height}, BLOCK_KS])", value.deps)

    def scales(self, block: str) -> tuple[str, str]:
        """Scale and sum of each row's block, [height, 1]; no sum where the format has no use for it."""
        given, writer = arguments(self.anchor), self.evaluator.writer
        writer.statement(f"x_block = {block}")
        place = writer.define(Var("x_block", self.k // ROUNDED_BLOCK))
        texts = []
        for node in (given["scales"], given["sums"]):
            if node is None:
                texts.append("")
                continue
            texts.append(self.evaluator.number(node, (*self.rows, place), torch.float32).text)
        return texts[0], texts[1]
