"""Control flow with scalars and tensors as carried values, functions, early returns."""

import pytest
import torch
import triton
import triton.language as tl


@triton.jit(noinline=True)
def factor(n):
    if n > 5:
        return 2.0
    return 3.0


@triton.jit
def flow_kernel(x_ptr, out_ptr, n, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + i)
    j = n
    while j > 1:
        x = x + 1.0
        j = j // 2
    a, b = x, x * 2
    for t in range(0, n):
        a, b = b, a + b  # a swap: neither may be overwritten before the other is read
        if t == 2:
            a = a * 0.5
        else:
            b = b - 1.0
    tl.store(out_ptr + i, (a + b) * factor(n))


@pytest.mark.parametrize("n", [0, 1, 3, 7])
def test_loops_branches_and_calls(n: int) -> None:
    x = torch.randn(64)
    out = torch.empty_like(x)
    flow_kernel[(1,)](x, out, n, BLOCK=64)
    x, j = x.double(), n
    while j > 1:
        x, j = x + 1, j // 2
    a, b = x, x * 2
    for t in range(n):
        a, b = b, a + b
        if t == 2:
            a = a * 0.5
        else:
            b = b - 1
    torch.testing.assert_close(out.double(), (a + b) * (2 if n > 5 else 3), rtol=1e-5, atol=1e-5)


@triton.jit
def rotate_kernel(x_ptr, out_ptr, n, SIZE: tl.constexpr):
    p = tl.arange(0, SIZE)[:, None] * SIZE + tl.arange(0, SIZE)[None, :]
    x = tl.load(x_ptr + p)
    for _ in range(n):
        x = tl.trans(x) + tl.flip(x, 1)
    tl.store(out_ptr + p, x)


def test_a_carried_tile_that_is_read_elsewhere_is_not_updated_in_place() -> None:
    x = torch.randn(32, 32)
    out = torch.empty_like(x)
    rotate_kernel[(1,)](x, out, 3, SIZE=32)
    expected = x.double()
    for _ in range(3):
        expected = expected.t() + expected.flip(1)
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)


@triton.jit
def pointer_kernel(x_ptr, out_ptr, rows, columns, BLOCK: tl.constexpr):
    c = tl.arange(0, BLOCK)
    pointers = x_ptr + c
    left = columns
    total = tl.zeros([BLOCK], tl.float32)
    for r in range(rows):
        total += tl.load(pointers, mask=c <= left - 1, other=0.0)
        pointers += columns
        if r == 1:
            left -= 3
    tl.store(out_ptr + c, total, mask=c < columns)


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (2, 20), (5, 100)])
def test_pointers_advanced_by_a_loop(rows: int, columns: int) -> None:
    x = torch.randn(rows, columns)
    out = torch.empty(columns)
    pointer_kernel[(1,)](x, out, rows, columns, BLOCK=128)
    expected = x.double().clone()
    expected[2:, max(columns - 3, 0) :] = 0
    torch.testing.assert_close(out.double(), expected.sum(0), rtol=1e-5, atol=1e-5)


@triton.jit
def early_kernel(out_ptr, n, BLOCK: tl.constexpr):
    pid = tl.program_id(0)
    if pid >= n:
        return
    i = pid * BLOCK + tl.arange(0, BLOCK)
    if pid == 1:
        tl.store(out_ptr + i, i)
        return
    tl.store(out_ptr + i, -i)


def test_early_returns() -> None:
    out = torch.full((64,), 7, dtype=torch.int32)
    early_kernel[(4,)](out, 3, BLOCK=16)
    i = torch.arange(64, dtype=torch.int32)
    expected = torch.where((i >= 16) & (i < 32), i, -i)
    expected[48:] = 7
    assert torch.equal(out, expected)


@triton.jit
def halved_if(x, flag):
    if flag:
        return x // 2
    return x


@triton.jit
def many_returns_kernel(x_ptr, out_ptr, bits, n, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + i, mask=i < n, other=-3)
    y = x
    for bit in tl.static_range(20):
        y = halved_if(y, (bits >> bit) & 1 > 0)
    tl.store(out_ptr + i, y)
    tl.store(out_ptr + BLOCK + i, x)


@pytest.mark.parametrize("n", [0, 5, 32])
def test_branches_that_meet_are_followed_once(n: int) -> None:
    # Twenty calls that return early: written out anew behind each branch they would be a million blocks.
    x, out = torch.randint(-10000, 10000, (32,), dtype=torch.int32), torch.empty(64, dtype=torch.int32)
    many_returns_kernel[(1,)](x, out, 0b1000_0000_0000_0010_0101, n, BLOCK=32)
    x[n:] = -3
    y = x
    for _ in range(4):
        y = torch.div(y, 2, rounding_mode="trunc")
    assert torch.equal(out, torch.cat([y, x]))


@triton.jit
def while_tile_kernel(x_ptr, out_ptr, limit, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + i)
    steps = 0
    while tl.max(x, 0) < limit:
        x = x * 2
        steps += 1
    tl.store(out_ptr + i, x + steps)


def test_while_with_a_tile() -> None:
    x = torch.rand(64) + 0.1
    out = torch.empty_like(x)
    while_tile_kernel[(1,)](x, out, 50.0, BLOCK=64)
    steps = 0
    while x.max() < 50:
        x, steps = x * 2, steps + 1
    torch.testing.assert_close(out, x + steps)


@triton.jit
def late_read_kernel(x_ptr, out_ptr, n, SIZE: tl.constexpr):
    p = tl.arange(0, SIZE)[:, None] * SIZE + tl.arange(0, SIZE)[None, :]
    x = tl.load(x_ptr + p)
    acc = tl.zeros([SIZE, SIZE], tl.float32)
    history = tl.zeros([SIZE, SIZE], tl.float32)
    for _ in range(n):
        new = tl.dot(x, x, acc)
        history += acc
        acc = new
    tl.store(out_ptr + p, history)


def test_an_accumulator_that_is_read_after_the_dot_keeps_its_value() -> None:
    x = torch.randn(16, 16)
    out = torch.empty_like(x)
    late_read_kernel[(1,)](x, out, 4, SIZE=16)
    torch.testing.assert_close(out.double(), (x.double() @ x.double()) * 6, rtol=1e-5, atol=1e-4)


@triton.jit
def nested_kernel(x_ptr, out_ptr, n, m, SIZE: tl.constexpr):
    p = tl.arange(0, SIZE)[:, None] * SIZE + tl.arange(0, SIZE)[None, :]
    x = tl.load(x_ptr + p)
    acc = tl.zeros([SIZE, SIZE], tl.float32)
    for i in range(n):
        before = acc
        for _ in range(m):
            acc = tl.dot(x, x, acc)
        acc = acc + before * i
    tl.store(out_ptr + p, acc)


@pytest.mark.parametrize(("n", "m"), [(0, 3), (2, 0), (3, 2)])
def test_nested_loops_with_an_accumulator(n: int, m: int) -> None:
    x = torch.randn(32, 32) * 0.1
    out = torch.empty_like(x)
    nested_kernel[(1,)](x, out, n, m, SIZE=32)
    product = x.double() @ x.double()
    acc = torch.zeros_like(product)
    for i in range(n):
        acc = acc + product * m + acc * i
    torch.testing.assert_close(out.double(), acc, rtol=1e-5, atol=1e-5)


@triton.jit
def kept_kernel(x_ptr, out_ptr, n, steps, N: tl.constexpr):
    i = tl.arange(0, N)
    x = tl.load(x_ptr + i)
    acc = tl.zeros((N,), tl.int32)
    for a in range(n):
        y = x
        for b in range(steps):
            y += b + 1
        if a % 2 == 0:
            x = x * 2
        acc += y  # made of the x before
    tl.store(out_ptr + i, acc)
    tl.store(out_ptr + N + i, x)


@pytest.mark.parametrize(("n", "steps"), [(0, 0), (1, 1), (3, 2), (2, 0)])
def test_a_tile_changes_after_a_loop_began_with_it(n: int, steps: int) -> None:
    x = torch.randint(0, 50, (1024,)).int()
    out = torch.empty(2, 1024).int()
    kept_kernel[(1,)](x, out, n, steps, N=1024)
    acc = torch.zeros_like(x)
    for a in range(n):
        acc += x + steps * (steps + 1) // 2
        x = x * 2 if a % 2 == 0 else x
    assert torch.equal(out, torch.stack([acc, x]))


@triton.jit(noinline=True)
def twice(n):
    return n * 2


@triton.jit
def return_after_call_kernel(out_ptr, n):
    pid = tl.program_id(0)
    value = twice(pid + 1)
    if pid >= n:
        return
    if pid > 0:
        value = value * twice(pid)
    tl.store(out_ptr + pid, value)


@pytest.mark.parametrize("n", [0, 1, 3])
def test_the_result_of_a_call_is_used_after_an_early_return(n: int) -> None:
    out = torch.zeros(4).int()
    return_after_call_kernel[(4,)](out, n)
    assert out.tolist() == [(pid + 1) * 2 * (pid * 2 if pid else 1) if pid < n else 0 for pid in range(4)]
