"""log and what is made of it: log2, log10, log1p, pow, cube roots, inverse hyperbolic functions.

``log(x) = e ln 2 + log(m)`` with m in [0.75, 1.5) and a polynomial in m - 1 (Muller, "Elementary Functions", 3rd ed.,
2016, chapter 11). The functions ending in ``_wide`` compute in f64, to about 1e-10, for results in f32.
"""

from tilewright.codegen.cpu.mathlib.exp import LN2, LOG2E, exp2_wide
from tilewright.codegen.cpu.mathlib.floatcode import FloatCode

INF, NAN = float("inf"), float("nan")
_LN2_HIGH, _LN2_LOW = 0.693145751953125, 1.428606765330187e-06  # products of the first with exponents are exact
# log(1 + z) = z - z^2 / 2 + z^3 q(z): coefficients of q.
_LOG = (0.3333345055580139, -0.25000065565109253, 0.1999068707227707, -0.16648422181606293, 0.14483962953090668,
        -0.1315469741821289, 0.10410644114017487, -0.04451892897486687)  # fmt: skip
_LOG_WIDE = (
    0.3333333275625658, -0.24999995860047147, 0.20000076849734166, -0.166671633125485, 0.14283091362983774,
    -0.12479615939576172, 0.11125762460322551, -0.10324098718884468, 0.09591417978565009, -0.07074291768380868,
    0.02652302133102691,
)  # fmt: skip
_THREE_QUARTERS_F32, _THREE_QUARTERS_F64 = 0x3F400000, 0x3FE8000000000000
_MANTISSA = 0b1011  # immediate of vgetmantps: in [0.75, 1.5), NaN for negative numbers


def _parts(f: FloatCode, x: str) -> tuple[str, str]:
    """Exponent and ``m - 1`` with ``x = 2**e * m``."""
    if f.avx512:
        m = f.avx512_call("getmant", x, immediate=_MANTISSA)
        e = f.sub(f.avx512_call("getexp", x), f.avx512_call("getexp", m))
        return e, f.sub(m, 1.0)
    tiny = f.compare("olt", x, 1.1754943508222875e-38)
    scaled = f.choose(tiny, f.mul(x, 8388608.0), x)
    bits = f.integer("sub", f.bits(scaled), _THREE_QUARTERS_F32)
    e = f.emit(f"sitofp {f.int_type} {f.integer('ashr', bits, 23)} to {f.type}")
    e = f.add(e, f.choose(tiny, -23.0, 0.0))
    m = f.unbits(f.integer("add", f.integer("and", bits, 0x7FFFFF), _THREE_QUARTERS_F32))
    return e, f.sub(m, 1.0)


def _special(f: FloatCode, x: str, out: str) -> str:
    out = f.choose(f.compare("oeq", x, INF), INF, out)
    out = f.choose(f.compare("oeq", x, 0.0), -INF, out)
    return f.choose(f.compare("ult", x, 0.0), NAN, out)


def log(f: FloatCode, x: str) -> str:
    e, z = _parts(f, x)
    square = f.mul(z, z)
    tail = f.mul(f.mul(square, z), f.horner(z, _LOG))
    tail = f.fma(e, _LN2_LOW, tail)
    tail = f.fma(square, -0.5, tail)
    out = f.fma(e, _LN2_HIGH, f.add(z, tail))
    return out if f.avx512 else _special(f, x, out)


def log2(f: FloatCode, x: str) -> str:
    e, z = _parts(f, x)
    square = f.mul(z, z)
    tail = f.fma(f.mul(square, z), f.horner(z, _LOG), f.mul(square, -0.5))
    # log2(1 + z) = (z + tail) * log2(e), with the sum split so that the product with the leading part is exact.
    high = f.unbits(f.integer("and", f.bits(f.add(z, tail)), -4096))
    low = f.add(f.sub(z, high), tail)
    out = f.fma(low, LOG2E, f.mul(high, LOG2E - 1.44140625))
    out = f.add(f.fma(high, 1.44140625, out), e)
    return out if f.avx512 else _special(f, x, out)


def _parts_wide(w: FloatCode, x: str) -> tuple[str, str]:
    """As ``_parts``, for normal f64 numbers, as all that come from f32 are."""
    bits = w.integer("sub", w.bits(x), _THREE_QUARTERS_F64)
    e = w.integer("add", w.integer("ashr", bits, 52), w.bits(w.ref(w.magic)))
    m = w.integer("add", w.integer("and", bits, (1 << 52) - 1), _THREE_QUARTERS_F64)
    return w.sub(w.unbits(e), w.magic), w.sub(w.unbits(m), 1.0)


def _from_parts_wide(w: FloatCode, e: str, z: str) -> str:
    square = w.mul(z, z)
    tail = w.fma(w.mul(square, z), w.horner(z, _LOG_WIDE), w.mul(square, -0.5))
    return w.fma(e, LN2, w.add(z, tail))


def log_wide(w: FloatCode, x: str) -> str:
    return _special(w, x, _from_parts_wide(w, *_parts_wide(w, x)))


def log2_wide(w: FloatCode, x: str) -> str:
    return w.mul(log_wide(w, x), LOG2E)


def log10_wide(w: FloatCode, x: str) -> str:
    return w.mul(log_wide(w, x), 0.4342944819032518)


def log1p_wide(w: FloatCode, x: str) -> str:
    """Where ``1 + x`` has exponent 0, its ``m - 1`` is x itself, to all its digits."""
    total = w.add(x, 1.0)
    e, z = _parts_wide(w, total)
    z = w.choose(w.compare("oeq", e, 0.0), x, z)
    out = _special(w, total, _from_parts_wide(w, e, z))
    return w.choose(w.compare("oeq", x, 0.0), x, out)


def pow_wide(w: FloatCode, x: str, y: str) -> str:
    """``x**y`` with the special cases of C (ISO/IEC 9899:2018, F.10.4.4)."""
    size = w.abs(x)
    power = exp2_wide(w, w.mul(log2_wide(w, size), y))
    half = w.mul(y, 0.5)
    integral = w.compare("oeq", w.call("trunc", y), y)
    odd = w.both(integral, w.compare("one", w.call("trunc", half), half))
    power = w.choose(odd, w.copysign(power, x), power)
    negative = w.both(w.compare("olt", x, 0.0), w.compare("ogt", x, -INF))
    broken = w.both(negative, w.compare("one", w.call("trunc", y), y))
    power = w.choose(broken, NAN, power)
    root_of_one = w.both(w.compare("oeq", size, 1.0), w.compare("oeq", w.abs(y), INF))
    for one in (root_of_one, w.compare("oeq", x, 1.0), w.compare("oeq", y, 0.0)):
        power = w.choose(one, 1.0, power)
    return power


def cbrt_wide(w: FloatCode, x: str) -> str:
    return w.copysign(exp2_wide(w, w.div(log2_wide(w, w.abs(x)), 3.0)), x)


def rcbrt_wide(w: FloatCode, x: str) -> str:
    return w.copysign(exp2_wide(w, w.div(log2_wide(w, w.abs(x)), -3.0)), x)


def asinh_wide(w: FloatCode, x: str) -> str:
    size = w.abs(x)
    square = w.mul(size, size)
    root = w.call("sqrt", w.add(square, 1.0))
    t = w.add(size, w.div(square, w.add(root, 1.0)))
    t = w.choose(w.compare("oeq", size, INF), INF, t)
    return w.copysign(log1p_wide(w, t), x)


def acosh_wide(w: FloatCode, x: str) -> str:
    t = w.sub(x, 1.0)
    out = log1p_wide(w, w.add(t, w.call("sqrt", w.mul(t, w.add(t, 2.0)))))
    return w.choose(w.compare("olt", x, 1.0), NAN, out)


def atanh_wide(w: FloatCode, x: str) -> str:
    size = w.abs(x)
    out = w.mul(log1p_wide(w, w.div(w.add(size, size), w.sub(1.0, size))), 0.5)
    return w.copysign(out, x)
