"""Flash attention, forward and backward, as ordinary Triton kernels: packed sequences, masks, shared heads."""

import math

import pytest
import torch
import triton
import triton.language as tl

LOG2_E = 1.4426950408889634


@triton.jit
def scores_of(q, k, rows, keys, length, scale, LEFT: tl.constexpr, CAUSAL: tl.constexpr):
    scores = tl.dot(q, k) * scale
    seen = keys[None, :] < length
    if CAUSAL:
        seen &= keys[None, :] <= rows[:, None]
    if LEFT >= 0:
        seen &= keys[None, :] >= rows[:, None] - LEFT
    return tl.where(seen, scores, float("-inf"))


@triton.jit
def forward(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, cu_ptr, scale,
    HEADS: tl.constexpr, GROUP: tl.constexpr, SIZE: tl.constexpr, D: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, LEFT: tl.constexpr, CAUSAL: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(1)
    first = tl.load(cu_ptr + tl.program_id(2))
    length = tl.load(cu_ptr + tl.program_id(2) + 1) - first
    top = tl.program_id(0) * BM
    if top >= length:
        return
    rows = top + tl.arange(0, BM)
    d = tl.arange(0, D)
    KV: tl.constexpr = HEADS // GROUP
    q_offsets = ((first + rows) * HEADS + head)[:, None] * SIZE + d[None, :]
    q_mask = (rows < length)[:, None] & (d < SIZE)[None, :]
    q = tl.load(q_ptr + q_offsets, mask=q_mask, other=0.0)
    peak = tl.full([BM], float("-inf"), tl.float32)
    total = tl.zeros([BM], tl.float32)
    acc = tl.zeros([BM, D], tl.float32)
    end = tl.minimum(length, top + BM) if CAUSAL else length
    begin = tl.maximum(top - LEFT, 0) // BN * BN if LEFT >= 0 else 0
    for start in range(begin, end, BN):
        keys = start + tl.arange(0, BN)
        kv = ((first + keys) * KV + head // GROUP) * SIZE
        k = tl.load(k_ptr + kv[None, :] + d[:, None], mask=(keys < length)[None, :] & (d < SIZE)[:, None], other=0.0)
        v = tl.load(v_ptr + kv[:, None] + d[None, :], mask=(keys < length)[:, None] & (d < SIZE)[None, :], other=0.0)
        scores = scores_of(q, k, rows, keys, length, scale, LEFT, CAUSAL)
        new_peak = tl.maximum(peak, tl.max(scores, 1))
        shift = tl.where(new_peak == float("-inf"), 0.0, new_peak)
        weights = tl.exp2(scores - shift[:, None])
        fade = tl.exp2(peak - shift)
        total = total * fade + tl.sum(weights, 1)
        acc = tl.dot(weights.to(v.dtype), v, acc * fade[:, None])
        peak = new_peak
    tl.store(out_ptr + q_offsets, (acc / total[:, None]).to(out_ptr.dtype.element_ty), mask=q_mask)
    tl.store(lse_ptr + (first + rows) * HEADS + head, peak + tl.log2(total), mask=rows < length)


def reference(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, lengths: list[int], left: int, causal: bool
) -> torch.Tensor:
    """Attention of packed [T, H, D] sequences, in the precision of the inputs."""
    group, out = q.shape[1] // k.shape[1], []
    parts = zip(*(tensor.split(lengths) for tensor in (q, k, v)), strict=True)
    for query, key, value in parts:
        n = len(query)
        scores = torch.einsum("qhd,khd->hqk", query, key.repeat_interleave(group, 1)) / math.sqrt(q.shape[2])
        distance = torch.arange(n)[:, None] - torch.arange(n)[None, :]
        seen = torch.ones(n, n, dtype=torch.bool)
        seen &= (distance >= 0) if causal else seen
        seen &= (distance <= left) if left >= 0 else seen
        weights = scores.masked_fill(~seen, -math.inf).softmax(-1)
        out.append(torch.einsum("hqk,khd->qhd", weights, value.repeat_interleave(group, 1)))
    return torch.cat(out)


def run_forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    lengths: list[int],
    block_m: int,
    block_n: int,
    left: int,
    causal: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    heads, size = q.shape[1:]
    out, lse = torch.full_like(q, math.nan), torch.empty(q.shape[:2])
    cu = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    grid = (triton.cdiv(max(lengths), block_m), heads, len(lengths))
    forward[grid](
        q, k, v, out, lse, cu, LOG2_E / math.sqrt(size), heads, heads // k.shape[1], size,
        triton.next_power_of_2(size), block_m, block_n, left, causal,
    )  # fmt: skip
    return out, lse


@pytest.mark.parametrize(
    ("size", "block_m", "block_n", "left", "causal", "kv_heads"),
    [
        (16, 32, 16, -1, False, 2),
        (32, 16, 64, -1, True, 1),
        (64, 64, 64, -1, False, 4),
        (64, 32, 32, 20, True, 2),
        (64, 16, 32, 0, True, 4),
        (80, 32, 32, -1, True, 2),
        (128, 32, 64, 33, False, 1),
        (256, 16, 16, -1, False, 4),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packed_attention(
    size: int, block_m: int, block_n: int, left: int, causal: bool, kv_heads: int, dtype: torch.dtype
) -> None:
    lengths = [70, 1, 0, 33, 64, 16]
    q = torch.randn(sum(lengths), 4, size).to(dtype)
    k, v = (torch.randn(sum(lengths), kv_heads, size).to(dtype) for _ in range(2))
    out, _ = run_forward(q, k, v, lengths, block_m, block_n, left, causal)
    expected = reference(*(tensor.double() for tensor in (q, k, v)), lengths, left, causal)
    limit = 5e-6 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(out.double(), expected, rtol=limit, atol=limit)


@triton.jit
def forward_of_two_ranges(q_ptr, k_ptr, v_ptr, out_ptr, n, scale, D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr):
    rows = tl.program_id(0) * BM + tl.arange(0, BM)
    d = tl.arange(0, D)
    q = tl.load(q_ptr + rows[:, None] * D + d[None, :])
    peak = tl.full([BM], float("-inf"), tl.float32)
    total = tl.zeros([BM], tl.float32)
    acc = tl.zeros([BM, D], tl.float32)
    for stage in tl.static_range(2):
        low = 0 if stage == 0 else tl.program_id(0) * BM
        high = tl.program_id(0) * BM if stage == 0 else tl.minimum(n, (tl.program_id(0) + 1) * BM)
        for start in range(low, high, BN):
            keys = start + tl.arange(0, BN)
            k = tl.load(k_ptr + keys[:, None] * D + d[None, :])
            scores = tl.dot(q, tl.trans(k)) * scale
            if stage == 1:
                scores += tl.where(rows[:, None] >= keys[None, :], 0.0, -1.0e6)
            new_peak = tl.maximum(peak, tl.max(scores, 1))
            weights = tl.exp2(scores - new_peak[:, None])
            fade = tl.exp2(peak - new_peak)
            total = total * fade + tl.sum(weights, 1)
            acc = tl.dot(weights, tl.load(v_ptr + keys[:, None] * D + d[None, :]), acc * fade[:, None])
            peak = new_peak
    tl.store(out_ptr + rows[:, None] * D + d[None, :], acc / total[:, None])


def test_causal_attention_of_full_and_masked_blocks() -> None:
    q, k, v = (torch.randn(128, 1, 32) for _ in range(3))
    out = torch.empty_like(q)
    forward_of_two_ranges[(4,)](q, k, v, out, 128, LOG2_E / math.sqrt(32), D=32, BM=32, BN=16)
    expected = reference(q.double(), k.double(), v.double(), [128], -1, True)
    torch.testing.assert_close(out.double(), expected, rtol=5e-6, atol=5e-6)


@triton.jit
def backward_of_queries(
    q_ptr, k_ptr, v_ptr, grad_ptr, lse_ptr, delta_ptr, dq_ptr, n, scale,
    SIZE: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, CAUSAL: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * BM + tl.arange(0, BM)
    d = tl.arange(0, SIZE)
    at = tl.program_id(1) * n
    here = rows < n
    places = (at + rows)[:, None] * SIZE + d[None, :]
    q = tl.load(q_ptr + places, mask=here[:, None], other=0.0)
    grad = tl.load(grad_ptr + places, mask=here[:, None], other=0.0)
    lse = tl.load(lse_ptr + at + rows, mask=here, other=0.0)
    delta = tl.load(delta_ptr + at + rows, mask=here, other=0.0)
    dq = tl.zeros([BM, SIZE], tl.float32)
    for start in range(0, n, BN):
        keys = start + tl.arange(0, BN)
        key_places = (at + keys)[:, None] * SIZE + d[None, :]
        k = tl.load(k_ptr + key_places, mask=(keys < n)[:, None], other=0.0)
        v = tl.load(v_ptr + key_places, mask=(keys < n)[:, None], other=0.0)
        weights = tl.exp2(
            scores_of(q, tl.trans(k), rows, keys, n, scale * 1.4426950408889634, -1, CAUSAL) - lse[:, None]
        )
        slopes = weights * (tl.dot(grad, tl.trans(v)) - delta[:, None])
        dq += tl.dot(slopes.to(k.dtype), k)
    tl.store(dq_ptr + places, dq * scale, mask=here[:, None])


@triton.jit
def backward_of_keys(
    q_ptr, k_ptr, v_ptr, grad_ptr, lse_ptr, delta_ptr, dk_ptr, dv_ptr, n, scale,
    SIZE: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, CAUSAL: tl.constexpr,
):  # fmt: skip
    keys = tl.program_id(0) * BN + tl.arange(0, BN)
    d = tl.arange(0, SIZE)
    at = tl.program_id(1) * n
    places = (at + keys)[:, None] * SIZE + d[None, :]
    k = tl.load(k_ptr + places, mask=(keys < n)[:, None], other=0.0)
    v = tl.load(v_ptr + places, mask=(keys < n)[:, None], other=0.0)
    dk = tl.zeros([BN, SIZE], tl.float32)
    dv = tl.zeros([BN, SIZE], tl.float32)
    q_turned = q_ptr + (at + tl.arange(0, BM))[None, :] * SIZE + d[:, None]
    grads = grad_ptr + (at + tl.arange(0, BM))[:, None] * SIZE + d[None, :]
    for start in range(0, n, BM):
        rows = start + tl.arange(0, BM)
        here = rows < n
        q_t = tl.load(q_turned, mask=here[None, :], other=0.0)
        grad = tl.load(grads, mask=here[:, None], other=0.0)
        lse = tl.load(lse_ptr + at + rows, mask=here, other=0.0)
        delta = tl.load(delta_ptr + at + rows, mask=here, other=0.0)
        weights = tl.exp2(tl.dot(k, q_t) * (scale * 1.4426950408889634) - lse[None, :])
        seen = here[None, :] & (rows[None, :] >= keys[:, None]) if CAUSAL else here[None, :]
        weights = tl.where(seen, weights, 0.0)
        dv += tl.dot(weights.to(grad.dtype), grad)
        slopes = weights * (tl.dot(v, tl.trans(grad)) - delta[None, :])
        dk += tl.dot(slopes.to(q_t.dtype), tl.trans(q_t))
        q_turned += BM * SIZE
        grads += BM * SIZE
    tl.store(dk_ptr + places, dk * scale, mask=(keys < n)[:, None])
    tl.store(dv_ptr + places, dv, mask=(keys < n)[:, None])


@pytest.mark.parametrize(("n", "size", "causal"), [(64, 32, True), (65, 64, False), (100, 16, True), (1, 64, True)])
def test_gradients(n: int, size: int, causal: bool) -> None:
    q, k, v, grad = (torch.randn(n, 2, size) for _ in range(4))
    exact = [tensor.double().requires_grad_() for tensor in (q, k, v)]
    out = reference(*exact, [n], -1, causal)
    expected = torch.autograd.grad(out, exact, grad.double())
    got, lse = run_forward(q, k, v, [n], 32, 32, -1, causal)
    torch.testing.assert_close(got.double(), out.detach(), rtol=5e-6, atol=5e-6)
    q, k, v, grad, got = (tensor.transpose(0, 1).contiguous() for tensor in (q, k, v, grad, got))
    delta, lse = (got * grad).sum(-1), lse.t().contiguous()
    dq, dk, dv = (torch.empty_like(q) for _ in range(3))
    grid, scale = (triton.cdiv(n, 32), 2), 1 / math.sqrt(size)
    backward_of_queries[grid](q, k, v, grad, lse, delta, dq, n, scale, size, 32, 32, causal)
    backward_of_keys[grid](q, k, v, grad, lse, delta, dk, dv, n, scale, size, 32, 32, causal)
    for ours, exact_gradient in zip((dq, dk, dv), expected, strict=True):
        torch.testing.assert_close(ours.transpose(0, 1).double(), exact_gradient, rtol=2e-5, atol=2e-5)
