"""``tl.device_assert`` and the overflow checks of debug mode: a failure stops the kernel with an error."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import triton
import triton.language as tl

import tilewright
from tilewright import settings
from tilewright.errors import KernelAssertion


@pytest.fixture(autouse=True, params=[False, True], ids=["plain", "checked"])
def mode(request: pytest.FixtureRequest) -> Iterator[None]:
    """Assertions work without checked mode and together with it."""
    with settings.scope(check=request.param):
        yield


@triton.jit
def scalar_kernel(out_ptr, n):
    tl.device_assert(tl.program_id(0) < n, "too many programs")
    tl.store(out_ptr + tl.program_id(0), 1)


def test_a_scalar_condition_stops_its_program() -> None:
    out = torch.zeros(8, dtype=torch.int32)
    scalar_kernel[(8,)](out, 8, debug=True)
    assert bool(out.all())
    out.zero_()
    with pytest.raises(KernelAssertion, match="device_assert failed: too many programs") as caught:
        scalar_kernel[(2, 3)](out, 1, debug=True)
    line = next(
        n for n, text in enumerate(Path(__file__).read_text().splitlines(), 1) if '"too many programs")' in text
    )
    assert caught.value.program[0] == 1
    assert (caught.value.kernel, caught.value.source) == ("scalar_kernel", f"{__file__}:{line}")
    assert caught.value.message == "too many programs"
    assert isinstance(caught.value, AssertionError)
    assert not out[1:].any()


def test_without_debug_nothing_is_tested() -> None:
    out = torch.zeros(8, dtype=torch.int32)
    scalar_kernel[(8,)](out, 1)
    assert bool(out.all())


@triton.jit
def tensor_kernel(x_ptr, out_ptr, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + i, mask=i < n, other=-1.0)
    tl.device_assert(x >= 0, 'x "must not" be\\ negative: é', mask=i < n)
    tl.store(out_ptr + i, tl.sqrt(x), mask=i < n)


@pytest.mark.parametrize("n", [0, 1, 15, 64, 100])
def test_tensors_under_a_mask(n: int) -> None:
    x, out = torch.rand(n), torch.zeros(n)
    tensor_kernel[(2,)](x, out, n, BLOCK=64, debug=True)
    torch.testing.assert_close(out, x.sqrt())
    for bad in {0, n // 2, n - 1} if n else ():
        wrong = x.clone()
        wrong[bad] = -1
        with pytest.raises(KernelAssertion) as caught:
            tensor_kernel[(2,)](wrong, out, n, BLOCK=64, debug=True)
        assert caught.value.message == 'x "must not" be\\ negative: é'
        assert caught.value.program == (bad // 64, 0, 0)
    tensor_kernel[(2,)](x, out, n, BLOCK=64, debug=True)


@triton.jit(noinline=True)
def checked_root(x, limit):
    tl.device_assert(x < limit, "over the limit")
    return tl.sqrt(x)


@triton.jit
def loop_kernel(x_ptr, out_ptr, n, limit):
    total = 0.0
    for i in range(n):
        total += checked_root(tl.load(x_ptr + i), limit)
    i = 0
    while i < n:
        assert tl.load(x_ptr + i) != 3.0, "no threes"
        i += 1
    tl.store(out_ptr, total)


def test_in_functions_and_loops() -> None:
    x, out = torch.rand(20), torch.zeros(1)
    loop_kernel[(1,)](x, out, 20, 2.0, debug=True)
    torch.testing.assert_close(out[0], x.sqrt().sum())
    x[13] = 3
    out.zero_()
    with pytest.raises(KernelAssertion, match="over the limit"):
        loop_kernel[(1,)](x, out, 20, 2.0, debug=True)
    with pytest.raises(KernelAssertion, match="no threes"):
        loop_kernel[(1,)](x, out, 20, 4.0, debug=True)
    assert not out.any()


@triton.jit
def tile_kernel(x_ptr, out_ptr, n, BM: tl.constexpr, BN: tl.constexpr):
    i, j = tl.arange(0, BM)[:, None], tl.arange(0, BN)[None, :]
    tl.device_assert(i < n, "rows")
    x = tl.load(x_ptr + i * BN + j)
    tl.device_assert(x == x, "NaN")
    tl.store(out_ptr + tl.arange(0, BM), tl.sum(x, 1))


def test_tiles() -> None:
    x, out = torch.randn(8, 32), torch.zeros(8)
    tile_kernel[(1,)](x, out, 8, BM=8, BN=32, debug=True)
    torch.testing.assert_close(out, x.sum(1))
    with pytest.raises(KernelAssertion, match="rows"):
        tile_kernel[(1,)](x, out, 7, BM=8, BN=32, debug=True)
    x[7, 31] = float("nan")
    with pytest.raises(KernelAssertion, match="NaN"):
        tile_kernel[(1,)](x, out, 8, BM=8, BN=32, debug=True)


@triton.jit
def integer_kernel(x_ptr, y_ptr, out_ptr, BLOCK: tl.constexpr, OP: tl.constexpr):
    i = tl.arange(0, BLOCK)
    x, y = tl.load(x_ptr + i), tl.load(y_ptr + i)
    if OP == "add":
        z = x + y
    elif OP == "sub":
        z = x - y
    elif OP == "mul":
        z = x * y
    elif OP == "sum":
        z = tl.sum(x, 0) + y * 0
    else:
        z = tl.cumsum(x, 0) + y * 0
    tl.store(out_ptr + i, z)


@pytest.mark.parametrize("op", ["add", "sub", "mul", "sum", "cumsum"])
def test_integer_overflow(op: str) -> None:
    top = 2**31 - 1
    x, y = torch.ones(64, dtype=torch.int32), torch.ones(64, dtype=torch.int32)
    out = torch.empty_like(x)
    if op in ("sum", "cumsum"):
        # No partial sum leaves 32 bits, in whatever order; and lanes of a scan that are thrown away do not count.
        x[0], x[1] = top - 62, 0
    integer_kernel[(1,)](x, y, out, BLOCK=64, OP=op, debug=True)
    expected = {"add": x + y, "sub": x - y, "mul": x * y, "sum": x.sum().int(), "cumsum": x.cumsum(0)}[op]
    assert torch.equal(out, expected.int().expand(64))
    x[40] = -top if op == "sub" else 2**30 + 1
    y[40] = 2**30 + 1
    with pytest.raises(KernelAssertion, match="int32 overflow detected for operation"):
        integer_kernel[(1,)](x, y, out, BLOCK=64, OP=op, debug=True)
    integer_kernel[(1,)](x, y, out, BLOCK=64, OP=op, debug=True, sanitize_overflow=False)


def test_prepared_and_then_well_again() -> None:
    x, out = torch.rand(64), torch.zeros(64)
    launch = tilewright.prepare(tensor_kernel, (1,), x, out, 64, BLOCK=64, debug=True)
    for value in (-1.0, 0.5, -2.0, 0.25):
        x[5] = value
        if value < 0:
            with pytest.raises(KernelAssertion):
                launch()
        else:
            launch()
            torch.testing.assert_close(out, x.sqrt())


def test_triton_debug_turns_assertions_on() -> None:
    code = f"""
import sys, torch
sys.path.insert(0, {str(Path(__file__).parent)!r})
from test_assertions import scalar_kernel
from tilewright.errors import KernelAssertion
try:
    scalar_kernel[(8,)](torch.zeros(8, dtype=torch.int32), 1)
except KernelAssertion as error:
    print(error.message)
"""
    environment = {**os.environ, "TRITON_DEBUG": "1"}
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, env=environment)
    assert result.stdout == "too many programs\n", result.stderr
