"""exp and what is made of it: exp2, exp10, expm1, sigmoid, tanh, sinh, cosh.

``exp(x) = 2**n * exp(r)`` with n the integer nearest to x / ln 2 and a polynomial in r (Muller, "Elementary Functions",
3rd ed., 2016, chapter 11). The functions ending in ``_wide`` compute in f64, to about 1e-11: for f32 results that
would lose digits in f32.
"""

from tilewright.codegen.cpu.mathlib.floatcode import FloatCode

LN2 = 0.6931471805599453
LOG2E = 1.4426950408889634
LOG2_10 = 3.321928094887362
_LN2_HIGH, _LN2_LOW = 0.6931471824645996, -1.904654323148236e-09  # the sum to 48 bits
# exp(r) = 1 + r + r^2 q(r) and 2**r = 1 + r q(r): coefficients of q.
_EXP = (0.4999999403953552, 0.1666650027036667, 0.041667889803647995, 0.008371070958673954, 0.0013862140476703644)
_EXP2 = (0.6931471824645996, 0.24022594094276428, 0.055503662675619125, 0.009625445120036602,
         0.001338792615570128, 0.0001333240797976032)  # fmt: skip
_EXPM1 = (0.5000000000105721, 0.1666666675439521, 0.041666665950803, 0.008333288965781682, 0.0013888985460204389,
          0.00019904972713529503, 2.4796378652102482e-05)  # fmt: skip
_TANH = (-0.33333330802643624, 0.13333206005450843, -0.053946762736028255, 0.02170070161211123,
         -0.008177394589741526, 0.00214295874665384)  # fmt: skip
_SMALLER_SIZE = 0b0010  # immediate of vrangeps: the operand of smaller size, with the sign of the first


def _bounded(f: FloatCode, r: str, limit: float) -> str:
    """The remainder: where x was infinite or huge it is nonsense, and has to be harmless."""
    return f.avx512_call("range", r, f.ref(limit), immediate=_SMALLER_SIZE)


def exp(f: FloatCode, x: str) -> str:
    """With AVX-512 the scaling makes 0, infinity and NaN of any n; else x is clamped first."""
    x = x if f.avx512 else f.clamp(x, -104.0, 89.0)
    shifted = f.fma(x, LOG2E, f.magic)
    n = f.sub(shifted, f.magic)
    r = f.fma(n, -_LN2_LOW, f.fma(n, -_LN2_HIGH, x))
    r = _bounded(f, r, 0.375) if f.avx512 else r
    value = f.horner(r, (1.0, 1.0, *_EXP))
    return f.avx512_call("scalef", value, n) if f.avx512 else f.scale(value, shifted)


def exp2(f: FloatCode, x: str) -> str:
    """As ``exp``; the reduction is exact."""
    x = x if f.avx512 else f.clamp(x, -151.0, 129.0)
    shifted = f.add(x, f.magic)
    n = f.sub(shifted, f.magic)
    r = f.sub(x, n)
    r = _bounded(f, r, 0.5) if f.avx512 else r
    value = f.horner(r, (1.0, *_EXP2))
    return f.avx512_call("scalef", value, n) if f.avx512 else f.scale(value, shifted)


def sigmoid(f: FloatCode, x: str) -> str:
    """``1 / (1 + exp(-x))`` without overflow: small results are exp(x) / (1 + exp(x)).

    What rounding the sum loses is a whole unit of the quotient's last place at worst, so the quotient is corrected by
    its remainder from the unrounded sum.
    """
    e = exp(f, f.negative(f.abs(x)))
    top = f.choose(f.compare("olt", x, 0.0), e, 1.0)
    bottom = f.add(e, 1.0)
    lost = f.add(f.sub(1.0, bottom), e)
    inverse = f.avx512_call("rcp14", bottom) if f.avx512 else f.div(1.0, bottom)
    quotient = f.mul(top, inverse)
    remainder = f.fma(f.negative(quotient), lost, f.fma(f.negative(quotient), bottom, top))
    return f.fma(remainder, inverse, quotient)


def tanh(f: FloatCode, x: str) -> str:
    """A polynomial near 0, else ``1 - 2 / (exp(2 |x|) + 1)``."""
    size, square = f.abs(x), f.mul(x, x)
    small = f.fma(f.mul(square, x), f.horner(square, _TANH), x)
    e = exp(f, f.add(size, size))
    large = f.sub(1.0, f.div(2.0, f.add(e, 1.0)))
    # The sign last: the polynomial has lost that of -0.
    return f.copysign(f.choose(f.compare("olt", size, 0.625), small, large), x)


def _expm1_of_remainder(w: FloatCode, r: str) -> str:
    return w.fma(w.mul(r, r), w.horner(r, _EXPM1), r)


def _parts_wide(w: FloatCode, x: str) -> tuple[str, str]:
    """``exp(r) - 1`` and n, as ``FloatCode.scale`` takes it."""
    x = w.clamp(x, -400.0, 400.0)
    shifted = w.fma(x, LOG2E, w.magic)
    return _expm1_of_remainder(w, w.fma(w.sub(shifted, w.magic), -LN2, x)), shifted


def exp_wide(w: FloatCode, x: str) -> str:
    p, shifted = _parts_wide(w, x)
    return w.scale(w.add(p, 1.0), shifted)


def exp2_wide(w: FloatCode, x: str) -> str:
    x = w.clamp(x, -600.0, 600.0)
    shifted = w.add(x, w.magic)
    r = w.sub(x, w.sub(shifted, w.magic))
    return w.scale(w.add(_expm1_of_remainder(w, w.mul(r, LN2)), 1.0), shifted)


def exp10_wide(w: FloatCode, x: str) -> str:
    return exp2_wide(w, w.mul(x, LOG2_10))


def expm1_wide(w: FloatCode, x: str) -> str:
    """``2**n (exp(r) - 1) + (2**n - 1)``: nothing cancels, n is 0 for small x."""
    p, shifted = _parts_wide(w, x)
    power = w.scale(w.ref(1.0), shifted)
    return w.choose(w.compare("oeq", x, 0.0), x, w.fma(power, p, w.sub(power, 1.0)))


def sinh_wide(w: FloatCode, x: str) -> str:
    m = expm1_wide(w, w.abs(x))
    return w.copysign(w.mul(w.add(m, w.div(m, w.add(m, 1.0))), 0.5), x)


def cosh_wide(w: FloatCode, x: str) -> str:
    e = exp_wide(w, w.abs(x))
    return w.mul(w.add(e, w.div(1.0, e)), 0.5)
