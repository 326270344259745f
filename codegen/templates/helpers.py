"""Functions that Triton expressions of ops may call; a kernel's module contains the text of those it uses."""

import triton
import triton.language as tl


@triton.jit
def tanh(x):
    # Near 0, 1 - 2 / (exp(2x) + 1) cancels: there Lambert's continued fraction x / (1 + x^2 / (3 + x^2 / (5 + ...))).
    # Cut off after 9 (after 15 for fp64) it is exact to the last bit or two below 0.625.
    square = x * x
    if x.dtype == tl.float64:
        fraction = 11.0 + square / (13.0 + square / 15.0)
        fraction = 5.0 + square / (7.0 + square / (9.0 + square / fraction))
        small = x / (1.0 + square / (3.0 + square / fraction))
    else:
        small = x * (945.0 + square * (105.0 + square)) / (945.0 + square * (420.0 + square * 15.0))
    large = 1.0 - 2.0 / (tl.exp(2.0 * tl.abs(x)) + 1.0)
    return tl.where(tl.abs(x) < 0.625, small, tl.where(x < 0.0, -large, large))


@triton.jit
def gelu(x, approximate: tl.constexpr):
    if approximate == "tanh":
        result = 0.5 * x * (1.0 + tanh(0.7978845608028654 * (x + 0.044715 * x * x * x)))
    else:
        result = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    return result


@triton.jit
def pow_scalar(x, exponent: tl.constexpr):
    if exponent == 2:
        result = x * x
    elif exponent == 3:
        result = x * x * x
    elif exponent == 1:
        result = x
    elif exponent == 0.5:
        result = tl.sqrt(x)
    elif exponent == -0.5:
        result = 1.0 / tl.sqrt(x)
    elif exponent == -1:
        result = 1.0 / x
    elif exponent == 0:
        result = x * 0 + 1
    else:
        result = tl.exp2(exponent * tl.log2(tl.abs(x)))
        if exponent % 2 == 1:
            result = tl.where(x < 0.0, -result, result)
        elif exponent % 2 != 0:
            result = tl.where(x < 0.0, float("nan"), result)
    return result


@triton.jit
def top_places(x, places, count, ranks, k: tl.constexpr, axis: tl.constexpr):
    # For each rank its place: the greatest of those left, and of equal ones the first, is taken k times.
    left = tl.broadcast_to(tl.where(places < count, places, count), x.shape)
    x = tl.where(x != x, float("inf"), x)
    found = ranks * 0
    for rank in range(k):
        greatest = tl.max(tl.where(left < count, x, float("-inf")), axis, keep_dims=True)
        at = tl.min(tl.where(x == greatest, left, count), axis, keep_dims=True)
        found = tl.where(ranks == rank, at, found)
        left = tl.where(left == at, count, left)
    return found


@triton.jit
def sign(x):
    return tl.where(x > 0, 1, tl.where(x < 0, -1, 0)).to(x.dtype)


@triton.jit
def clamp(x, low: tl.constexpr, high: tl.constexpr):
    result = x
    if low is not None:
        result = tl.where(result < low, low, result)
    if high is not None:
        result = tl.where(result > high, high, result)
    return result


@triton.jit
def expm1(x):
    # Kahan: what rounding e^x to u loses is lost in log(u) too, so their quotient is right near 0.
    u = tl.exp(x)
    near = (u - 1.0) * x / tl.log(u)
    return tl.where(u == 1.0, x, tl.where(tl.abs(x) < 1.0, near, u - 1.0))


@triton.jit
def log1p(x):
    # Likewise, with 1 + x rounded to u.
    u = 1.0 + x
    near = tl.log(u) * x / (u - 1.0)
    return tl.where(u == 1.0, x, tl.where(tl.abs(x) < 1.0, near, tl.log(u)))


@triton.jit
def softplus(x, beta: tl.constexpr, threshold: tl.constexpr):
    # Above the threshold torch returns x itself, which keeps the exponential finite.
    scaled = x * beta
    return tl.where(scaled > threshold, x, log1p(tl.exp(tl.where(scaled > threshold, 0.0, scaled))) / beta)
