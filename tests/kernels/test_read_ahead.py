"""Which loads read ahead: long runs of a program's own memory, and no others."""

import pytest
import torch
import triton
import triton.language as tl


@triton.jit
def sum_kernel(x_ptr, shared_ptr, out_ptr, stride, ROWS: tl.constexpr, COLUMNS: tl.constexpr, OWN: tl.constexpr):
    rows = tl.arange(0, ROWS)[:, None] * stride
    x = tl.load(x_ptr + OWN * tl.program_id(0) * ROWS * stride + rows + tl.arange(0, COLUMNS)[None, :])
    out = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    tl.store(out_ptr + out, tl.sum(x + tl.load(shared_ptr + tl.arange(0, COLUMNS))[None, :], axis=1))


@pytest.mark.parametrize(
    ("rows", "columns", "ahead"),
    [(1, 256, True), (4, 1024, True), (32, 128, False), (1, 128, False)],
)
def test_runs(rows: int, columns: int, ahead: bool) -> None:
    programs, stride = 3, columns + 16
    x, shared = torch.randn(programs * rows, stride), torch.randn(columns)
    out = torch.empty(programs * rows)
    kernel = sum_kernel[(programs,)](x, shared, out, stride, ROWS=rows, COLUMNS=columns, OWN=1)
    want = (x[:, :columns].double() + shared).sum(1)
    torch.testing.assert_close(out.double(), want, rtol=1e-5, atol=1e-4)
    assert ("call void @llvm.prefetch" in kernel.asm["llir"]) == ahead


def test_what_all_programs_read_is_not_read_ahead() -> None:
    x, shared, out = torch.randn(1024), torch.randn(1024), torch.empty(3)
    kernel = sum_kernel[(3,)](x, shared, out, 1024, ROWS=1, COLUMNS=1024, OWN=0)
    torch.testing.assert_close(out.double(), (x.double() + shared).sum().expand(3), rtol=1e-5, atol=1e-4)
    assert "llvm.prefetch" not in kernel.asm["llir"]
