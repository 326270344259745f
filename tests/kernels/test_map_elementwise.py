"""``tl.map_elementwise``: functions of scalars with branches and loops of their own."""

import pytest
import torch
import triton
import triton.language as tl


@triton.jit
def branches(x, slope):
    if x > 0:
        y = x * 1.0
        for _ in range(3):
            y = y * 0.5 + slope
        return y
    if x < -1:
        return slope - x
    return slope * (tl.exp(x) - 1)


@triton.jit
def branches_kernel(x_ptr, slope_ptr, out_ptr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    place = tl.arange(0, ROWS)[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    slope = tl.load(slope_ptr + tl.arange(0, ROWS))[:, None]
    tl.store(out_ptr + place, tl.map_elementwise(branches, tl.load(x_ptr + place), slope))


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (1, 64), (16, 8), (8, 1)])
def test_early_returns_and_loops(rows: int, columns: int) -> None:
    x, slope = torch.randn(rows, columns) * 2, torch.randn(rows)
    out = torch.empty_like(x)
    branches_kernel[(1,)](x, slope, out, ROWS=rows, COLUMNS=columns)
    x, slope = x.double(), slope.double()[:, None].expand(rows, columns)
    repeated = x
    for _ in range(3):
        repeated = repeated * 0.5 + slope
    below = torch.where(x < -1, slope - x, slope * x.expm1())
    torch.testing.assert_close(out.double(), torch.where(x > 0, repeated, below), rtol=1e-5, atol=1e-6)


@triton.jit
def smaller_larger(a0, a1, b0, b1):
    return tl.minimum(a0, b0), tl.minimum(a1, b1) * 10, tl.maximum(a0, a1), tl.maximum(b0, b1)


@triton.jit
def packed_kernel(a_ptr, b_ptr, low_ptr, high_ptr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    place = tl.arange(0, ROWS)[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    low, high = tl.map_elementwise(smaller_larger, tl.load(a_ptr + place), tl.load(b_ptr + place), pack=2)
    tl.store(low_ptr + place, low)
    tl.store(high_ptr + place, high)


@pytest.mark.parametrize(("rows", "columns"), [(1, 2), (4, 16), (16, 1)])
def test_neighbours_go_through_the_function_together(rows: int, columns: int) -> None:
    a, b = (torch.randint(-50, 50, (rows, columns), dtype=torch.int32) for _ in range(2))
    low, high = torch.empty_like(a), torch.empty_like(a)
    packed_kernel[(1,)](a, b, low, high, ROWS=rows, COLUMNS=columns)
    pairs_a, pairs_b = a.reshape(-1, 2), b.reshape(-1, 2)
    assert torch.equal(low.reshape(-1, 2), torch.minimum(pairs_a, pairs_b) * torch.tensor([1, 10]))
    assert torch.equal(high.reshape(-1, 2), torch.stack([pairs_a.amax(1), pairs_b.amax(1)], 1))
