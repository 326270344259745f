"""GEMM kernels: ``epilogue(x @ weight.T + bias)``, with what makes x computed on the way in.

A program computes one tile of the result. Weights are laid out once, at load time, in panels of the tile's width, so
that the K loop reads them front to back and no tile needs a mask along N. A norm in front of the product needs whole
rows: its statistics are computed in loops over K before the main one, by every program again, which pays for few rows.
A product of heads has a program axis more: each head multiplies its own part of x with its own rows of the weight.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.fx import Node

from tilewright.codegen.builder import ProgramBuilder
from tilewright.codegen.columns import define_columns
from tilewright.codegen.emit_blocks import PANEL, is_block_product, multiply_blocks
from tilewright.codegen.emit_row import emit_rows
from tilewright.codegen.emit_split import define_part, define_range, emit_totals, partial_sums, store_part
from tilewright.codegen.emit_vendor import emit_vendor
from tilewright.codegen.evaluate import Evaluator
from tilewright.codegen.index import Index, linear, reshape, same_count, unravel, without_ones
from tilewright.codegen.kernel_text import finish
from tilewright.codegen.nodes import arguments, compute_dtype
from tilewright.codegen.region_call import Inputs, RegionCall
from tilewright.codegen.results import Result, depends_on, needed_nodes, peel, store
from tilewright.codegen.writer import TL_TYPES, KernelWriter, Register, Var
from tilewright.errors import CodegenError
from tilewright.ir.facts import TensorType, fact, where
from tilewright.ir.program import KernelStep, VendorLinear, View
from tilewright.ir.regions import GEMM_VARIANTS
from tilewright.ir.sizes import Size, ceil_div, contiguous_strides, product
from tilewright.ops import Flow, traits_of
from tilewright.ops.block_linear import ROUNDED_BLOCK
from tilewright.ops.head_linear import HEAD_LINEAR

aten = torch.ops.aten


@dataclass(frozen=True)
class Tile:
    """Block sizes of a GEMM: rows, columns, and the step along K."""

    m: int
    n: int
    k: int


# Columns and step along K. A step of a panel is 32 KB, which stay in a first-level cache while all rows of a tile pass
# by; fp16 is twice as wide there, and bytes gain nothing from longer steps.
_TILES = {
    torch.float64: (32, 128),
    torch.float32: (64, 128),
    torch.float16: (64, 128),
    torch.bfloat16: (64, 256),
    torch.int8: (64, 256),
}
# Rows of a tile by variant: of few rows up to 8; from some hundreds on tall tiles win 3 %, as they read the panels of a
# long K less often, below that there are too few of them.
_ROWS = {"triton_one": 1, "triton_few": 4, "triton": 16, "triton_many": 64}
# With weights in block formats, eight rows cost hardly more than four: unpacking is for all rows of a tile.
_BLOCK_ROWS = {"triton_one": 1, "triton_few": 4, "triton": 8, "triton_many": 32}
LEAST_STEP = 32
_PANEL = "tl.program_id(1).to(tl.int64)"


def tile_for(dtype: torch.dtype, variant: str, k: int) -> Tile:
    """Block sizes by element type and variant, with a step that divides K, if one does, so that no turn needs a mask.

    The width of a tile does not depend on the variant: all variants read the same panels of a weight.
    """
    if dtype not in _TILES:
        raise CodegenError(f"no GEMM kernel for elements of type {dtype}")
    columns, longest = _TILES[dtype]
    steps = [longest >> shift for shift in range(longest.bit_length()) if longest >> shift >= LEAST_STEP]
    step = next((block for block in steps if k % block == 0), 64)
    return Tile(_ROWS[variant], columns, step)


def emit_gemm(call: RegionCall, builder: ProgramBuilder, variant: str) -> tuple[KernelStep | VendorLinear, ...]:
    """The steps of a region with one product by a weight: one kernel, or the vendor's with kernels around it.

    Args:
        variant: "triton", "triton_one" (tiles of one row), "triton_few" (for row counts up to 8), "triton_many" (for
            some hundreds) or "vendor"; with ":n" behind it, K is cut into n parts.

    Raises:
        CodegenError: the region has no or several products, or its epilogue does not follow its tiles.
    """
    inputs = call.read(builder)
    results = list(call.results())
    anchors = [node for node in call.graph.graph.nodes if traits_of(node.target).flow is Flow.CONTRACT]
    if len(anchors) != 1:
        raise CodegenError("a GEMM region needs exactly one linear", where=call.name, why=f"it has {len(anchors)}")
    anchor = anchors[0]
    if variant == "vendor" and anchor.target is HEAD_LINEAR:
        raise CodegenError("the vendor library has no product of heads", where=where(anchor))
    if variant == "vendor":
        return emit_vendor(call, builder, inputs, results, anchor)
    if variant not in GEMM_VARIANTS:
        raise CodegenError(f"no GEMM variant '{variant}'", where=call.name, hint=f"{', '.join(GEMM_VARIANTS)}")
    ahead = [(node, view) for node, view in results if not depends_on(node, anchor)]
    behind = [(node, view) for node, view in results if depends_on(node, anchor)]
    steps = emit_rows(call.graph, inputs, ahead) if ahead else ()
    height, _, parts = variant.partition(":")
    if not parts:
        return (*steps, _kernel(call, builder, inputs, behind, anchor, height))
    sums = partial_sums(builder, call.name, anchor, int(parts), _sum_dtype_of(anchor))
    first = _kernel(call, builder, inputs, behind, anchor, height, sums)
    return (*steps, first, *emit_totals(call.graph, inputs, behind, anchor, sums, _sum_dtype_of(anchor)))


def _kernel(
    call: RegionCall,
    builder: ProgramBuilder,
    inputs: Inputs,
    results: Sequence[tuple[Node, View]],
    anchor: Node,
    variant: str,
    sums: View | None = None,
) -> KernelStep:
    """The kernel of the product and what follows, or, where ``sums`` is given, of its parts, which are stored there."""
    given = arguments(anchor)
    kind, source = fact(anchor, TensorType), fact(given["input"], TensorType)
    n, k = static_size(kind.shape[-1], anchor), static_size(source.shape[-1], anchor)
    heads = kind.shape[-2] if anchor.target is HEAD_LINEAR else None
    rows = product(kind.shape[: -1 if heads is None else -2])
    blocks = is_block_product(anchor)
    tile = Tile(_BLOCK_ROWS[variant], PANEL, ROUNDED_BLOCK) if blocks else tile_for(source.dtype, variant, k)
    writer = KernelWriter(2, register_columns=0, loop_columns=tile.k)
    writer.reserve("acc", "panel_ptr", "rows", "row_mask", "cols", "cols_mask", "ks", "k_rows", "k_rows_mask")
    writer.reserve("k_groups", "neighbours", "grouped", "head", "part", "first")
    evaluator = Evaluator(call.graph, writer, inputs)
    row, column = _define_tile(writer, rows, n, tile)
    of_weight = column
    panel: str | None = _PANEL
    if heads is not None:
        row, of_weight, panel = _of_head(writer, heads, row, column, n, tile)
    place = unravel(row, source.shape[:-1])
    parts = 1 if sums is None else static_size(sums.shape[0], anchor)
    part = None if sums is None else define_part(writer, parts)
    if blocks:
        multiply_blocks(evaluator, builder, anchor, place, k, parts)
    else:
        weight = WeightTiles(evaluator, builder, anchor, of_weight, k, tile, panel)
        multiply(evaluator, anchor, place, k, tile, weight, parts=parts)
    acc_dtype = _sum_dtype_of(anchor)
    if sums is not None and part is not None:
        store_part(writer, sums, acc_dtype, part, row, column)
    else:
        evaluator.bindings[anchor] = Product(evaluator, anchor, row, column, acc_dtype)
        for node, view in results:
            store_tile(evaluator, peel(node, view, inputs), anchor, row, column)
    written = [view for _, view in results] if sums is None else [sums]
    return finish(
        writer,
        family="gemm",
        summary=f"x [{', '.join(map(str, source.shape))}] times weight [{n}, {k}] transposed, "
        f"{'by head, ' if heads is not None else ''}"
        + (
            "and what follows on the tile. A program computes one tile."
            if sums is None
            else f"{parts} parts of K apart."
        ),
        nodes=needed_nodes([node for node, _ in results], inputs) if sums is None else [anchor],
        variables=evaluator.used,
        grid=(ceil_div(rows, tile.m), ceil_div(n, tile.n), parts if heads is None else heads),
        writes=written,
        num_warps=4,
        num_stages=3,
    )


def _of_head(
    writer: KernelWriter, heads: Size, row: Index, column: Index, n: int, tile: Tile
) -> tuple[Index, Index, str | None]:
    """Row among those of all heads, row of the weight, and its panel, where panels divide the rows of a head."""
    writer.statement("head = tl.program_id(2)")
    head = writer.define(Var("head", heads))
    panel = f"(head * {n // tile.n} + tl.program_id(1)).to(tl.int64)" if n % tile.n == 0 else None
    return row * heads + head, head * n + column, panel


def static_size(size: Size, node: Node) -> int:
    if not isinstance(size, int):
        raise CodegenError("a GEMM needs fixed N and K", where=where(node), why=f"a size is {size}")
    return size


def sum_dtype(dtype: torch.dtype) -> torch.dtype:
    """Element type of sums of products: 32 bits for whole numbers of 8, else that of any computation."""
    return torch.int32 if dtype == torch.int8 else compute_dtype(dtype)


def _sum_dtype_of(anchor: Node) -> torch.dtype:
    """Element type of a product's sums."""
    if is_block_product(anchor):
        return torch.float32
    return sum_dtype(fact(arguments(anchor)["input"], TensorType).dtype)


def dot(left: str, right: str, acc: str | None, dtype: torch.dtype) -> str:
    """A product of tiles, exact in fp32 and accumulated in ``sum_dtype``."""
    start = f", {acc}" if acc else ""
    kind = f", out_dtype={TL_TYPES[sum_dtype(dtype)]}" if dtype in (torch.float64, torch.int8) else ""
    return f'tl.dot({left}, {right}{start}, input_precision="ieee"{kind})'


def _define_tile(writer: KernelWriter, rows: Size, n: int, tile: Tile) -> tuple[Index, Index]:
    writer.constants.update(BLOCK_M=tile.m, BLOCK_N=tile.n)
    writer.statement("rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]")
    if tile.m > 1:  # there are as many tiles of one row as there are rows
        writer.statement(f"row_mask = rows < {writer.size(rows)}")
    writer.row_deps = frozenset(("rows",))
    row = writer.define(Var("rows", rows, 0, "BLOCK_M", "row_mask" if tile.m > 1 else None))
    writer.statement("cols = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]")
    full = n % tile.n == 0
    if not full:
        writer.statement(f"cols_mask = cols < {n}")
    return row, writer.define(Var("cols", n, 1, "BLOCK_N", None if full else "cols_mask"))


@dataclass
class Product:
    """The product plus bias, at the place of the tile: the only place it is known at."""

    evaluator: Evaluator
    anchor: Node
    row: Index
    column: Index
    dtype: torch.dtype

    def __call__(self, index: tuple[Index, ...]) -> Register:
        shape = fact(self.anchor, TensorType).shape
        here = without_ones((*unravel(self.row, shape[:-1]), self.column), shape)
        strides = contiguous_strides(shape)
        if linear(index, strides) != linear(here, strides):
            raise CodegenError(
                "an epilogue needs elements of other tiles", where=where(self.anchor), hint="cut the region there"
            )
        bias = arguments(self.anchor).get("bias")
        deps = self.row.deps | self.column.deps
        text = "acc"
        if isinstance(bias, Node):
            added = self.evaluator.number(bias, (self.column,), self.dtype)
            text = self.evaluator.writer.emit("linear", f"acc + {added.text}", deps)
        self.evaluator.used.setdefault(self.anchor, text)
        return Register(text, self.dtype, deps)


def multiply(
    evaluator: Evaluator,
    anchor: Node,
    row: tuple[Index, ...],
    k: int,
    tile: Tile,
    weight: "WeightTiles",
    parts: int = 1,
) -> None:
    """The loop over K, which leaves the product in ``acc``; a rest that does not fill a block is one turn with masks.

    Args:
        row: index of the tile's rows among the leading axes of the anchor's input.
        parts: parts of K, of which a program computes the one called ``part``; one is all of K.

    Raises:
        CodegenError: K has no such parts of whole steps.
    """
    writer = evaluator.writer
    source = fact(arguments(anchor)["input"], TensorType)
    writer.column_names[k] = "ks"
    # The product is written inside the loops, so its start stands in front of them.
    writer.statement(f"acc = tl.zeros([BLOCK_M, BLOCK_N], {TL_TYPES[sum_dtype(source.dtype)]})")
    for begin, end, masked in _ranges(writer, k, tile, parts, anchor):
        with writer.block(f"for start in range({begin}, {end}, BLOCK_KS):"):
            column = define_columns(writer, "ks", k, tile.k, "start", masked=masked)
            # Rows beyond the last are not stored, so they may be anything; columns of x meet rows of the weight.
            x = evaluator.raw(arguments(anchor)["input"], (*row, column), source.dtype, fill=masked)
            left = _full_tile(writer, x, "BLOCK_M, BLOCK_KS")
            w = weight.load(masked=masked)
            writer.statement(f"acc = {dot(left, w, 'acc', source.dtype)}")


def _ranges(writer: KernelWriter, k: int, tile: Tile, parts: int, anchor: Node) -> list[tuple[str, str, bool]]:
    """Begin and end of the loops over K, and whether places there are masked."""
    if parts > 1:
        return [(*define_range(writer, k, tile.k, parts, anchor), False)]
    whole = k // tile.k * tile.k
    return [(str(begin), str(end), end != whole) for begin, end in ((0, whole), (whole, k)) if begin < end]


def _full_tile(writer: KernelWriter, value: Register, shape: str) -> str:
    """Text of an operand in the shape ``tl.dot`` wants; along an axis of size 1 it has one place for all of them."""
    if writer.axes(value.deps) == {0, 1}:
        return value.text
    return writer.emit(value.text, f"tl.broadcast_to({value.text}, [{shape}])", value.deps)


class WeightTiles:
    """The weight's tiles [BLOCK_K, BLOCK_N] at the places of the K loop.

    Args:
        panel: number of the panel that the program reads, as text in 64 bits; None where it reads no whole one.
        outer: index along the weight's axes in front of [N, K], if it has such.
    """

    def __init__(
        self,
        evaluator: Evaluator,
        builder: ProgramBuilder,
        anchor: Node,
        column: Index,
        k: int,
        tile: Tile,
        panel: str | None = _PANEL,
        outer: tuple[Index, ...] = (),
    ) -> None:
        self.outer = outer
        self.evaluator, self.node, self.column, self.k = evaluator, arguments(anchor)["weight"], column, k
        self.dtype = fact(self.node, TensorType).dtype
        self.panels: str | None = None
        self.group = 1
        view = evaluator.inputs.get(self.node, (None, None))[0]
        whole = view is not None and builder.is_weight(view.value) and view == builder.whole(view.value)
        if view is not None and whole and panel is not None:
            group = builder.interleaved.get(self.dtype, 1)
            self.group = group if tile.k % group == 0 and k % tile.k == 0 else 1
            form = f"panels:{tile.n}" if self.group == 1 else f"panels:{tile.n}:{self.group}"
            laid_out = builder.whole(builder.weight_layout(view.value, form))
            self.panels = evaluator.writer.pointer(laid_out, self.dtype, "weight")
            evaluator.writer.statement(f"panel_ptr = {self.panels} + {panel} * ({k} * BLOCK_N)")

    def load(self, masked: bool) -> str:
        """Text of the loaded tile, in the scope of the K loop."""
        writer = self.evaluator.writer
        if self.group > 1:
            return self._load_groups()
        writer.statement("k_rows = start + tl.arange(0, BLOCK_KS)[:, None]")
        if masked:
            writer.statement(f"k_rows_mask = k_rows < {self.k}")
        down = writer.define(Var("k_rows", self.k, 0, "BLOCK_KS", "k_rows_mask" if masked else None))
        if self.panels is None:
            loaded = self.evaluator.raw(self.node, (*self.outer, self.column, down), self.dtype)
            return _full_tile(writer, loaded, "BLOCK_KS, BLOCK_N")
        mask = ", mask=k_rows_mask, other=0" if masked else ""
        address = "panel_ptr + k_rows * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]"
        return writer.emit("weight", f"tl.load({address}{mask})", down.deps)

    def _load_groups(self) -> str:
        """The tile out of [K / group, BLOCK_N, group]; no block is masked."""
        writer = self.evaluator.writer
        writer.constants["GROUP"] = self.group
        writer.statement("k_groups = start // GROUP + tl.arange(0, BLOCK_KS // GROUP)[:, None, None]")
        writer.statement(
            "neighbours = tl.arange(0, BLOCK_N)[None, :, None] * GROUP + tl.arange(0, GROUP)[None, None, :]"
        )
        writer.statement("grouped = tl.load(panel_ptr + k_groups * (BLOCK_N * GROUP) + neighbours)")
        return "grouped.permute(0, 2, 1).reshape(BLOCK_KS, BLOCK_N)"


def store_tile(evaluator: Evaluator, result: Result, anchor: Node, row: Index, column: Index) -> None:
    """Stores the tile of a result, whose elements stand in the order of the product's."""
    shape = fact(anchor, TensorType).shape
    if result.scatter is not None or not same_count(result.shape, shape):
        raise CodegenError("a result of a GEMM region has another shape than the product", where=where(result.node))
    place = (*unravel(row, shape[:-1]), column)
    index = reshape(without_ones(place, shape), result.shape, shape)
    value = evaluator.value(result.node, index)
    dtype = fact(result.node, TensorType).dtype
    # By the tile's own variables, so that those of a tile beyond an axis of size 1 are masked.
    store(evaluator.writer, result.view, dtype, row * shape[-1] + column, value)
