"""Dot micro-kernels on AMX tile registers: products of bf16 and int8 tiles, 16 x 16 sums in a register.

A tile register holds up to 16 rows of 64 bytes. One instruction multiplies a tile of A (rows of contiguous k) with one
of B (groups of k that fill 32 bits interleaved, the "vnni" layout) into a tile of sums. Four registers hold a 2 x 2
block of the sums over the whole k loop; two tiles of A and two of B are loaded for four products, which keeps the
multiplier busy when the tiles are in the first-level cache (Intel 64 and IA-32 Architectures Optimization
Reference Manual, chapter 20).

Whoever calls a micro-kernel has set the registers to its ``TileShape`` before, on the same thread (``load_shape``),
and gives them up when the kernel ends (``RELEASE``). bf16 products treat denormal inputs and results as zero
(TDPBF16PS), as those of ``vdpbf16ps`` do; i8 products are exact modulo 2**32.
"""

from collections.abc import Callable
from dataclasses import dataclass

from tilewright.codegen.cpu.microkernel_ir import BYTES, IrText
from tilewright.codegen.cpu.microkernel_pack import Pack
from tilewright.codegen.cpu.target import CpuTarget

RELEASE = "call void @llvm.x86.tilerelease()"
_SUMS, _A, _B = 0, 4, 6  # first register of each role: 2 x 2 blocks of sums, two tiles of A, two of B
_INSTRUCTIONS = {"bf16": "tdpbf16ps", "i8": "tdpbssd"}
_ROWS, _LINE = 16, 64
# Below this a broadcast of A for each row costs no more than loading B into tiles.
_LEAST_M = 4


@dataclass(frozen=True)
class TileShape:
    """Sizes of the tile registers.

    Attributes:
        m: rows of a tile of A and of the sums, up to 16.
        n: columns of a tile of B and of the sums, up to 16.
        k_bytes: bytes of a row of A, up to 64.
    """

    m: int
    n: int
    k_bytes: int

    @property
    def symbol(self) -> str:
        """Name of the constant with the configuration."""
        return f"@tw.tiles_{self.m}x{self.n}x{self.k_bytes}"

    def definition(self) -> str:
        """LLVM IR of the constant: palette 1; from byte 16 bytes of a row, from 48 rows of each register."""
        image = bytearray(64)
        image[0] = 1
        columns = {_SUMS: self.n * 4, _A: self.k_bytes, _B: self.n * 4}
        rows = {_SUMS: self.m, _A: self.m, _B: self.k_bytes // 4}
        for register in range(8):
            role = _SUMS if register < _A else _A if register < _B else _B
            image[16 + 2 * register] = columns[role]
            image[48 + register] = rows[role]
        text = ", ".join(f"i8 {byte}" for byte in image)
        return f"{self.symbol} = internal constant [64 x i8] [{text}], align 64\n"

    def load_shape(self) -> str:
        """The instruction that sets the registers of this thread to these sizes; their contents become zero."""
        return f"call void @llvm.x86.ldtilecfg(ptr {self.symbol})"


def tile_shape(m: int, n: int, k: int, dtype: str, target: CpuTarget) -> TileShape | None:
    """Register sizes for a product of tiles of ``dtype``; None where tile registers cannot or should not compute it.

    All tiles of a product have one shape, so a size over that of a register is a multiple of it.
    """
    if not target.amx or dtype not in _INSTRUCTIONS or m < _LEAST_M:
        return None
    longest = _LINE // BYTES[dtype]
    fits = all(size <= limit or size % limit == 0 for size, limit in ((m, _ROWS), (n, _ROWS), (k, longest)))
    if not fits or k * BYTES[dtype] % 4:
        return None
    return TileShape(min(m, _ROWS), min(n, _ROWS), min(k, longest) * BYTES[dtype])


@dataclass(frozen=True)
class AmxDot:
    """Writes the body of one micro-kernel.

    Attributes:
        m, n, k: sizes of the product.
        dtype: "bf16" or "i8".
        shape: what ``tile_shape`` gives for them.
        zero_init: the sums start at zero.
        a_turned: A has M contiguous, and is turned on the stack first.
        ragged: only the first ``%rows`` rows of the sums are wanted.
    """

    m: int
    n: int
    k: int
    dtype: str
    shape: TileShape
    zero_init: bool
    a_turned: bool
    ragged: bool

    def write(self, ir: IrText, target: CpuTarget) -> None:
        """Adds ``%a @ %b`` to ``%acc``; the parameters are those of ``microkernel.tile_dot``."""
        size = BYTES[self.dtype]
        a, a_row = "%a", ir.mul("%a_stride", size)
        if self.a_turned:
            a, a_row = self._turned(ir, target)
        b_group = ir.mul("%b_stride", size)

        def panel(column: str, tiles: int) -> None:
            offset = ir.mul(column, 4)
            self._panel(ir, tiles, ir.at("%acc", offset), (a, a_row), (ir.at("%b", offset), b_group))

        _pairs(ir, self.n, self.shape.n, panel)

    def _turned(self, ir: IrText, target: CpuTarget) -> tuple[str, str]:
        """A copy of A with K contiguous: groups are interleaved, then 32-bit units transposed."""
        size = BYTES[self.dtype]
        group = 4 // size
        units = ir.op(f"alloca [{self.m * self.k * size} x i8], align {_LINE}")
        turned = ir.op(f"alloca [{self.m * self.k * size} x i8], align {_LINE}")
        Pack(self.dtype, self.dtype, group, target).rows(ir, units, "%a", ir.mul("%a_stride", size), self.k, self.m)
        Pack("i32", "i32", 1, target).transpose(ir, turned, units, str(self.m * 4), self.k // group, self.m)
        return turned, str(self.k * size)

    def _panel(self, ir: IrText, columns: int, acc: str, a: tuple[str, str], b: tuple[str, str]) -> None:
        row_bytes = self.n * 4

        def block(row: str, rows: int) -> None:
            place = ir.at(acc, ir.mul(row, row_bytes))
            self._block(ir, (rows, columns), place, (ir.at(a[0], ir.mul(row, a[1])), a[1]), b)

        if self.ragged and self.m % (2 * self.shape.m) == 0:
            ir.each_below("%rows", 2 * self.shape.m, lambda row: block(row, 2))
        else:
            _pairs(ir, self.m, self.shape.m, block)

    def _block(self, ir: IrText, tiles: tuple[int, int], acc: str, a: tuple[str, str], b: tuple[str, str]) -> None:
        """The sums of up to 2 x 2 tiles, in registers over the k loop."""
        rows, columns = tiles
        row_bytes = self.n * 4
        sums = [
            (
                row,
                column,
                _SUMS + 2 * row + column,
                ir.at(acc, row * self.shape.m * row_bytes + column * self.shape.n * 4),
            )
            for row in range(rows)
            for column in range(columns)
        ]
        for _, _, register, place in sums:
            if self.zero_init:
                ir.do(f"call void @llvm.x86.tilezero(i8 {register})")
            else:
                ir.do(_load(register, place, row_bytes))
        a_tiles = [ir.at(a[0], ir.mul(row * self.shape.m, a[1])) for row in range(rows)]
        b_tiles = [ir.at(b[0], column * self.shape.n * 4) for column in range(columns)]

        def step(index: str) -> None:
            # The index counts bytes of k in a row of A, a quarter of that are groups of k, which are rows of B.
            groups = ir.mul(ir.op(f"lshr exact i64 {index}, 2"), b[1]) if index != "0" else "0"
            for column, tile in enumerate(b_tiles):
                ir.do(_load(_B + column, ir.at(tile, groups), b[1]))
            for row, tile in enumerate(a_tiles):
                ir.do(_load(_A + row, ir.at(tile, index), a[1]))
            for row, column, register, _ in sums:
                name = _INSTRUCTIONS[self.dtype]
                ir.do(f"call void @llvm.x86.{name}(i8 {register}, i8 {_A + row}, i8 {_B + column})")

        ir.each(self.k * BYTES[self.dtype], self.shape.k_bytes, step)
        for _, _, register, place in sums:
            ir.do(f"call void @llvm.x86.tilestored64(i8 {register}, ptr {place}, i64 {row_bytes})")


def _load(register: int, place: str, stride: str | int) -> str:
    return f"call void @llvm.x86.tileloadd64(i8 {register}, ptr {place}, i64 {stride})"


def _pairs(ir: IrText, total: int, size: int, body: Callable[[str, int], None]) -> None:
    """Ranges of two tiles each, then one of the tile that is left, if any."""
    count = total // size
    ir.each(count // 2 * 2 * size, 2 * size, lambda index: body(index, 2))
    if count % 2:
        body(str((count - 1) * size), 1)
