"""Kernels that map functions of ``libdevice`` over numbers, for the tests of them."""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra import libdevice

INF, NAN = float("inf"), float("nan")
N = 32


@triton.jit
def map_kernel(a_ptr, b_ptr, c_ptr, d_ptr, out_ptr, NAMES: tl.constexpr, ARITY: tl.constexpr, N: tl.constexpr):
    """One row of ``out`` for each function."""
    i = tl.arange(0, N)
    a, b, c, d = tl.load(a_ptr + i), tl.load(b_ptr + i), tl.load(c_ptr + i), tl.load(d_ptr + i)
    for k in tl.static_range(len(NAMES)):
        if ARITY == 1:
            y = getattr(libdevice, NAMES[k])(a)
        elif ARITY == 2:
            y = getattr(libdevice, NAMES[k])(a, b)
        elif ARITY == 3:
            y = getattr(libdevice, NAMES[k])(a, b, c)
        else:
            y = getattr(libdevice, NAMES[k])(a, b, c, d)
        tl.store(out_ptr + k * N + i, y)


def run(names: Sequence[str], *operands: Tensor, dtype: torch.dtype = torch.float64) -> Tensor:
    out = torch.empty(len(names), N, dtype=dtype)
    filled = [*operands, *[operands[0]] * (4 - len(operands))]
    map_kernel[(1,)](*filled, out, NAMES=tuple(names), ARITY=len(operands), N=N)
    return out


def numbers(dtype: torch.dtype, scale: float = 3.0) -> Tensor:
    x = torch.randn(N, dtype=dtype) * scale
    special = torch.tensor([0.0, -0.0, INF, -INF, NAN, 1.0, -1.0, 0.5, -0.5, 2.5, 3.5, -2.5, 1e-3, -1e-3], dtype=dtype)
    x[: len(special)] = special
    return x


@triton.jit
def cast_kernel(x_ptr, out_ptr, NAMES: tl.constexpr, N: tl.constexpr, UNSIGNED: tl.constexpr = 0):
    i = tl.arange(0, N)
    x = tl.load(x_ptr + i)
    if UNSIGNED == 32:
        x = x.to(tl.uint32)
    if UNSIGNED == 64:
        x = x.to(tl.uint64)
    for k in tl.static_range(len(NAMES)):
        tl.store(out_ptr + k * N + i, getattr(libdevice, NAMES[k])(x))
