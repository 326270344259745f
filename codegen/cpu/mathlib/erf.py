"""The error function and its relatives.

The functions ending in ``_wide`` compute in f64, to about 1e-11, for results in f32. Those in f64 proper are made of
the C library's erfc and exp.
"""

from tilewright.codegen.cpu.mathlib.erf_table import erf_from_table
from tilewright.codegen.cpu.mathlib.exp import exp, exp_wide
from tilewright.codegen.cpu.mathlib.floatcode import FloatCode

_ERF = (
    0.12837916572669061, -0.37612625824093415, 0.11283585147030036, -0.026853811869047683, 0.005188327559877521,
    -0.0008010192519593213, 7.85385770266165e-05,
)  # fmt: skip
_LOG_ERFC_CENTER = 2.4
_LOG_ERFC = (-7.280975079356353, -5.164236737048378, -0.9405016469896994, -0.01176526800292075, 0.002391621163416954,
             -0.00047135138692946515, 7.903319328077078e-05, -2.0489337824955266e-05,
             2.5132650873303957e-07)  # fmt: skip
# erfcx(x) as a polynomial in (x - 2) / (x + 2), for x from 0 to _ERFCX_END.
_ERFCX = (
    0.2553956763106407, -0.4271858474140431, 0.24165819421352014, -0.07897858098737581, 0.0037328934165857374,
    0.006997460949230173, -0.0008471569495598038, -0.0009819702178941758, 4.36491896115939e-05,
    0.00017434363062603485, 2.716713827727573e-05, -2.762341667635297e-05, -1.3184933235267726e-05,
    1.7213475371869496e-06, 2.872261744599709e-06, 5.32687114154016e-07, -7.407063869197887e-08,
)  # fmt: skip
_ERFCX_END = 10.5
_ROOT_PI, _ROOT_2 = 1.772453850905516, 1.4142135623730951
_ROOT_HALF = (0.7071067811865476, -4.833646656726457e-17)
# sqrt(pi) x erfcx(x) as a series in 1 / (2 x^2) (Abramowitz and Stegun, 7.1.23).
_ERFCX_FAR = (1.0, -1.0, 3.0, -15.0, 105.0, -945.0, 10395.0, -135135.0)


def erf(f: FloatCode, x: str) -> str:
    """A table of polynomials where the processor looks it up; a polynomial near 0, else ``1 - exp(log(erfc(x)))``."""
    if f.looks_up:
        return erf_from_table(f, x)
    size, square = f.abs(x), f.mul(x, x)
    small = f.fma(x, f.horner(square, _ERF), x)
    t = f.sub(f.clamp(size, 0.0, 4.0), _LOG_ERFC_CENTER)
    large = f.sub(1.0, exp(f, f.horner(t, _LOG_ERFC)))
    return f.choose(f.compare("olt", size, 1.0), small, f.copysign(large, x))


def _scaled_wide(w: FloatCode, x: str) -> str:
    """erfcx for x from 0 to _ERFCX_END."""
    return w.horner(w.div(w.sub(x, 2.0), w.add(x, 2.0)), _ERFCX)


def erfc_wide(w: FloatCode, x: str) -> str:
    size = w.clamp(w.abs(x), 0.0, _ERFCX_END)
    out = w.mul(exp_wide(w, w.negative(w.mul(size, size))), _scaled_wide(w, size))
    return w.choose(w.compare("olt", x, 0.0), w.sub(2.0, out), out)


def normcdf_wide(w: FloatCode, x: str) -> str:
    return w.mul(erfc_wide(w, w.mul(x, -_ROOT_HALF[0])), 0.5)


def _erfcx_far(w: FloatCode, x: str) -> str:
    series = w.horner(w.div(0.5, w.mul(x, x)), _ERFCX_FAR)
    return w.div(series, w.mul(x, _ROOT_PI))


def _erfcx_left(w: FloatCode, x: str, right: str, power: str) -> str:
    """``erfcx(x) = 2 exp(x^2) - erfcx(-x)`` for x < 0."""
    return w.choose(w.compare("olt", x, 0.0), w.fma(2.0, power, w.negative(right)), right)


def erfcx_wide(w: FloatCode, x: str) -> str:
    size = w.abs(x)
    near = _scaled_wide(w, w.clamp(size, 0.0, _ERFCX_END))
    right = w.choose(w.compare("ogt", size, _ERFCX_END), _erfcx_far(w, size), near)
    return _erfcx_left(w, x, right, exp_wide(w, w.mul(x, x)))


def erfcx(w: FloatCode, x: str) -> str:
    """f64: ``exp(x^2) erfc(x)`` with the rounding error of the square made good, and a series from 25 up."""
    size = w.abs(x)
    bounded = w.clamp(size, 0.0, 25.0)
    square = w.mul(bounded, bounded)
    low = w.fma(bounded, bounded, w.negative(square))
    power = w.libm("exp", square)
    power = w.fma(power, low, power)
    near = w.mul(power, w.libm("erfc", bounded))
    right = w.choose(w.compare("ogt", size, 25.0), _erfcx_far(w, size), near)
    whole = w.mul(x, x)
    power = w.libm("exp", whole)
    power = w.choose(w.compare("olt", power, float("inf")), w.fma(power, w.fma(x, x, w.negative(whole)), power), power)
    return _erfcx_left(w, x, right, power)


def normcdf(w: FloatCode, x: str) -> str:
    """f64: ``erfc(-x / sqrt(2)) / 2`` with the rounding error of the quotient made good to first order."""
    bounded = w.clamp(x, -40.0, 40.0)
    z = w.mul(bounded, -_ROOT_HALF[0])
    low = w.fma(bounded, -_ROOT_HALF[0], w.negative(z))
    low = w.fma(bounded, -_ROOT_HALF[1], low)
    slope = w.mul(w.libm("exp", w.negative(w.mul(z, z))), -2.0 / _ROOT_PI)
    return w.mul(w.fma(low, slope, w.libm("erfc", z)), 0.5)


def _inverse(w: FloatCode, y: str, complement: str) -> str:
    """x > 0 with erfc(x) = complement and erf(x) = y, both of them exact and positive.

    Winitzki's approximation (2008), right to 2e-3, and three steps of Halley's method, each of which triples
    the digits.
    """
    log = w.libm("log", w.mul(complement, w.add(y, 1.0)))
    middle = w.fma(log, 0.5, 2.0 / (3.141592653589793 * 0.147))
    root = w.call("sqrt", w.sub(w.mul(middle, middle), w.div(log, 0.147)))
    x = w.call("sqrt", w.sub(root, middle))
    # Near 0 the formula cancels, and the error function is linear.
    x = w.choose(w.compare("olt", y, 1e-3), w.mul(y, _ROOT_PI / 2), x)
    lower = w.compare("ole", y, 0.5)
    for _ in range(3):
        off = w.choose(lower, w.sub(y, w.libm("erf", x)), w.sub(w.libm("erfc", x), complement))
        slope = w.mul(w.libm("exp", w.negative(w.mul(x, x))), 2.0 / _ROOT_PI)
        step = w.div(off, slope)
        x = w.add(x, w.div(step, w.fma(w.negative(x), step, 1.0)))
    return x


def erfinv(w: FloatCode, y: str) -> str:
    """f64. NaN outside [-1, 1]."""
    size = w.abs(y)
    x = _inverse(w, size, w.sub(1.0, size))
    x = w.choose(w.compare("oeq", size, 1.0), float("inf"), x)
    x = w.choose(w.compare("oeq", size, 0.0), 0.0, x)
    x = w.choose(w.compare("ugt", size, 1.0), float("nan"), x)
    return w.copysign(x, y)


def erfcinv(w: FloatCode, y: str) -> str:
    """f64. NaN outside [0, 2]."""
    upper = w.compare("ogt", y, 1.0)
    complement = w.choose(upper, w.sub(2.0, y), y)
    x = _inverse(w, w.sub(1.0, complement), complement)
    x = w.choose(w.compare("oeq", complement, 0.0), float("inf"), x)
    x = w.choose(w.compare("oeq", complement, 1.0), 0.0, x)
    x = w.choose(upper, w.negative(x), x)
    return w.choose(w.compare("ult", complement, 0.0), float("nan"), x)


def normcdfinv(w: FloatCode, p: str) -> str:
    """f64. NaN outside [0, 1]."""
    return w.mul(erfcinv(w, w.mul(p, 2.0)), -_ROOT_2)
