"""Division of vectors by one number that a loop does not change, without a division in the loop.

A vector division takes as long as a dozen other instructions. With ``r`` the rounded reciprocal of ``d``, ``q = x * r``
is off by few units in the last place, ``x - q * d`` is exact with a fused multiply-add, and ``q + (x - q * d) * r`` is
the correctly rounded quotient unless the mantissa of ``d`` is all ones (Markstein, IBM J. Res. Dev. 34, 1990).
"""

from tilewright.codegen.cpu.lower.lanes import Lane, LaneBuilder, Uniform, Vector, width_of
from tilewright.codegen.cpu.ttir.records import F32

# Divisors for which no intermediate result overflows or loses digits; of a smaller |x| than 2**-100 the remainder
# may be subnormal, and the quotient is then off by one unit in the last place at most.
_LEAST, _MOST = "0x3C30000000000000", "0x43B0000000000000"  # 2**-60, 2**60
_INFINITY = "0x7FF0000000000000"


def shared_divisor(b: LaneBuilder, dividend: Lane, divisor: Lane) -> Uniform | None:
    """The divisor, if the division is one of many by it: of f32, in a loop around which the divisor is known."""
    if not isinstance(divisor, Uniform) or isinstance(dividend, Uniform) or divisor.elem != F32:
        return None
    return divisor if divisor.ref.startswith("%") and b.level_of(divisor.ref) < b.depth else None


def divide_by_shared(b: LaneBuilder, functions: dict[str, str], dividend: Lane, divisor: Uniform) -> Lane:
    """``dividend / divisor`` lane by lane.

    Args:
        functions: definitions of the module, by name; the one that is called is added.
    """
    width = width_of(dividend)
    d = divisor.ref
    reciprocal = b.emit(f"fdiv float 1.0, {d}")
    low = b.emit(f"fcmp oge float {d}, {_LEAST}")
    high = b.emit(f"fcmp ole float {d}, {_MOST}")
    bits = b.emit(f"bitcast float {d} to i32")
    fraction = b.emit(f"or i32 {bits}, {-(1 << 23)}")
    ordinary = b.emit(f"icmp ne i32 {fraction}, -1")
    safe = b.emit(f"and i1 {b.emit(f'and i1 {low}, {high}')}, {ordinary}")
    name = f"@tw.quotient.v{width}f32"
    functions.setdefault(name, _definition(name, width))
    x = b.vector(dividend, width)
    call = f"call <{width} x float> {name}(<{width} x float> {x}, float {d}, float {reciprocal}, i1 {safe})"
    return Vector(F32, b.emit(call), width)


def _definition(name: str, width: int) -> str:
    v, i = f"<{width} x float>", f"<{width} x i32> zeroinitializer"
    spread = [
        f"  %{n}0 = insertelement {v} poison, float %{n}, i32 0\n  %{n}s = shufflevector {v} %{n}0, {v} poison, {i}\n"
        for n in "dr"
    ]
    return f"""define internal {v} {name}({v} %x, float %d, float %r, i1 %safe) alwaysinline memory(none) {{
{"".join(spread)}  br i1 %safe, label %product, label %division
product:
  %q = fmul {v} %x, %rs
  %minus = fneg {v} %x
  %over = call {v} @llvm.fma.v{width}f32({v} %q, {v} %ds, {v} %minus)
  %under = fneg {v} %over
  %better = call {v} @llvm.fma.v{width}f32({v} %under, {v} %rs, {v} %q)
  %size = call {v} @llvm.fabs.v{width}f32({v} %q)
  %finite = fcmp olt {v} %size, splat (float {_INFINITY})
  %out = select <{width} x i1> %finite, {v} %better, {v} %q
  ret {v} %out
division:
  %exact = fdiv {v} %x, %ds
  ret {v} %exact
}}
"""
