"""Casts between all element types: every value of the 8- and 16-bit types, and the numbers around every rounding
boundary of the smaller types from f32 and f64, against torch."""

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

INF = float("inf")
SMALL = (torch.float8_e4m3fn, torch.float8_e5m2, torch.float16, torch.bfloat16)
FLOATS = (*SMALL, torch.float32, torch.float64)
SIGNED = (torch.int8, torch.int16, torch.int32, torch.int64)
UNSIGNED = (torch.uint8, torch.uint16, torch.uint32, torch.uint64)


@triton.jit
def cast_to_six_kernel(x_ptr, a_ptr, b_ptr, c_ptr, d_ptr, e_ptr, f_ptr, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = i < n
    x = tl.load(x_ptr + i, mask=mask)
    tl.store(a_ptr + i, x.to(a_ptr.dtype.element_ty), mask=mask)
    tl.store(b_ptr + i, x.to(b_ptr.dtype.element_ty), mask=mask)
    tl.store(c_ptr + i, x.to(c_ptr.dtype.element_ty), mask=mask)
    tl.store(d_ptr + i, x.to(d_ptr.dtype.element_ty), mask=mask)
    tl.store(e_ptr + i, x.to(e_ptr.dtype.element_ty), mask=mask)
    tl.store(f_ptr + i, x.to(f_ptr.dtype.element_ty), mask=mask)


def cast(x: Tensor, dtypes: tuple[torch.dtype, ...]) -> list[Tensor]:
    n = x.numel()
    outs = [torch.empty(n, dtype=dtype) for dtype in dtypes]
    cast_to_six_kernel[(triton.cdiv(n, 1024),)](x, *outs, *[outs[0]] * (6 - len(outs)), n, BLOCK=1024)
    return outs


def every_value(dtype: torch.dtype) -> Tensor:
    if dtype.itemsize == 1:
        return torch.arange(256).to(torch.uint8).view(dtype)
    return torch.arange(1 << 16).to(torch.uint16).view(dtype)


def around_boundaries(dtype: torch.dtype) -> Tensor:
    """Each number of the small types, the middles between neighbours, and what lies next to all of those."""
    special = torch.tensor(
        [INF, -INF, float("nan"), 464.0, 465.0, 61440.0, 65519.0, 65520.0, 1e30], dtype=torch.float64
    )
    parts = [special]
    for small in SMALL:
        x = every_value(small).double()
        x = x[x.isfinite()].unique()
        x, middles = x[:-1], (x[1:] + x[:-1]) / 2
        some = torch.randperm(x.numel())[:6000]  # of 16-bit types not all, to save time
        parts += [x[some], middles[some]]
    x = torch.cat(parts).float()
    near = [torch.nextafter(x, torch.tensor(limit)) for limit in (INF, -INF)]
    return torch.cat([x, *near]).to(dtype)


def sources(dtype: torch.dtype) -> Tensor:
    return every_value(dtype) if dtype in SMALL else around_boundaries(dtype)


@pytest.mark.parametrize("source", FLOATS)
def test_floats_to_floats(source: torch.dtype) -> None:
    """f64 holds f32 values here, for which torch's way over f32 rounds once. e5m2 saturates, as Triton has it."""
    x = sources(source)
    for dtype, out in zip(FLOATS, cast(x, FLOATS), strict=True):
        expected = x.to(dtype).double()
        if dtype == torch.float8_e5m2 and source != dtype:
            expected = torch.where(expected.isinf(), expected.sign() * 57344.0, expected)
        torch.testing.assert_close(out.double(), expected, rtol=0, atol=0, equal_nan=True)
        kept = ~expected.isnan()
        assert torch.equal(out.double().signbit()[kept], expected.signbit()[kept])


@pytest.mark.parametrize("source", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("kinds", [SIGNED, UNSIGNED])
def test_floats_to_integers(source: torch.dtype, kinds: tuple[torch.dtype, ...]) -> None:
    """Toward zero, for all numbers that the integer type holds."""
    x = sources(source)
    if source in (torch.float32, torch.float64):
        x = torch.cat([x, torch.tensor([2.0**63, 1.5 * 2.0**63, 2.0**64 * (1 - 2.0**-24), 2.0**31, 4e9]).to(source)])
    x = x[torch.cat([torch.randperm(x.numel())[:5000], torch.arange(x.numel() - 5, x.numel())])].contiguous()
    for dtype, out in zip(kinds, cast(x, kinds), strict=True):
        limits = torch.iinfo(dtype)
        for value, got in zip(x.double().trunc().tolist(), out.tolist(), strict=True):
            if limits.min <= value <= limits.max and value < 2.0 ** (8 * dtype.itemsize):
                assert got == int(value)


def integers(dtype: torch.dtype) -> Tensor:
    """Powers of two, numbers beside them, and the middles that each float type rounds to even."""
    if dtype.itemsize == 1:
        return every_value(dtype)
    bits = 8 * dtype.itemsize
    values = []
    for exponent in range(bits):
        values += [(1 << exponent) + step for step in (-1, 0, 1)]
        for digits in (8, 9, 11, 12, 24, 25, 53, 54):
            if exponent > digits:
                middle = (1 << exponent) + (1 << (exponent - digits))
                values += [middle - 1, middle, middle + 1]
    wrapped = [(v + (1 << (bits - 1))) % (1 << bits) - (1 << (bits - 1)) for v in values + [-v for v in values]]
    signed = {16: torch.int16, 32: torch.int32, 64: torch.int64}[bits]
    return torch.tensor(wrapped, dtype=signed).view(dtype)


@pytest.mark.parametrize("source", [*SIGNED, *UNSIGNED])
def test_integers_to_floats(source: torch.dtype) -> None:
    """Rounded once: no float of the type is nearer, and of two as near the even one is taken."""
    x = integers(source)
    kinds = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
    for dtype, out in zip(kinds, cast(x, kinds), strict=True):
        top = torch.tensor(torch.finfo(dtype).max, dtype=dtype)
        up, down = torch.nextafter(out, torch.tensor(INF, dtype=dtype)), torch.nextafter(out, -top)
        even = out.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]) % 2 == 0
        rows = zip(x.tolist(), out.tolist(), up.tolist(), down.tolist(), even.tolist(), strict=True)
        for value, got, above, below, is_even in rows:
            if got in (INF, -INF):
                assert abs(value) >= 65520  # of f16, the only type too small
                continue
            off = abs(int(got) - value)
            others = [abs(int(other) - value) for other in (above, below) if abs(other) != INF and other == int(other)]
            assert all(off < other or (off == other and is_even) for other in others), (value, got)


def test_from_f64_to_fp8_rounds_once() -> None:
    """Just beside a tie, which rounding to f32 first (as torch does) would take for one."""
    for dtype, bits in ((torch.float8_e4m3fn, 3), (torch.float8_e5m2, 2)):
        step = 2.0**-bits
        x = torch.tensor([1 + step / 2 + 2.0**-40, 1 + 3 * step / 2 - 2.0**-40], dtype=torch.float64)
        assert cast(x, (dtype,))[0].double().tolist() == [1 + step] * 2


@triton.jit
def integer_kernel(x_ptr, out_ptr, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + i, mask=i < n)
    tl.store(out_ptr + i, x.to(tl.int8).to(tl.int64), mask=i < n)
    tl.store(out_ptr + n + i, x.to(tl.uint16).to(tl.int64), mask=i < n)
    tl.store(out_ptr + 2 * n + i, x.to(tl.int32).to(tl.int64), mask=i < n)
    tl.store(out_ptr + 3 * n + i, x.to(tl.int1).to(tl.int64), mask=i < n)
    tl.store(out_ptr + 4 * n + i, (x > 5).to(tl.int64), mask=i < n)


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64])
def test_integers_to_integers(dtype: torch.dtype) -> None:
    x = integers(dtype)
    n = x.numel()
    out = torch.empty(5, n, dtype=torch.int64)
    integer_kernel[(triton.cdiv(n, 256),)](x, out, n, BLOCK=256)
    expected = [x.to(torch.int8), x.to(torch.int64) & 0xFFFF, x.to(torch.int32), x != 0, x > 5]
    assert torch.equal(out, torch.stack([t.to(torch.int64) for t in expected]))
