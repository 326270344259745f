"""Sums of products of bytes by the integer dot instruction ``vpdpbusd``.

A reduction by addition of i32 values that are products of two values of a byte's range each, or sums of such
products, needs no i32 vectors: the factors are computed in 8 bits, modulo 256, and the instruction adds four
products of an unsigned and a signed byte to each i32 lane, modulo 2**32. That a factor fits into a byte follows from
the extensions, masks and constants it is made of.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from tilewright.codegen.cpu.lower.context import Context
from tilewright.codegen.cpu.lower.convert import typed
from tilewright.codegen.cpu.lower.lanes import ZERO, Point
from tilewright.codegen.cpu.lower.nest import broadcast_point
from tilewright.codegen.cpu.ttir.literals import python_value
from tilewright.codegen.cpu.ttir.plan import is_lazy
from tilewright.codegen.cpu.ttir.records import I1, Op, Value

_MOVED = {"tt.broadcast", "tt.expand_dims", "tt.splat"}
_SAME_BITS = {"arith.addi": "add", "arith.subi": "sub", "arith.andi": "and", "arith.ori": "or", "arith.xori": "xor"}
_LEAST_LANES = 16
_OFFSET = 'asm "", "=x,0"'


@dataclass(frozen=True)
class Term:
    """One summand: the product of two factors, or one factor alone."""

    left: Value
    right: Value | None


def byte_terms(ctx: Context, value: Value) -> list[Term] | None:
    """The summands of an i32 tensor as products of bytes; None if it is anything else."""
    op = value.op
    if op is None or value in ctx.bindings:
        return None
    if op.name == "arith.addi":
        parts = [byte_terms(ctx, operand) for operand in op.operands]
        return None if parts[0] is None or parts[1] is None else parts[0] + parts[1]
    if op.name == "arith.muli":
        left, right = op.operands
        return [Term(left, right)] if _is_byte(ctx, left) and _is_byte(ctx, right) else None
    return [Term(value, None)] if op.name in ("arith.extsi", "arith.extui") and _is_byte(ctx, value) else None


def _is_byte(ctx: Context, value: Value) -> bool:
    limits = _limits(ctx, value)
    return limits is not None and ((limits[0] >= -128 and limits[1] <= 127) or (limits[0] >= 0 and limits[1] <= 255))


def _limits(ctx: Context, value: Value) -> tuple[int, int] | None:
    """Least and largest value an integer of more than 8 bits may have; None if it cannot be computed in bytes."""
    op = value.op
    if op is None or not is_lazy(op) or value in ctx.bindings:
        return None
    if op.name == "arith.constant":
        number = python_value(op.attrs["value"], value.elem)
        return None if number is None else (int(number), int(number))
    if op.name in _MOVED:
        return _limits(ctx, op.operands[0])
    if op.name in ("arith.extsi", "arith.extui"):
        return _extended(ctx, op)
    if op.name not in ("arith.addi", "arith.subi", "arith.andi", "arith.shrui", "arith.shrsi"):
        return None
    left, right = (_limits(ctx, operand) for operand in op.operands)
    if left is None or right is None:
        return None
    if op.name == "arith.andi":
        return (0, right[1]) if right[0] == right[1] and 0 <= right[1] <= 255 else None
    if op.name in ("arith.shrui", "arith.shrsi"):
        fits = right[0] == right[1] and 0 <= right[0] < 8 and left[0] >= 0 and left[1] <= 255
        return (left[0] >> right[0], left[1] >> right[0]) if fits else None
    if op.name == "arith.addi":
        low, high = left[0] + right[0], left[1] + right[1]
    else:
        low, high = left[0] - right[1], left[1] - right[0]
    # A sum that wraps around would be extended otherwise.
    return (low, high) if -(1 << (value.elem.bits - 1)) <= low and high < 1 << (value.elem.bits - 1) else None


def _extended(ctx: Context, op: Op) -> tuple[int, int] | None:
    source, signed = op.operands[0], op.name == "arith.extsi"
    if not source.elem.is_int:
        return None
    if source.elem.bits <= 8:
        top = 1 << (source.elem.bits - signed)
        return (-top if signed else 0), _mask_of(source, top - 1)
    limits = _limits(ctx, source)
    return None if limits is None or (limits[0] < 0 and not signed) else limits


def _mask_of(source: Value, top: int) -> int:
    """``top``, or less where a byte has just been cut down by a mask or a shift with a constant."""
    op = source.op
    if op is None or op.name not in ("arith.andi", "arith.shrui") or op.operands[1].op is None:
        return top
    number = python_value(op.operands[1].op.attrs.get("value", ""), source.elem)
    if number is None or number < 0:
        return top
    return min(top, int(number) if op.name == "arith.andi" else 255 >> int(number))


def plus_128(ctx: Context, ref: str, lanes: int) -> str:
    """Bytes plus 128, modulo 256.

    An empty assembler statement hides that 0x80 is constant: LLVM 22 does not finish selecting instructions for the xor
    of a broadcast and a constant.
    """
    emit, words, kind = ctx.b.emit, f"<{lanes // 4} x i32>", f"<{lanes} x i8>"
    offset = emit(f"call {words} {_OFFSET}({words} splat (i32 {-0x7F7F7F80})) memory(none) nounwind willreturn")
    given = emit(f"bitcast {kind} {ref} to {words}") if ref != "zeroinitializer" else ref
    return emit(f"bitcast {words} {emit(f'xor {words} {given}, {offset}')} to {kind}")


class ByteDot:
    """The loop body of such a sum, over ``lanes`` elements at a time.

    The instruction multiplies unsigned by signed. Of two signed factors one enters as ``a + 128``, and 128 times the
    other is taken off; of two unsigned ones as ``b - 128``, and 128 times the other is added.

    Attributes:
        count: accumulators of one stream, each ``<lanes / 4 x i32>``.
    """

    def __init__(self, ctx: Context, terms: Sequence[Term], lanes: int) -> None:
        self.ctx, self.lanes = ctx, lanes
        self.terms = [(term, self._kind(term.left), self._kind(term.right)) for term in terms]
        kinds = [{left, right} for term, left, right in self.terms]
        self._less, self._more = {"s"} in kinds, {"u"} in kinds
        self.count = 1 + self._less + self._more
        self.type = f"<{lanes // 4} x i32>"
        self._bytes = f"<{lanes} x i8>"

    def _kind(self, factor: Value | None) -> str:
        """ "u" of 0 to 255, "s" of -128 to 127, "b" both; a factor that is not there is 1."""
        limits = (1, 1) if factor is None else _limits(self.ctx, factor)
        assert limits is not None
        return "u" if limits[1] > 127 else "s" if limits[0] < 0 else "b"

    def step(self, point: Point, accs: Sequence[str]) -> list[str]:
        """Adds the products at a point whose vector axis has ``lanes`` lanes."""
        main, extra = accs[0], list(accs[1:])
        for term, left_kind, right_kind in self.terms:
            left, right = self._factor(term.left, point), self._factor(term.right, point)
            if {left_kind, right_kind} == {"s"}:
                extra[0] = self._dot(extra[0], self._flipped("zeroinitializer"), right)
                left = self._flipped(left)
            elif {left_kind, right_kind} == {"u"}:
                extra[-1] = self._dot(extra[-1], left, "splat (i8 1)")
                right = self._flipped(right)
            elif left_kind == "s" or right_kind == "u":
                left, right = right, left
            main = self._dot(main, left, right)
        return [main, *extra]

    def total(self, accs: Sequence[str]) -> str:
        """The sum, from its accumulators."""
        emit, main = self.ctx.b.emit, accs[0]
        if self._less:
            main = emit(f"sub {self.type} {main}, {accs[1]}")
        if self._more:
            main = emit(f"add {self.type} {main}, {emit(f'shl {self.type} {accs[-1]}, splat (i32 7)')}")
        return main

    def _dot(self, acc: str, unsigned: str, signed: str) -> str:
        name = f"@llvm.x86.avx512.vpdpbusd.{8 * self.lanes}"
        return self.ctx.b.emit(
            f"call {self.type} {name}({self.type} {acc}, {self._bytes} {unsigned}, {self._bytes} {signed})"
        )

    def _flipped(self, ref: str) -> str:
        return plus_128(self.ctx, ref, self.lanes)

    def _factor(self, factor: Value | None, point: Point) -> str:
        return "splat (i8 1)" if factor is None else self._narrow(factor, point)

    def _narrow(self, value: Value, point: Point) -> str:
        """Lanes of a value modulo 256."""
        b, op = self.ctx.b, value.op
        if value.elem.bits <= 8:
            ref = b.vector(self.ctx.value(value, point), self.lanes)
            return b.emit(f"zext {typed('i1', self.lanes)} {ref} to {self._bytes}") if value.elem == I1 else ref
        assert op is not None
        if op.name == "arith.constant":
            number = python_value(op.attrs["value"], value.elem)
            assert number is not None
            return f"splat (i8 {(int(number) + 128) % 256 - 128})"
        if op.name in _MOVED:
            return self._narrow(op.operands[0], _source_point(op, point))
        if op.name in ("arith.extsi", "arith.extui"):
            return self._extended(op, point)
        refs = [self._narrow(operand, point) for operand in op.operands]
        name = _SAME_BITS.get(op.name, "lshr")
        return b.emit(f"{name} {self._bytes} {refs[0]}, {refs[1]}")

    def _extended(self, op: Op, point: Point) -> str:
        source = op.operands[0]
        ref = self._narrow(source, point)
        if source.elem != I1 or op.name == "arith.extui":
            return ref
        return self.ctx.b.emit(f"sub {self._bytes} zeroinitializer, {ref}")


def _source_point(op: Op, point: Point) -> Point:
    """Where the operand of an operation that only repeats elements is read."""
    if op.name == "tt.broadcast":
        return broadcast_point(op.operands[0].shape, point)
    if op.name == "tt.expand_dims":
        axis = op.int_attr("axis")
        return point[:axis] + point[axis + 1 :]
    return (ZERO,) * len(op.operands[0].shape)


def dot_lanes(ctx: Context, size: int) -> int:
    """Bytes of one instruction for rows of ``size`` elements; 0 where there is none."""
    lanes = min(4 * ctx.width, size)
    return lanes if ctx.target.int8_dot and lanes >= _LEAST_LANES else 0
