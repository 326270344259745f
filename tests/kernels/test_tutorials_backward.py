"""Layer norm and attention as Triton's tutorials teach them, forward and backward, in our own words at small sizes."""

import pytest
import torch
import triton
import triton.language as tl


@triton.jit
def norm_kernel(x_ptr, y_ptr, w_ptr, b_ptr, mean_ptr, rstd_ptr, columns, eps, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    x_ptr += row * columns
    total = tl.zeros([BLOCK], dtype=tl.float32)
    for start in range(0, columns, BLOCK):
        c = start + tl.arange(0, BLOCK)
        total += tl.load(x_ptr + c, mask=c < columns, other=0.0).to(tl.float32)
    mean = tl.sum(total, axis=0) / columns
    squares = tl.zeros([BLOCK], dtype=tl.float32)
    for start in range(0, columns, BLOCK):
        c = start + tl.arange(0, BLOCK)
        x = tl.load(x_ptr + c, mask=c < columns, other=0.0).to(tl.float32)
        centred = tl.where(c < columns, x - mean, 0.0)
        squares += centred * centred
    rstd = 1 / tl.sqrt(tl.sum(squares, axis=0) / columns + eps)
    tl.store(mean_ptr + row, mean)
    tl.store(rstd_ptr + row, rstd)
    for start in range(0, columns, BLOCK):
        c = start + tl.arange(0, BLOCK)
        w, b = tl.load(w_ptr + c, mask=c < columns), tl.load(b_ptr + c, mask=c < columns)
        x = tl.load(x_ptr + c, mask=c < columns, other=0.0).to(tl.float32)
        tl.store(y_ptr + row * columns + c, (x - mean) * rstd * w + b, mask=c < columns)


@triton.jit
def norm_backward_kernel(
    dx_ptr, dy_ptr, dw_ptr, db_ptr, x_ptr, w_ptr, mean_ptr, rstd_ptr, locks_ptr, columns, GROUPS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    c = tl.arange(0, BLOCK)
    inside = c < columns
    group = row % GROUPS
    lock_ptr, count_ptr = locks_ptr + group, locks_ptr + GROUPS + group
    x = tl.load(x_ptr + row * columns + c, mask=inside, other=0).to(tl.float32)
    dy = tl.load(dy_ptr + row * columns + c, mask=inside, other=0).to(tl.float32)
    w = tl.load(w_ptr + c, mask=inside).to(tl.float32)
    rstd = tl.load(rstd_ptr + row)
    normed = tl.where(inside, (x - tl.load(mean_ptr + row)) * rstd, 0.0)
    wdy = tl.where(inside, w * dy, 0.0)
    projection = tl.sum(normed * wdy, axis=0) / columns
    dx = (wdy - normed * projection - tl.sum(wdy, axis=0) / columns) * rstd
    tl.store(dx_ptr + row * columns + c, dx, mask=inside)
    dw, db = dy * normed, dy
    while tl.atomic_cas(lock_ptr, 0, 1) == 1:
        pass
    if tl.load(count_ptr) == 0:
        tl.atomic_xchg(count_ptr, 1)
    else:
        dw += tl.load(dw_ptr + group * columns + c, mask=inside)
        db += tl.load(db_ptr + group * columns + c, mask=inside)
    tl.store(dw_ptr + group * columns + c, dw, mask=inside)
    tl.store(db_ptr + group * columns + c, db, mask=inside)
    tl.debug_barrier()
    tl.atomic_xchg(lock_ptr, 0)


@triton.jit
def sum_groups_kernel(parts_ptr, out_ptr, groups, columns, BM: tl.constexpr, BN: tl.constexpr):
    c = tl.program_id(0) * BN + tl.arange(0, BN)
    total = tl.zeros((BM, BN), dtype=tl.float32)
    for start in range(0, groups, BM):
        r = start + tl.arange(0, BM)
        mask = (r[:, None] < groups) & (c[None, :] < columns)
        total += tl.load(parts_ptr + r[:, None] * columns + c[None, :], mask=mask, other=0.0)
    tl.store(out_ptr + c, tl.sum(total, axis=0), mask=c < columns)


@pytest.mark.parametrize(("rows", "columns"), [(1, 5), (200, 300)])
def test_layer_norm_with_locks(rows: int, columns: int, two_threads: None) -> None:
    groups, block = 4, triton.next_power_of_2(columns)
    x, dy = torch.randn(rows, columns) * 2 + 1, torch.randn(rows, columns)
    w, b = torch.rand(columns), torch.rand(columns)
    y, dx, mean, rstd = torch.empty_like(x), torch.empty_like(x), torch.empty(rows), torch.empty(rows)
    norm_kernel[(rows,)](x, y, w, b, mean, rstd, columns, 1e-5, BLOCK=128)
    parts = torch.full((2, groups, columns), float("nan"))
    locks = torch.zeros(2 * groups, dtype=torch.int32)
    norm_backward_kernel[(rows,)](
        dx, dy, parts[0], parts[1], x, w, mean, rstd, locks, columns, GROUPS=groups, BLOCK=block
    )
    used = min(rows, groups)
    sums = torch.empty(2, columns)
    for part, out in zip(parts, sums, strict=True):
        sum_groups_kernel[(triton.cdiv(columns, 64),)](part, out, used, columns, BM=32, BN=64)
    wide = [tensor.double().requires_grad_() for tensor in (x, w, b)]
    expected = torch.nn.functional.layer_norm(wide[0], (columns,), wide[1], wide[2], 1e-5)
    expected.backward(dy.double())
    for ours, reference in ((y, expected), (dx, wide[0].grad), (sums[0], wide[1].grad), (sums[1], wide[2].grad)):
        torch.testing.assert_close(ours.double(), reference, rtol=1e-4, atol=2e-5 * rows**0.5)
    assert not locks[:groups].any()


@triton.jit
def attention_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, scale, LENGTH: tl.constexpr, DIM: tl.constexpr, BM: tl.constexpr,
    BN: tl.constexpr, CAUSAL: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(1)
    base = head * LENGTH
    total: tl.constexpr = 4 * LENGTH
    q_desc = tl.make_tensor_descriptor(q_ptr, [total, DIM], [DIM, 1], [BM, DIM])
    k_desc = tl.make_tensor_descriptor(k_ptr, [total, DIM], [DIM, 1], [BN, DIM])
    v_desc = tl.make_tensor_descriptor(v_ptr, [total, DIM], [DIM, 1], [BN, DIM])
    out_desc = tl.make_tensor_descriptor(out_ptr, [total, DIM], [DIM, 1], [BM, DIM])
    first = tl.program_id(0) * BM
    rows = first + tl.arange(0, BM)
    largest = tl.full([BM], -float("inf"), tl.float32)
    weight = tl.full([BM], 1.0, tl.float32)
    acc = tl.zeros([BM, DIM], tl.float32)
    q = q_desc.load([base + first, 0])
    end = first + BM if CAUSAL else LENGTH
    for start in tl.range(0, end, BN, warp_specialize=False):
        start = tl.multiple_of(start, BN)
        scores = tl.dot(q, k_desc.load([base + start, 0]).T) * scale
        if CAUSAL:
            scores = tl.where(rows[:, None] >= start + tl.arange(0, BN)[None, :], scores, -1.0e6)
        new = tl.maximum(largest, tl.max(scores, 1))
        p = tl.math.exp2(scores - new[:, None])
        change = tl.math.exp2(largest - new)
        acc = tl.dot(p.to(tl.float16), v_desc.load([base + start, 0]), acc * change[:, None])
        weight = weight * change + tl.sum(p, 1)
        largest = new
    tl.store(lse_ptr + base + rows, largest + tl.math.log2(weight))
    out_desc.store([base + first, 0], (acc / weight[:, None]).to(tl.float16))


@triton.jit
def keys_gradient(dk, dv, k, v, q_ptr, do_ptr, lse_ptr, delta_ptr, columns, begin, scale, LENGTH: tl.constexpr,
                  DIM: tl.constexpr, BM: tl.constexpr, CAUSAL: tl.constexpr):  # fmt: skip
    d = tl.arange(0, DIM)
    for start in range(begin, LENGTH, BM):
        rows = start + tl.arange(0, BM)
        q_turned = tl.load(q_ptr + rows[None, :] * DIM + d[:, None])
        p = tl.math.exp2(tl.dot(k, q_turned) * scale - tl.load(lse_ptr + rows)[None, :])
        if CAUSAL:
            p = tl.where(rows[None, :] >= columns[:, None], p, 0.0)
        do = tl.load(do_ptr + rows[:, None] * DIM + d[None, :])
        dv += tl.dot(p.to(tl.float16), do)
        ds = p * (tl.dot(v, tl.trans(do)) - tl.load(delta_ptr + rows)[None, :])
        dk += tl.dot(ds.to(tl.float16), tl.trans(q_turned))
    return dk, dv


@triton.jit
def attention_backward_kernel(
    q_ptr, k_ptr, v_ptr, do_ptr, dq_ptr, dk_ptr, dv_ptr, lse_ptr, delta_ptr, scale, factor, LENGTH: tl.constexpr,
    DIM: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, CAUSAL: tl.constexpr,
):  # fmt: skip
    base = tl.program_id(1).to(tl.int64) * LENGTH
    q_ptr, k_ptr, v_ptr, do_ptr = q_ptr + base * DIM, k_ptr + base * DIM, v_ptr + base * DIM, do_ptr + base * DIM
    lse_ptr, delta_ptr = lse_ptr + base, delta_ptr + base
    first = tl.program_id(0) * BN
    columns, d = first + tl.arange(0, BN), tl.arange(0, DIM)
    place = columns[:, None] * DIM + d[None, :]
    k, v = tl.load(k_ptr + place), tl.load(v_ptr + place)
    dk, dv = tl.zeros([BN, DIM], tl.float32), tl.zeros([BN, DIM], tl.float32)
    begin = first if CAUSAL else 0
    dk, dv = keys_gradient(
        dk, dv, k, v, q_ptr, do_ptr, lse_ptr, delta_ptr, columns, begin, scale, LENGTH, DIM, BM, CAUSAL
    )
    tl.store(dv_ptr + base * DIM + place, dv)
    tl.store(dk_ptr + base * DIM + place, dk * factor)
    q, do = tl.load(q_ptr + place), tl.load(do_ptr + place)
    lse, delta = tl.load(lse_ptr + columns)[:, None], tl.load(delta_ptr + columns)
    dq = tl.zeros([BN, DIM], tl.float32)
    end = first + BN if CAUSAL else LENGTH
    for start in range(0, end, BM):
        at = start + tl.arange(0, BM)
        turned = at[None, :] * DIM + d[:, None]
        k_turned, v_turned = tl.load(k_ptr + turned), tl.load(v_ptr + turned)
        p = tl.math.exp2(tl.dot(q, k_turned) * scale - lse)
        if CAUSAL:
            p = tl.where(columns[:, None] >= at[None, :], p, 0.0)
        ds = p * (tl.dot(do, v_turned).to(tl.float32) - delta[:, None])
        dq += tl.dot(ds.to(tl.float16), tl.trans(k_turned))
    tl.store(dq_ptr + base * DIM + place, dq * factor)


@pytest.mark.parametrize("causal", [False, True])
def test_attention_forward_and_backward(causal: bool) -> None:
    heads, length, dim = 4, 64, 32
    q, k, v, do = (torch.randn(heads, length, dim).half() for _ in range(4))
    out, lse = torch.empty_like(q), torch.empty(heads, length)
    factor = dim**-0.5
    scale = factor * 1.44269504
    attention_kernel[(length // 32, heads)](q, k, v, out, lse, scale, length, dim, BM=32, BN=16, CAUSAL=causal)
    dq, dk, dv = (torch.empty(heads, length, dim) for _ in range(3))
    delta = (out.float() * do.float()).sum(2)
    attention_backward_kernel[(length // 32, heads)](
        q, k, v, do, dq, dk, dv, lse, delta, scale, factor, length, dim, BM=16, BN=32, CAUSAL=causal
    )
    wide = [tensor.double().requires_grad_() for tensor in (q, k, v)]
    scores = wide[0] @ wide[1].transpose(1, 2) * factor
    if causal:
        scores = scores.masked_fill(~torch.ones(length, length, dtype=torch.bool).tril(), -torch.inf)
    expected = scores.softmax(2) @ wide[2]
    expected.backward(do.double())
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=4e-3)
    for ours, tensor in ((dq, wide[0]), (dk, wide[1]), (dv, wide[2])):
        torch.testing.assert_close(ours.double(), tensor.grad, rtol=0, atol=2e-2)
