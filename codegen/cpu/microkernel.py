"""Dot micro-kernels: LLVM IR functions that add the product of two tiles in memory to a third.

A register-blocked outer product (Goto and van de Geijn, "Anatomy of High-Performance Matrix Multiplication",
2008, section 6): a block of rows x vectors of the accumulator stays in registers over the whole k loop, in
which each value of A is broadcast and multiplied with the vectors of one row of B.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from tilewright.codegen.cpu.microkernel_ir import BYTES, IrText, vector
from tilewright.codegen.cpu.microkernel_step import Step, fma_step
from tilewright.codegen.cpu.target import CpuTarget
from tilewright.errors import CodegenError

_FLOATS = ("f64", "f32", "f16", "bf16")
_CACHE_LINE = 64


@dataclass(frozen=True)
class TileDot:
    """The product ``acc[m, n] += a[m, k] @ b[k, n]`` of tiles in memory.

    Attributes:
        m, n, k: sizes of the tiles, each at least 1.
        a_dtype, b_dtype: "f64", "f32", "f16", "bf16" or "i8".
        acc_dtype: "f64", "f32" or "i32".
        b_layout: "kn": rows of N contiguous values, the stride is that between rows of k; "vnni": groups of k
            interleaved, ``[k / group][n][group]``, the stride is that between groups.
        a_layout: "mk": K contiguous, the stride is that between rows of m; "km": M contiguous, the stride is
            that between rows of k.
        zero_init: the accumulator starts at zero and its old contents are not read.
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

    @property
    def symbol(self) -> str:
        """Name of the function, the same for equal specs only."""
        layouts = f"{self.a_layout}_{self.b_layout}{'_zero' if self.zero_init else ''}"
        return f"tile_dot_{self.m}x{self.n}x{self.k}_{self.a_dtype}_{self.b_dtype}_{self.acc_dtype}_{layouts}"


def tile_dot(spec: TileDot, target: CpuTarget) -> str:
    """LLVM IR text of the function ``spec.symbol`` for one target.

    The function is ``internal`` and has the parameters ``(ptr noalias acc, ptr a, i64 a_stride, ptr b,
    i64 b_stride)``: ``acc`` is row-major and contiguous, aligned to 64 bytes; ``a`` and ``b`` need the alignment of
    their elements; strides count elements.

    Raises:
        CodegenError: the dtypes or the layout of B do not fit the target.
    """
    step = _step(spec, target)
    ir = IrText()
    _emit_tiles(ir, spec, step, target)
    signature = "ptr noalias %acc, ptr readonly %a, i64 %a_stride, ptr readonly %b, i64 %b_stride"
    return f"define internal void @{spec.symbol}({signature}) noinline nounwind {{\n{ir.text()}\n}}\n"


def _step(spec: TileDot, target: CpuTarget) -> Step:
    if spec.acc_dtype == "f32" and spec.a_dtype == "f32" and spec.b_dtype in _FLOATS[1:] and spec.b_layout == "kn":
        return fma_step("f32", spec.b_dtype, target)
    raise CodegenError(
        f"no dot micro-kernel multiplies {spec.a_dtype} by {spec.b_dtype} into {spec.acc_dtype}",
        where=spec.symbol,
        why=f"layout {spec.b_layout} of B, vectors of {target.vector_bits} bits",
    )


def _emit_tiles(ir: IrText, spec: TileDot, step: Step, target: CpuTarget) -> None:
    rows, vectors = _block_shape(spec.m, -(-spec.n // step.lanes), target)
    width = vectors * step.lanes
    full = spec.n // width * width
    tail = [(spec.n - full) // step.lanes * [step.lanes], _powers_of_two((spec.n - full) % step.lanes)]

    def panel(column: str, lanes: Sequence[int]) -> None:
        b = ir.at("%b", ir.mul(column, step.b_bytes))
        acc = ir.at("%acc", ir.mul(column, BYTES[spec.acc_dtype]))
        _emit_panel(ir, spec, step, rows, lanes, acc, b)

    def full_panel(column: str, _: list[str]) -> list[str]:
        panel(column, [step.lanes] * vectors)
        return []

    ir.loop(full, full_panel, step=width)
    if full < spec.n:
        panel(str(full), tail[0] + tail[1])


def _block_shape(m: int, vectors: int, target: CpuTarget) -> tuple[int, int]:
    """Rows and vectors of the register block: accumulators, a row of B and one value of A fit the registers."""
    if target.vector_bits == 256:
        # 16 registers: 12 accumulators, two vectors of B, two broadcasts.
        return min(m, 6), min(vectors, 2)
    if m >= 8:
        return 8, min(vectors, 2)
    return m, min(vectors, 4)


def _powers_of_two(count: int) -> list[int]:
    return [1 << bit for bit in reversed(range(count.bit_length())) if count >> bit & 1]


def _emit_panel(ir: IrText, spec: TileDot, step: Step, rows: int, lanes: Sequence[int], acc: str, b: str) -> None:
    """All rows of A times one panel of B: columns of ``sum(lanes)``, held in one register for each of ``lanes``."""
    a_row = ir.mul("%a_stride", BYTES[spec.a_dtype]) if spec.a_layout == "mk" else str(step.a_bytes)
    acc_row = spec.n * BYTES[spec.acc_dtype]
    full = spec.m // rows * rows

    def block(row: str, count: int) -> None:
        _emit_block(ir, spec, step, count, lanes, ir.at(acc, ir.mul(row, acc_row)), ir.at("%a", ir.mul(row, a_row)), b)

    def full_block(row: str, _: list[str]) -> list[str]:
        block(row, rows)
        return []

    ir.loop(full, full_block, step=rows)
    if full < spec.m:
        block(str(full), spec.m - full)


def _emit_block(
    ir: IrText, spec: TileDot, step: Step, rows: int, lanes: Sequence[int], acc: str, a: str, b: str
) -> None:
    """One register block: loads its accumulators, runs the k loop, stores them."""
    size = BYTES[spec.acc_dtype]
    offsets = [sum(lanes[:index]) for index in range(len(lanes))]
    places = [
        (vector(step.acc, width), ir.at(acc, (row * spec.n + offset) * size), _alignment(spec.n * size, offset * size))
        for row in range(rows)
        for offset, width in zip(offsets, lanes, strict=True)
    ]
    first = ["zeroinitializer" if spec.zero_init else ir.load(kind, place, align) for kind, place, align in places]
    b_row = ir.mul("%b_stride", BYTES[spec.b_dtype])
    if spec.a_layout == "mk":
        a_stride = ir.mul("%a_stride", BYTES[spec.a_dtype])
        a_rows = [ir.at(a, ir.mul(row, a_stride)) for row in range(rows)]
        a_group: str | int = step.a_bytes
    else:
        a_rows = [ir.at(a, row * step.a_bytes) for row in range(rows)]
        a_group = ir.mul("%a_stride", step.a_bytes)

    def group(index: str, values: list[str]) -> list[str]:
        row_b = ir.at(b, ir.mul(index, b_row))
        loaded = [
            step.load_b(ir, ir.at(row_b, offset * step.b_bytes), width)
            for offset, width in zip(offsets, lanes, strict=True)
        ]
        results = []
        for row, pointer in enumerate(a_rows):
            place = ir.at(pointer, ir.mul(index, a_group))
            for column, width in enumerate(lanes):
                value = step.load_a(ir, place, width)
                results.append(step.multiply(ir, values[row * len(lanes) + column], value, loaded[column], width))
        return results

    groups = spec.k // step.group
    unroll = _unroll(groups)

    def unrolled(index: str, values: list[str]) -> list[str]:
        for offset in range(unroll):
            values = group(ir.add(index, offset), values)
        return values

    carried = [(kind, value) for (kind, _, _), value in zip(places, first, strict=True)]
    for (kind, place, align), value in zip(places, ir.loop(groups, unrolled, carried, unroll), strict=True):
        ir.store(kind, value, place, align)


def _unroll(groups: int) -> int:
    return next(count for count in (4, 2, 1) if groups % count == 0)


def _alignment(*offsets: int) -> int:
    """Largest power of two up to a cache line that divides all offsets into an accumulator."""
    return next(size for size in (_CACHE_LINE, 32, 16, 8, 4, 2, 1) if all(offset % size == 0 for offset in offsets))
