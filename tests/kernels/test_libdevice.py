"""The functions of ``triton.language.extra.libdevice`` on real numbers, against torch in fp64."""

import inspect
import math
import re
from collections.abc import Callable

import mpmath
import pytest
import torch
import triton
import triton.language as tl
from tests.kernels.libdevice_kernels import INF, NAN, N, numbers, run
from torch import Tensor
from triton.language.extra import libdevice
from triton.language.extra.cuda import libdevice as offered

from tilewright.codegen.cpu.mathlib.libdevice import SYMBOLS


def _gamma(x: Tensor) -> Tensor:
    return torch.where(x > 0, torch.lgamma(x).exp(), NAN)


def _by_mpmath(function: Callable[[float], object]) -> Callable[[Tensor], Tensor]:
    """torch's Bessel functions are right to seven digits only."""

    def run_one(x: Tensor) -> Tensor:
        values = [float(function(v)) if 0 < v < INF else NAN for v in x.tolist()]
        return torch.tensor(values, dtype=torch.float64)

    return run_one


UNARY: dict[str, Callable[[Tensor], Tensor]] = {
    "exp": torch.exp, "exp2": torch.exp2, "exp10": lambda x: 10.0**x, "expm1": torch.expm1, "log": torch.log,
    "log2": torch.log2, "log10": torch.log10, "log1p": torch.log1p, "sin": torch.sin, "cos": torch.cos,
    "tan": torch.tan, "sinh": torch.sinh, "cosh": torch.cosh, "tanh": torch.tanh, "asin": torch.asin,
    "acos": torch.acos, "atan": torch.atan, "asinh": torch.asinh, "acosh": torch.acosh, "atanh": torch.atanh,
    "erf": torch.erf, "erfc": torch.erfc, "erfcx": torch.special.erfcx, "erfinv": torch.special.erfinv,
    "normcdf": lambda x: 0.5 * torch.erfc(-x / math.sqrt(2)), "normcdfinv": torch.special.ndtri,
    "erfcinv": lambda x: -torch.special.ndtri(x / 2) / math.sqrt(2), "lgamma": torch.lgamma,
    "j0": _by_mpmath(mpmath.j0), "j1": _by_mpmath(mpmath.j1),
    "y0": _by_mpmath(lambda x: mpmath.bessely(0, x)), "y1": _by_mpmath(lambda x: mpmath.bessely(1, x)),
    "cyl_bessel_i0": torch.special.i0, "cyl_bessel_i1": torch.special.i1,
    "cbrt": lambda x: x.sign() * x.abs() ** (1 / 3), "rcbrt": lambda x: torch.copysign(x.abs() ** (-1 / 3), x),
    "sqrt": torch.sqrt, "rsqrt": torch.rsqrt, "sqrt_rn": torch.sqrt, "rcp_rn": torch.reciprocal, "floor": torch.floor,
    "ceil": torch.ceil, "trunc": torch.trunc, "rint": torch.round, "nearbyint": torch.round, "abs": torch.abs,
    "round": lambda x: x.sign() * (x.abs() + 0.5).floor(), "sinpi": lambda x: torch.sin(torch.fmod(x, 2) * math.pi),
    "cospi": lambda x: torch.cos(torch.fmod(x, 2) * math.pi), "logb": lambda x: torch.log2(x.abs()).floor(),
}  # fmt: skip
INFINITE_DIFFERS = {
    "lgamma",
    "j0",
    "j1",
    "y0",
    "y1",
    "cyl_bessel_i0",
    "cyl_bessel_i1",
}  # torch gives NaN, or another infinity, for -inf or negatives


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_functions_of_one_number(dtype: torch.dtype) -> None:
    x = numbers(dtype)
    out = run(tuple(UNARY), x)
    rtol, atol = (4e-7, 2e-7) if dtype == torch.float32 else (2e-14, 2e-15)
    for row, (name, function) in zip(out, UNARY.items(), strict=True):
        keep = x.isfinite() & (x > 0) if name in INFINITE_DIFFERS else torch.ones(N, dtype=torch.bool)
        exact = function(x.double())
        torch.testing.assert_close(
            row[keep], exact[keep], rtol=rtol, atol=atol, equal_nan=True, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_inverse_and_scaled_error_functions_far_out(dtype: torch.dtype) -> None:
    """Over the whole range where they are neither 0 nor infinite, relative to their size."""
    tiny = -44.0 if dtype == torch.float32 else -300.0
    p = (10.0 ** torch.linspace(tiny, -0.31, N, dtype=torch.float64)).to(dtype)
    wide = p.double()
    out = run(("erfcinv", "normcdfinv"), p)
    rtol = 2e-7 if dtype == torch.float32 else 3e-14
    torch.testing.assert_close(out[1], torch.special.ndtri(wide), rtol=rtol, atol=0)
    torch.testing.assert_close(out[0], -torch.special.ndtri(wide / 2) / math.sqrt(2), rtol=rtol, atol=0)
    near_one = 1 - p.double().clamp(min=2.0**-24).to(dtype)
    torch.testing.assert_close(
        run(("erfinv",), near_one)[0], torch.special.erfinv(near_one.double()), rtol=rtol, atol=0
    )
    small = run(("erfinv",), p)[0]
    torch.testing.assert_close(small, torch.special.erfinv(wide), rtol=rtol, atol=1.5e-45)
    x = torch.linspace(-13, 60, N, dtype=dtype)
    out = run(("erfcx", "normcdf"), -x if dtype == torch.float32 else x)
    bounds = x.double() if dtype == torch.float64 else -x.double()
    keep = bounds > -9.3  # beyond, erfcx overflows in f32
    torch.testing.assert_close(out[0][keep], torch.special.erfcx(bounds[keep]), rtol=max(rtol, 2e-13), atol=0)
    exact = 0.5 * torch.erfc(-bounds / math.sqrt(2))
    torch.testing.assert_close(out[1], exact, rtol=max(rtol, 1e-12), atol=1.5e-45)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gamma_and_bessel_functions_of_integer_order(dtype: torch.dtype) -> None:
    x = torch.rand(N, dtype=dtype) * 20 + 3
    torch.testing.assert_close(run(("tgamma",), x)[0], _gamma(x.double()), rtol=1e-6, atol=0)
    order = torch.full((N,), 3, dtype=torch.int32)
    out = run(("jn", "yn"), order, x)
    for row, function in zip(out, (mpmath.besselj, mpmath.bessely), strict=True):
        exact = torch.tensor([float(function(3, v)) for v in x.tolist()], dtype=torch.float64)
        torch.testing.assert_close(row, exact, rtol=4e-7, atol=2e-7)


@triton.jit
def fast_kernel(x_ptr, y_ptr, out_ptr, N: tl.constexpr):
    i = tl.arange(0, N)
    x, y = tl.load(x_ptr + i), tl.load(y_ptr + i)
    tl.store(out_ptr + i, libdevice.fast_sinf(x))
    tl.store(out_ptr + N + i, libdevice.fast_cosf(x))
    tl.store(out_ptr + 2 * N + i, libdevice.fast_tanf(x))
    tl.store(out_ptr + 3 * N + i, libdevice.fast_expf(x))
    tl.store(out_ptr + 4 * N + i, libdevice.fast_exp10f(x))
    tl.store(out_ptr + 5 * N + i, libdevice.fast_logf(x))
    tl.store(out_ptr + 6 * N + i, libdevice.fast_log2f(x))
    tl.store(out_ptr + 7 * N + i, libdevice.fast_log10f(x))
    tl.store(out_ptr + 8 * N + i, libdevice.fast_powf(x, y))
    tl.store(out_ptr + 9 * N + i, libdevice.fast_dividef(x, y))
    tl.store(out_ptr + 10 * N + i, libdevice.saturatef(y))
    tl.store(out_ptr + 11 * N + i, libdevice.rsqrt_rn(x))
    tl.store(out_ptr + 12 * N + i, libdevice.finitef(x).to(tl.float32))


def test_functions_of_f32_alone() -> None:
    x, y = torch.rand(N) * 5 + 0.1, torch.randn(N) * 2
    out = torch.empty(13, N)
    fast_kernel[(1,)](x, y, out, N=N)
    x, y = x.double(), y.double()
    exact = [
        x.sin(), x.cos(), x.tan(), x.exp(), 10**x, x.log(), x.log2(), x.log10(), x**y, x / y, y.clamp(0, 1),
        x.rsqrt(), x * 0 + 1,
    ]  # fmt: skip
    torch.testing.assert_close(out.double(), torch.stack(exact), rtol=3e-7, atol=2e-7)


def _remainder(x: float, y: float) -> float:
    return NAN if math.isinf(x) or y == 0 else math.remainder(x, y)


def _remainders(x: Tensor, y: Tensor) -> Tensor:
    pairs = zip(x.tolist(), y.tolist(), strict=True)
    return torch.tensor([_remainder(*pair) for pair in pairs], dtype=torch.float64)


BINARY: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "add_rn": torch.add, "sub_rn": torch.sub, "mul_rn": torch.mul, "div_rn": torch.div, "atan2": torch.atan2,
    "hypot": torch.hypot, "rhypot": lambda x, y: 1 / torch.hypot(x, y), "pow": torch.pow, "fmod": torch.fmod,
    "copysign": torch.copysign, "fdim": lambda x, y: torch.where(x <= y, 0.0, x - y),
    "remainder": _remainders,
}  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_functions_of_two_numbers(dtype: torch.dtype) -> None:
    x, y = numbers(dtype), numbers(dtype)[torch.randperm(N)]
    out = run(tuple(BINARY), x, y)
    rtol, atol = (1e-6, 0.0) if dtype == torch.float32 else (1e-15, 0.0)
    for row, (name, function) in zip(out, BINARY.items(), strict=True):
        exact = function(x.double(), y.double())
        torch.testing.assert_close(row, exact, rtol=rtol, atol=atol, equal_nan=True, msg=lambda m, n=name: f"{n}: {m}")
    own = run(("nextafter",), x, y, dtype=dtype)[0]
    torch.testing.assert_close(own, torch.nextafter(x, y), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_norms(dtype: torch.dtype) -> None:
    a, b, c, d = (numbers(dtype)[torch.randperm(N)] for _ in range(4))
    rtol = 2e-7 if dtype == torch.float32 else 1e-15
    for operands, name in (((a, b, c), "norm3d"), ((a, b, c, d), "norm4d")):
        stacked = torch.stack(operands).double()
        exact = stacked.square().sum(0).sqrt()
        exact[stacked.isinf().any(0)] = INF
        out = run((name, "r" + name), *operands)
        torch.testing.assert_close(out, torch.stack([exact, 1 / exact]), rtol=rtol, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_powers_of_integers(dtype: torch.dtype) -> None:
    x, n = numbers(dtype), torch.randint(-40, 40, (N,), dtype=torch.int32)
    out = run(("ldexp", "scalbn", "pow"), x, n)
    scaled = (x.double() * 2.0 ** n.double()).to(dtype).double()
    torch.testing.assert_close(out[:2], torch.stack([scaled, scaled]), rtol=0, atol=0, equal_nan=True)
    power = (x.double() ** n.double()).to(dtype).double()
    torch.testing.assert_close(out[2], power, rtol=2e-7, atol=1e-45, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_conditions_and_exponents(dtype: torch.dtype) -> None:
    x = numbers(dtype)
    names = ("isnan", "isinf", "signbit", *(("isfinited",) if dtype == torch.float64 else ()))
    out = run(names, x).bool()
    exact = [x.isnan(), x.isinf(), x.signbit(), x.isfinite()]
    keep = ~x.isnan()  # the sign of a NaN is not kept
    assert torch.equal(out[0], exact[0])
    assert torch.equal(out[1:, keep], torch.stack(exact[1 : len(names)])[:, keep])
    y = x[(x != 0) & x.isfinite()]
    x[:] = y[0]
    x[: len(y)] = y
    exponent = torch.tensor([math.frexp(v)[1] - 1 for v in x.tolist()], dtype=torch.int32)
    assert torch.equal(run(("ilogb",), x, dtype=torch.int32)[0], exponent)


def test_every_function_is_known() -> None:
    """What the front end offers is in the table; the tests here and beside it cover it."""
    assert set(re.findall(r'"(__nv_\w+)"', inspect.getsource(offered))) <= set(SYMBOLS)
