"""Elementwise operations on lanes: one table entry per operation of the arith and tt dialects.

Every entry works on scalars (width 0) and vectors. Operations of the math dialect are in ``mathlib.functions``.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace

from tilewright.codegen.cpu.lower.convert import CASTS, cast, const, narrow, typed, widen
from tilewright.codegen.cpu.lower.lanes import (
    TRUE,
    Affine,
    Lane,
    LaneBuilder,
    Mask,
    Uniform,
    Vector,
    is_const,
    type_of,
    width_of,
)
from tilewright.codegen.cpu.ttir.records import F32, F64, I1, Elem, Op

# Takes the builder, the operation, operands of one LLVM type, their element type and the width.
Rule = Callable[[LaneBuilder, Op, list[str], Elem, int], str]

_INT_BINARY = {
    "arith.addi": "add",
    "arith.subi": "sub",
    "arith.muli": "mul",
    "arith.andi": "and",
    "arith.ori": "or",
    "arith.xori": "xor",
}
_INT_CALLS = {"arith.maxsi": "smax", "arith.minsi": "smin", "arith.maxui": "umax", "arith.minui": "umin"}
_SHIFTS = {"arith.shli": "shl", "arith.shrsi": "ashr", "arith.shrui": "lshr"}
_DIVISIONS = {"arith.divsi": "sdiv", "arith.divui": "udiv", "arith.remsi": "srem", "arith.remui": "urem"}
_FLOAT_BINARY = {
    "arith.addf": "fadd contract",
    "arith.subf": "fsub contract",
    "arith.mulf": "fmul contract",
    "arith.divf": "fdiv",
    "tt.precise_divf": "fdiv",
    "arith.remf": "frem",
}


def in_f32(rule: Rule) -> Rule:
    """Runs a float rule on 8- and 16-bit types in f32 and rounds its result."""

    def wrapped(b: LaneBuilder, op: Op, refs: list[str], elem: Elem, width: int) -> str:
        if elem in (F32, F64):
            return rule(b, op, refs, elem, width)
        wide = [widen(b, ref, elem, width) for ref in refs]
        return narrow(b, rule(b, op, wide, F32, width), elem, width)

    return wrapped


def _int_binary(b: LaneBuilder, op: Op, refs: list[str], elem: Elem, width: int) -> str:
    name = _INT_BINARY[op.name]
    if not width and name in ("add", "sub", "mul") and elem.bits > 1:
        return b.int_op(name, refs[0], refs[1], elem)
    return b.emit(f"{name} {type_of(elem, width)} {refs[0]}, {refs[1]}")


def _int_call(b: LaneBuilder, op: Op, refs: list[str], elem: Elem, width: int) -> str:
    type_ = type_of(elem, width)
    suffix = f"v{width}{elem.llvm}" if width else elem.llvm
    return b.emit(f"call {type_} @llvm.{_INT_CALLS[op.name]}.{suffix}({type_} {refs[0]}, {type_} {refs[1]})")


def _shift(b: LaneBuilder, op: Op, refs: list[str], elem: Elem, width: int) -> str:
    return b.emit(f"{_SHIFTS[op.name]} {type_of(elem, width)} {refs[0]}, {refs[1]}")


def divide(b: LaneBuilder, name: str, refs: list[str], elem: Elem, width: int) -> str:
    """Integer division or remainder that cannot trap: masked-off lanes may hold any divisor."""
    type_, flag = type_of(elem, width), typed("i1", width)
    top, bottom = refs
    literal = bottom.removeprefix(f"splat ({elem.llvm} ").removesuffix(")")
    if not is_const(literal) or literal == "0":
        zero = b.emit(f"icmp eq {type_} {bottom}, {const(0, width, elem.bits)}")
        bottom = b.emit(f"select {flag} {zero}, {type_} {const(1, width, elem.bits)}, {type_} {bottom}")
    if name in ("sdiv", "srem") and (not is_const(literal) or literal == "-1"):
        # The smallest integer divided by -1 overflows, and traps on x86: negate instead.
        minus = b.emit(f"icmp eq {type_} {bottom}, {const(-1, width, elem.bits)}")
        safe = b.emit(f"select {flag} {minus}, {type_} {const(1, width, elem.bits)}, {type_} {bottom}")
        quotient = b.emit(f"{name} {type_} {top}, {safe}")
        if name == "srem":
            return quotient
        negated = b.emit(f"sub {type_} {const(0, width, elem.bits)}, {top}")
        return b.emit(f"select {flag} {minus}, {type_} {negated}, {type_} {quotient}")
    return b.emit(f"{name} {type_} {top}, {bottom}")


def _division(b: LaneBuilder, op: Op, refs: list[str], elem: Elem, width: int) -> str:
    return divide(b, _DIVISIONS[op.name], refs, elem, width)


def _ceil_floor_div(b: LaneBuilder, op: Op, refs: list[str], elem: Elem, width: int) -> str:
    """Division of signed integers rounded up or down: the quotient towards zero, and one where it is off."""
    type_, flag = type_of(elem, width), typed("i1", width)
    quotient = divide(b, "sdiv", refs, elem, width)
    product = b.emit(f"mul {type_} {quotient}, {refs[1]}")
    inexact = b.emit(f"icmp ne {type_} {product}, {refs[0]}")
    signs = b.emit(f"xor {type_} {refs[0]}, {refs[1]}")
    up = op.name == "arith.ceildivsi"
    same = b.emit(f"icmp {'sge' if up else 'slt'} {type_} {signs}, {const(0, width, elem.bits)}")
    adjust = b.emit(f"zext {flag} {b.emit(f'and {flag} {inexact}, {same}')} to {type_}")
    return b.emit(f"{'add' if up else 'sub'} {type_} {quotient}, {adjust}")


def _mulhiui(b: LaneBuilder, op: Op, refs: list[str], elem: Elem, width: int) -> str:
    type_, double = type_of(elem, width), typed(f"i{elem.bits * 2}", width)
    wide = [b.emit(f"zext {type_} {ref} to {double}") for ref in refs]
    product = b.emit(f"mul {double} {wide[0]}, {wide[1]}")
    high = b.emit(f"lshr {double} {product}, {const(elem.bits, width, elem.bits * 2)}")
    return b.emit(f"trunc {double} {high} to {type_}")


def _float_binary(b: LaneBuilder, op: Op, refs: list[str], elem: Elem, width: int) -> str:
    return b.emit(f"{_FLOAT_BINARY[op.name]} {type_of(elem, width)} {refs[0]}, {refs[1]}")


def _negf(b: LaneBuilder, op: Op, refs: list[str], elem: Elem, width: int) -> str:
    return b.emit(f"fneg {type_of(elem, width)} {refs[0]}")


def float_extreme(b: LaneBuilder, name: str, refs: Sequence[str], elem: Elem, width: int) -> str:
    """maxnumf and minnumf ignore a NaN, maximumf and minimumf pass it on."""
    x, y = refs
    type_, flag = type_of(elem, width), typed("i1", width)
    order = b.emit(f"fcmp {'ogt' if 'max' in name else 'olt'} {type_} {x}, {y}")
    best = b.emit(f"select {flag} {order}, {type_} {x}, {type_} {y}")
    checked = y if "num" in name else x
    nan = b.emit(f"fcmp uno {type_} {checked}, {checked}")
    return b.emit(f"select {flag} {nan}, {type_} {x}, {type_} {best}")


def _extreme(b: LaneBuilder, op: Op, refs: list[str], elem: Elem, width: int) -> str:
    return float_extreme(b, op.name, refs, elem, width)


def _clampf(b: LaneBuilder, op: Op, refs: list[str], elem: Elem, width: int) -> str:
    low, high = ("maximum", "minimum") if op.attrs.get("propagateNan") == "all" else ("maxnum", "minnum")
    return float_extreme(b, high, [float_extreme(b, low, refs[:2], elem, width), refs[2]], elem, width)


RULES: dict[str, Rule] = dict.fromkeys(_INT_BINARY, _int_binary)
RULES |= dict.fromkeys(_INT_CALLS, _int_call)
RULES |= dict.fromkeys(_SHIFTS, _shift)
RULES |= dict.fromkeys(_DIVISIONS, _division)
RULES |= dict.fromkeys(("arith.ceildivsi", "arith.floordivsi"), _ceil_floor_div)
RULES |= {name: in_f32(_float_binary) for name in _FLOAT_BINARY}
RULES |= {f"arith.{name}": in_f32(_extreme) for name in ("maxnumf", "minnumf", "maximumf", "minimumf")}
RULES |= {"tt.mulhiui": _mulhiui, "arith.negf": in_f32(_negf), "tt.clampf": in_f32(_clampf)}

_SWAPPED = {"sgt": "slt", "sge": "sle"}


def _compare_int(b: LaneBuilder, op: Op, lanes: Sequence[Lane]) -> Lane:
    predicate, (left, right) = op.words[0], lanes
    elem, width = left.elem, width_of(*lanes)
    if prefix := _prefix(b, predicate, left, right):
        return prefix
    refs = [b.vector(lane, width) if width else _scalar(lane) for lane in lanes]
    out = b.emit(f"icmp {predicate} {type_of(elem, width)} {refs[0]}, {refs[1]}")
    return Vector(I1, out, width) if width else Uniform(I1, out)


def _prefix(b: LaneBuilder, predicate: str, left: Lane, right: Lane) -> Lane | None:
    """``base + lane < limit`` as a bound on the lane number."""
    if predicate in _SWAPPED:
        predicate, left, right = _SWAPPED[predicate], right, left
    if predicate not in ("slt", "sle") or left.elem.is_ptr:
        return None
    a, c = b.affine_parts(left), b.affine_parts(right)
    if a is None or c is None or not width_of(left, right):
        return None
    elem = left.elem
    if b.int_op("sub", a[1], c[1], elem) != "1":
        return None
    bound = b.int_op("sub", c[0], a[0], elem)
    if predicate == "sle":
        bound = b.int_op("add", bound, "1", elem)
    width = width_of(left, right)
    if elem.bits > 32:
        bound = b.int_max(b.int_min(bound, str(width), elem.llvm), "0", elem.llvm)
        bound = bound if is_const(bound) else b.emit(f"trunc {elem.llvm} {bound} to i32")
    elif elem.bits < 32 and not is_const(bound):
        bound = b.emit(f"sext {elem.llvm} {bound} to i32")
    if is_const(bound) and int(bound) >= width:
        return TRUE
    return Mask(width, bound=bound)


def _scalar(lane: Lane) -> str:
    if isinstance(lane, Mask) and lane.all_true:
        return "true"
    assert isinstance(lane, Uniform), lane
    return lane.ref


def _compare_float(b: LaneBuilder, op: Op, lanes: Sequence[Lane]) -> Lane:
    elem, width = lanes[0].elem, width_of(*lanes)
    refs = [widen(b, b.vector(lane, width) if width else _scalar(lane), elem, width) for lane in lanes]
    wide = elem if elem == F64 else F32
    out = b.emit(f"fcmp {op.words[0]} {type_of(wide, width)} {refs[0]}, {refs[1]}")
    return Vector(I1, out, width) if width else Uniform(I1, out)


def select(b: LaneBuilder, condition: Lane, yes: Lane, no: Lane) -> Lane:
    """``condition ? yes : no`` lane by lane."""
    if condition == TRUE or (isinstance(condition, Mask) and condition.all_true) or yes == no:
        return yes
    width = width_of(condition, yes, no)
    elem = yes.elem
    flag = condition.ref if isinstance(condition, Uniform) else None
    if isinstance(condition, Mask) and condition.bound is None and condition.vector is None:
        flag = condition.uniform
    if flag is not None:
        width = width_of(yes, no)
        choice = f"i1 {flag}"
    else:
        choice = f"<{width} x i1> {b.vector(condition, width)}"
    refs = [b.vector(lane, width) if width else _scalar(lane) for lane in (yes, no)]
    type_ = type_of(elem, width)
    out = b.emit(f"select {choice}, {type_} {refs[0]}, {type_} {refs[1]}")
    return Vector(elem, out, width) if width else Uniform(elem, out)


def _and(b: LaneBuilder, op: Op, lanes: Sequence[Lane]) -> Lane | None:
    left, right = lanes
    width = width_of(left, right)
    if left.elem != I1 or not width:
        return None
    return b.both(b.mask(left, width), b.mask(right, width))


def _affine_rule(b: LaneBuilder, op: Op, lanes: Sequence[Lane]) -> Lane | None:
    """Keeps index arithmetic affine; None where it is not."""
    if op.result.elem == I1:
        return None
    if op.name in ("arith.addi", "arith.subi"):
        return b.add_sub(_INT_BINARY[op.name], lanes[0], lanes[1])
    if op.name == "arith.muli":
        return b.mul(lanes[0], lanes[1])
    if op.name == "arith.extsi" and isinstance(lanes[0], Affine) and lanes[0].elem.bits == 32:
        # Exact unless the index wraps around within one vector, which no valid address does; large strides,
        # as hash functions multiply with, may wrap and are widened lane by lane.
        stride = lanes[0].stride
        if isinstance(stride, str) or abs(stride) < 1 << 20:
            base = b.widen_index(lanes[0].base, lanes[0].elem)
            return b.affine(op.result.elem, base, b.widen_index(str(stride), lanes[0].elem), lanes[0].width)
    return None


def _pointer_cast(b: LaneBuilder, lane: Lane, elem: Elem) -> Lane:
    """A pointer to another type; contiguous addresses stay contiguous. Loads of booleans go through it."""
    if isinstance(lane, Affine) and isinstance(lane.stride, int):
        assert lane.elem.pointee is not None
        assert elem.pointee is not None
        distance = lane.stride * lane.elem.pointee.size
        if distance % elem.pointee.size == 0:
            return replace(lane, elem=elem, stride=distance // elem.pointee.size)
    if isinstance(lane, Uniform):
        return replace(lane, elem=elem)
    width = width_of(lane)
    return Vector(elem, b.vector(lane, width), width)


def elementwise(b: LaneBuilder, op: Op, lanes: Sequence[Lane], rules: dict[str, Rule]) -> Lane:
    """Value of one elementwise operation.

    Args:
        lanes: operands at the point.
        rules: table of operations (``RULES`` and that of ``mathlib.functions``).

    Raises:
        KeyError: the operation is in no table.
    """
    if op.name == "arith.select":
        return select(b, *lanes)
    if op.name == "arith.cmpi":
        return _compare_int(b, op, lanes)
    if op.name == "arith.cmpf":
        return _compare_float(b, op, lanes)
    if op.name == "tt.addptr":
        return b.add_pointer(lanes[0], lanes[1])
    if op.name == "tt.bitcast" and op.result.elem.is_ptr:
        return _pointer_cast(b, lanes[0], op.result.elem)
    kept = _and(b, op, lanes) if op.name == "arith.andi" else _affine_rule(b, op, lanes)
    if kept is not None:
        return kept
    width = width_of(*lanes)
    refs = [b.vector(lane, width) if width else _scalar(lane) for lane in lanes]
    if op.name in CASTS:
        toward_zero = op.attrs.get("rounding") == "rtz"
        out = cast(b, op.name, refs[0], lanes[0].elem, op.result.elem, width, toward_zero)
    else:
        out = rules[op.name](b, op, refs, lanes[0].elem, width)
    return Vector(op.result.elem, out, width) if width else Uniform(op.result.elem, out)


ELEMENTWISE = {*RULES, *CASTS, "arith.select", "arith.cmpi", "arith.cmpf", "tt.addptr"}
