"""Sorting networks and other code that cuts tiles into axes of size 2."""

import pytest
import torch
import triton
import triton.language as tl


@triton.jit
def order_kernel(x_ptr, out_ptr, WHAT: tl.constexpr, DIM: tl.constexpr, M: tl.constexpr, N: tl.constexpr):
    at = tl.arange(0, M)[:, None] * N + tl.arange(0, N)[None, :]
    x = tl.load(x_ptr + at)
    if WHAT == "sort":
        y = tl.sort(x, dim=DIM)
    elif WHAT == "descending":
        y = tl.sort(x, dim=DIM, descending=True)
    else:
        y = tl.flip(x, DIM)
    tl.store(out_ptr + at, y)


ORDERS = {
    "sort": lambda x, dim: x.sort(dim).values,
    "descending": lambda x, dim: x.sort(dim, descending=True).values,
    "flip": lambda x, dim: x.flip(dim),
}
DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int8, torch.int64]


@pytest.mark.parametrize("what", ORDERS)
@pytest.mark.parametrize(("m", "n"), [(1, 2), (1, 8), (4, 4), (2, 64), (8, 32)])
def test_order(what: str, m: int, n: int) -> None:
    dtype = DTYPES[(m + n + len(what)) % len(DTYPES)]
    x = (torch.randn(m, n) * 20).to(dtype)
    out = torch.empty_like(x)
    order_kernel[(1,)](x, out, what, 1, m, n)
    assert torch.equal(out, ORDERS[what](x, 1))


@triton.jit
def long_sort_kernel(x_ptr, out_ptr, n, N: tl.constexpr):
    i = tl.arange(0, N)
    x = tl.load(x_ptr + tl.program_id(0) * n + i, mask=i < n, other=float("inf"))
    tl.store(out_ptr + tl.program_id(0) * n + i, tl.sort(x), mask=i < n)


@pytest.mark.parametrize("n", [100, 512])
def test_sort_of_masked_rows(n: int) -> None:
    x = torch.randn(3, n)
    x[1, ::7] = float("-inf")
    out = torch.empty_like(x)
    long_sort_kernel[(3,)](x, out, n, triton.next_power_of_2(n))
    assert torch.equal(out, x.sort(1).values)


@triton.jit
def running_topk_kernel(x_ptr, out_ptr, n, K: tl.constexpr, BLOCK: tl.constexpr):
    row = x_ptr + tl.program_id(0) * n
    best = tl.full([K], float("-inf"), tl.float32)
    for start in range(0, n, BLOCK):
        i = start + tl.arange(0, BLOCK)
        x = tl.load(row + i, mask=i < n, other=float("-inf"))
        top = tl.topk(x, K)
        both = tl.reshape(tl.trans(tl.join(best, top)), [2 * K])
        best = tl.topk(both, K)
    tl.store(out_ptr + tl.program_id(0) * K + tl.arange(0, K), best)


@pytest.mark.parametrize(("k", "block", "n"), [(4, 64, 200), (16, 32, 96), (32, 32, 70), (2, 16, 33)])
def test_running_topk(k: int, block: int, n: int) -> None:
    x = torch.randn(2, n)
    out = torch.empty(2, k)
    running_topk_kernel[(2,)](x, out, n, k, block)
    assert torch.equal(out, x.topk(k, dim=1).values)


@triton.jit
def compare_swap(x, ids, up, N: tl.constexpr, HALF: tl.constexpr):
    # The two halves by masked sums, as libraries write it that cannot index a tile.
    which = tl.arange(0, 2)[None, :, None]
    shape: tl.constexpr = [N // (2 * HALF), 2, HALF]
    pair = tl.reshape(x, shape)
    left = tl.broadcast_to(tl.sum(pair * (1 - which), 1)[:, None, :], shape)
    right = tl.broadcast_to(tl.sum(pair * which, 1)[:, None, :], shape)
    id_pair = tl.reshape(ids, shape)
    id_left = tl.broadcast_to(tl.sum(id_pair * (1 - which), 1)[:, None, :], shape)
    id_right = tl.broadcast_to(tl.sum(id_pair * which, 1)[:, None, :], shape)
    wrong = (left > right) == tl.reshape(up, shape)
    other = tl.where(which == 0, right, left)
    id_other = tl.where(which == 0, id_right, id_left)
    return tl.reshape(tl.where(wrong, other, pair), [N]), tl.reshape(tl.where(wrong, id_other, id_pair), [N])


@triton.jit
def argsort_kernel(x_ptr, values_ptr, ids_ptr, N: tl.constexpr, LOG: tl.constexpr):
    ids = tl.arange(0, N)
    i = tl.arange(0, N)
    x = tl.load(x_ptr + i)
    for stage in tl.static_range(LOG):
        up = (i >> (stage + 1)) % 2 == 0
        for step in tl.static_range(stage + 1):
            x, ids = compare_swap(x, ids, up, N, 2 ** (stage - step))
    tl.store(values_ptr + i, x)
    tl.store(ids_ptr + i, ids)


@pytest.mark.parametrize("log", [1, 3, 4, 6])
def test_argsort_by_masked_sums(log: int) -> None:
    n = 2**log
    x = torch.randperm(n).to(torch.int32) - n // 2
    values, ids = torch.empty_like(x), torch.empty_like(x)
    argsort_kernel[(1,)](x, values, ids, n, log)
    expected, order = x.sort()
    assert torch.equal(values, expected)
    assert torch.equal(ids.long(), order)


@triton.jit
def pairs_kernel(x_ptr, sum_ptr, at_ptr, flag, A: tl.constexpr, B: tl.constexpr):
    x = tl.load(x_ptr + tl.arange(0, 2 * A * B))
    if flag > 0:
        x = x * 2
    pair = tl.reshape(x, [A, 2, B])
    total = tl.reshape(tl.sum(pair, 1), [A * B])
    larger = tl.reshape(tl.argmax(pair, 1), [A * B])
    spread = tl.reshape(pair - tl.max(pair, 1, keep_dims=True), [2 * A * B])
    i = tl.arange(0, A * B)
    tl.store(sum_ptr + i, total)
    tl.store(at_ptr + i, larger)
    tl.store(x_ptr + tl.arange(0, 2 * A * B), spread)


@pytest.mark.parametrize(("a", "b"), [(1, 1), (1, 4), (4, 2), (2, 32), (16, 16)])
@pytest.mark.parametrize("flag", [0, 1])
def test_pairwise_reductions(a: int, b: int, flag: int) -> None:
    x = torch.randn(2 * a * b, dtype=torch.float64)
    total, at = torch.empty(a * b, dtype=torch.float64), torch.empty(a * b, dtype=torch.int32)
    pair = (x * (2 if flag else 1)).reshape(a, 2, b)
    spread = x.clone()
    pairs_kernel[(1,)](spread, total, at, flag, a, b)
    assert torch.equal(total, pair.sum(1).flatten())
    assert torch.equal(at.long(), pair.argmax(1).flatten())
    assert torch.equal(spread, (pair - pair.amax(1, keepdim=True)).flatten())


def test_flip_of_the_first_axis() -> None:
    x = torch.randn(16, 4)
    out = torch.empty_like(x)
    order_kernel[(1,)](x, out, "flip", 0, 16, 4)
    assert torch.equal(out, x.flip(0))


@triton.jit
def plain_reshape_kernel(out_ptr, M: tl.constexpr, N: tl.constexpr):
    ones = tl.reshape(tl.full([M, N], 1, tl.int32), [M * N])
    both = tl.arange(0, M)[:, None] + tl.arange(0, N)[None, :] * 3
    tl.store(out_ptr + tl.arange(0, M * N), ones + tl.reshape(both, [M * N]))


def test_reshapes_without_pairs_stay() -> None:
    out = torch.empty(8 * 16, dtype=torch.int32)
    plain_reshape_kernel[(1,)](out, 8, 16)
    assert torch.equal(out.reshape(8, 16), 1 + torch.arange(8)[:, None].int() + torch.arange(16).int() * 3)


@triton.jit
def low_bits_of_xor(a, b):
    return (a ^ b) & 3


@triton.jit
def almost_swapped_kernel(x_ptr, out_ptr, N: tl.constexpr):
    i = tl.arange(0, N)
    x = tl.reshape(tl.load(x_ptr + i), (N // 2, 2))
    y = x ^ tl.reduce(x, 1, low_bits_of_xor)[:, None]
    tl.store(out_ptr + i, tl.reshape(y, (N,)))


def test_an_xor_that_is_changed_is_no_swap() -> None:
    x = torch.randint(0, 1000, (256,)).int()
    out = torch.empty_like(x)
    almost_swapped_kernel[(1,)](x, out, N=256)
    pairs = x.reshape(-1, 2)
    assert torch.equal(out, (pairs ^ ((pairs[:, :1] ^ pairs[:, 1:]) & 3)).reshape(-1))
