"""Products of few rows with bytes that are computed: each vector of B goes from where it is made into the product.

A micro-kernel would read it back from scratch memory, which costs as much as the product where there are few rows.
``vpdpbusd`` multiplies unsigned by signed bytes. B is the unsigned operand: as it is where no byte is below zero, else
as b + 128, and 128 times the sum of the row of A is taken off.
"""

from tilewright.codegen.cpu.lower.byte_dot import plus_128
from tilewright.codegen.cpu.lower.byte_range import largest_byte, splat_constant
from tilewright.codegen.cpu.lower.context import Buffer, Context
from tilewright.codegen.cpu.lower.lanes import Affine, Uniform, Vector
from tilewright.codegen.cpu.lower.nest import expression
from tilewright.codegen.cpu.lower.operand import Tile
from tilewright.codegen.cpu.ttir.records import I32, Value

_MOST_ACCUMULATORS = 16  # registers left for what makes B
_MOST_UNROLLED = 8
_SHIFTS = ("arith.shrui", "arith.shrsi", "arith.shli")
_LARGEST_SIGNED = 127


def fits_inline(ctx: Context, rows: int, columns: int, left: Tile, source: Value) -> bool:
    """Whether the product of ``left`` with ``source``, bytes [K / 4, 4 * columns], is written in place."""
    vectors, rest = divmod(columns, ctx.width)
    instruction = ctx.target.int8_dot and not ctx.target.amx
    return instruction and not rest and rows * vectors <= _MOST_ACCUMULATORS and not left.transposed


class _InlineDot:
    def __init__(self, ctx: Context, left: Tile, source: Value, acc: Buffer) -> None:
        self.ctx, self.left, self.source, self.acc = ctx, left, source, acc
        self.rows, self.columns = acc.shape
        self.kind, self.bytes = f"<{ctx.width} x i32>", f"<{4 * ctx.width} x i8>"
        self.firsts = range(0, self.columns, ctx.width)
        self.signed = largest_byte(source) > _LARGEST_SIGNED

    def run(self, zero: bool) -> None:
        b, width = self.ctx.b, self.ctx.width
        cells = [
            (Uniform(I32, str(row)), Affine(I32, str(first), 1, width))
            for row in range(self.rows)
            for first in self.firsts
        ]
        starts = ["zeroinitializer"] * len(cells)
        if not zero:
            starts = [b.vector(self.ctx.read(self.acc, cell, b.depth), width) for cell in cells]
        starts += ["zeroinitializer"] * (self.rows if self.signed else 0)
        sums, groups = starts, self.source.shape[0]
        if groups <= _MOST_UNROLLED and self._shifts_vary():
            for index in range(groups):
                sums = self._group(str(index), sums)
        else:
            sums = b.loop("0", str(groups), "1", [(self.kind, start) for start in starts], self._group)
        for place, cell in enumerate(cells):
            total = sums[place]
            if self.signed:
                surplus = b.emit(f"shl {self.kind} {sums[len(cells) + place // len(self.firsts)]}, splat (i32 7)")
                total = b.emit(f"sub {self.kind} {total}, {surplus}")
            self.ctx.write(self.acc, cell, Vector(I32, total, width))

    def _shifts_vary(self) -> bool:
        """Whether bits are shifted by amounts that differ from group to group: written out, these are constants."""
        ops = [value.op for value in expression(self.ctx, self.source) if value.op is not None]
        return any(op.name in _SHIFTS and splat_constant(op.operands[1]) is None for op in ops)

    def _group(self, index: str, carried: list[str]) -> list[str]:
        """Four neighbours along K of all rows and columns."""
        b, lanes = self.ctx.b, 4 * self.ctx.width
        a, results = [self._word(row, index) for row in range(self.rows)], list(carried)
        for place, first in enumerate(self.firsts):
            point = (Uniform(I32, index), Affine(I32, str(4 * first), 1, lanes))
            unsigned = b.vector(self.ctx.value(self.source, point), lanes)
            unsigned = plus_128(self.ctx, unsigned, lanes) if self.signed else unsigned
            for row in range(self.rows):
                cell = row * len(self.firsts) + place
                results[cell] = self._add(carried[cell], unsigned, a[row])
        for row in range(self.rows if self.signed else 0):
            cell = self.rows * len(self.firsts) + row
            results[cell] = self._add(carried[cell], "splat (i8 1)", a[row])
        return results

    def _word(self, row: int, index: str) -> str:
        """Four values of a row of A, in all lanes."""
        b = self.ctx.b
        start = b.emit(f"getelementptr i8, ptr {self.left.ptr}, i64 {b.emit(f'mul i64 {self.left.stride}, {row}')}")
        place = b.emit(f"getelementptr i32, ptr {start}, i32 {index}")
        word = b.vector_of_scalar(b.load(f"load i32, ptr {place}, align 1", b.depth), "i32", self.ctx.width)
        return b.emit(f"bitcast {self.kind} {word} to {self.bytes}")

    def _add(self, acc: str, unsigned: str, signed: str) -> str:
        name = f"@llvm.x86.avx512.vpdpbusd.{32 * self.ctx.width}"
        return self.ctx.b.emit(
            f"call {self.kind} {name}({self.kind} {acc}, {self.bytes} {unsigned}, {self.bytes} {signed})"
        )


def inline_dot(ctx: Context, left: Tile, source: Value, acc: Buffer, zero: bool) -> None:
    """Adds the product to ``acc``, or writes it where that starts at zero."""
    _InlineDot(ctx, left, source, acc).run(zero)
