"""Circular functions and their inverses.

sin, cos and tan subtract a multiple of pi/2 given in parts (Cody and Waite, 1980), which is right up to 2**18; lanes
beyond go to the C library on a branch that is hardly ever taken. The functions ending in ``_wide`` compute in f64,
to about 1e-10, for results in f32.
"""

from collections.abc import Callable

from tilewright.codegen.cpu.mathlib.floatcode import FloatCode

PI = 3.141592653589793
_TWO_OVER_PI = 0.6366197723675814
_LIMIT = float(1 << 18)
_PI_HALF = (1.5707963705062866, -4.371138828673793e-08, -1.7151245100058819e-15)  # three times 24 bits
_PI_HALF_WIDE = (1.5707963267948966, 6.123233995736766e-17)
# sin(r) = r + r^3 s(r^2), cos(r) = 1 - r^2 / 2 + r^4 c(r^2), atan(r) = r + r^3 a(r^2).
_SIN = (-0.1666666716337204, 0.008333376608788967, -0.0001985156413866207, 2.8142421797383577e-06)
_COS = (0.04166664183139801, -0.001388711971230805, 2.4410059268120676e-05)
_SIN_WIDE = (-0.16666666666617783, 0.008333333322865528, -0.00019841262539029524, 2.7555090914741608e-06,
             -2.4742716363070724e-08)  # fmt: skip
_COS_WIDE = (0.041666666666580164, -0.0013888888875450767, 2.480157974737101e-05, -2.7555348126728774e-07,
             2.0633871090359053e-09)  # fmt: skip
_ATAN_WIDE = (
    -0.3333333213380099, 0.19999927244261057, -0.1428416723222724, 0.11094503639896712, -0.0898543887602614,
    0.07259437419450256, -0.05451595383246628, 0.034475860454015864, -0.016299439101219733, 0.004926351247091136,
    -0.0006979560350050425,
)  # fmt: skip


def _reduced(f: FloatCode, x: str, parts: tuple[float, ...]) -> tuple[str, str]:
    """Quadrant, in the lowest bits, and what is left of x."""
    shifted = f.fma(x, _TWO_OVER_PI, f.magic)
    n = f.sub(shifted, f.magic)
    for part in parts:
        x = f.fma(n, -part, x)
    return f.bits(shifted), x


def _sine_and_cosine(f: FloatCode, r: str, sine: tuple[float, ...], cosine: tuple[float, ...]) -> tuple[str, str]:
    square = f.mul(r, r)
    tail = f.fma(f.mul(square, square), f.horner(square, cosine), f.mul(square, -0.5))
    return f.fma(f.mul(square, r), f.horner(square, sine), r), f.add(tail, 1.0)


def _is_odd(f: FloatCode, quadrant: str) -> str:
    return f.emit(f"trunc {f.int_type} {quadrant} to {f.flag}")


def _with_huge_lanes(f: FloatCode, x: str, out: str, name: str) -> str:
    """Lanes beyond the reduction's limit from the C library, whose reduction has no limit."""
    huge = f.compare("ogt", f.abs(x), _LIMIT)

    def slow() -> list[str]:
        w = f.in_f64()
        return [f.choose(huge, w.round_to_f32(w.libm(name, w.extend(x))), out)]

    return f.branch(f.any(huge), slow, lambda: [out], [f.type])[0]


def _sin_cos(name: str, shift: int) -> Callable[[FloatCode, str], str]:
    def body(f: FloatCode, x: str) -> str:
        quadrant, r = _reduced(f, x, _PI_HALF)
        sine, cosine = _sine_and_cosine(f, r, _SIN, _COS)
        quadrant = f.integer("add", quadrant, shift) if shift else quadrant
        sign = f.integer("shl", f.integer("lshr", quadrant, 1), 31)
        out = f.choose(_is_odd(f, quadrant), cosine, sine)
        out = f.unbits(f.integer("xor", f.bits(out), sign))
        if not shift:
            out = f.choose(f.compare("oeq", x, 0.0), x, out)
        return _with_huge_lanes(f, x, out, name)

    return body


sin = _sin_cos("sin", 0)
cos = _sin_cos("cos", 1)


def tan(f: FloatCode, x: str) -> str:
    """The quotient of sine and cosine in f64."""
    w = f.in_f64()
    quadrant, r = _reduced(w, w.extend(x), _PI_HALF_WIDE)
    sine, cosine = _sine_and_cosine(w, r, _SIN_WIDE, _COS_WIDE)
    odd = _is_odd(w, quadrant)
    out = w.div(w.choose(odd, w.negative(cosine), sine), w.choose(odd, sine, cosine))
    out = w.choose(w.compare("oeq", w.extend(x), 0.0), w.extend(x), out)
    return _with_huge_lanes(f, x, w.round_to_f32(out), "tan")


def of_pi_multiple(shift: int, sine_and_cosine: Callable[[FloatCode, str], tuple[str, str]]) -> Callable[..., str]:
    """``sin(pi x)`` (shift 0) or ``cos(pi x)`` (shift 1), the reduction of x being exact."""

    def body(w: FloatCode, x: str) -> str:
        halves = w.call("roundeven", w.mul(x, 2.0))
        sine, cosine = sine_and_cosine(w, w.mul(w.fma(halves, -0.5, x), PI))
        turned = w.add(halves, float(shift))
        quadrant = w.sub(turned, w.mul(w.call("floor", w.mul(turned, 0.25)), 4.0))
        out = sine
        for number, value in ((1.0, cosine), (2.0, w.negative(sine)), (3.0, w.negative(cosine))):
            out = w.choose(w.compare("oeq", quadrant, number), value, out)
        return w.choose(w.compare("oeq", x, 0.0), 1.0 if shift else x, out)

    return body


def _sine_and_cosine_wide(w: FloatCode, r: str) -> tuple[str, str]:
    return _sine_and_cosine(w, r, _SIN_WIDE, _COS_WIDE)


sinpi_wide = of_pi_multiple(0, _sine_and_cosine_wide)
cospi_wide = of_pi_multiple(1, _sine_and_cosine_wide)


def atan2_wide(w: FloatCode, y: str, x: str) -> str:
    """The angle of the first octant, then its place by the signs and sizes of x and y."""
    a, b = w.abs(y), w.abs(x)
    steep = w.compare("ogt", a, b)
    top, bottom = w.choose(steep, b, a), w.choose(steep, a, b)
    z = w.div(top, bottom)
    z = w.choose(w.compare("oeq", bottom, 0.0), 0.0, z)
    z = w.choose(w.compare("oeq", top, float("inf")), 1.0, z)
    square = w.mul(z, z)
    angle = w.fma(w.mul(square, z), w.horner(square, _ATAN_WIDE), z)
    angle = w.choose(steep, w.sub(PI / 2, angle), angle)
    left = w.compare("olt", w.copysign(1.0, x), 0.0)
    angle = w.copysign(w.choose(left, w.sub(PI, angle), angle), y)
    return w.choose(w.compare("uno", x, y), float("nan"), angle)


def atan_wide(w: FloatCode, x: str) -> str:
    return atan2_wide(w, x, w.ref(1.0))


def _other_side(w: FloatCode, x: str) -> str:
    """``sqrt(1 - x^2)``; NaN for |x| > 1."""
    return w.call("sqrt", w.mul(w.sub(1.0, x), w.add(x, 1.0)))


def asin_wide(w: FloatCode, x: str) -> str:
    return atan2_wide(w, x, _other_side(w, x))


def acos_wide(w: FloatCode, x: str) -> str:
    return atan2_wide(w, _other_side(w, x), x)
