"""Products of few rows with bytes that are computed: each vector of B goes from where it is made into the product.

A micro-kernel would read it back from scratch memory, which costs as much as the product where there are few rows.

``vpdpbusd`` multiplies unsigned by signed bytes. B is the unsigned operand: as it is where no byte is below zero, else
as b + c, and c times the sum of the row of A is taken off. Where B is computed as u - c, u is that operand; else c is
128. Rows of fp32 meet the bytes widened to fp32, in registers as well: a vector of bytes is one of words of four
neighbours along K, of which each in turn is cut out, converted and multiplied.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence

from tilewright.codegen.cpu.lower.byte_dot import plus_128
from tilewright.codegen.cpu.lower.byte_range import largest_byte, splat_constant, without_offset
from tilewright.codegen.cpu.lower.context import Buffer, Context
from tilewright.codegen.cpu.lower.lanes import Affine, Point, Uniform, Vector
from tilewright.codegen.cpu.lower.nest import expression
from tilewright.codegen.cpu.lower.operand import Tile
from tilewright.codegen.cpu.ttir.records import F32, I8, I32, Elem, Value

_MOST_ACCUMULATORS = 16  # registers left for what makes B
_LEAST_CHAINS = 8  # sums in flight that hide the latency of a multiply-add
_MOST_UNROLLED = 8
_SHIFTS = ("arith.shrui", "arith.shrsi", "arith.shli")
_LARGEST_SIGNED = 127


def fits_inline(ctx: Context, rows: int, columns: int, left: Tile) -> bool:
    """Whether the product of ``left``, bytes or fp32, with bytes [K / 4, 4 * columns] is written in place."""
    if left.elem == I8 and (not ctx.target.int8_dot or ctx.target.amx):
        return False
    return columns % ctx.width == 0 and rows <= _MOST_ACCUMULATORS and not left.transposed and left.rows is None


class _InlineDot(ABC):
    """The loop over K: for some columns at a time, so that the sums of all rows stay in registers."""

    elem: Elem

    def __init__(self, ctx: Context, left: Tile, source: Value, acc: Buffer) -> None:
        self.ctx, self.left, self.source, self.acc = ctx, left, source, acc
        self.rows, self.columns = acc.shape
        self.kind, self.bytes = f"<{ctx.width} x {self.elem.llvm}>", f"<{4 * ctx.width} x i8>"

    def run(self, zero: bool) -> None:
        """Adds the product to the accumulator, or writes it where that starts at zero."""
        step = max(1, _MOST_ACCUMULATORS // self.rows) * self.ctx.width
        for begin in range(0, self.columns, step):
            firsts = range(begin, min(begin + step, self.columns), self.ctx.width)
            cells = [(row, first) for row in range(self.rows) for first in firsts]
            starts = ["zeroinitializer" if zero else self._start(*cell) for cell in cells]
            for cell, total in zip(cells, self._sums(firsts, starts), strict=True):
                self.ctx.write(self.acc, self._point(*cell), Vector(self.elem, total, self.ctx.width))

    def _point(self, row: int, first: int) -> Point:
        return Uniform(I32, str(row)), Affine(I32, str(first), 1, self.ctx.width)

    def _start(self, row: int, first: int) -> str:
        b = self.ctx.b
        return b.vector(self.ctx.read(self.acc, self._point(row, first), b.depth), self.ctx.width)

    @abstractmethod
    def _sums(self, firsts: range, starts: list[str]) -> list[str]:
        """Sums of all rows, each for these vectors of columns."""

    @abstractmethod
    def _group(self, index: str, firsts: range, carried: list[str]) -> list[str]:
        """Adds the products of four neighbours along K."""

    def _loop(self, firsts: range, starts: list[str]) -> list[str]:
        b, groups = self.ctx.b, self.source.shape[0]
        if groups <= _MOST_UNROLLED and self._shifts_vary():
            for index in range(groups):
                starts = self._group(str(index), firsts, starts)
            return starts
        carried = [(self.kind, start) for start in starts]
        return b.loop("0", str(groups), "1", carried, lambda index, sums: self._group(index, firsts, sums))

    def _shifts_vary(self) -> bool:
        """Whether bits are shifted by amounts that differ from group to group: written out, these are constants."""
        ops = [value.op for value in expression(self.ctx, self.source) if value.op is not None]
        return any(op.name in _SHIFTS and splat_constant(op.operands[1]) is None for op in ops)

    def _made(self, index: str, first: int) -> str:
        """The bytes of B: four neighbours along K of a vector of columns."""
        lanes = 4 * self.ctx.width
        point = (Uniform(I32, index), Affine(I32, str(4 * first), 1, lanes))
        return self.ctx.b.vector(self.ctx.value(self.source, point), lanes)

    def _word(self, row: int, index: str, elem: Elem, align: int) -> str:
        """Element ``index`` of a row of A, read as ``elem``, in all lanes."""
        b = self.ctx.b
        offset = b.emit(f"mul i64 {self.left.stride}, {row * self.left.elem.size}")
        start = b.emit(f"getelementptr i8, ptr {self.left.ptr}, i64 {offset}")
        place = b.emit(f"getelementptr {elem.llvm}, ptr {start}, i32 {index}")
        loaded = b.load(f"load {elem.llvm}, ptr {place}, align {align}", b.depth)
        return b.vector_of_scalar(loaded, elem.llvm, self.ctx.width)


class _ByteRows(_InlineDot):
    elem = I32

    def __init__(self, ctx: Context, left: Tile, source: Value, acc: Buffer) -> None:
        super().__init__(ctx, left, source, acc)
        self.source, self.offset = without_offset(source)
        self.flipped = self.offset == 0 and largest_byte(source) > _LARGEST_SIGNED
        self.surplus: list[str] = []

    def _sums(self, firsts: range, starts: list[str]) -> list[str]:
        b, count = self.ctx.b, len(starts)
        first_time = bool(self.offset or self.flipped) and not self.surplus
        sums = self._loop(firsts, starts + (["zeroinitializer"] * self.rows if first_time else []))
        if first_time:
            times = 128 if self.flipped else self.offset
            self.surplus = [b.emit(f"mul {self.kind} {total}, splat (i32 {times})") for total in sums[count:]]
        if not self.surplus:
            return sums
        columns = len(firsts)
        return [b.emit(f"sub {self.kind} {sums[cell]}, {self.surplus[cell // columns]}") for cell in range(count)]

    def _group(self, index: str, firsts: range, carried: list[str]) -> list[str]:
        b, count = self.ctx.b, self.rows * len(firsts)
        words = [self._word(row, index, I32, 1) for row in range(self.rows)]
        a, results = [b.emit(f"bitcast {self.kind} {word} to {self.bytes}") for word in words], list(carried)
        for place, first in enumerate(firsts):
            made = self._made(index, first)
            unsigned = plus_128(self.ctx, made, 4 * self.ctx.width) if self.flipped else made
            for row in range(self.rows):
                cell = row * len(firsts) + place
                results[cell] = self._add(carried[cell], unsigned, a[row])
        for row, total in enumerate(carried[count:]):
            results[count + row] = self._add(total, "splat (i8 1)", a[row])
        return results

    def _add(self, acc: str, unsigned: str, signed: str) -> str:
        name = f"@llvm.x86.avx512.vpdpbusd.{32 * self.ctx.width}"
        return self.ctx.b.emit(
            f"call {self.kind} {name}({self.kind} {acc}, {self.bytes} {unsigned}, {self.bytes} {signed})"
        )


class _FloatRows(_InlineDot):
    elem = F32

    def _sums(self, firsts: range, starts: list[str]) -> list[str]:
        b, count = self.ctx.b, len(starts)
        if count >= _LEAST_CHAINS:
            return self._loop(firsts, starts)
        sums = self._loop(firsts, starts + ["zeroinitializer"] * count)
        return [b.emit(f"fadd {self.kind} {sums[cell]}, {sums[count + cell]}") for cell in range(count)]

    def _group(self, index: str, firsts: range, carried: list[str]) -> list[str]:
        b, width, count, sums = self.ctx.b, self.ctx.width, self.rows * len(firsts), list(carried)
        first_element = b.emit(f"mul i32 {index}, 4")
        places = [b.emit(f"add i32 {first_element}, {number}") for number in range(4)]
        a = [[self._word(row, place, F32, 4) for place in places] for row in range(self.rows)]
        for place, first in enumerate(firsts):
            words = b.emit(f"bitcast {self.bytes} {self._made(index, first)} to <{width} x i32>")
            for number in range(4):
                widened = self._widened(words, number)
                for row in range(self.rows):
                    cell = row * len(firsts) + place
                    cell += count * (number % (len(sums) // count))
                    sums[cell] = self._add(sums[cell], a[row][number], widened)
        return sums

    def _widened(self, words: str, number: int) -> str:
        """Byte ``number`` of each word, signed, in fp32."""
        b, kind = self.ctx.b, f"<{self.ctx.width} x i32>"
        if number < 3:
            words = b.emit(f"shl {kind} {words}, splat (i32 {24 - 8 * number})")
        return b.emit(f"sitofp {kind} {b.emit(f'ashr {kind} {words}, splat (i32 24)')} to {self.kind}")

    def _add(self, acc: str, a: str, widened: str) -> str:
        name = f"@llvm.{'fma' if self.ctx.target.fma else 'fmuladd'}.v{self.ctx.width}f32"
        arguments: Sequence[str] = [f"{self.kind} {value}" for value in (a, widened, acc)]
        return self.ctx.b.emit(f"call {self.kind} {name}({', '.join(arguments)})")


def inline_dot(ctx: Context, left: Tile, source: Value, acc: Buffer, zero: bool) -> None:
    """Adds the product to ``acc``, or writes it where that starts at zero."""
    (_ByteRows if left.elem == I8 else _FloatRows)(ctx, left, source, acc).run(zero)
