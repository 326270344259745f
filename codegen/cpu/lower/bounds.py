"""Proves that a masked tail of a tile is neutral in a reduction, so that the mask can end the loop.

What a value is where a condition is false follows from the ``other`` of loads and from ``where``: the tail of
``where(c < n, x - mean, 0)`` is 0, and so is that of its square, which a sum may leave out.
"""

import math
import operator
from collections.abc import Callable
from dataclasses import dataclass

from tilewright.codegen.cpu.lower.context import Context
from tilewright.codegen.cpu.lower.nest import Conjunct, bounded, conjuncts, masks_of
from tilewright.codegen.cpu.ttir.literals import python_value, scalar_literal
from tilewright.codegen.cpu.ttir.records import I1, Op, Value

_NEUTRAL = {
    "arith.addf": 0.0, "arith.addi": 0.0, "arith.ori": 0.0, "arith.xori": 0.0, "arith.mulf": 1.0, "arith.muli": 1.0,
    "arith.maxnumf": -math.inf, "arith.maximumf": -math.inf, "arith.minnumf": math.inf, "arith.minimumf": math.inf,
}  # fmt: skip
_BINARY: dict[str, Callable[[float, float], float]] = {
    "arith.addf": operator.add, "arith.addi": operator.add, "arith.subf": operator.sub, "arith.subi": operator.sub,
    "arith.mulf": operator.mul, "arith.muli": operator.mul,
}  # fmt: skip
_EXACT = 128  # integers up to here are exact in every type
_SAME = {"tt.splat", "tt.broadcast", "tt.expand_dims", "arith.extf", "arith.truncf", "tt.fp_to_fp"}
# A constant of unsigned elements is written with a sign, and a signed bit that is set is -1.
_WIDENED = {"arith.extsi", "arith.extui", "arith.sitofp", "arith.uitofp"}


def tail_bound(ctx: Context, value: Value, axis: int, combine: Op) -> Conjunct | None:
    """A mask factor along ``axis`` outside of which ``value`` is neutral for the operation ``combine``."""
    neutral = _NEUTRAL.get(combine.name)
    if neutral is None:
        return None
    tried: set[Value] = set()
    for mask in masks_of(value):
        for part in bounded(ctx, mask):
            if part.axis != axis or part.bound is None or part.value in tried:
                continue
            tried.add(part.value)
            if _where_false(value, part.value, {}) == neutral:
                return part
    return None


@dataclass(frozen=True)
class Tail:
    """Elements of a tile that are one number, whatever the row.

    Attributes:
        bound: i32 number of elements before them, between 0 and the size of the axis.
        part: the mask factor that ends there.
        literal: the number, as an LLVM literal.
    """

    bound: str
    part: Conjunct
    literal: str


def constant_tail(ctx: Context, value: Value, axis: int) -> Tail | None:
    """The tail along ``axis`` that a mask in a tile's expression makes constant; None if there is none."""
    for mask in masks_of(value):
        for part in bounded(ctx, mask):
            if part.axis == axis and part.bound is not None and (literal := tail_literal(value, part)) is not None:
                return Tail(part.bound, part, literal)
    return None


def tail_literal(value: Value, part: Conjunct) -> str | None:
    """LLVM literal of what a value is where a mask factor is false; None if it is not one fixed number.

    Numbers that the arithmetic of the proof, done in f64, may have rounded otherwise than the kernel's are refused.
    """
    number = _where_false(value, part.value, {})
    if (
        number is None
        or math.isnan(number)
        or not (math.isinf(number) or (number == int(number) and abs(number) <= _EXACT))
    ):
        return None
    return scalar_literal(str(number if value.elem.is_float else int(number)), value.elem)


def _where_false(value: Value, condition: Value, known: dict[Value, float | None]) -> float | None:
    """The number a value has wherever a condition is false; None if it is not one fixed number."""
    if value not in known:
        known[value] = None
        if value.op is not None:
            known[value] = _of_op(value.op, value, condition, known)
    return known[value]


def _of_op(op: Op, value: Value, condition: Value, known: dict[Value, float | None]) -> float | None:
    def operand(index: int) -> float | None:
        return _where_false(op.operands[index], condition, known)

    if op.name == "arith.constant":
        return python_value(op.attrs["value"], value.elem)
    if op.name in _SAME:
        return operand(0)
    if op.name in _WIDENED:
        number = operand(0)
        signed = op.name in ("arith.extsi", "arith.sitofp")
        flag = op.operands[0].elem == I1 and signed
        return None if number is None or (flag and number) or (not signed and number < 0) else number
    if op.name == "tt.load":
        if len(op.operands) < 2 or not _is_factor(condition, op.operands[1]):
            return None
        return operand(2) if len(op.operands) > 2 else 0.0
    if op.name == "arith.select":
        return operand(2) if _is_factor(condition, op.operands[0]) else None
    if op.name in ("math.exp", "math.exp2"):
        return 0.0 if operand(0) == -math.inf else None
    if op.name not in _BINARY:
        return None
    left, right = operand(0), operand(1)
    if op.name == "arith.subf" and left == -math.inf and right is None:
        return left  # minus a number; minus -inf, all elements are NaN, those before the bound as well
    return None if left is None or right is None else _BINARY[op.name](left, right)


def _is_factor(condition: Value, mask: Value) -> bool:
    return any(part.value is condition for part in conjuncts(mask))
