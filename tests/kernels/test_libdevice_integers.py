"""``libdevice``'s functions of integers and of numbers as bits against Python's integers."""

import pytest
import torch
import triton
import triton.language as tl
from tests.kernels.libdevice_kernels import N, run
from torch import Tensor
from triton.language.extra import libdevice


def _signed(value: int, bits: int) -> int:
    value %= 1 << bits
    return value - (1 << bits) if value >> (bits - 1) else value


def _byte_permutation(x: int, y: int, selector: int) -> int:
    pool = (x % (1 << 32)) | (y % (1 << 32)) << 32
    return sum((pool >> 8 * ((selector >> 4 * i) & 7) & 0xFF) << 8 * i for i in range(4))


def integers(dtype: torch.dtype) -> Tensor:
    bits = torch.iinfo(dtype).bits
    x = torch.randint(torch.iinfo(dtype).min, torch.iinfo(dtype).max, (N,), dtype=dtype)
    x[:6] = torch.tensor([0, 1, -1, torch.iinfo(dtype).max, torch.iinfo(dtype).min, 1 << (bits // 2)])
    return x[torch.randperm(N)]


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_integer_functions(dtype: torch.dtype) -> None:
    x, y, z = integers(dtype), integers(dtype), integers(dtype)
    bits = torch.iinfo(dtype).bits
    full = (1 << bits) - 1
    a, b, c = x.tolist(), y.tolist(), z.tolist()
    one = run(("clz", "popc", "brev", "ffs", "abs"), x, dtype=dtype).tolist()
    assert one[0] == [bits - (v & full).bit_length() for v in a]
    assert one[1] == [(v & full).bit_count() for v in a]
    assert one[2] == [_signed(int(f"{v & full:0{bits}b}"[::-1], 2), bits) for v in a]
    assert one[3] == [(v & -v).bit_length() for v in a]
    assert one[4] == [_signed(abs(v), bits) for v in a]
    assert run(("mulhi",), x, y, dtype=dtype).tolist()[0] == [(v * w) >> bits for v, w in zip(a, b, strict=True)]
    if dtype == torch.int64:
        return
    two = run(("mul24", "hadd", "rhadd"), x, y, dtype=dtype).tolist()
    low = [[_signed(v, 24) for v in values] for values in (a, b)]
    assert two[0] == [_signed(v * w, 32) for v, w in zip(*low, strict=True)]
    assert two[1] == [(v + w) >> 1 for v, w in zip(a, b, strict=True)]
    assert two[2] == [(v + w + 1) >> 1 for v, w in zip(a, b, strict=True)]
    permuted = run(("byte_perm",), x, y, z, dtype=dtype).tolist()[0]
    assert permuted == [_signed(_byte_permutation(*v), 32) for v in zip(a, b, c, strict=True)]


@triton.jit
def unsigned_kernel(x_ptr, y_ptr, z_ptr, out_ptr, N: tl.constexpr):
    i = tl.arange(0, N)
    x, y, z = tl.load(x_ptr + i), tl.load(y_ptr + i), tl.load(z_ptr + i).to(tl.uint32)
    ux, uy = x.to(tl.uint32), y.to(tl.uint32)
    tl.store(out_ptr + i, libdevice.mulhi(ux, uy).to(tl.int32))
    tl.store(out_ptr + N + i, libdevice.mul24(ux, uy).to(tl.int32))
    tl.store(out_ptr + 2 * N + i, libdevice.hadd(ux, uy).to(tl.int32))
    tl.store(out_ptr + 3 * N + i, libdevice.rhadd(ux, uy).to(tl.int32))
    tl.store(out_ptr + 4 * N + i, libdevice.sad(ux, uy, z).to(tl.int32))
    tl.store(out_ptr + 5 * N + i, libdevice.sad(x, y, z).to(tl.int32))
    tl.store(out_ptr + 6 * N + i, tl.umulhi(ux, uy).to(tl.int32))
    tl.store(out_ptr + 7 * N + i, libdevice.mulhi(ux.to(tl.uint64) << 20, uy.to(tl.uint64) << 20).to(tl.int32))


def test_functions_of_unsigned_integers() -> None:
    x, y, z = (integers(torch.int32) for _ in range(3))
    out = torch.empty(8, N, dtype=torch.int32)
    unsigned_kernel[(1,)](x, y, z, out, N=N)
    signed = list(zip(x.tolist(), y.tolist(), z.tolist(), strict=True))
    for k, (v, w, u) in enumerate(signed):
        a, b, c = (n & 0xFFFFFFFF for n in (v, w, u))
        exact = [
            a * b >> 32, (a & 0xFFFFFF) * (b & 0xFFFFFF), (a + b) >> 1, (a + b + 1) >> 1, abs(a - b) + c,
            abs(v - w) + c, a * b >> 32, (a << 20) * (b << 20) >> 64,
        ]  # fmt: skip
        assert out[:, k].tolist() == [_signed(value, 32) for value in exact]


@triton.jit
def bits_kernel(x_ptr, d_ptr, back_ptr, back64_ptr, out_ptr, out64_ptr, N: tl.constexpr):
    i = tl.arange(0, N)
    x, d = tl.load(x_ptr + i), tl.load(d_ptr + i)
    tl.store(out_ptr + i, libdevice.float_as_int(x))
    tl.store(out_ptr + N + i, libdevice.float_as_uint(x))
    tl.store(out_ptr + 2 * N + i, libdevice.double2loint(d))
    tl.store(out_ptr + 3 * N + i, libdevice.double2hiint(d))
    tl.store(out64_ptr + i, libdevice.double_as_longlong(d))
    tl.store(back_ptr + i, libdevice.int_as_float(libdevice.float_as_int(x)))
    tl.store(back_ptr + N + i, libdevice.uint_as_float(libdevice.float_as_int(x).to(tl.uint32)))
    tl.store(back64_ptr + i, libdevice.longlong_as_double(libdevice.double_as_longlong(d)))
    tl.store(back64_ptr + N + i, libdevice.hiloint2double(libdevice.double2hiint(d), libdevice.double2loint(d)))
    tl.store(back64_ptr + 2 * N + i, libdevice.rcp64h(d))


def test_numbers_as_bits() -> None:
    x, d = torch.randn(N), torch.randn(N, dtype=torch.float64)
    back, back64 = torch.empty(2, N), torch.empty(3, N, dtype=torch.float64)
    out, out64 = torch.empty(4, N, dtype=torch.int32), torch.empty(N, dtype=torch.int64)
    bits_kernel[(1,)](x, d, back, back64, out, out64, N=N)
    halves = d.view(torch.int32).reshape(N, 2).T
    assert torch.equal(out, torch.stack([x.view(torch.int32), x.view(torch.int32), halves[0], halves[1]]))
    assert torch.equal(out64, d.view(torch.int64))
    assert torch.equal(back, torch.stack([x, x]))
    assert torch.equal(back64[:2], torch.stack([d, d]))
    torch.testing.assert_close(back64[2], 1 / d, rtol=1e-6, atol=0)
