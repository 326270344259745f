"""Conversions between element types, on scalars and vectors alike.

bf16 and fp8 values are carried as bit patterns in integers and converted with integer instructions, so the
rounding is the same (to nearest, ties to even) on every target.
"""

from tilewright.codegen.cpu.lower.builder import Builder
from tilewright.codegen.cpu.ttir.records import F32, F64, Elem


def typed(llvm: str, width: int) -> str:
    """``<width x llvm>``, or the scalar type for width 0."""
    return f"<{width} x {llvm}>" if width else llvm


def const(number: int, width: int, bits: int = 32) -> str:
    """Integer literal, as a splat for vectors."""
    return f"splat (i{bits} {number})" if width else str(number)


def widen(b: Builder, ref: str, elem: Elem, width: int) -> str:
    """A float of 8 or 16 bits as f32; f32 and f64 unchanged."""
    if elem.name in ("f32", "f64"):
        return ref
    f32, i32 = typed("float", width), typed("i32", width)
    if elem.name == "f16":
        return b.emit(f"fpext {typed('half', width)} {ref} to {f32}")
    if elem.name == "bf16":
        bits = b.emit(f"zext {typed('i16', width)} {ref} to {i32}")
        bits = b.emit(f"shl {i32} {bits}, {const(16, width)}")
        return b.emit(f"bitcast {i32} {bits} to {f32}")
    return _widen_fp8(b, ref, elem, width)


def _widen_fp8(b: Builder, ref: str, elem: Elem, width: int) -> str:
    f32, i32, i16 = typed("float", width), typed("i32", width), typed("i16", width)
    if elem.name == "f8E5M2":
        bits = b.emit(f"zext {typed('i8', width)} {ref} to {i16}")
        bits = b.emit(f"shl {i16} {bits}, {const(8, width, 16)}")
        half = b.emit(f"bitcast {i16} {bits} to {typed('half', width)}")
        return b.emit(f"fpext {typed('half', width)} {half} to {f32}")
    # e4m3: placed 4 bits below f16's fields the value is 2^-8 of what it should be, subnormals included.
    wide = b.emit(f"sext {typed('i8', width)} {ref} to {i32}")
    sign = b.emit(f"and {i32} {wide}, {const(-(1 << 31), width)}")
    magnitude = b.emit(f"and {i32} {wide}, {const(0x7F, width)}")
    bits = b.emit(f"shl {i32} {magnitude}, {const(20, width)}")
    small = b.emit(f"bitcast {i32} {bits} to {f32}")
    scale = "0x4770000000000000"  # 2^120: exponent bias 127 against 7
    value = b.emit(f"fmul {f32} {small}, {f'splat (float {scale})' if width else scale}")
    nan = b.emit(f"icmp eq {i32} {magnitude}, {const(0x7F, width)}")
    vbits = b.emit(f"bitcast {f32} {value} to {i32}")
    vbits = b.emit(f"select {typed('i1', width)} {nan}, {i32} {const(0x7FC00000, width)}, {i32} {vbits}")
    return b.emit(f"bitcast {i32} {b.emit(f'or {i32} {vbits}, {sign}')} to {f32}")


def narrow(b: Builder, ref: str, elem: Elem, width: int) -> str:
    """An f32 rounded to a float of 8 or 16 bits."""
    if elem.name == "f32":
        return ref
    f32, i32 = typed("float", width), typed("i32", width)
    if elem.name == "f16":
        return b.emit(f"fptrunc {f32} {ref} to {typed('half', width)}")
    if elem.name != "bf16":
        return _narrow_fp8(b, ref, elem, width)
    bits = b.emit(f"bitcast {f32} {ref} to {i32}")
    odd = b.emit(f"lshr {i32} {bits}, {const(16, width)}")
    odd = b.emit(f"and {i32} {odd}, {const(1, width)}")
    rounded = b.emit(f"add {i32} {bits}, {const(0x7FFF, width)}")
    rounded = b.emit(f"add {i32} {rounded}, {odd}")
    nan = b.emit(f"fcmp uno {f32} {ref}, {ref}")
    quiet = b.emit(f"or {i32} {bits}, {const(0x400000, width)}")
    chosen = b.emit(f"select {typed('i1', width)} {nan}, {i32} {quiet}, {i32} {rounded}")
    chosen = b.emit(f"lshr {i32} {chosen}, {const(16, width)}")
    return b.emit(f"trunc {i32} {chosen} to {typed('i16', width)}")


def _narrow_fp8(b: Builder, ref: str, elem: Elem, width: int) -> str:
    """Round to nearest even by adding a magic number for subnormals and by integer carry for normals."""
    f32, i32, i1 = typed("float", width), typed("i32", width), typed("i1", width)
    mantissa, bias = (2, 15) if elem.name == "f8E5M2" else (3, 7)
    drop = 23 - mantissa
    bits = b.emit(f"bitcast {f32} {ref} to {i32}")
    sign = b.emit(f"and {i32} {b.emit(f'lshr {i32} {bits}, {const(24, width)}')}, {const(0x80, width)}")
    mag = b.emit(f"and {i32} {bits}, {const(0x7FFFFFFF, width)}")
    odd = b.emit(f"and {i32} {b.emit(f'lshr {i32} {mag}, {const(drop, width)}')}, {const(1, width)}")
    rebias = ((bias - 127) << 23) + (1 << (drop - 1)) - 1
    normal = b.emit(f"add {i32} {b.emit(f'add {i32} {mag}, {const(rebias, width)}')}, {odd}")
    normal = b.emit(f"lshr {i32} {normal}, {const(drop, width)}")
    magic_bits = (127 - bias + 1 + drop) << 23
    magic = b.emit(f"bitcast {i32} {const(magic_bits, width)} to {f32}")
    value = b.emit(f"bitcast {i32} {mag} to {f32}")
    total = b.emit(f"bitcast {f32} {b.emit(f'fadd {f32} {value}, {magic}')} to {i32}")
    subnormal = b.emit(f"sub {i32} {total}, {const(magic_bits, width)}")
    is_sub = b.emit(f"icmp ult {i32} {mag}, {const((128 - bias) << 23, width)}")
    out = b.emit(f"select {i1} {is_sub}, {i32} {subnormal}, {i32} {normal}")
    # Infinities too become the largest value, as in a cast on a GPU, though e5m2 has infinities.
    top = 0x7B if elem.name == "f8E5M2" else 0x7E
    over = b.emit(f"icmp ugt {i32} {out}, {const(top, width)}")
    out = b.emit(f"select {i1} {over}, {i32} {const(top, width)}, {i32} {out}")
    huge = b.emit(f"icmp ugt {i32} {mag}, {const((254 - bias + 1) << 23, width)}")
    out = b.emit(f"select {i1} {huge}, {i32} {const(top, width)}, {i32} {out}")
    nan = b.emit(f"icmp ugt {i32} {mag}, {const(0x7F800000, width)}")
    out = b.emit(f"select {i1} {nan}, {i32} {const(0x7F, width)}, {i32} {out}")
    return b.emit(f"trunc {i32} {b.emit(f'or {i32} {out}, {sign}')} to {typed('i8', width)}")


def float_to_float(b: Builder, ref: str, src: Elem, dst: Elem, width: int, toward_zero: bool = False) -> str:
    """Between any two float types, rounded once: to nearest even, or toward zero."""
    if src == dst:
        return ref
    if toward_zero:
        return _truncated(b, ref, src, float_to_float(b, ref, src, dst, width), dst, width)
    if src == F64:
        if dst == F32:
            return b.emit(f"fptrunc {typed('double', width)} {ref} to {typed('float', width)}")
        return narrow(b, _round_to_odd(b, ref, width), dst, width)
    wide = widen(b, ref, src, width)
    if dst == F64:
        return b.emit(f"fpext {typed('float', width)} {wide} to {typed('double', width)}")
    return narrow(b, wide, dst, width)


def _truncated(b: Builder, ref: str, src: Elem, near: str, dst: Elem, width: int) -> str:
    """The neighbour nearer to zero where rounding to nearest made a number larger in size."""
    f64, bits = typed("double", width), typed(f"i{dst.bits}", width)
    suffix = f"v{width}f64" if width else "f64"
    sizes = []
    for value, elem in ((near, dst), (ref, src)):
        wide = float_to_float(b, value, elem, F64, width)
        sizes.append(b.emit(f"call {f64} @llvm.fabs.{suffix}({f64} {wide})"))
    larger = b.emit(f"fcmp ogt {f64} {sizes[0]}, {sizes[1]}")
    step = b.emit(f"zext {typed('i1', width)} {larger} to {bits}")
    if dst.llvm == f"i{dst.bits}":
        return b.emit(f"sub {bits} {near}, {step}")
    moved = b.emit(f"sub {bits} {b.emit(f'bitcast {typed(dst.llvm, width)} {near} to {bits}')}, {step}")
    return b.emit(f"bitcast {bits} {moved} to {typed(dst.llvm, width)}")


def _round_to_odd(b: Builder, ref: str, width: int) -> str:
    """f64 to f32 such that a second rounding to fewer bits is right (Boldo and Melquiond, 2008)."""
    f64, f32, i32, i1 = (typed(t, width) for t in ("double", "float", "i32", "i1"))
    near = b.emit(f"fptrunc {f64} {ref} to {f32}")
    back = b.emit(f"fpext {f32} {near} to {f64}")
    suffix = f"v{width}f64" if width else "f64"
    size_back = b.emit(f"call {f64} @llvm.fabs.{suffix}({f64} {back})")
    size = b.emit(f"call {f64} @llvm.fabs.{suffix}({f64} {ref})")
    above = b.emit(f"zext {i1} {b.emit(f'fcmp ogt {f64} {size_back}, {size}')} to {i32}")
    inexact = b.emit(f"zext {i1} {b.emit(f'fcmp one {f64} {size_back}, {size}')} to {i32}")
    bits = b.emit(f"sub {i32} {b.emit(f'bitcast {f32} {near} to {i32}')}, {above}")
    return b.emit(f"bitcast {i32} {b.emit(f'or {i32} {bits}, {inexact}')} to {f32}")


def cast(b: Builder, name: str, ref: str, src: Elem, dst: Elem, width: int, toward_zero: bool = False) -> str:
    """One of the conversion operations of the arith and tt dialects.

    Args:
        name: operation name, such as ``arith.sitofp``.
        ref: scalar, or vector of ``width`` lanes.
        toward_zero: rounding of a float to a narrower one, to nearest even otherwise.
    """
    src_t, dst_t = typed(src.llvm, width), typed(dst.llvm, width)
    kind = name.split(".")[1]
    if src == dst:
        return ref
    if kind in ("extf", "truncf", "fp_to_fp"):
        return float_to_float(b, ref, src, dst, width, toward_zero)
    if kind in ("sitofp", "uitofp"):
        return _int_to_float(b, kind, ref, src, dst, width)
    if kind in ("fptosi", "fptoui"):
        wide_src = F64 if src == F64 else F32
        value = widen(b, ref, src, width)
        if kind == "fptoui" and dst.bits == 64:
            return _to_u64(b, value, wide_src, width)
        # Through 32 bits at least: values beyond a narrower integer then wrap instead of being undefined.
        bits = max(dst.bits, 64 if kind == "fptoui" else 32)
        out = b.emit(f"fptosi {typed(wide_src.llvm, width)} {value} to {typed(f'i{bits}', width)}")
        return out if bits == dst.bits else b.emit(f"trunc {typed(f'i{bits}', width)} {out} to {dst_t}")
    if kind in ("extsi", "extui", "trunci", "index_cast"):
        op = "trunc" if dst.bits < src.bits else "zext" if kind == "extui" else "sext"
        return ref if dst.bits == src.bits else b.emit(f"{op} {src_t} {ref} to {dst_t}")
    if kind in ("bitcast", "ptr_to_int", "int_to_ptr"):
        if src_t == dst_t:
            return ref
        op = {"ptr_to_int": "ptrtoint", "int_to_ptr": "inttoptr"}.get(kind, "bitcast")
        return b.emit(f"{op} {src_t} {ref} to {dst_t}")
    raise KeyError(name)


def _to_u64(b: Builder, ref: str, src: Elem, width: int) -> str:
    """An f32 or f64 as u64: numbers of 2**63 and more have it taken off; negative ones wrap, as narrower ones do."""
    real, i64, flag = typed(src.llvm, width), typed("i64", width), typed("i1", width)
    half = "0x43E0000000000000"  # 2**63
    limit = f"splat ({src.llvm} {half})" if width else half
    big = b.emit(f"fcmp oge {real} {ref}, {limit}")
    low = b.emit(f"select {flag} {big}, {real} {b.emit(f'fsub {real} {ref}, {limit}')}, {real} {ref}")
    out = b.emit(f"fptosi {real} {low} to {i64}")
    top = b.emit(f"select {flag} {big}, {i64} {const(-(1 << 63), width, 64)}, {i64} {const(0, width, 64)}")
    return b.emit(f"xor {i64} {out}, {top}")


def _fewer_digits(b: Builder, signed: bool, ref: str, width: int) -> str:
    """A 64-bit integer that f64 holds exactly and that rounds to 16 bits alike.

    From 2**32 up the lowest 16 bits only say whether anything is there: one of them stands for all.
    """
    i64, flag = typed("i64", width), typed("i1", width)

    def write(name: str, x: str, y: int) -> str:
        return b.emit(f"{name} {i64} {x}, {const(y, width, 64)}")

    some = b.emit(f"icmp ne {i64} {write('and', ref, 0xFFFF)}, {const(0, width, 64)}")
    mark = b.emit(f"select {flag} {some}, {i64} {const(0x8000, width, 64)}, {i64} {const(0, width, 64)}")
    marked = b.emit(f"or {i64} {write('and', ref, -0x10000)}, {mark}")
    place = write("add", ref, 1 << 32) if signed else ref
    large = b.emit(f"icmp uge {i64} {place}, {const(1 << 33 if signed else 1 << 32, width, 64)}")
    return b.emit(f"select {flag} {large}, {i64} {marked}, {i64} {ref}")


def _int_to_float(b: Builder, kind: str, ref: str, src: Elem, dst: Elem, width: int) -> str:
    # 32- and 64-bit integers have more digits than f32: a 16-bit result must be rounded from f64 once.
    direct = dst if dst in (F32, F64) else (F32 if src.bits <= 16 else F64)
    if src.bits == 64 and direct != dst:
        ref = _fewer_digits(b, kind == "sitofp", ref, width)
    value = b.emit(f"{kind} {typed(src.llvm, width)} {ref} to {typed(direct.llvm, width)}")
    return value if direct == dst else float_to_float(b, value, direct, dst, width)


CASTS = (
    "arith.extf", "arith.truncf", "arith.sitofp", "arith.uitofp", "arith.fptosi", "arith.fptoui", "arith.extsi",
    "arith.extui", "arith.trunci", "arith.index_cast", "arith.bitcast", "tt.fp_to_fp", "tt.bitcast", "tt.ptr_to_int",
    "tt.int_to_ptr",
)  # fmt: skip
