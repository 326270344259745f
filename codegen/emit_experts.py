"""Grouped GEMM kernels: ``epilogue(x[row] @ weight[expert of the row].T)``.

A program computes the columns of one tile for all rows of one expert. So a panel of a weight is read from memory once
however many rows there are, and not at all where there are none. Tiles are tall, and of the last one only the rows
that there are get computed. With weights in blocks, which have to be unpacked for each tile, there are tiles of eight
rows, all of them computed, and of one. The table of rows gives the place of each; x is read and results are stored
there, so rows are never moved, and an epilogue finds its other operands as it would behind any product.
"""

from dataclasses import dataclass, replace
from functools import partial

import torch
from torch.fx import Node

from tilewright.codegen.builder import ProgramBuilder
from tilewright.codegen.emit_blocks import PANEL, is_block_product, multiply_blocks
from tilewright.codegen.emit_gemm import (
    LEAST_STEP,
    Product,
    Tile,
    WeightTiles,
    multiply,
    static_size,
    store_tile,
    sum_dtype,
    tile_for,
)
from tilewright.codegen.evaluate import Evaluator
from tilewright.codegen.index import Index, unravel, without_ones
from tilewright.codegen.kernel_text import finish
from tilewright.codegen.nodes import arguments
from tilewright.codegen.region_call import RegionCall
from tilewright.codegen.results import needed_nodes, peel
from tilewright.codegen.writer import KernelWriter, Register, Var
from tilewright.errors import CodegenError
from tilewright.ir.facts import TensorType, fact
from tilewright.ir.program import KernelStep
from tilewright.ir.sizes import ceil_div, product
from tilewright.ops import Flow, traits_of
from tilewright.ops.block_linear import ROUNDED_BLOCK
from tilewright.ops.expert_blocks import GROUPED_INT8_LINEAR

# Tall tiles pass over a panel once, and half the step along K leaves room in a first-level cache for the half that
# follows, which is brought there meanwhile: a program's work is to read its panel from memory.
_VARIANT = "triton_many"
_STEPS = 2
# With weights in blocks: two rows cost hardly less than eight, and one less.
_BLOCK_ROWS = 8


@dataclass(frozen=True)
class _Stretch:
    """Tiles over a part of an expert's rows: how many rows they have, as a named constant, and where they go."""

    height: str
    rows: int
    begin: str
    end: str
    masked: bool = True


def emit_experts(call: RegionCall, builder: ProgramBuilder) -> tuple[KernelStep, ...]:
    """The kernel of a region with one product of experts.

    Raises:
        CodegenError: the region has no or several products, or its epilogue does not follow its tiles.
    """
    inputs = call.read(builder)
    anchors = [node for node in call.graph.graph.nodes if traits_of(node.target).flow is Flow.GROUPED]
    if len(anchors) != 1:
        raise CodegenError(
            "a region of experts needs exactly one product", where=call.name, why=f"it has {len(anchors)}"
        )
    anchor = anchors[0]
    kind, source = fact(anchor, TensorType), fact(arguments(anchor)["input"], TensorType)
    n, k = static_size(kind.shape[-1], anchor), static_size(source.shape[-1], anchor)
    count = static_size(fact(arguments(anchor)["weight"], TensorType).shape[0], anchor)
    blocks = is_block_product(anchor)
    tile = Tile(_BLOCK_ROWS, PANEL, ROUNDED_BLOCK) if blocks else _tile(source.dtype, k)
    writer = KernelWriter(2, register_columns=0, loop_columns=tile.k)
    writer.reserve("acc", "panel_ptr", "expert", "first", "begin", "end", "whole", "sorted_rows", "sorted_mask")
    writer.reserve("cols", "cols_mask", "ks", "k_rows", "k_rows_mask", "k_groups", "neighbours", "grouped")
    evaluator = Evaluator(call.graph, writer, inputs)
    tiles = ceil_div(n, tile.n)
    column, expert = _define_program(evaluator, anchor, n, count, tile)
    panel = f"(expert.to(tl.int64) * {tiles} + tl.program_id(0))"
    weight = None if blocks else WeightTiles(evaluator, builder, anchor, column, k, tile, panel, (expert,))
    results = [peel(node, view, inputs) for node, view in call.results()]
    leading = fact(anchor, TensorType).shape[:-1]
    for stretch in _stretches(writer, tile, blocks):
        with writer.block(f"for first in range({stretch.begin}, {stretch.end}, {stretch.height}):"):
            row = _define_rows(evaluator, anchor, stretch)
            place = without_ones(unravel(row, leading), source.shape[:-1])
            if weight is None:
                multiply_blocks(evaluator, builder, anchor, place, k, place=panel, height=stretch.height)
            else:
                multiply(evaluator, anchor, place, k, tile, weight)
            acc_dtype = torch.float32 if blocks else sum_dtype(source.dtype)
            whole = Product(evaluator, anchor, row, column, acc_dtype)
            scaled = anchor.target is GROUPED_INT8_LINEAR
            evaluator.bindings[anchor] = partial(_scaled, whole, expert) if scaled else whole
            for result in results:
                store_tile(evaluator, result, anchor, row, column)
    step = finish(
        writer,
        family="experts",
        summary=f"x [{', '.join(map(str, source.shape))}] times weight [{count}, {n}, {k}] transposed, each row the "
        "weight of its expert, and what follows on the tile. A program computes columns of all rows of an expert.",
        nodes=needed_nodes([node for node, _ in call.results()], inputs),
        variables=evaluator.used,
        grid=(tiles, count, 1),
        writes=[view for _, view in call.results()],
        num_warps=4,
        num_stages=3,
    )
    return (step,)


def _define_program(evaluator: Evaluator, anchor: Node, n: int, count: int, tile: Tile) -> tuple[Index, Index]:
    """The program's columns and expert, and the places of the expert's rows in the table."""
    writer = evaluator.writer
    writer.constants.update(BLOCK_M=tile.m, BLOCK_N=tile.n)
    writer.statement("expert = tl.program_id(1)")
    expert = writer.define(Var("expert", count))
    writer.statement("cols = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]")
    full = n % tile.n == 0
    if not full:
        writer.statement(f"cols_mask = cols < {n}")
    column = writer.define(Var("cols", n, 1, "BLOCK_N", None if full else "cols_mask"))
    offsets = arguments(anchor)["offsets"]
    for name, place in (("begin", expert), ("end", expert + 1)):
        writer.statement(f"{name} = {evaluator.value(offsets, (place,)).text}")
    return column, expert


def _tile(dtype: torch.dtype, k: int) -> Tile:
    tile = tile_for(dtype, _VARIANT, k)
    return replace(tile, k=max(tile.k // _STEPS, LEAST_STEP))


def _stretches(writer: KernelWriter, tile: Tile, blocks: bool) -> tuple[_Stretch, ...]:
    """The tiles of a program, in order."""
    if not blocks:
        return (_Stretch("BLOCK_M", tile.m, "begin", "end"),)
    writer.constants["BLOCK_ONE"] = 1
    writer.statement("whole = tl.minimum(begin + (end - begin + BLOCK_M - 2) // BLOCK_M * BLOCK_M, end)")
    return _Stretch("BLOCK_M", tile.m, "begin", "whole"), _Stretch("BLOCK_ONE", 1, "whole", "end", masked=False)


def _scaled(whole: Product, expert: Index, index: tuple[Index, ...]) -> Register:
    """A product of whole numbers times the scale of the expert's output channel."""
    evaluator, total = whole.evaluator, whole(index)
    scale = evaluator.number(arguments(whole.anchor)["scale"], (expert, whole.column), torch.float32)
    deps = total.deps | scale.deps
    text = evaluator.writer.emit("scaled", f"{total.text}.to(tl.float32) * {scale.text}", deps)
    return Register(text, torch.float32, deps)


def _define_rows(evaluator: Evaluator, anchor: Node, stretch: _Stretch) -> Index:
    """The rows of a tile: their places in the table, and their numbers among all rows."""
    writer = evaluator.writer
    writer.statement(f"sorted_rows = first + tl.arange(0, {stretch.height})[:, None]")
    if stretch.masked:
        writer.statement("sorted_mask = sorted_rows < end")
    order = arguments(anchor)["order"]
    shape = fact(order, TensorType).shape
    mask = "sorted_mask" if stretch.masked else None
    place = writer.define(Var("sorted_rows", product(shape), 0, stretch.height, mask))
    return evaluator.loaded_index(order, unravel(place, shape), product(shape))
