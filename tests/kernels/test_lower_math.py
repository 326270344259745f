"""f32 functions: at most 2 units in the last place from fp64, and the right special values."""

from collections.abc import Callable

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra import libdevice


@triton.jit
def math_kernel(x_ptr, out_ptr, NAME: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + i)
    if NAME == "tanh":
        y = libdevice.tanh(x)
    elif NAME == "sigmoid":
        y = tl.sigmoid(x)
    else:
        y = getattr(tl, NAME)(x)
    tl.store(out_ptr + i, y)


FUNCTIONS: dict[str, tuple[Callable[[Tensor], Tensor], float]] = {
    "exp": (torch.exp, 110.0),
    "exp2": (torch.exp2, 160.0),
    "log": (torch.log, 0.0),
    "log2": (torch.log2, 0.0),
    "sin": (torch.sin, 1e5),
    "cos": (torch.cos, 1e5),
    "tanh": (torch.tanh, 12.0),
    "erf": (torch.erf, 5.0),
    "sqrt": (torch.sqrt, 0.0),
    "rsqrt": (torch.rsqrt, 0.0),
    "sigmoid": (torch.sigmoid, 80.0),
}
COUNT = 1 << 16


def samples(limit: float) -> Tensor:
    """Dense in [-limit, limit] and over all magnitudes up to it; over all positive floats for limit 0."""
    bits = torch.randint(0, 0x7F800000, (COUNT // 2,), dtype=torch.int32)
    any_size = bits.view(torch.float32)
    if limit == 0.0:
        return torch.cat([any_size, torch.rand(COUNT // 2) * 4])
    signed = any_size * (torch.randint(0, 2, any_size.shape) * 2 - 1)
    return torch.cat([signed.clamp(-limit, limit), (torch.rand(COUNT // 2) * 2 - 1) * limit])


@pytest.mark.parametrize("name", FUNCTIONS)
def test_error_in_units_of_the_last_place(name: str) -> None:
    function, limit = FUNCTIONS[name]
    x = samples(limit)
    out = torch.empty_like(x)
    math_kernel[(COUNT // 1024,)](x, out, NAME=name, BLOCK=1024)
    exact = function(x.double())
    rounded = exact.float()
    ulp = torch.nextafter(rounded.abs(), torch.tensor(float("inf"))).double() - rounded.abs().double()
    finite = rounded.isfinite()
    assert torch.equal(out.isfinite(), finite)
    error = ((out.double() - exact).abs() / ulp)[finite]
    # A sum of sigmoid's three roundings; all others are one polynomial.
    assert error.max() <= (3.0 if name == "sigmoid" else 2.0), (error.max(), x[finite][error.argmax()])


@pytest.mark.parametrize("name", FUNCTIONS)
def test_special_values(name: str) -> None:
    function, _ = FUNCTIONS[name]
    inf = float("inf")
    x = torch.tensor([0.0, -0.0, inf, -inf, float("nan"), 1.0, -1.0, 1e-42, -1e-42, 3e38, -3e38, 1.17549435e-38] * 2)
    if name in ("sin", "cos"):
        x = x.clamp(-100, 100)
    x = torch.cat([x, x[:8]])
    out = torch.empty_like(x)
    math_kernel[(1,)](x, out, NAME=name, BLOCK=32)
    torch.testing.assert_close(out, function(x.double()).float(), rtol=4e-7, atol=0, equal_nan=True)
