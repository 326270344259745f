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
