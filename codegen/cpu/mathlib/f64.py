"""Functions that the C library lacks, in f64, made of those it has; f32 arguments are widened for them."""

import math
from collections.abc import Callable

from tilewright.codegen.cpu.mathlib.floatcode import FloatCode
from tilewright.codegen.cpu.mathlib.trig import of_pi_multiple

_INF = float("inf")
_BESSEL_SPLIT = 20.0
_BESSEL_TERMS = 52


def rsqrt(w: FloatCode, x: str) -> str:
    return w.div(1.0, w.call("sqrt", x))


def sigmoid(w: FloatCode, x: str) -> str:
    """Without overflow, as ``exp.sigmoid``."""
    e = w.libm("exp", w.negative(w.abs(x)))
    return w.div(w.choose(w.compare("olt", x, 0.0), e, 1.0), w.add(e, 1.0))


def rcbrt(w: FloatCode, x: str) -> str:
    return w.div(1.0, w.libm("cbrt", x))


def norm(w: FloatCode, *xs: str) -> str:
    """Root of the sum of squares; infinite if any operand is, even beside a NaN."""
    total = xs[0]
    for x in xs[1:]:
        total = w.libm("hypot", total, x)
    return total


def rnorm(w: FloatCode, *xs: str) -> str:
    return w.div(1.0, norm(w, *xs))


def norm_wide(w: FloatCode, *xs: str) -> str:
    """``norm`` for operands from f32, whose squares neither overflow nor vanish in f64."""
    total = w.mul(xs[0], xs[0])
    for x in xs[1:]:
        total = w.fma(x, x, total)
    out = w.call("sqrt", total)
    for x in xs:
        out = w.choose(w.compare("oeq", w.abs(x), _INF), _INF, out)
    return out


def rnorm_wide(w: FloatCode, *xs: str) -> str:
    return w.div(1.0, norm_wide(w, *xs))


sinpi = of_pi_multiple(0, lambda w, r: (w.libm("sin", r), w.libm("cos", r)))
cospi = of_pi_multiple(1, lambda w, r: (w.libm("sin", r), w.libm("cos", r)))


def _bessel(order: int) -> Callable[[FloatCode, str], str]:
    """Modified Bessel function of the first kind of order 0 or 1 (Abramowitz and Stegun, 9.6.10 and 9.7.1)."""
    near = tuple(1.0 / (math.factorial(k) * math.factorial(k + order)) for k in range(_BESSEL_TERMS))
    far = [1.0]
    for k in range(1, 26):
        far.append(-far[-1] * (4.0 * order * order - (2 * k - 1) ** 2) / (8.0 * k))

    def body(w: FloatCode, x: str) -> str:
        size = w.abs(x)
        half = w.mul(w.clamp(size, 0.0, _BESSEL_SPLIT), 0.5)
        small = w.horner(w.mul(half, half), near)
        small = w.mul(small, half) if order else small
        series = w.horner(w.div(1.0, size), far)
        # In two factors, because exp overflows before the function does.
        root = w.libm("exp", w.mul(size, 0.5))
        large = w.mul(w.mul(root, w.div(series, w.call("sqrt", w.mul(size, 2.0 * math.pi)))), root)
        large = w.choose(w.compare("oeq", size, _INF), _INF, large)
        out = w.choose(w.compare("ogt", size, _BESSEL_SPLIT), large, small)
        return w.copysign(out, x) if order else out

    return body


cyl_bessel_i0 = _bessel(0)
cyl_bessel_i1 = _bessel(1)


def saturate(w: FloatCode, x: str) -> str:
    """Into [0, 1]; a NaN becomes 0."""
    low = w.choose(w.compare("ogt", x, 0.0), x, 0.0)
    return w.choose(w.compare("olt", low, 1.0), low, 1.0)


def difference(w: FloatCode, x: str, y: str) -> str:
    """``x - y``, or 0 where it is negative; NaN for a NaN."""
    return w.choose(w.compare("ole", x, y), 0.0, w.sub(x, y))
