"""The integer functions of CUDA's device library, and those on the halves of an f64.

Semantics after the CUDA Math API reference, "Integer Intrinsics" and "Type Casting Intrinsics".
"""

from collections.abc import Callable

from tilewright.codegen.cpu.lower.convert import const
from tilewright.codegen.cpu.lower.lanes import LaneBuilder, type_of
from tilewright.codegen.cpu.ttir.records import F64, I32, I64, Elem, int_elem

_Writer = Callable[[LaneBuilder, list[str], Elem, int], str]


def _binary(b: LaneBuilder, name: str, x: str, y: str | int, elem: Elem, width: int) -> str:
    right = const(y, width, elem.bits) if isinstance(y, int) else y
    return b.emit(f"{name} {type_of(elem, width)} {x}, {right}")


def _convert(b: LaneBuilder, name: str, x: str, source: Elem, result: Elem, width: int) -> str:
    return b.emit(f"{name} {type_of(source, width)} {x} to {type_of(result, width)}")


def _intrinsic(b: LaneBuilder, name: str, x: str, elem: Elem, width: int, *flags: str) -> str:
    type_ = type_of(elem, width)
    suffix = (f"v{width}" if width else "") + elem.llvm
    return b.emit(f"call {type_} @llvm.{name}.{suffix}({', '.join([f'{type_} {x}', *flags])})")


def _as_i32(b: LaneBuilder, x: str, elem: Elem, width: int) -> str:
    return x if elem == I32 else _convert(b, "trunc", x, elem, I32, width)


def _count_leading(b: LaneBuilder, refs: list[str], elem: Elem, width: int) -> str:
    return _as_i32(b, _intrinsic(b, "ctlz", refs[0], elem, width, "i1 false"), elem, width)


def _count_set(b: LaneBuilder, refs: list[str], elem: Elem, width: int) -> str:
    return _as_i32(b, _intrinsic(b, "ctpop", refs[0], elem, width), elem, width)


def _reverse(b: LaneBuilder, refs: list[str], elem: Elem, width: int) -> str:
    return _intrinsic(b, "bitreverse", refs[0], elem, width)


def _find_first(b: LaneBuilder, refs: list[str], elem: Elem, width: int) -> str:
    """Place of the lowest bit set, from 1; 0 for 0."""
    place = _binary(b, "add", _intrinsic(b, "cttz", refs[0], elem, width, "i1 false"), 1, elem, width)
    zero = b.emit(f"icmp eq {type_of(elem, width)} {refs[0]}, {const(0, width, elem.bits)}")
    place = b.emit(
        f"select {type_of(int_elem(1), width)} {zero}, {type_of(elem, width)} {const(0, width, elem.bits)}, "
        f"{type_of(elem, width)} {place}"
    )
    return _as_i32(b, place, elem, width)


def _absolute(b: LaneBuilder, refs: list[str], elem: Elem, width: int) -> str:
    return _intrinsic(b, "abs", refs[0], elem, width, "i1 false")


def _wider(signed: bool, write: Callable[[LaneBuilder, list[str], Elem, int], str]) -> _Writer:
    """Runs integer arithmetic in twice the bits and keeps the low half."""

    def run(b: LaneBuilder, refs: list[str], elem: Elem, width: int) -> str:
        double = int_elem(elem.bits * 2)
        wide = [_convert(b, "sext" if signed else "zext", ref, elem, double, width) for ref in refs]
        return _convert(b, "trunc", write(b, wide, double, width), double, elem, width)

    return run


def _high_half(b: LaneBuilder, refs: list[str], elem: Elem, width: int) -> str:
    return _binary(b, "lshr", _binary(b, "mul", refs[0], refs[1], elem, width), elem.bits // 2, elem, width)


def _mean(extra: int) -> _Writer:
    """``(x + y + extra) >> 1``."""

    def write(b: LaneBuilder, refs: list[str], elem: Elem, width: int) -> str:
        total = _binary(b, "add", refs[0], refs[1], elem, width)
        total = _binary(b, "add", total, extra, elem, width) if extra else total
        return _binary(b, "ashr", total, 1, elem, width)

    return write


def _product_24(signed: bool) -> _Writer:
    """Low 32 bits of the product of the low 24 bits of each operand."""

    def write(b: LaneBuilder, refs: list[str], elem: Elem, width: int) -> str:
        shift = "ashr" if signed else "lshr"
        low = [_binary(b, shift, _binary(b, "shl", ref, 8, elem, width), 8, elem, width) for ref in refs]
        return _binary(b, "mul", low[0], low[1], elem, width)

    return write


def _difference(signed: bool) -> _Writer:
    """``|x - y| + z``."""

    def write(b: LaneBuilder, refs: list[str], elem: Elem, width: int) -> str:
        type_ = type_of(elem, width)
        x, y, z = refs
        ordered = b.emit(f"icmp {'sgt' if signed else 'ugt'} {type_} {x}, {y}")
        one, other = (_binary(b, "sub", left, right, elem, width) for left, right in ((x, y), (y, x)))
        size = b.emit(f"select {type_of(int_elem(1), width)} {ordered}, {type_} {one}, {type_} {other}")
        return _binary(b, "add", size, z, elem, width)

    return write


def _byte_permutation(b: LaneBuilder, refs: list[str], elem: Elem, width: int) -> str:
    """Each byte of the result is one of the 8 of x (0 to 3) and y (4 to 7), by 3 of each 4 bits of the selector."""
    x, y, selector = (_convert(b, "zext", ref, I32, I64, width) for ref in refs)
    bytes_ = _binary(b, "or", x, _binary(b, "shl", y, 32, I64, width), I64, width)
    out = const(0, width, 64)
    for place in range(4):
        # 8 times the number: bits 4 place to 4 place + 2 moved to bits 3 to 5.
        move = ("shl", 3) if place == 0 else ("lshr", 4 * place - 3)
        shift = _binary(b, "and", _binary(b, *move[:1], selector, move[1], I64, width), 0x38, I64, width)
        byte = _binary(b, "and", _binary(b, "lshr", bytes_, shift, I64, width), 0xFF, I64, width)
        out = _binary(b, "or", out, _binary(b, "shl", byte, 8 * place, I64, width), I64, width)
    return _convert(b, "trunc", out, I64, I32, width)


def _double_of_halves(b: LaneBuilder, refs: list[str], elem: Elem, width: int) -> str:
    high, low = (_convert(b, "zext", ref, I32, I64, width) for ref in refs)
    bits = _binary(b, "or", _binary(b, "shl", high, 32, I64, width), low, I64, width)
    return _convert(b, "bitcast", bits, I64, F64, width)


def _half_of_double(shift: int) -> _Writer:
    def write(b: LaneBuilder, refs: list[str], elem: Elem, width: int) -> str:
        bits = _convert(b, "bitcast", refs[0], F64, I64, width)
        return _convert(b, "trunc", _binary(b, "lshr", bits, shift, I64, width), I64, I32, width)

    return write


INTEGER_FUNCTIONS: dict[str, _Writer] = {
    **dict.fromkeys(("__nv_clz", "__nv_clzll"), _count_leading),
    **dict.fromkeys(("__nv_popc", "__nv_popcll"), _count_set),
    **dict.fromkeys(("__nv_brev", "__nv_brevll"), _reverse),
    **dict.fromkeys(("__nv_ffs", "__nv_ffsll"), _find_first),
    **dict.fromkeys(("__nv_abs", "__nv_llabs"), _absolute),
    **dict.fromkeys(("__nv_mulhi", "__nv_mul64hi"), _wider(True, _high_half)),
    **dict.fromkeys(("__nv_umulhi", "__nv_umul64hi"), _wider(False, _high_half)),
    "__nv_hadd": _wider(True, _mean(0)),
    "__nv_uhadd": _wider(False, _mean(0)),
    "__nv_rhadd": _wider(True, _mean(1)),
    "__nv_urhadd": _wider(False, _mean(1)),
    "__nv_mul24": _product_24(True),
    "__nv_umul24": _product_24(False),
    "__nv_sad": _difference(True),
    "__nv_usad": _difference(False),
    "__nv_byte_perm": _byte_permutation,
    "__nv_hiloint2double": _double_of_halves,
    "__nv_double2loint": _half_of_double(0),
    "__nv_double2hiint": _half_of_double(32),
}
