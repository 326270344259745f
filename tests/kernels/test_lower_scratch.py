"""Tiles that are too large for the stack of a thread."""

import pytest
import torch
import triton
import triton.language as tl


@triton.jit
def row_kernel(x_ptr, out_ptr, grad_ptr, n, BLOCK: tl.constexpr):
    # Several tiles of a whole row that are all needed at once.
    i = tl.arange(0, BLOCK)
    row = tl.program_id(0) * n
    x = tl.load(x_ptr + row + i, mask=i < n, other=float("-inf")).to(tl.float32)
    e = tl.exp(x - tl.max(x, 0))
    y = e / tl.sum(e, 0)
    before = tl.cumsum(y, 0)
    after = tl.cumsum(y, 0, reverse=True)
    tl.store(out_ptr + row + i, before - after, mask=i < n)
    tl.store(grad_ptr + row + i, y * (1 - y), mask=i < n)


@pytest.mark.parametrize(("n", "block"), [(50_000, 65536), (500_000, 524288)])
def test_rows_of_any_length(n: int, block: int) -> None:
    x = torch.randn(3, n)
    out, grad = torch.empty_like(x), torch.empty_like(x)
    row_kernel[(3,)](x, out, grad, n, BLOCK=block)
    y = x.double().softmax(1)
    expected = y.cumsum(1) - y.flip(1).cumsum(1).flip(1)
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=2e-5)
    torch.testing.assert_close(grad.double(), y * (1 - y), rtol=1e-5, atol=0)
