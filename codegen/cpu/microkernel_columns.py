"""The right operand of a micro-kernel: a panel of B as vector registers, and reading ahead of it."""

from collections.abc import Sequence
from dataclasses import dataclass

from tilewright.codegen.cpu.microkernel_ir import LLVM_TYPES, IrText, vector
from tilewright.codegen.cpu.microkernel_step import Step
from tilewright.codegen.cpu.target import LINE

FIRST_CACHE, SECOND_CACHE = 3, 2
"""Localities of ``llvm.prefetch``: the cache that lines are brought into."""


@dataclass(frozen=True)
class Ahead:
    """What a block of rows prefetches with each group of B.

    Attributes:
        distance: i64 bytes behind the group.
        lines: how many cache lines from there on.
        cache: ``FIRST_CACHE`` or ``SECOND_CACHE``.
    """

    distance: str
    lines: int
    cache: int


@dataclass(frozen=True)
class Columns:
    """A panel of B: (first column, lanes) of each register, address of its first group, i64 bytes between groups."""

    step: Step
    registers: tuple[tuple[int, int], ...]
    base: str
    group: str

    @staticmethod
    def of(step: Step, lanes: Sequence[int], base: str, group: str) -> "Columns":
        """The panel whose registers have so many lanes each."""
        registers = tuple((sum(lanes[:index]), width) for index, width in enumerate(lanes))
        return Columns(step, registers, base, group)

    @property
    def row_bytes(self) -> int:
        """Bytes of one group of all columns."""
        return sum(width for _, width in self.registers) * self.step.b_bytes

    @property
    def lines(self) -> int:
        """Cache lines of one group of all columns."""
        return -(-self.row_bytes // LINE)

    def copied(self, ir: IrText, dtype: str, rows: int, to: str) -> "Columns":
        """The panel of so many rows with these one behind the other at ``to``."""
        size = self.step.b_bytes

        def copy(index: str) -> None:
            source, target = ir.at(self.base, ir.mul(index, self.group)), ir.at(to, ir.mul(index, self.row_bytes))
            for column, width in self.registers:
                kind = vector(LLVM_TYPES[dtype], width)
                ir.store(kind, ir.load(kind, ir.at(source, column * size), size), ir.at(target, column * size), size)

        ir.each(rows, 1, copy)
        return Columns(self.step, self.registers, to, str(self.row_bytes))

    def load(self, ir: IrText, index: str) -> list[str]:
        """One group, a register each."""
        place, size = ir.at(self.base, ir.mul(index, self.group)), self.step.b_bytes
        return [self.step.load_b(ir, ir.at(place, column * size), width) for column, width in self.registers]

    def read_ahead(self, ir: IrText, ahead: Ahead, index: str) -> None:
        """Touches lines that lie behind a group."""
        place = ir.at(ir.at(self.base, ir.mul(index, self.group)), ahead.distance)
        for line in range(ahead.lines):
            ir.do(f"call void @llvm.prefetch.p0(ptr {ir.at(place, line * LINE)}, i32 0, i32 {ahead.cache}, i32 1)")
