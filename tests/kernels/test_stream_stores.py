"""Stores that pass the caches by: launches that write much, whatever the alignment, and kernels that must not do so."""

from collections.abc import Iterator

import pytest
import torch
import triton
import triton.language as tl

from tilewright import settings
from tilewright.codegen.cpu.lower.stream import STREAM_BYTES


@pytest.fixture(autouse=True)
def without_checks() -> Iterator[None]:
    """Checked kernels store through the caches."""
    with settings.scope(check=False):
        yield


@triton.jit
def shift_kernel(x_ptr, out_ptr, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out_ptr + i, tl.load(x_ptr + i, mask=i < n) + 1, mask=i < n)


@triton.jit
def again_kernel(x_ptr, out_ptr, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out_ptr + i, tl.load(x_ptr + i, mask=i < n) + 1, mask=i < n)
    # Other lanes of the same program: what was written before is there.
    back = tl.program_id(0) * BLOCK + BLOCK - 1 - tl.arange(0, BLOCK)
    tl.store(x_ptr + back, tl.load(out_ptr + back, mask=back < n), mask=back < n)


@triton.jit
def count_kernel(x_ptr, out_ptr, done_ptr, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out_ptr + i, tl.load(x_ptr + i, mask=i < n) + 1, mask=i < n)
    tl.atomic_add(done_ptr, 1)


@triton.jit
def rows_kernel(x_ptr, out_ptr, m, n, stride, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    columns = tl.arange(0, BLOCK)[None, :]
    mask = (rows < m) & (columns < n)
    x = tl.load(x_ptr + rows * n + columns, mask=mask)
    tl.store(out_ptr + rows * stride + columns, x * 2, mask=mask)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8, torch.float64])
@pytest.mark.parametrize("offset", [0, 1])
def test_large_outputs_aligned_or_not(dtype: torch.dtype, offset: int) -> None:
    n = STREAM_BYTES // dtype.itemsize + 4099
    x = torch.randint(-99, 99, (n,), dtype=torch.int8).to(dtype)
    out = torch.full((n + 2,), 77, dtype=dtype)
    shift_kernel[(triton.cdiv(n, 4096),)](x, out[offset:], n, BLOCK=4096)
    assert torch.equal(out[offset : offset + n], x + 1)
    assert (out[:offset] == 77).all()
    assert (out[offset + n :] == 77).all()


@pytest.mark.parametrize(("n", "stride"), [(1000, 1000), (1000, 1024), (1024, 1027), (16, 16), (64, 64)])
def test_rows(n: int, stride: int) -> None:
    m = STREAM_BYTES // (4 * n) + 3
    x = torch.randn(m, n)
    out = torch.full((m, stride), 7.0)
    rows_kernel[(triton.cdiv(m, 8),)](x, out, m, n, stride, ROWS=8, BLOCK=triton.next_power_of_2(n))
    assert torch.equal(out[:, :n], x * 2)
    assert (out[:, n:] == 7.0).all()


def test_what_is_read_again_or_signalled_stays_in_the_caches() -> None:
    x, out, done = torch.randn(300), torch.zeros(300), torch.zeros(1, dtype=torch.int32)
    want = x + 1
    plain = shift_kernel[(3,)](x, out, 300, BLOCK=128)
    counted = count_kernel[(3,)](x, out, done, 300, BLOCK=128)
    again = again_kernel[(3,)](x, out, 300, BLOCK=128)
    assert torch.equal(out, want)
    assert torch.equal(x, want)
    assert done.item() == 3
    assert [("!nontemporal" in kernel.asm["llir"]) for kernel in (plain, counted, again)] == [True, False, False]
