"""Arithmetic rounded towards zero, up or down: the processor's rounding mode is set around the instruction."""

from collections.abc import Sequence

from tilewright.codegen.cpu.lower.convert import const, typed
from tilewright.codegen.cpu.lower.lanes import LaneBuilder, type_of
from tilewright.codegen.cpu.ttir.literals import float_literal
from tilewright.codegen.cpu.ttir.records import F32, F64, Elem

# Numbers of ``llvm.set.rounding``.
_MODES = {"rz": 0, "rn": 1, "ru": 2, "rd": 3}


def rounded(
    functions: dict[str, str], b: LaneBuilder, name: str, mode: str, refs: Sequence[str], elem: Elem, width: int
) -> str:
    """An operation of a rounding mode.

    Args:
        functions: definitions of the module, by name.
        name: fadd, fsub, fmul, fdiv, sqrt, fma, or fptrunc (f64 to f32).
        mode: rn, rz, ru or rd.
        refs: operands of type ``elem``.
    """
    type_ = type_of(elem, width)
    result = type_of(F32, width) if name == "fptrunc" else type_
    symbol = f"@tw.{name}.{mode}.{f'v{width}' if width else ''}f{elem.bits}"
    if symbol not in functions:
        functions[symbol] = _definition(symbol, name, mode, len(refs), type_, result)
    return b.emit(f"call {result} {symbol}({', '.join(f'{type_} {ref}' for ref in refs)})")


def _suffix(type_: str) -> str:
    return type_.strip("<>").replace(" x ", "").replace("float", "f32").replace("double", "f64")


def _definition(symbol: str, name: str, mode: str, arity: int, type_: str, result: str) -> str:
    """Not inlined: functions that depend on the mode cannot be part of those that do not."""
    params = ", ".join(f"{type_} %x{i}" for i in range(arity))
    vector = f"v{type_.split()[0].strip('<')}" if type_.startswith("<") else ""
    scalar = _suffix(type_.split()[-1])
    kind = f"{vector}{scalar}"
    if name == "fptrunc":
        kind = f"{vector}f32.{kind}"
    call = f'@llvm.experimental.constrained.{name}.{kind}({params}, metadata !"round.dynamic"'
    return (
        f"define internal {result} {symbol}({params}) noinline strictfp {{\n"
        f"  call void @llvm.set.rounding(i32 {_MODES[mode]}) strictfp\n"
        f'  %out = call {result} {call}, metadata !"fpexcept.strict") strictfp\n'
        f"  call void @llvm.set.rounding(i32 {_MODES['rn']}) strictfp\n"
        f"  ret {result} %out\n}}\n"
    )


def from_integer(
    functions: dict[str, str], b: LaneBuilder, mode: str, ref: str, source: Elem, signed: bool, dst: Elem, width: int
) -> str:
    """An integer as f32 or f64, rounded once: by way of f64, with 64 bits as the sum of two exact halves.

    Rounding to f64 and then to f32 in one direction is the same as rounding to f32 at once; to nearest it is not, and
    the conversion instruction does it.
    """
    source_type, double = type_of(source, width), type_of(F64, width)
    convert = "sitofp" if signed else "uitofp"
    if mode == "rn":
        return b.emit(f"{convert} {source_type} {ref} to {type_of(dst, width)}")
    if source.bits == 32:
        wide = b.emit(f"{convert} {source_type} {ref} to {double}")
    else:
        high = b.emit(f"{'ashr' if signed else 'lshr'} {source_type} {ref}, {const(32, width, 64)}")
        high = b.emit(f"{convert} {source_type} {high} to {double}")
        scale = float_literal(2.0**32, 64)
        high = b.emit(f"fmul {double} {high}, {f'splat (double {scale})' if width else scale}")
        low = b.emit(f"and {source_type} {ref}, {const((1 << 32) - 1, width, 64)}")
        low = b.emit(f"uitofp {source_type} {low} to {double}")
        wide = rounded(functions, b, "fadd", mode, [high, low], F64, width)
    return rounded(functions, b, "fptrunc", mode, [wide], F64, width) if dst == F32 else wide


_ROUND_FIRST = {"rn": "roundeven", "rd": "floor", "ru": "ceil"}


def to_integer(b: LaneBuilder, mode: str, ref: str, source: Elem, signed: bool, bits: int, width: int) -> str:
    """A float as an integer, as the GPU's conversion does it: saturated, NaN as 0 or as the highest bit alone.

    Source: PTX ISA, instruction ``cvt``: NaN gives 0 if the source is not f64 and the result has 32 bits.
    """
    type_, out_type = type_of(source, width), typed(f"i{bits}", width)
    lanes = f"v{width}" if width else ""
    value = ref
    if mode in _ROUND_FIRST:
        value = b.emit(f"call {type_} @llvm.{_ROUND_FIRST[mode]}.{lanes}f{source.bits}({type_} {ref})")
    convert = f"llvm.fpto{'s' if signed else 'u'}i.sat.{lanes}i{bits}.{lanes}f{source.bits}"
    out = b.emit(f"call {out_type} @{convert}({type_} {value})")
    if source == F32 and bits == 32:
        return out
    nan = b.emit(f"fcmp uno {type_} {ref}, {ref}")
    return b.emit(
        f"select {typed('i1', width)} {nan}, {out_type} {const(-1 << (bits - 1), width, bits)}, {out_type} {out}"
    )
