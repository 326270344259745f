"""Functions of one f32: at most 2 units in the last place from f64 over the whole range, special values included.

``benchmarks/ulp.py`` does the same for every one of the 2**32 inputs.
"""

from collections.abc import Callable

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra import libdevice

INF, NAN = float("inf"), float("nan")
FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "exp": torch.exp,
    "exp2": torch.exp2,
    "log": torch.log,
    "sin": torch.sin,
    "cos": torch.cos,
    "tanh": torch.tanh,
    "erf": torch.erf,
    "sigmoid": torch.sigmoid,
    "rsqrt": torch.rsqrt,
    "log2": torch.log2,
    "log10": torch.log10,
    "log1p": torch.log1p,
    "exp10": lambda x: 10.0**x,
    "expm1": torch.expm1,
    "sinh": torch.sinh,
    "cosh": torch.cosh,
    "tan": torch.tan,
    "asin": torch.asin,
    "acos": torch.acos,
    "atan": torch.atan,
    "asinh": torch.asinh,
    "acosh": torch.acosh,
    "atanh": torch.atanh,
    "erfc": torch.erfc,
    "normcdf": lambda x: 0.5 * torch.erfc(-x / 2**0.5),
    "erfcx": torch.special.erfcx,
    "cbrt": lambda x: x.sign() * x.abs() ** (1 / 3),
    "rcbrt": lambda x: 1 / (x.sign() * x.abs() ** (1 / 3)),
    "sinpi": lambda x: torch.sin(torch.fmod(x, 2) * torch.pi),
    "cospi": lambda x: torch.cos(torch.fmod(x, 2) * torch.pi),
    "sqrt": torch.sqrt,
}
TRITON_ONLY = ("sigmoid",)
COUNT = 1 << 17


@triton.jit
def math_kernel(x_ptr, out_ptr, NAME: tl.constexpr, TRITON: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + i)
    tl.store(out_ptr + i, getattr(tl if TRITON else libdevice, NAME)(x))


def samples() -> Tensor:
    """All special values, subnormals, numbers of all sizes and signs, and more of those that functions change in."""
    special = torch.tensor([0.0, INF, NAN, 1.0, 2.0, 0.5, 1e-45, 1.1754942e-38, 1.17549435e-38, 3.4028235e38, 262144.0])
    bits = torch.randint(-(2**31), 2**31, (COUNT // 2,))
    any_size = bits.to(torch.int32).view(torch.float32)
    small = torch.randn(COUNT // 4) * 4
    large = torch.randn(COUNT // 4) * 60
    x = torch.cat([any_size, small, large])
    x[: len(special)], x[len(special) : 2 * len(special)] = special, -special
    # Halves and integers, where circular functions of multiples of pi and powers are exact.
    x[1000:3000] = torch.randint(-300, 300, (2000,)) / 2
    return x


def units(out: Tensor, exact: Tensor) -> Tensor:
    """Error in units of the last place of the exact value; infinite where one is NaN or a zero has the wrong sign."""
    top = 2.0**128
    exponent = ((exact.view(torch.int64) >> 52) & 0x7FF) - 1023
    ulp = 2.0 ** (exponent.clamp(-126, 127) - 23).double()
    wide = out.double()
    error = (wide.clamp(-top, top) - exact.clamp(-top, top)).abs() / ulp
    error[wide.isnan() & exact.isnan()] = 0
    error[wide.isnan() != exact.isnan()] = INF
    error[(exact == 0) & (wide.signbit() != exact.signbit())] = INF
    return error


@pytest.mark.parametrize("name", FUNCTIONS)
def test_error_in_units_of_the_last_place(name: str) -> None:
    x = samples()
    out = torch.empty_like(x)
    math_kernel[(COUNT // 1024,)](x, out, NAME=name, TRITON=name in TRITON_ONLY, BLOCK=1024)
    exact = FUNCTIONS[name](x.double())
    keep = torch.ones_like(x, dtype=torch.bool)
    if name in ("sinpi", "cospi", "cbrt", "rcbrt"):
        # The references give zeros of another sign, or nearly zero for 0.
        zero = x == 0 if "cbrt" in name else (2 * x.double()).frac() == 0
        keep = ~zero
    error = units(out, exact)[keep]
    assert error.max() <= 2.0, (error.max(), x[keep][error.argmax()], out[keep][error.argmax()])


@pytest.mark.parametrize("name", ["exp", "log", "sin", "sigmoid", "rsqrt", "pow"])
@pytest.mark.parametrize("width", [1, 2, 4, 8])
def test_lanes_do_not_change_the_result(name: str, width: int) -> None:
    """Scalars, short vectors and whole registers give results that are right and all but the same."""
    x = torch.randn(64).abs() * 3
    x[:8] = torch.tensor([0.0, INF, 1e-42, 1.0, 88.9, 104.0, 3e38, 1e6])
    wide, narrow = torch.empty(64), torch.empty(64)
    triton_own = name in TRITON_ONLY
    if name == "pow":
        power_kernel[(1,)](x, x, wide, BLOCK=64)
        power_kernel[(64 // width,)](x, x, narrow, BLOCK=width)
    else:
        math_kernel[(1,)](x, wide, NAME=name, TRITON=triton_own, BLOCK=64)
        math_kernel[(64 // width,)](x, narrow, NAME=name, TRITON=triton_own, BLOCK=width)
    torch.testing.assert_close(wide, narrow, rtol=2.5e-7, atol=0, equal_nan=True)


@triton.jit
def power_kernel(x_ptr, y_ptr, out_ptr, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out_ptr + i, libdevice.pow(tl.load(x_ptr + i), tl.load(y_ptr + i)))


def test_pow() -> None:
    values = torch.tensor([0.0, 1.0, 2.0, 3.0, 0.5, 1.5, 1e-40, 1e30, INF, NAN, 0.999, 1.001, 16777215.0, 33554434.0])
    values = torch.cat([values, -values])
    x, y = (t.reshape(-1) for t in torch.meshgrid(values, values, indexing="ij"))
    more = torch.randn(3312).abs() * 10
    x, y = torch.cat([x, more]), torch.cat([y, torch.randn(3312) * 30])
    out = torch.empty_like(x)
    power_kernel[(len(x) // 1024,)](x, y, out, BLOCK=1024)
    error = units(out, x.double() ** y.double())
    assert error.max() <= 1.0, (error.max(), x[error.argmax()], y[error.argmax()])


@triton.jit
def sigmoid_forms_kernel(x_ptr, y_ptr, out_ptr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    x, y = tl.load(x_ptr + i), tl.load(y_ptr + i)
    tl.store(out_ptr + i, 1 / (1 + tl.exp(-x)))
    tl.store(out_ptr + BLOCK + i, 1.0 / (tl.exp(-(x + y)) + 1.0))
    # No sigmoids, though they look like it.
    tl.store(out_ptr + 2 * BLOCK + i, 2 / (1 + tl.exp(-x)))
    tl.store(out_ptr + 3 * BLOCK + i, 1 / (1 + tl.exp(1 - x)))
    tl.store(out_ptr + 4 * BLOCK + i, 1 / (2 + tl.exp(-x)))
    tl.store(out_ptr + 5 * BLOCK + i, 1 / (1 + tl.exp(x)))


def sigmoid(x: Tensor) -> Tensor:
    """Without overflow, which torch's own has."""
    e = (-x.abs()).exp()
    return torch.where(x < 0, e, 1.0) / (1 + e)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_sigmoid_is_recognized(dtype: torch.dtype) -> None:
    """Where exp(-x) overflows the sigmoid is still a number."""
    x, y = torch.randn(2, 64, dtype=dtype)
    x[:4] = torch.tensor([-90.0, -100.0, 90.0, -INF])
    if dtype == torch.float64:
        x[1] = -720.0
    out = torch.empty(6, 64, dtype=dtype)
    sigmoid_forms_kernel[(1,)](x, y, out, BLOCK=64)
    wide, both = x.double(), (x + y).double()
    limits = {"rtol": 4e-7, "atol": 1.5e-45} if dtype == torch.float32 else {"rtol": 1e-14, "atol": 5e-324}
    torch.testing.assert_close(out[0].double(), sigmoid(wide), **limits)
    torch.testing.assert_close(out[1].double(), sigmoid(both), **limits)
    rest = [2 / (1 + (-wide).exp()), 1 / (1 + (1 - wide).exp()), 1 / (2 + (-wide).exp()), 1 / (1 + wide.exp())]
    torch.testing.assert_close(out[2:].double(), torch.stack(rest), rtol=1e-6, atol=1e-37)


@triton.jit
def language_kernel(x_ptr, y_ptr, out_ptr, N: tl.constexpr):
    i = tl.arange(0, N)
    x, y = tl.load(x_ptr + i), tl.load(y_ptr + i)
    wide, positive = x.to(tl.float32), tl.abs(x).to(tl.float32) + 0.5
    tl.store(out_ptr + i, tl.math.exp(wide) + tl.math.exp2(wide))
    tl.store(out_ptr + N + i, tl.math.log(positive) + tl.math.log2(positive))
    tl.store(out_ptr + 2 * N + i, tl.math.sin(wide) * tl.math.cos(wide))
    tl.store(out_ptr + 3 * N + i, tl.fdiv(wide, positive))
    tl.store(out_ptr + 4 * N + i, tl.math.div_rn(wide, positive))
    tl.store(out_ptr + 5 * N + i, tl.math.sqrt_rn(positive) + tl.math.sqrt(positive) + tl.math.rsqrt(positive))
    tl.store(out_ptr + 6 * N + i, tl.fma(x, y, x))
    tl.store(out_ptr + 7 * N + i, tl.floor(wide) + tl.ceil(wide))
    tl.store(out_ptr + 8 * N + i, tl.clamp(x, -0.5, 0.5))
    tl.store(out_ptr + 9 * N + i, tl.abs(x) + tl.erf(wide).to(x.dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_functions_of_the_language(dtype: torch.dtype) -> None:
    x, y = torch.randn(2, 64).to(dtype)
    out = torch.empty(10, 64, dtype=dtype)
    language_kernel[(1,)](x, y, out, N=64)
    x, y = x.double(), y.double()
    p = x.abs() + 0.5
    exact = [
        x.exp() + x.exp2(), p.log() + p.log2(), x.sin() * x.cos(), x / p, x / p, 2 * p.sqrt() + p.rsqrt(), x * y + x,
        x.floor() + x.ceil(), x.clamp(-0.5, 0.5), x.abs() + x.erf(),
    ]  # fmt: skip
    epsilon = torch.finfo(dtype).eps
    torch.testing.assert_close(out.double(), torch.stack(exact), rtol=2 * epsilon, atol=4 * epsilon)


@triton.jit
def fma_kernel(x_ptr, y_ptr, z_ptr, out_ptr, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(out_ptr + i, tl.fma(tl.load(x_ptr + i), tl.load(y_ptr + i), tl.load(z_ptr + i)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_fma_rounds_once(dtype: torch.dtype) -> None:
    """A product that differs from ``-z`` only in the digits that rounding it would lose."""
    x = (1 + torch.randint(0, 1 << 6, (64,)) * torch.finfo(dtype).eps).to(dtype)
    z = (-(x.double() ** 2)).to(dtype)
    out = torch.empty(64, dtype=dtype)
    fma_kernel[(1,)](x, x, z, out, N=64)
    assert torch.equal(out, (x.double() * x.double() + z.double()).to(dtype))


@triton.jit
def double_kernel(x_ptr, out_ptr, NAME: tl.constexpr, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(out_ptr + i, getattr(tl, NAME)(tl.load(x_ptr + i)))


@pytest.mark.parametrize("name", ["exp", "exp2", "log", "log2", "sin", "cos", "sqrt", "rsqrt", "erf", "sigmoid"])
def test_f64(name: str) -> None:
    x = torch.randn(64, dtype=torch.float64) * 5
    x[:6] = torch.tensor([0.0, -0.0, INF, -INF, NAN, 700.0])
    out = torch.empty_like(x)
    double_kernel[(1,)](x, out, NAME=name, N=64)
    torch.testing.assert_close(out, FUNCTIONS[name](x), rtol=5e-16, atol=1e-300, equal_nan=True)
