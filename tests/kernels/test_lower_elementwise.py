"""Lowering of elementwise operations, casts, masks, gathers and shape operations, against torch in fp64."""

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra import libdevice

FLOATS = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
INTS = [torch.int8, torch.int16, torch.int32, torch.int64]
EPSILON = {torch.float16: 2e-3, torch.bfloat16: 1.6e-2, torch.float32: 4e-7, torch.float64: 1e-14}


@triton.jit
def float_kernel(x_ptr, y_ptr, out_ptr, n, x_stride, BLOCK: tl.constexpr):
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = index < n
    x = tl.load(x_ptr + index * x_stride, mask=mask, other=1.0)
    y = tl.load(y_ptr + index, mask=mask, other=1.0)
    tl.store(out_ptr + index, x + y, mask=mask)
    tl.store(out_ptr + n + index, x * y - x, mask=mask)
    tl.store(out_ptr + 2 * n + index, x / y, mask=mask)
    tl.store(out_ptr + 3 * n + index, tl.where(x > y, -x, y), mask=mask)
    tl.store(out_ptr + 4 * n + index, tl.maximum(x, y) + tl.minimum(x, 0.5), mask=mask)
    tl.store(out_ptr + 5 * n + index, tl.abs(x), mask=mask)


def float_reference(x: Tensor, y: Tensor) -> Tensor:
    x, y = x.double(), y.double()
    parts = [x + y, x * y - x, x / y, torch.where(x > y, -x, y), x.maximum(y) + x.clamp(max=0.5), x.abs()]
    return torch.cat(parts)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("n", [1, 7, 64, 1000])
def test_float_operations(dtype: torch.dtype, n: int) -> None:
    x = torch.randn(3 * n).to(dtype)[::3]
    y = (torch.rand(n) + 0.5).to(dtype)
    out = torch.empty(6 * n, dtype=dtype)
    float_kernel[(triton.cdiv(n, 64),)](x, y, out, n, 3, BLOCK=64)
    reference = float_reference(x, y)
    assert (out.double() - reference).abs().max() <= EPSILON[dtype] * reference.abs().max()


@triton.jit
def int_kernel(x_ptr, y_ptr, out_ptr, n, BLOCK: tl.constexpr):
    index = tl.arange(0, BLOCK)
    mask = index < n
    x = tl.load(x_ptr + index, mask=mask, other=0)
    y = tl.load(y_ptr + index, mask=mask, other=0)
    tl.store(out_ptr + index, x + y * x - 3, mask=mask)
    tl.store(out_ptr + n + index, x // y, mask=mask)
    tl.store(out_ptr + 2 * n + index, x % y, mask=mask)
    tl.store(out_ptr + 3 * n + index, (x & y) | (x ^ 5), mask=mask)
    tl.store(out_ptr + 4 * n + index, (x << 2) >> 1, mask=mask)
    tl.store(out_ptr + 5 * n + index, tl.maximum(x, y) - tl.minimum(x, y), mask=mask)


@pytest.mark.parametrize("dtype", INTS)
@pytest.mark.parametrize("n", [1, 33])
def test_int_operations(dtype: torch.dtype, n: int) -> None:
    x = torch.randint(-100, 100, (n,)).to(dtype)
    y = torch.randint(1, 20, (n,)).to(dtype) * torch.tensor([1, -1])[torch.randint(0, 2, (n,))].to(dtype)
    out = torch.empty(6 * n, dtype=dtype)
    # Lanes that the mask switches off divide 0 by 0, which must not trap.
    int_kernel[(1,)](x, y, out, n, BLOCK=64)
    quotient = torch.div(x, y, rounding_mode="trunc")
    parts = [x + y * x - 3, quotient, x - quotient * y, (x & y) | (x ^ 5), (x << 2) >> 1, x.maximum(y) - x.minimum(y)]
    assert torch.equal(out, torch.cat(parts))


@triton.jit
def cast_kernel(x_ptr, out_ptr, back_ptr, BLOCK: tl.constexpr):
    index = tl.arange(0, BLOCK)
    value = tl.load(x_ptr + index).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + index, value)
    tl.store(back_ptr + index, value.to(tl.float64))


def edge_values() -> Tensor:
    """Numbers at rounding boundaries, subnormals and special values of the small float types."""
    special = [0.0, -0.0, float("inf"), float("-inf"), float("nan"), 65504.0, 65520.0, 3.4e38, 1e-40, 6e-8, 5.9e-8]
    near = [
        1 + 2**-8,
        1 + 3 * 2**-8,
        1 + 2**-11,
        1 + 3 * 2**-11,
        2**-133,
        3 * 2.0**-134,
        448.0,
        240.0,
        2**-9,
        2**-10,
    ]
    random = (torch.randn(4096) * 10 ** (torch.rand(4096) * 12 - 8)).tolist()
    values = special + near + random
    return torch.tensor(values[:4096], dtype=torch.float64)


@pytest.mark.parametrize("source", [torch.float32, torch.float64])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float8_e5m2])
def test_float_casts_round_to_nearest_even(source: torch.dtype, dtype: torch.dtype) -> None:
    x = edge_values().to(source)
    out, back = torch.empty(4096, dtype=dtype), torch.empty(4096, dtype=torch.float64)
    cast_kernel[(1,)](x, out, back, BLOCK=4096)
    expected = x.to(dtype)
    if dtype == torch.float8_e5m2 and source == torch.float64:
        expected = x.float().to(dtype)
    expected = expected.double()
    if dtype == torch.float8_e5m2:
        expected = torch.where(expected.isnan(), expected, expected.clamp(-57344, 57344))  # Triton saturates
    torch.testing.assert_close(back, expected, rtol=0, atol=0, equal_nan=True)


@triton.jit
def toward_zero_kernel(x_ptr, out_ptr, back_ptr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    out = tl.load(x_ptr + i).to(out_ptr.dtype.element_ty, fp_downcast_rounding="rtz")
    tl.store(out_ptr + i, out)
    tl.store(back_ptr + i, out.to(tl.float64))


@pytest.mark.parametrize("source", [torch.float32, torch.float64])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float8_e5m2])
def test_float_casts_toward_zero(source: torch.dtype, dtype: torch.dtype) -> None:
    x = edge_values().to(source)
    out, back = torch.empty(4096, dtype=dtype), torch.empty(4096, dtype=torch.float64)
    toward_zero_kernel[(1,)](x, out, back, BLOCK=4096)
    x = x.double()
    x = x[x.isfinite()]
    # The largest number of the type that is not larger in size: its neighbour is.
    numbers = torch.arange(0, 1 << (8 * dtype.itemsize - 1)).to({1: torch.uint8, 2: torch.int16}[dtype.itemsize])
    numbers = numbers.view(dtype).double()
    numbers = numbers[numbers.isfinite()]
    expected = numbers[torch.searchsorted(numbers, x.abs(), right=True) - 1] * x.sign()
    torch.testing.assert_close(back[edge_values().to(source).isfinite()], expected, rtol=0, atol=0)


@pytest.mark.parametrize(("dtype", "bits"), [(torch.float16, 10), (torch.bfloat16, 7)])
def test_casts_from_f64_round_once(dtype: torch.dtype, bits: int) -> None:
    """Just beside a tie, which rounding to f32 first (as torch does) would take for one."""
    x = torch.tensor([1 + 2.0 ** -(bits + 1) + 2.0**-40, 1 + 3 * 2.0 ** -(bits + 1) - 2.0**-40], dtype=torch.float64)
    out, back = torch.empty(2, dtype=dtype), torch.empty(2, dtype=torch.float64)
    cast_kernel[(1,)](x, out, back, BLOCK=2)
    assert back.tolist() == [1 + 2.0**-bits] * 2


@pytest.mark.parametrize("dtype", [torch.int8, torch.int16, torch.int32, torch.int64])
def test_float_to_int_and_back(dtype: torch.dtype) -> None:
    x = (torch.rand(64) - 0.5) * 250
    out, back = torch.empty(64, dtype=dtype), torch.empty(64, dtype=torch.float64)
    cast_kernel[(1,)](x, out, back, BLOCK=64)
    assert torch.equal(out, x.to(dtype))
    assert torch.equal(back, x.to(dtype).double())


def test_fp8_e4m3_round_trips_every_value() -> None:
    codes = torch.arange(256, dtype=torch.uint8)
    x = codes.view(torch.float8_e4m3fn)
    back = torch.empty(256, dtype=torch.float64)
    out = torch.empty(256, dtype=torch.float8_e4m3fn)
    cast_kernel[(1,)](x.float(), out, back, BLOCK=256)
    torch.testing.assert_close(back, x.double(), rtol=0, atol=0, equal_nan=True)


@triton.jit
def two_dim_kernel(
    x_ptr, ids_ptr, row_ptr, out_ptr, rows, columns, x_row, x_col, o_row, o_col, BM: tl.constexpr, BN: tl.constexpr
):
    r = tl.program_id(0) * BM + tl.arange(0, BM)
    c = tl.program_id(1) * BN + tl.arange(0, BN)
    mask = (r[:, None] < rows) & (c[None, :] < columns)
    ids = tl.load(ids_ptr + r, mask=r < rows, other=0)
    x = tl.load(x_ptr + ids[:, None] * x_row + c[None, :] * x_col, mask=mask, other=0.0)
    scale = tl.load(row_ptr + c, mask=c < columns, other=0.0)
    tl.store(out_ptr + r[:, None] * o_row + c[None, :] * o_col, x * scale[None, :] + r[:, None], mask=mask)


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (7, 33), (64, 64), (50, 130)])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("id_dtype", [torch.int64, torch.int32])
def test_gathered_rows_with_any_strides(rows: int, columns: int, transposed: bool, id_dtype: torch.dtype) -> None:
    x = torch.randn(columns, 90).t() if transposed else torch.randn(90, columns)
    ids = torch.randint(0, 90, (rows,), dtype=id_dtype)
    scale = torch.randn(columns)
    out = torch.full((rows + 1, columns + 1), float("nan"))
    grid = (triton.cdiv(rows, 16), triton.cdiv(columns, 32))
    two_dim_kernel[grid](x, ids, scale, out, rows, columns, *x.stride(), *out.stride(), BM=16, BN=32)
    expected = x[ids] * scale + torch.arange(rows)[:, None]
    torch.testing.assert_close(out[:rows, :columns], expected)
    assert out[rows].isnan().all(), "a row outside the mask was written"
    assert out[:, columns].isnan().all(), "a column outside the mask was written"


@triton.jit
def shape_kernel(x_ptr, out_ptr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + i)
    low, high = tl.split(tl.reshape(x, BLOCK // 2, 2))
    tl.store(out_ptr + i, tl.reshape(tl.join(high, low), BLOCK))
    tl.store(out_ptr + BLOCK + i, tl.sort(x))
    tl.store(out_ptr + 2 * BLOCK + i, tl.flip(x, 0))
    tl.store(out_ptr + 3 * BLOCK + i, tl.gather(x, (i * 7) % BLOCK, 0))
    tile = tl.trans(tl.reshape(x, 8, BLOCK // 8))
    tl.store(out_ptr + 4 * BLOCK + tl.arange(0, BLOCK // 8)[:, None] * 8 + tl.arange(0, 8)[None, :], tile)
    cube = tl.permute(tl.reshape(x, 2, 4, BLOCK // 8), 2, 0, 1)
    tl.store(out_ptr + 5 * BLOCK + i, tl.reshape(cube, BLOCK))
    tl.store(out_ptr + 6 * BLOCK + tl.arange(0, 2 * BLOCK), tl.cat(x, x + 1, can_reorder=True))


def test_shape_operations() -> None:
    size = 64
    x = torch.randn(size)
    out = torch.empty(8 * size)
    shape_kernel[(1,)](x, out, BLOCK=size)
    parts = [
        x.reshape(-1, 2).flip(1).reshape(-1),
        x.sort().values,
        x.flip(0),
        x[torch.arange(size) * 7 % size],
        x.reshape(8, -1).t().reshape(-1),
        x.reshape(2, 4, -1).permute(2, 0, 1).reshape(-1),
        x,
        x + 1,
    ]
    assert torch.equal(out, torch.cat(parts))


@triton.jit
def in_place_kernel(x_ptr, y_ptr, n, BLOCK: tl.constexpr):
    index = tl.arange(0, BLOCK)
    mask = index < n
    x = tl.load(x_ptr + index, mask=mask)
    tl.store(x_ptr + index, x + 1, mask=mask)
    tl.store(y_ptr + index, x, mask=mask)


def test_a_load_keeps_the_value_from_before_a_store() -> None:
    x = torch.randn(100)
    y, before = torch.empty(100), x.clone()
    in_place_kernel[(1,)](x, y, 100, BLOCK=128)
    assert torch.equal(y, before)
    assert torch.equal(x, before + 1)


@triton.jit
def libdevice_kernel(x_ptr, out_ptr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + i)
    tl.store(out_ptr + i, libdevice.tanh(x))
    tl.store(out_ptr + BLOCK + i, libdevice.pow(tl.abs(x), x))
    tl.store(out_ptr + 2 * BLOCK + i, libdevice.atan2(x, x + 2))
    tl.store(out_ptr + 3 * BLOCK + i, libdevice.rint(x * 4))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_libdevice(dtype: torch.dtype) -> None:
    x = torch.randn(64, dtype=dtype)
    out = torch.empty(256, dtype=dtype)
    libdevice_kernel[(1,)](x, out, BLOCK=64)
    d = x.double()
    expected = torch.cat([d.tanh(), d.abs() ** d, torch.atan2(d, d + 2), (d * 4).round()])
    torch.testing.assert_close(out.double(), expected, rtol=4e-7 if dtype == torch.float32 else 1e-14, atol=1e-7)


@triton.jit
def two_strides_kernel(x_ptr, out_ptr, sum_ptr, row_stride, n, COLUMNS: tl.constexpr, BLOCK: tl.constexpr):
    # Quotients and remainders of 64 bits are kept in tiles, and the mask allows a vector behind the tile's end.
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < n
    at = (offsets // COLUMNS) * row_stride + offsets % COLUMNS
    x = tl.load(x_ptr + at, mask=mask, other=0.0)
    tl.store(out_ptr + at, tl.exp(x) + tl.sqrt(tl.abs(x)), mask=mask)
    tl.store(sum_ptr + tl.program_id(0), tl.sum(tl.load(x_ptr + at, mask=mask, other=0.0), 0))


@pytest.mark.parametrize("n", [64, 1024, 1000])
def test_indices_in_tiles_are_read_inside_the_tile(n: int) -> None:
    x = torch.randn(n // 8, 32, dtype=torch.float64)
    out, sums = torch.zeros_like(x), torch.empty(triton.cdiv(n, 64), dtype=torch.float64)
    two_strides_kernel[(triton.cdiv(n, 64),)](x, out, sums, 32, n, 8, 64)
    part = x[:, :8]
    torch.testing.assert_close(out[:, :8], part.exp() + part.abs().sqrt())
    padded = torch.nn.functional.pad(part.flatten(), (0, -n % 64))
    torch.testing.assert_close(sums, padded.reshape(-1, 64).sum(1))
