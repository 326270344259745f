"""CUDA's and AMD's device library by symbol (``__nv_*``, ``__ocml_*``), as ``tt.extern_elementwise`` names it.

Semantics after the CUDA Math API reference. The fast variants are the accurate ones. A symbol that is not in the table
is not supported.
"""

from collections.abc import Callable

from tilewright.codegen.cpu.lower.arith import Rule
from tilewright.codegen.cpu.lower.convert import const, typed
from tilewright.codegen.cpu.lower.lanes import LaneBuilder, type_of
from tilewright.codegen.cpu.mathlib.functions import FUNCTIONS, MathLibrary
from tilewright.codegen.cpu.mathlib.libdevice_integer import INTEGER_FUNCTIONS
from tilewright.codegen.cpu.mathlib.rounding import from_integer, rounded, to_integer
from tilewright.codegen.cpu.ttir.records import F32, F64, I32, I64, Elem, Op

# Takes the library, the builder, the operands, the first one's element type, and the width.
_Entry = Callable[[MathLibrary, LaneBuilder, list[str], Elem, int], str]


def symbol_of(op: Op) -> str:
    """The symbol that an operation names."""
    return op.attrs["symbol"].strip('"')


def extern_rule(library: MathLibrary) -> Rule:
    """The rule of ``tt.extern_elementwise``; it raises KeyError for a symbol that is not known."""

    def rule(b: LaneBuilder, op: Op, refs: list[str], elem: Elem, width: int) -> str:
        return SYMBOLS[symbol_of(op)](library, b, refs, elem, width)

    return rule


def _function(name: str) -> _Entry:
    return lambda library, b, refs, elem, width: library.call(b, name, refs, elem, width)


def _cast(kind: str, result: Elem) -> _Entry:
    """One LLVM conversion instruction, such as bitcast."""
    return lambda library, b, refs, elem, width: b.emit(
        f"{kind} {type_of(elem, width)} {refs[0]} to {type_of(result, width)}"
    )


def _by_lanes(callee: str, types: tuple[Elem, ...], result: Elem) -> _Entry:
    """A function of the C library whose operands and result are of different types, called for each lane."""
    declared = ", ".join(elem.llvm for elem in types)

    def entry(library: MathLibrary, b: LaneBuilder, refs: list[str], elem: Elem, width: int) -> str:
        library.functions[callee] = f"declare {result.llvm} @{callee}({declared}) memory(none) nounwind\n"

        def call(lanes: list[str]) -> str:
            args = ", ".join(f"{one.llvm} {ref}" for one, ref in zip(types, lanes, strict=True))
            return b.emit(f"call {result.llvm} @{callee}({args})")

        if not width:
            return call(refs)
        out = "poison"
        for lane in range(width):
            parts = [
                b.emit(f"extractelement {type_of(one, width)} {ref}, i32 {lane}")
                for one, ref in zip(types, refs, strict=True)
            ]
            out = b.emit(f"insertelement {type_of(result, width)} {out}, {result.llvm} {call(parts)}, i32 {lane}")
        return out

    return entry


def _in_f64(entry: _Entry, position: int = 0) -> _Entry:
    """Runs an entry with the f32 operand at ``position`` widened, and its f64 result rounded."""

    def wrapped(library: MathLibrary, b: LaneBuilder, refs: list[str], elem: Elem, width: int) -> str:
        single, double = type_of(F32, width), type_of(F64, width)
        wide = list(refs)
        wide[position] = b.emit(f"fpext {single} {refs[position]} to {double}")
        out = entry(library, b, wide, elem if position else F64, width)
        return b.emit(f"fptrunc {double} {out} to {single}")

    return wrapped


def _power(library: MathLibrary, b: LaneBuilder, refs: list[str], elem: Elem, width: int) -> str:
    """f64 to an i32 power."""
    power = b.emit(f"sitofp {type_of(I32, width)} {refs[1]} to {type_of(F64, width)}")
    return library.call(b, "pow", [refs[0], power], F64, width)


def _ldexp(library: MathLibrary, b: LaneBuilder, refs: list[str], elem: Elem, width: int) -> str:
    type_, lanes = type_of(elem, width), f"v{width}" if width else ""
    name = f"llvm.ldexp.{lanes}f{elem.bits}.{lanes}i32"
    return b.emit(f"call {type_} @{name}({type_} {refs[0]}, {type_of(I32, width)} {refs[1]})")


def _rounded(name: str, mode: str) -> _Entry:
    """Arithmetic in a rounding mode. To nearest it is the plain instruction, which is never contracted."""
    plain = {"sqrt": "sqrt", "fma": "fma"}

    def entry(library: MathLibrary, b: LaneBuilder, refs: list[str], elem: Elem, width: int) -> str:
        if mode != "rn":
            return rounded(library.functions, b, name, mode, refs, elem, width)
        if name in plain:
            return library.call(b, plain[name], refs, elem, width)
        type_ = type_of(elem, width)
        if name == "fptrunc":
            return b.emit(f"fptrunc {type_} {refs[0]} to {type_of(F32, width)}")
        return b.emit(f"{name} {type_} {refs[0]}, {refs[1]}")

    return entry


def _reciprocal(mode: str) -> _Entry:
    divide = _rounded("fdiv", mode)

    def entry(library: MathLibrary, b: LaneBuilder, refs: list[str], elem: Elem, width: int) -> str:
        one = f"splat ({elem.llvm} 1.0)" if width else "1.0"
        return divide(library, b, [one, *refs], elem, width)

    return entry


def _llround(library: MathLibrary, b: LaneBuilder, refs: list[str], elem: Elem, width: int) -> str:
    return to_integer(b, "rz", library.call(b, "round", refs, elem, width), elem, True, 64, width)


def _to_integer(mode: str, signed: bool, bits: int) -> _Entry:
    return lambda library, b, refs, elem, width: to_integer(b, mode, refs[0], elem, signed, bits, width)


def _from_integer(mode: str, signed: bool, result: Elem) -> _Entry:
    return lambda library, b, refs, elem, width: from_integer(
        library.functions, b, mode, refs[0], elem, signed, result, width
    )


def _test(write: Callable[[LaneBuilder, str, Elem, int], str]) -> _Entry:
    """A condition as i32."""

    def entry(library: MathLibrary, b: LaneBuilder, refs: list[str], elem: Elem, width: int) -> str:
        flag = write(b, refs[0], elem, width)
        return b.emit(f"zext {typed('i1', width)} {flag} to {type_of(I32, width)}")

    return entry


def _is_nan(b: LaneBuilder, ref: str, elem: Elem, width: int) -> str:
    return b.emit(f"fcmp uno {type_of(elem, width)} {ref}, {ref}")


def _against_infinity(predicate: str) -> Callable[[LaneBuilder, str, Elem, int], str]:
    def write(b: LaneBuilder, ref: str, elem: Elem, width: int) -> str:
        type_, inf = type_of(elem, width), "0x7FF0000000000000"
        suffix = (f"v{width}" if width else "") + f"f{elem.bits}"
        size = b.emit(f"call {type_} @llvm.fabs.{suffix}({type_} {ref})")
        return b.emit(f"fcmp {predicate} {type_} {size}, {f'splat ({elem.llvm} {inf})' if width else inf}")

    return write


def _sign(b: LaneBuilder, ref: str, elem: Elem, width: int) -> str:
    integer = typed(f"i{elem.bits}", width)
    bits = b.emit(f"bitcast {type_of(elem, width)} {ref} to {integer}")
    return b.emit(f"icmp slt {integer} {bits}, {const(0, width, elem.bits)}")


def _reciprocal_high(library: MathLibrary, b: LaneBuilder, refs: list[str], elem: Elem, width: int) -> str:
    """1/x in f64 with the low half of its digits cleared, as the GPU's estimate has."""
    double, i64 = type_of(F64, width), type_of(I64, width)
    quotient = _reciprocal("rn")(library, b, refs, elem, width)
    bits = b.emit(f"bitcast {double} {quotient} to {i64}")
    return b.emit(f"bitcast {i64} {b.emit(f'and {i64} {bits}, {const(-1 << 32, width, 64)}')} to {double}")


def _integer(write: Callable[[LaneBuilder, list[str], Elem, int], str]) -> _Entry:
    return lambda library, b, refs, elem, width: write(b, refs, elem, width)


SYMBOLS: dict[str, _Entry] = {symbol: _integer(write) for symbol, write in INTEGER_FUNCTIONS.items()}
for _name in FUNCTIONS:
    SYMBOLS |= dict.fromkeys((f"__nv_{_name}", f"__nv_{_name}f"), _function(_name))
    SYMBOLS |= dict.fromkeys((f"__ocml_{_name}_f32", f"__ocml_{_name}_f64"), _function(_name))
for _name in ("sin", "cos", "tan", "log", "log2", "log10", "exp", "exp10", "pow"):
    SYMBOLS[f"__nv_fast_{_name}f"] = _function(_name)
_DIVIDE = _rounded("fdiv", "rn")
SYMBOLS |= {
    "__nv_fast_fdividef": _DIVIDE,
    "__nv_saturatef": _function("saturate"),
    "__nv_frsqrt_rn": _function("rsqrt_rn"),
    "__nv_rcp64h": _reciprocal_high,
    "__nv_ldexpf": _ldexp,
    "__nv_ldexp": _ldexp,
    "__nv_scalbnf": _ldexp,
    "__nv_scalbn": _ldexp,
    "__nv_powi": _power,
    "__nv_powif": _in_f64(_power),
    "__nv_ilogb": _by_lanes("ilogb", (F64,), I32),
    "__nv_ilogbf": _by_lanes("ilogbf", (F32,), I32),
    "__nv_isnanf": _test(_is_nan),
    "__nv_isnand": _test(_is_nan),
    "__nv_isinff": _test(_against_infinity("oeq")),
    "__nv_isinfd": _test(_against_infinity("oeq")),
    "__nv_finitef": _test(_against_infinity("olt")),
    "__nv_isfinited": _test(_against_infinity("olt")),
    "__nv_signbitf": _test(_sign),
    "__nv_signbitd": _test(_sign),
    "__nv_llrint": _to_integer("rn", True, 64),
    "__nv_llrintf": _to_integer("rn", True, 64),
    "__nv_llround": _llround,
    "__nv_llroundf": _llround,
    "__nv_int2double_rn": _from_integer("rn", True, F64),
    "__nv_uint2double_rn": _from_integer("rn", False, F64),
}
for _name in ("jn", "yn"):
    _bessel = _by_lanes(_name, (I32, F64), F64)
    SYMBOLS |= {f"__nv_{_name}": _bessel, f"__nv_{_name}f": _in_f64(_bessel, position=1)}
for _name, _kind, _result in (
    ("int_as_float", "bitcast", F32),
    ("uint_as_float", "bitcast", F32),
    ("float_as_int", "bitcast", I32),
    ("float_as_uint", "bitcast", I32),
    ("longlong_as_double", "bitcast", F64),
    ("double_as_longlong", "bitcast", I64),
):
    SYMBOLS[f"__nv_{_name}"] = _cast(_kind, _result)
for _mode in ("rn", "rz", "ru", "rd"):
    for _name in ("add", "sub", "mul", "div", "sqrt"):
        _operation = _rounded(_name if _name == "sqrt" else f"f{_name}", _mode)
        SYMBOLS |= {f"__nv_f{_name}_{_mode}": _operation, f"__nv_d{_name}_{_mode}": _operation}
    SYMBOLS |= {f"__nv_fmaf_{_mode}": _rounded("fma", _mode), f"__nv_fma_{_mode}": _rounded("fma", _mode)}
    SYMBOLS |= {f"__nv_{_type}rcp_{_mode}": _reciprocal(_mode) for _type in "fd"}
    SYMBOLS[f"__nv_double2float_{_mode}"] = _rounded("fptrunc", _mode)
    for _source in ("float", "double"):
        SYMBOLS[f"__nv_{_source}2int_{_mode}"] = _to_integer(_mode, True, 32)
        SYMBOLS[f"__nv_{_source}2uint_{_mode}"] = _to_integer(_mode, False, 32)
        SYMBOLS[f"__nv_{_source}2ll_{_mode}"] = _to_integer(_mode, True, 64)
        SYMBOLS[f"__nv_{_source}2ull_{_mode}"] = _to_integer(_mode, False, 64)
    for _name, _signed in (("int", True), ("uint", False), ("ll", True), ("ull", False)):
        SYMBOLS[f"__nv_{_name}2float_{_mode}"] = _from_integer(_mode, _signed, F32)
        if _name.endswith("ll"):
            SYMBOLS[f"__nv_{_name}2double_{_mode}"] = _from_integer(_mode, _signed, F64)
