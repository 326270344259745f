"""Dot micro-kernels: LLVM IR functions that add the product of two tiles in memory to a third.

A register-blocked outer product (Goto and van de Geijn, "Anatomy of High-Performance Matrix Multiplication",
2008, section 6): a block of rows x vectors of the accumulator stays in registers over the whole k loop, in
which each value of A is broadcast and multiplied with the vectors of one row of B.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tilewright.codegen.cpu.microkernel_amx import AmxDot, TileShape, tile_shape
from tilewright.codegen.cpu.microkernel_columns import FIRST_CACHE, SECOND_CACHE, Ahead, Columns
from tilewright.codegen.cpu.microkernel_ir import BYTES, LLVM_TYPES, IrText, powers_of_two, vector
from tilewright.codegen.cpu.microkernel_pack import Pack
from tilewright.codegen.cpu.microkernel_step import (
    Step,
    bf16_step,
    byte_words_step,
    fma_step,
    int8_step,
    int16_step,
    integer_step,
    make_unsigned,
)
from tilewright.codegen.cpu.target import AHEAD, LINE, CpuTarget
from tilewright.errors import CodegenError

_FLOATS = ("bf16", "f16", "f32", "f64")
_INTEGERS = ("i8", "i16", "i32")
BYTES_OF_WORD = 4
# Products take 4 cycles and two begin in each: with fewer sums at work, units wait.
_LEAST_ACCUMULATORS = 8
# Tiles of B up to this size are read ahead into the first cache, where there is room for two.
_HALF_CACHE = 16 << 10


@dataclass(frozen=True)
class TileDot:
    """The product ``acc[m, n] += a[m, k] @ b[k, n]`` of tiles in memory.

    Attributes:
        m, n, k: sizes of the tiles, each at least 1.
        a_dtype, b_dtype: "f64", "f32", "f16", "bf16", "i8", "i16" or "i32"; signed integers.
        acc_dtype: "f64" or "f32" for floats, "i32" for integers.
        b_layout: "kn": rows of N contiguous values, the stride is that between rows of k; "vnni": groups of k
            interleaved, ``[k / group][n][group]``, the stride is that between groups of k. A group fills 32 bits; of
            i8 without ``vpdpbusd`` it has two values, which fill 32 bits once they are widened to i16; "words": i8 in
            groups of four on such processors.
        a_layout: "mk": K contiguous, the stride is that between rows of m; "km": M contiguous, the stride is
            that between rows of k.
        zero_init: the accumulator starts at zero and its old contents are not read.
        b_apart: rows of a "kn" B are far apart in memory. Each panel is copied together before it is used, so that it
            stays in the first-level cache, few sets of which hold rows that are a multiple of a page apart.
        b_positive: no value of an i8 B is below zero.
        b_ahead: what follows B in memory is read next, and is prefetched: what lies a little further where B is used
            for one block of rows, so that reading it is most of the work; else the tile that follows, each block of
            rows a part of it, so that memory is busy all the time.
        ragged: only the first rows of the sums are wanted, their number is one more parameter. The others keep what
            they hold, or get it added to as well.
    """

    m: int
    n: int
    k: int
    a_dtype: str = "f32"
    b_dtype: str = "f32"
    acc_dtype: str = "f32"
    b_layout: str = "kn"
    a_layout: str = "mk"
    zero_init: bool = False
    b_apart: bool = False
    b_positive: bool = False
    b_ahead: bool = False
    ragged: bool = False

    @property
    def symbol(self) -> str:
        """Name of the function, the same for equal specs only."""
        flags = {"zero": self.zero_init, "apart": self.b_apart, "ahead": self.b_ahead}
        flags |= {"positive": self.b_positive, "ragged": self.ragged}
        forms = "_".join([self.a_layout, self.b_layout, *[name for name, is_set in flags.items() if is_set]])
        return f"tile_dot_{self.m}x{self.n}x{self.k}_{self.a_dtype}_{self.b_dtype}_{self.acc_dtype}_{forms}"

    def tile_shape(self, target: CpuTarget) -> TileShape | None:
        """Sizes the tile registers must have been set to when the function is called; None if it uses none."""
        kinds = (self.a_dtype, self.b_dtype, self.acc_dtype, self.b_layout)
        if kinds not in (("bf16", "bf16", "f32", "vnni"), ("i8", "i8", "i32", "vnni")):
            return None
        return tile_shape(self.m, self.n, self.k, self.a_dtype, target)


def packed_form(dtype: str, k: int, target: CpuTarget) -> tuple[str, str]:
    """Fastest form of B on a target, for A and B of ``dtype``.

    Returns:
        ``(b_dtype, b_layout)`` for ``TileDot`` and ``PackB``. If it is ``(dtype, "kn")`` a B whose N is contiguous
        can be read where it is. ``(dtype, "kn")`` itself is correct for every dtype, only slower.
    """
    if dtype == "bf16" and target.bf16_dot and k % 2 == 0:
        return "bf16", "vnni"
    if dtype == "i8" and target.int8_dot and k % 4 == 0:
        return "i8", "vnni"
    if dtype == "i8" and target.is_x86 and k % 2 == 0:
        return "i16", "vnni"
    if dtype in _INTEGERS:
        return "i32", "kn"
    return ("f64" if dtype == "f64" else "f32"), "kn"


def interleaved_group(dtype: str, target: CpuTarget) -> int:
    """Values of k that are interleaved in a B of ``dtype`` laid out for this target, "vnni" in ``TileDot``.

    1 where rows of N contiguous values are read as they are, or nothing is gained by another layout.
    """
    if dtype == "bf16" and target.bf16_dot:
        return 2
    if dtype == "i8" and target.is_x86:
        return 4 if target.int8_dot else 2
    return 1


def tile_dot(spec: TileDot, target: CpuTarget) -> str:
    """LLVM IR text of the function ``spec.symbol`` for one target.

    The function is ``internal`` and has the parameters ``(ptr noalias acc, ptr a, i64 a_stride, ptr b,
    i64 b_stride)``: ``acc`` is row-major and contiguous, aligned to 64 bytes; ``a`` and ``b`` need the alignment of
    their elements; strides count elements. Where the spec is ragged ``i64 rows`` follows, at least 1.

    Raises:
        CodegenError: the dtypes or the layout of B do not fit one another or the target.
    """
    ir = IrText()
    shape = spec.tile_shape(target)
    if shape is not None:
        dot = AmxDot(spec.m, spec.n, spec.k, spec.a_dtype, shape, spec.zero_init, spec.a_layout == "km", spec.ragged)
        dot.write(ir, target)
    else:
        step = _step(spec, target)
        a = _prepare_a(ir, spec, step, target)
        _emit_tiles(ir, spec, step, a, target)
    signature = "ptr noalias %acc, ptr readonly %a, i64 %a_stride, ptr readonly %b, i64 %b_stride"
    if spec.ragged:
        signature += ", i64 %rows"
    return f"define internal void @{spec.symbol}({signature}) noinline nounwind {{\n{ir.text()}\n}}\n"


def _step(spec: TileDot, target: CpuTarget) -> Step:
    step = None
    if spec.b_layout == "kn":
        if spec.acc_dtype in ("f32", "f64") and spec.a_dtype in _FLOATS and spec.b_dtype in _FLOATS:
            step = fma_step(spec.acc_dtype, spec.b_dtype, target)
        elif spec.acc_dtype == "i32" and spec.a_dtype in _INTEGERS and spec.b_dtype in _INTEGERS:
            step = integer_step(spec.b_dtype, target)
    elif (spec.b_dtype, spec.acc_dtype) == ("bf16", "f32") and spec.a_dtype == "bf16" and target.bf16_dot:
        step = bf16_step(target)
    elif (spec.b_dtype, spec.acc_dtype) == ("i8", "i32") and spec.a_dtype == "i8" and target.int8_dot:
        step = int8_step(target, spec.b_positive)
    elif spec.b_layout == "words":
        step = byte_words_step(target) if (spec.a_dtype, spec.b_dtype) == ("i8", "i8") and target.is_x86 else None
    elif spec.b_dtype in ("i8", "i16") and spec.acc_dtype == "i32" and spec.a_dtype in ("i8", "i16") and target.is_x86:
        step = int16_step(spec.b_dtype, target)
    if step is None or spec.k % step.group or BYTES[spec.a_dtype] > BYTES[step.a_dtype]:
        raise CodegenError(
            f"no dot micro-kernel multiplies {spec.a_dtype} by {spec.b_dtype} into {spec.acc_dtype}",
            where=spec.symbol,
            why=f"layout {spec.b_layout} of B, k = {spec.k}, vectors of {target.vector_bits} bits",
            hint="packed_form names the dtype and layout of B for a target",
        )
    return step


@dataclass(frozen=True)
class _TileA:
    """A as the step reads it: the address of group g of row r is ``base + r * row + g * group`` (bytes)."""

    base: str
    row: str
    group: str


def _prepare_a(ir: IrText, spec: TileDot, step: Step, target: CpuTarget) -> _TileA:
    """A in place where the step can read it, else a copy of it on the stack."""
    stride = ir.mul("%a_stride", BYTES[spec.a_dtype])
    rows, columns = (spec.m, spec.k) if spec.a_layout == "mk" else (spec.k, spec.m)
    # With M contiguous, the values of a group are apart: they are interleaved as those of a "vnni" B.
    group = step.group if spec.a_layout == "km" else 1
    base = "%a"
    if group > 1 or spec.a_dtype != step.a_dtype:
        base = ir.op(f"alloca [{rows * columns} x {LLVM_TYPES[step.a_dtype]}], align {LINE}")
        Pack(spec.a_dtype, step.a_dtype, group, target).rows(ir, base, "%a", stride, rows, columns)
        stride = str(columns * group * BYTES[step.a_dtype])
    if step.unsigned_a:
        rows, columns = rows // group, columns * group
        source, source_stride = base, stride
        if base == "%a":
            base, stride = ir.op(f"alloca [{rows * columns} x i8], align {LINE}"), str(columns)
        make_unsigned(ir, base, source, source_stride, rows, columns, target)
    unit = str(step.a_bytes)
    return _TileA(base, stride, unit) if spec.a_layout == "mk" else _TileA(base, unit, stride)


def _emit_tiles(ir: IrText, spec: TileDot, step: Step, a: _TileA, target: CpuTarget) -> None:
    rows, vectors = _block_shape(spec.m, -(-spec.n // step.lanes), target)
    width = vectors * step.lanes
    full = spec.n // width * width
    copied = ir.op(f"alloca [{spec.k * width * step.b_bytes} x i8], align {LINE}") if spec.b_apart else None

    def panel(column: str, lanes: Sequence[int]) -> None:
        acc = ir.at("%acc", ir.mul(column, BYTES[spec.acc_dtype]))
        b = ir.at("%b", ir.mul(column, step.b_bytes))
        columns = Columns.of(step, lanes, b, ir.mul("%b_stride", BYTES[spec.b_dtype]))
        if copied is not None:
            columns = columns.copied(ir, spec.b_dtype, spec.k, copied)
        _emit_panel(ir, spec, step, rows, acc, a, columns)

    ir.each(full, width, lambda column: panel(column, [step.lanes] * vectors))
    if full < spec.n:
        whole, rest = divmod(spec.n - full, step.lanes)
        panel(str(full), [step.lanes] * whole + powers_of_two(rest))


def _block_shape(m: int, vectors: int, target: CpuTarget) -> tuple[int, int]:
    """Rows and vectors of a register block: accumulators, a row of B and one value of A fit the registers."""
    if target.vector_bits == 256:
        # 16 registers: 12 accumulators, two vectors of B, two broadcasts.
        return min(m, 6), min(vectors, 2)
    # 32 registers. 16 accumulators hide the latency of 4 at one or two instructions a cycle; square blocks load least.
    vectors = min(vectors, max(4, 16 // m))
    return min(m, 16 // vectors), vectors


def _emit_panel(ir: IrText, spec: TileDot, step: Step, rows: int, acc: str, a: _TileA, columns: Columns) -> None:
    """All rows of A times one panel of B."""
    acc_row = spec.n * BYTES[spec.acc_dtype]
    surplus = _emit_surplus(ir, spec, step, columns)

    def block(row: str, count: int, ahead: Ahead | None) -> None:
        part = _TileA(ir.at(a.base, ir.mul(row, a.row)), a.row, a.group)
        _emit_block(ir, spec, step, count, ir.at(acc, ir.mul(row, acc_row)), part, columns, surplus, ahead)

    def each_of(blocks: int, limit: str | int) -> None:
        """Blocks of ``rows`` below a limit, which read ahead as one of so many."""

        def body(row: str) -> None:
            block(row, rows, _ahead(ir, spec, columns, row, blocks, rows))

        if isinstance(limit, int):
            ir.each(limit, rows, body)
        else:
            ir.each_below(limit, rows, body)

    full, last = _row_blocks(spec.m, rows, len(columns.registers))
    blocks = -(-spec.m // rows)
    if not spec.ragged or full <= rows:
        each_of(blocks, full)
    else:
        limit = ir.op(f"call i64 @llvm.smin.i64(i64 %rows, i64 {full})")
        _by_count(ir, spec, limit, rows, lambda blocks: each_of(blocks, limit))
    for row, count in last:
        block(str(row), count, _ahead(ir, spec, columns, str(row), blocks, rows))


def _by_count(ir: IrText, spec: TileDot, limit: str, rows: int, body: Callable[[int], None]) -> None:
    """Runs what suits the number of blocks of rows below a limit: one, two or three, or more."""
    if not spec.b_ahead:
        body(4)
        return
    one, some = (ir.op(f"icmp sle i64 {limit}, {count * rows}") for count in (1, 3))
    ir.choose(one, lambda: body(1), lambda: ir.choose(some, lambda: body(2), lambda: body(4)))


def _ahead(ir: IrText, spec: TileDot, columns: Columns, row: str, blocks: int, rows: int) -> Ahead | None:
    """What the block that begins at a row reads ahead: of a product with several blocks, its part of the next tile."""
    if not spec.b_ahead:
        return None
    if blocks == 1:
        return Ahead(str(AHEAD), columns.lines, FIRST_CACHE)
    lines = -(-columns.lines // blocks)
    part = ir.op(f"urem i64 {ir.op(f'udiv i64 {row}, {rows}')}, {columns.lines // lines}")
    tile_bytes = spec.k * spec.n * BYTES[spec.b_dtype]
    distance = ir.add(ir.mul(columns.group, spec.k // columns.step.group), ir.mul(part, lines * LINE))
    return Ahead(distance, lines, FIRST_CACHE if tile_bytes <= _HALF_CACHE else SECOND_CACHE)


def _row_blocks(m: int, rows: int, vectors: int) -> tuple[int, list[tuple[int, int]]]:
    """Rows to take in blocks of ``rows``, and (first row, rows) of the blocks for what is left.

    A rest with too few accumulators to hide the latency of their instruction shares the rows of the block before it.
    """
    full = m // rows * rows
    if full and 0 < (m - full) * vectors < _LEAST_ACCUMULATORS:
        full -= rows
        first = -(-(m - full) // 2)
        return full, [(full, first), (full + first, m - full - first)]
    return full, [(full, m - full)] if full < m else []


def _emit_surplus(ir: IrText, spec: TileDot, step: Step, columns: Columns) -> list[str]:
    """What the products of a row of A with the panel will have too much, one vector for each register of B."""
    if step.surplus is None:
        return []
    add = step.surplus

    def group(index: str, sums: list[str]) -> list[str]:
        loaded = columns.load(ir, index)
        return [add(ir, total, b, width) for total, b, (_, width) in zip(sums, loaded, columns.registers, strict=True)]

    zeros = [(vector(step.acc, width), "zeroinitializer") for _, width in columns.registers]
    return ir.loop(spec.k // step.group, group, zeros)


def _emit_block(
    ir: IrText,
    spec: TileDot,
    step: Step,
    rows: int,
    acc: str,
    a: _TileA,
    columns: Columns,
    surplus: Sequence[str],
    ahead: Ahead | None,
) -> None:
    """One register block: loads its accumulators, runs the k loop, stores them."""
    size = BYTES[spec.acc_dtype]
    starts = [ir.at(a.base, ir.mul(row, a.row)) for row in range(rows)]
    cells = [
        (row, index, column, width) for row in range(rows) for index, (column, width) in enumerate(columns.registers)
    ]
    places = [ir.at(acc, (row * spec.n + column) * size) for row, _, column, _ in cells]
    aligns = [_alignment(spec.n * size, column * size) for _, _, column, _ in cells]
    kinds = [vector(step.acc, width) for *_, width in cells]

    def group(index: str, values: list[str]) -> list[str]:
        b = columns.load(ir, index)
        if ahead is not None:
            columns.read_ahead(ir, ahead, index)
        offset = ir.mul(index, a.group)
        results = []
        for value, (row, register, _, width) in zip(values, cells, strict=True):
            results.append(
                step.multiply(ir, value, step.load_a(ir, ir.at(starts[row], offset), width), b[register], width)
            )
        return results

    groups = spec.k // step.group
    unroll = next(count for count in (4, 2, 1) if groups % count == 0)

    def unrolled(index: str, values: list[str]) -> list[str]:
        for offset in range(unroll):
            values = group(ir.add(index, offset), values)
        return values

    first = [
        "zeroinitializer" if spec.zero_init else ir.load(kind, place, align)
        for kind, place, align in zip(kinds, places, aligns, strict=True)
    ]
    results = ir.loop(groups, unrolled, list(zip(kinds, first, strict=True)), unroll)
    if surplus:
        # At the end, so that nothing waits for the surplus.
        results = [
            ir.op(f"sub {kind} {value}, {surplus[register]}")
            for kind, value, (_, register, *_) in zip(kinds, results, cells, strict=True)
        ]
    for kind, value, place, align in zip(kinds, results, places, aligns, strict=True):
        ir.store(kind, value, place, align)


def _alignment(*offsets: int) -> int:
    """Largest power of two up to a cache line that divides all offsets into an accumulator."""
    return next(size for size in (LINE, 32, 16, 8, 4, 2, 1) if all(offset % size == 0 for offset in offsets))
