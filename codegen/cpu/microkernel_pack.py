"""Packing of tiles into the layout and dtype that a dot micro-kernel reads.

Three movements cover every case: a copy that widens, an interleave of neighbouring rows, and a transpose of
32- or 64-bit units by a butterfly of two-input shuffles (Eklundh, "A fast computer method for matrix
transposing", 1972).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from tilewright.codegen.cpu.microkernel_ir import BYTES, LLVM_TYPES, IrText, powers_of_two, vector, widen
from tilewright.codegen.cpu.target import CpuTarget
from tilewright.errors import CodegenError


@dataclass(frozen=True)
class PackB:
    """Packing of a tile of B.

    Attributes:
        k, n: sizes of the tile; k is a multiple of the group of a packed "vnni" layout.
        dtype: dtype of the source.
        source_layout: "kn" (rows of N contiguous values) or "nk" (rows of K contiguous values).
        packed_dtype: the same or a wider dtype.
        packed_layout: "kn", or "vnni" with groups of 32 bits: ``[k / group][n][group]``.
    """

    k: int
    n: int
    dtype: str
    source_layout: str
    packed_dtype: str
    packed_layout: str

    @property
    def symbol(self) -> str:
        """Name of the function, the same for equal specs only."""
        layouts = f"{self.source_layout}_{self.dtype}_to_{self.packed_layout}_{self.packed_dtype}"
        return f"pack_b_{self.k}x{self.n}_{layouts}"


def pack_b_text(spec: PackB, target: CpuTarget) -> str:
    """LLVM IR text of the function ``spec.symbol``.

    The function is ``internal`` and has the parameters ``(ptr noalias packed, ptr source, i64 source_stride)``;
    the stride is that between rows of the source, in elements, and the result is contiguous.

    Raises:
        CodegenError: k does not fill the groups of the packed layout.
    """
    group = 4 // BYTES[spec.packed_dtype] if spec.packed_layout == "vnni" else 1
    if spec.k % group:
        raise CodegenError(
            "a tile of B does not fill the groups of its packed layout",
            where=spec.symbol,
            why=f"k = {spec.k} is not a multiple of {group}",
        )
    ir = IrText()
    stride = ir.mul("%source_stride", BYTES[spec.dtype])
    pack = Pack(spec.dtype, spec.packed_dtype, group, target)
    if spec.source_layout == "nk":
        pack.transpose(ir, "%packed", "%source", stride, spec.n, spec.k)
    else:
        pack.rows(ir, "%packed", "%source", stride, spec.k, spec.n)
    signature = "ptr noalias %packed, ptr readonly %source, i64 %source_stride"
    return f"define internal void @{spec.symbol}({signature}) noinline nounwind {{\n{ir.text()}\n}}\n"


@dataclass(frozen=True)
class Pack:
    """Writes the code that packs a tile.

    Attributes:
        source, packed: dtypes.
        group: values that are interleaved into one unit of the packed tile.
        target: the processor.
    """

    source: str
    packed: str
    group: int
    target: CpuTarget

    def rows(self, ir: IrText, packed: str, source: str, stride: str, rows: int, columns: int) -> None:
        """[rows][columns], with ``stride`` bytes between rows, to [rows / group][columns][group]."""

        def group_of_rows(row: str) -> None:
            first = ir.at(source, ir.mul(row, stride))
            lines = [ir.at(first, ir.mul(line, stride)) for line in range(self.group)]
            result = ir.at(packed, ir.mul(row, columns * BYTES[self.packed]))
            for start, end, width in _strips(columns, self._width()):
                ir.each(end - start, width, partial(self._piece, ir, result, lines, start, width))

        ir.each(rows, self.group, group_of_rows)

    def transpose(self, ir: IrText, packed: str, source: str, stride: str, rows: int, columns: int) -> None:
        """[rows][columns], with ``stride`` bytes between rows, to [columns / group][rows][group]."""
        packed_stride = rows * self._unit()
        for first, end, height in _strips(rows, self._width()):
            lines = ir.at(source, ir.mul(first, stride))
            result = ir.at(packed, first * self._unit())
            for start, stop, width in _strips(columns // self.group, self._width()):
                side = min(height, width)
                place = ir.at(result, start * packed_stride)
                corner = ir.at(lines, start * self.group * BYTES[self.source])
                ir.each(
                    end - first,
                    side,
                    partial(self._blocks, ir, place, packed_stride, corner, stride, stop - start, side),
                )

    def _piece(self, ir: IrText, packed: str, lines: Sequence[str], start: int, width: int, index: str) -> None:
        """Interleaves ``width`` columns of a group of rows."""
        column = ir.add(index, start)
        values = [self._load(ir, ir.at(line, ir.mul(column, BYTES[self.source])), width) for line in lines]
        kind = vector(LLVM_TYPES[self.packed], self.group * width)
        place = ir.at(packed, ir.mul(column, self._unit()))
        ir.store(kind, self._interleave(ir, values, width), place, BYTES[self.packed])

    def _blocks(
        self, ir: IrText, packed: str, packed_stride: int, source: str, stride: str, width: int, side: int, row: str
    ) -> None:
        """Transposes ``side`` rows of ``width`` units."""
        result = ir.at(packed, ir.mul(row, self._unit()))
        lines = ir.at(source, ir.mul(row, stride))

        def block(column: str) -> None:
            corner = ir.at(lines, ir.mul(column, self.group * BYTES[self.source]))
            self._block(ir, ir.at(result, ir.mul(column, packed_stride)), packed_stride, corner, stride, side)

        ir.each(width, side, block)

    def _block(self, ir: IrText, packed: str, packed_stride: int, source: str, stride: str, side: int) -> None:
        """Transposes ``side`` x ``side`` units."""
        unit = f"i{8 * self._unit()}"
        kind = vector(unit, side)
        lines = []
        for row in range(side):
            values = self._load(ir, ir.at(source, ir.mul(row, stride)), side * self.group)
            lines.append(ir.op(f"bitcast {vector(LLVM_TYPES[self.packed], side * self.group)} {values} to {kind}"))
        distance = side // 2
        while distance:
            upper = [(lane & ~distance) + (side if lane & distance else 0) for lane in range(side)]
            lower = [pick + distance for pick in upper]
            for row in range(side):
                if not row & distance:
                    pair = lines[row], lines[row + distance]
                    lines[row] = ir.shuffle(unit, side, *pair, upper)
                    lines[row + distance] = ir.shuffle(unit, side, *pair, lower)
            distance //= 2
        for row, line in enumerate(lines):
            ir.store(kind, line, ir.at(packed, row * packed_stride), BYTES[self.packed])

    def _interleave(self, ir: IrText, values: list[str], width: int) -> str:
        element = LLVM_TYPES[self.packed]
        while len(values) > 1:
            # Neighbours at distance len / 2 first: 0 2 | 1 3 -> 0 1 2 3.
            half = len(values) // 2
            picks = [lane + width * side for lane in range(width) for side in (0, 1)]
            values = [ir.shuffle(element, width, values[i], values[i + half], picks) for i in range(half)]
            width *= 2
        return values[0]

    def _load(self, ir: IrText, pointer: str, count: int) -> str:
        loaded = ir.load(vector(LLVM_TYPES[self.source], count), pointer, BYTES[self.source])
        return widen(ir, loaded, self.source, self.packed, count)

    def _unit(self) -> int:
        """Bytes of a group of the packed tile."""
        return self.group * BYTES[self.packed]

    def _width(self) -> int:
        """Groups of the packed tile in a register."""
        return self.target.vector_bits // (8 * self._unit())


def _strips(total: int, width: int) -> list[tuple[int, int, int]]:
    """(start, end, step) of the ranges that cover ``total``: steps of ``width``, then shrinking powers of two."""
    full = total // width * width
    strips = [(0, full, width)] if full else []
    for step in powers_of_two(total - full):
        strips.append((full, full + step, step))
        full += step
    return strips
