"""Reductions and scans over every axis, with neutral elements, several operands and NaN."""

import pytest
import torch
import triton
import triton.language as tl


@triton.jit
def reduce_kernel(x_ptr, out_ptr, n, NAME: tl.constexpr, M: tl.constexpr, N: tl.constexpr, AXIS: tl.constexpr):
    r, c = tl.arange(0, M), tl.arange(0, N)
    x = tl.load(x_ptr + r[:, None] * N + c[None, :])
    if NAME == "sum":
        y = tl.sum(x, AXIS)
    elif NAME == "max":
        y = tl.max(x, AXIS)
    elif NAME == "min":
        y = tl.min(x, AXIS)
    elif NAME == "argmax":
        y = tl.argmax(x, AXIS).to(x.dtype)
    else:
        y = tl.xor_sum(x, AXIS)
    k = r if AXIS == 1 else c
    tl.store(out_ptr + k, y)


REFERENCES = {
    "sum": lambda x, axis: x.sum(axis),
    "max": lambda x, axis: x.amax(axis),
    "min": lambda x, axis: x.amin(axis),
    "argmax": lambda x, axis: x.argmax(axis),
}


@pytest.mark.parametrize("name", REFERENCES)
@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize(("m", "n", "dtype"), [(1, 64, torch.float32), (32, 4, torch.int32), (16, 128, torch.float64)])
def test_reductions(name: str, axis: int, m: int, n: int, dtype: torch.dtype) -> None:
    x = torch.randn(m, n, dtype=dtype) if dtype.is_floating_point else torch.randperm(m * n).reshape(m, n).to(dtype)
    kept = m if axis == 1 else n
    out = torch.empty(kept, dtype=dtype)
    reduce_kernel[(1,)](x, out, 0, NAME=name, M=m, N=n, AXIS=axis)
    torch.testing.assert_close(out.double(), REFERENCES[name](x.double(), axis).double(), rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.int64, torch.int8])
def test_reduction_dtypes(dtype: torch.dtype) -> None:
    x = torch.randint(-3, 4, (16, 32)).to(dtype)
    out = torch.empty(16, dtype=dtype)
    for name in ("sum", "max", "min"):
        reduce_kernel[(1,)](x, out, 0, NAME=name, M=16, N=32, AXIS=1)
        assert torch.equal(out.double(), REFERENCES[name](x.double(), 1))


@triton.jit
def nan_kernel(x_ptr, out_ptr, N: tl.constexpr):
    x = tl.load(x_ptr + tl.arange(0, N))
    tl.store(out_ptr, tl.max(x, 0))
    tl.store(out_ptr + 1, tl.min(x, 0))
    first = tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL)
    tl.store(out_ptr + 2, tl.sum(tl.where(first != first, 1.0, 0.0), 0))
    second = tl.maximum(x, 0.0)
    tl.store(out_ptr + 3, tl.sum(tl.where(second != second, 1.0, 0.0), 0))


def test_max_ignores_nan_unless_told_to_propagate() -> None:
    x = torch.randn(64)
    x[5] = x[40] = float("nan")
    out = torch.empty(4)
    nan_kernel[(1,)](x, out, N=64)
    real = x[~x.isnan()]
    assert out.tolist() == [real.max().item(), real.min().item(), 2.0, 0.0]
    nan_kernel[(1,)](torch.full((64,), float("nan")), out, N=64)
    assert out[:2].isnan().all()


@triton.jit
def masked_kernel(x_ptr, out_ptr, rows, n, BM: tl.constexpr, BN: tl.constexpr):
    r, c = tl.arange(0, BM), tl.arange(0, BN)
    mask = (r[:, None] < rows) & (c[None, :] < n)
    p = r[:, None] * n + c[None, :]
    x = tl.load(x_ptr + p, mask=mask, other=0.0)
    low = tl.load(x_ptr + p, mask=mask, other=float("-inf"))
    ones = tl.load(x_ptr + p, mask=mask, other=1.0)
    spread = tl.where(mask, x - 1, 0.0)
    top = tl.max(low, 1)
    tl.store(out_ptr + r, tl.sum(x, 1), mask=r < rows)
    tl.store(out_ptr + rows + r, tl.sum(spread * spread, 1), mask=r < rows)
    tl.store(out_ptr + 2 * rows + r, top, mask=r < rows)
    tl.store(out_ptr + 3 * rows + r, tl.sum(tl.exp(low - top[:, None]), 1), mask=r < rows)
    tl.store(out_ptr + 4 * rows + r, tl.sum(ones, 1), mask=r < rows)
    tl.store(out_ptr + 5 * rows + r, tl.sum(x + 1, 1), mask=r < rows)


@pytest.mark.parametrize(("rows", "n"), [(1, 1), (3, 16), (4, 100), (2, 128), (4, 65)])
def test_masked_tails(rows: int, n: int) -> None:
    """Sums whose masked elements are neutral may stop early; those of the last two outputs are not."""
    x = torch.randn(rows, n)
    out = torch.empty(6, rows)
    masked_kernel[(1,)](x, out, rows, n, BM=4, BN=128)
    d = x.double()
    soft = (d - d.amax(1, keepdim=True)).exp().sum(1)
    expected = [d.sum(1), ((d - 1) ** 2).sum(1), d.amax(1), soft, d.sum(1) + 128 - n, d.sum(1) + 128]
    torch.testing.assert_close(out.double(), torch.stack(expected), rtol=1e-5, atol=1e-5)


@triton.jit
def weighted(value_a, weight_a, value_b, weight_b):
    return value_a * weight_b + value_b, weight_a * weight_b


@triton.jit
def recurrence_kernel(x_ptr, w_ptr, out_ptr, M: tl.constexpr, N: tl.constexpr, AXIS: tl.constexpr):
    p = tl.arange(0, M)[:, None] * N + tl.arange(0, N)[None, :]
    value, _ = tl.associative_scan((tl.load(x_ptr + p), tl.load(w_ptr + p)), AXIS, weighted)
    tl.store(out_ptr + p, value)


@pytest.mark.parametrize("axis", [0, 1])
def test_scan_of_two_operands_keeps_the_order(axis: int) -> None:
    x, w = torch.randn(32, 64), torch.rand(32, 64)
    out = torch.empty_like(x)
    recurrence_kernel[(1,)](x, w, out, M=32, N=64, AXIS=axis)
    xs, ws = (t.double().movedim(axis, 0) for t in (x, w))
    expected = [xs[0]]
    for value, weight in zip(xs[1:], ws[1:], strict=True):
        expected.append(expected[-1] * weight + value)
    torch.testing.assert_close(out.double(), torch.stack(expected).movedim(0, axis), rtol=1e-5, atol=1e-5)


@triton.jit
def complex_product(real_a, imaginary_a, real_b, imaginary_b):
    return real_a * real_b - imaginary_a * imaginary_b, real_a * imaginary_b + imaginary_a * real_b


@triton.jit
def product_kernel(x_ptr, y_ptr, out_ptr, B: tl.constexpr, M: tl.constexpr, N: tl.constexpr):
    b = tl.arange(0, B)[:, None, None]
    p = (b * M + tl.arange(0, M)[None, :, None]) * N + tl.arange(0, N)[None, None, :]
    real, imaginary = tl.reduce((tl.load(x_ptr + p), tl.load(y_ptr + p)), 2, complex_product)
    row = 2 * (tl.arange(0, B)[:, None] * M + tl.arange(0, M)[None, :])
    tl.store(out_ptr + row, real)
    tl.store(out_ptr + row + 1, imaginary)


@pytest.mark.parametrize(
    ("b", "m", "n"), [(1, 1, 64), (2, 2, 4), (1, 4, 64), (2, 16, 16), (1, 64, 2), (4, 32, 128), (4, 8, 1)]
)
def test_rows_are_reduced_several_at_a_time(b: int, m: int, n: int) -> None:
    # Whatever the number of rows is against the lanes of a vector.
    phase = torch.rand(b, m, n) * 6
    x, y, out = phase.cos(), phase.sin(), torch.empty(b, m, 2)
    product_kernel[(1,)](x, y, out, B=b, M=m, N=n)
    expected = torch.complex(x.double(), y.double()).prod(2)
    torch.testing.assert_close(out.double(), torch.view_as_real(expected), rtol=1e-5, atol=1e-5)


@triton.jit
def cumsum_kernel(x_ptr, out_ptr, n, BLOCK: tl.constexpr, REVERSE: tl.constexpr):
    i = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + i, mask=i < n, other=0)
    tl.store(out_ptr + i, tl.cumsum(x, 0, reverse=REVERSE), mask=i < n)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("n", [1, 7, 64, 1000])
def test_prefix_sum(reverse: bool, n: int) -> None:
    x = torch.randint(0, 9, (n,), dtype=torch.int32)
    out = torch.empty_like(x)
    cumsum_kernel[(1,)](x, out, n, BLOCK=1024 if n > 64 else 64, REVERSE=reverse)
    expected = x.flip(0).cumsum(0).flip(0) if reverse else x.cumsum(0)
    assert torch.equal(out, expected.int())


@triton.jit
def cube_kernel(x_ptr, out_ptr, AXIS: tl.constexpr):
    p = tl.arange(0, 4)[:, None, None] * 128 + tl.arange(0, 8)[None, :, None] * 16 + tl.arange(0, 16)[None, None, :]
    total = tl.sum(tl.load(x_ptr + p), AXIS)
    tl.store(out_ptr + tl.arange(0, 512 // (4 if AXIS == 0 else 8 if AXIS == 1 else 16)), tl.ravel(total))


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_three_dimensional_tiles(axis: int) -> None:
    x = torch.randn(4, 8, 16)
    expected = x.double().sum(axis).reshape(-1)
    out = torch.empty(expected.shape)
    cube_kernel[(1,)](x, out, AXIS=axis)
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)


@triton.jit
def atomic_kernel(x_ptr, counts_ptr, sums_ptr, top_ptr, lock_ptr, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = i < n
    x = tl.load(x_ptr + i, mask=mask, other=0)
    tl.atomic_add(sums_ptr + x, 1.5, mask=mask)
    tl.atomic_max(top_ptr, tl.max(x, 0))
    tl.atomic_add(counts_ptr + tl.arange(0, 16), tl.histogram(x, 16, mask=mask))
    while tl.atomic_cas(lock_ptr, 0, 1) == 1:
        pass
    tl.store(lock_ptr + 1, tl.load(lock_ptr + 1) + 1)
    tl.atomic_xchg(lock_ptr, 0)


def test_atomics_are_exact_across_threads() -> None:
    x = torch.randint(0, 16, (1000,), dtype=torch.int32)
    counts, top, lock = (torch.zeros(16, dtype=torch.int32) for _ in range(3))
    sums = torch.zeros(16)
    atomic_kernel[(125,)](x, counts, sums, top, lock, 1000, BLOCK=8)
    expected = torch.bincount(x, minlength=16)
    assert torch.equal(counts, expected.int())
    assert torch.equal(sums, expected * 1.5)
    assert top[0] == x.max()
    assert lock[:2].tolist() == [0, 125]


@triton.jit
def softmax_kernel(x_ptr, out_ptr, sums_ptr, rows, n, BM: tl.constexpr, BN: tl.constexpr):
    """Writes its exponentials to memory inside its sum, and the elements behind n are read without a mask."""
    r, c = tl.arange(0, BM)[:, None], tl.arange(0, BN)[None, :]
    mask = (r < rows) & (c < n)
    x = tl.load(x_ptr + r * n + c, mask=mask, other=float("-inf"))
    e = tl.exp(x - tl.max(x, 1)[:, None])
    y = e / tl.sum(e, 1)[:, None]
    tl.store(out_ptr + r * n + c, y, mask=mask)
    back = tl.where(r < rows, e, 0.0)
    tl.store(sums_ptr + c, tl.sum(back, 0)[None, :])


@pytest.mark.parametrize(("rows", "n", "bm", "bn"), [(1, 1, 1, 64), (5, 77, 4, 128), (8, 64, 8, 64), (3, 200, 2, 256)])
def test_a_tile_written_by_a_reduction_has_its_tail(rows: int, n: int, bm: int, bn: int) -> None:
    x = torch.randn(rows, n) * 5
    out, sums = torch.empty(rows, n), torch.empty(-(-rows // bm), bn)
    for program in range(len(sums)):
        part = x[program * bm : (program + 1) * bm]
        softmax_kernel[(1,)](part, out[program * bm :], sums[program], len(part), n, BM=bm, BN=bn)
        d = part.double()
        expected = torch.zeros(bn, dtype=torch.float64)
        expected[:n] = (d - d.amax(1, keepdim=True)).exp().sum(0)
        torch.testing.assert_close(sums[program].double(), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(out.double(), x.double().softmax(1), rtol=1e-5, atol=1e-7)


@triton.jit
def tail_kernel(x_ptr, out_ptr, n, BLOCK: tl.constexpr):
    """The tail of a tile kept in memory is a number other than 0, and the whole tile is read again."""
    i = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + i, mask=i < n, other=3.0)
    y = tl.where(i < n, tl.sqrt(x), 7.0)
    total = tl.sum(tl.where(i < n, y, 0.0), 0)
    tl.store(out_ptr + i, y / total)


@pytest.mark.parametrize("n", [1, 15, 16, 17, 100, 255, 256])
def test_the_tail_of_a_tile_is_what_its_mask_says(n: int) -> None:
    x = torch.rand(n)
    out = torch.empty(256)
    tail_kernel[(1,)](x, out, n, BLOCK=256)
    y = torch.full((256,), 7.0, dtype=torch.float64)
    y[:n] = x.double().sqrt()
    torch.testing.assert_close(out.double(), y / y[:n].sum(), rtol=1e-5, atol=1e-6)


@triton.jit
def quotient_kernel(x_ptr, d_ptr, out_ptr, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out_ptr + i, tl.load(x_ptr + i) / tl.load(d_ptr + tl.program_id(0)))


def test_division_by_a_shared_number_is_exact() -> None:
    """Every divisor of 32 bits, special ones included; quotients of |x| below 2**-100 may be off by one unit."""
    bits = torch.randint(-(2**31), 2**31 - 1, (512, 256), dtype=torch.int32)
    x = torch.cat([bits.view(torch.float32), torch.randn(512, 256)])
    d = torch.randint(-(2**31), 2**31 - 1, (1024,), dtype=torch.int32).view(torch.float32)
    d[::2] = torch.rand(512) * 10.0 ** torch.randint(-6, 7, (512,))
    d[1:12:2] = torch.tensor([0.0, -0.0, float("inf"), float("nan"), -1.0, 1.9999999])
    x[:, :6] = torch.tensor([0.0, -0.0, float("inf"), float("-inf"), float("nan"), 3.4e38])
    out = torch.empty_like(x)
    quotient_kernel[(1024,)](x, d, out, BLOCK=256)
    expected = x / d[:, None]
    off = (out.view(torch.int32).long() - expected.view(torch.int32).long()).abs()
    off[out.isnan() & expected.isnan()] = 0
    assert off[x.abs() >= 2.0**-100].max() == 0
    assert off.max() <= 1


@triton.jit
def byte_kernel(x_ptr, w_ptr, out_ptr, n, KIND: tl.constexpr, M: tl.constexpr, N: tl.constexpr):
    r, c = tl.arange(0, M)[:, None], tl.arange(0, N)[None, :]
    x = tl.load(x_ptr + r * N + c, mask=c < n, other=0)
    w = tl.load(w_ptr + c, mask=c < n, other=0).to(tl.int32)
    if KIND == "product":
        y = tl.sum(x.to(tl.int32) * w, 1)
    elif KIND == "halves":
        y = tl.sum((x & 15).to(tl.int32) * w + (x >> 4).to(tl.int32) * w, 1)
    elif KIND == "shifted":
        y = tl.sum(((x.to(tl.int32) >> 4) - 8) * w + x.to(tl.int32), 1)
    elif KIND == "wide":
        y = tl.sum((x.to(tl.int16) + 100).to(tl.int32) * w, 1)
    else:
        y = tl.sum((x > 3).to(tl.int32), 1)
    tl.store(out_ptr + tl.arange(0, M), y)


BYTE_SUMS = {
    "product": lambda x, w: x * w,
    "halves": lambda x, w: (x & 15) * w + (x >> 4) * w,
    "shifted": lambda x, w: ((x >> 4) - 8) * w + x,
    "wide": lambda x, w: (x + 100) * w,
    "count": lambda x, w: x > 3,
}


@pytest.mark.parametrize("kind", BYTE_SUMS)
@pytest.mark.parametrize(
    ("x_dtype", "w_dtype"), [("int8", "int8"), ("uint8", "int8"), ("int8", "uint8"), ("uint8",) * 2]
)
def test_sums_of_products_of_bytes(kind: str, x_dtype: str, w_dtype: str) -> None:
    for m, size, n in ((4, 32, 32), (16, 64, 64), (2, 512, 77), (1, 256, 256), (8, 16, 16)):
        x = torch.randint(0, 256, (m, size), dtype=torch.uint8).view(getattr(torch, x_dtype))
        w = torch.randint(0, 256, (size,), dtype=torch.uint8).view(getattr(torch, w_dtype))
        x[0].fill_(-128 if x_dtype == "int8" else 255)
        out = torch.empty(m, dtype=torch.int32)
        byte_kernel[(1,)](x, w, out, n, KIND=kind, M=m, N=size)
        inside = torch.arange(size) < n
        masked_x, masked_w = x.long() * inside, w.long() * inside
        assert torch.equal(out.long(), BYTE_SUMS[kind](masked_x, masked_w).sum(1))


@triton.jit
def rows_kernel(x_ptr, out_ptr, places_ptr, rows, M: tl.constexpr, N: tl.constexpr):
    r, c = tl.arange(0, M), tl.arange(0, N)
    x = tl.load(x_ptr + r[:, None] * N + c[None, :], mask=(r < rows)[:, None], other=-1.0)
    value, place = tl.max(x, 1, return_indices=True)
    tl.store(out_ptr + r, value)
    tl.store(places_ptr + r, place)
    tl.store(out_ptr + M + r, tl.sum(x, 1))


@pytest.mark.parametrize(
    ("m", "n", "rows"), [(16, 4, 16), (64, 2, 33), (32, 32, 5), (8, 128, 8), (4, 16, 0), (32, 8, 31)]
)
def test_rows_combined_by_groups(m: int, n: int, rows: int) -> None:
    x = torch.randn(m, n)
    out, places = torch.empty(2, m), torch.empty(m, dtype=torch.int32)
    rows_kernel[(1,)](x, out, places, rows, M=m, N=n)
    x[rows:] = -1
    assert torch.equal(out[0], x.amax(1))
    assert torch.equal(places.long(), x.argmax(1))
    torch.testing.assert_close(out[1].double(), x.double().sum(1), rtol=1e-5, atol=1e-5)


def test_booleans_are_read_and_summed() -> None:
    x = torch.rand(16, 128) < 0.3
    out = torch.empty(16, dtype=torch.int32)
    reduce_kernel[(1,)](x, out, 0, NAME="sum", M=16, N=128, AXIS=1)
    assert torch.equal(out, x.sum(1, dtype=torch.int32))


@triton.jit
def odd_tail_kernel(x_ptr, byte_ptr, out_ptr, sum_ptr, n, rounds, N: tl.constexpr):
    i = tl.arange(0, N)
    x = tl.load(x_ptr + i, mask=i < n, other=float("nan"))
    difference = tl.load(x_ptr + i, mask=i < n, other=float("-inf")) - tl.load(x_ptr + N + i, i < n, float("-inf"))
    for r in range(rounds):
        tl.store(out_ptr + 2 * r * N + i, x + r)
        tl.store(out_ptr + 2 * r * N + N + i, difference + r)
    tl.store(sum_ptr, tl.sum(tl.load(byte_ptr + i, mask=i < n, other=255).to(tl.int32) + 1, 0))
    flags = tl.where(i < n, tl.load(byte_ptr + i) > 300, True)
    tl.store(sum_ptr + 1, tl.sum(flags.to(tl.int32) - 1, 0))


@pytest.mark.parametrize("n", [0, 5, 100, 128])
def test_tails_of_nan_and_of_unsigned_numbers(n: int) -> None:
    x, data = torch.randn(2, 128), torch.randint(0, 256, (128,), dtype=torch.uint8)
    out, sums = torch.empty(2, 2, 128), torch.empty(2, dtype=torch.int32)
    odd_tail_kernel[(1,)](x, data, out, sums, n, 2, N=128)
    first = x[0].clone()
    first[n:] = torch.nan
    expected = torch.stack([first, first - x[1]])
    torch.testing.assert_close(out, torch.stack([expected, expected + 1]), rtol=0, atol=0, equal_nan=True)
    data[n:] = 255
    assert sums.tolist() == [int((data.int() + 1).sum()), -n]
