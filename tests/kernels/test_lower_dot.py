"""Dot products: dtypes, transposed operands, ragged edges, epilogues, and whole kernels built on them."""

import itertools

import pytest
import torch
import triton
import triton.language as tl

F = torch.nn.functional


@triton.jit
def gemm_kernel(
    a_ptr, b_ptr, bias_ptr, out_ptr, M, N, K, a_row, a_col, b_row, b_col, o_row,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    rm = tl.program_id(0) * BM + tl.arange(0, BM)
    rn = tl.program_id(1) * BN + tl.arange(0, BN)
    rk = tl.arange(0, BK)
    acc = tl.zeros([BM, BN], ACC)
    a = a_ptr + rm[:, None] * a_row + rk[None, :] * a_col
    b = b_ptr + rk[:, None] * b_row + rn[None, :] * b_col
    for k in range(0, K, BK):
        a_tile = tl.load(a, mask=(rm[:, None] < M) & (k + rk[None, :] < K), other=0)
        b_tile = tl.load(b, mask=(rn[None, :] < N) & (k + rk[:, None] < K), other=0)
        acc = tl.dot(a_tile, b_tile, acc, out_dtype=ACC)
        a += BK * a_col
        b += BK * b_row
    out = acc
    if tl.float32 == ACC:
        out = acc + tl.load(bias_ptr + rn, mask=rn < N)[None, :]
        out = 0.5 * out * (1 + tl.erf(out * 0.7071067811865476))
    tl.store(out_ptr + rm[:, None] * o_row + rn[None, :], out, mask=(rm[:, None] < M) & (rn[None, :] < N))


def gemm(a: torch.Tensor, b: torch.Tensor, bias: torch.Tensor, out: torch.Tensor, acc: tl.dtype) -> None:
    (m, k), n = a.shape, b.shape[1]
    grid = (triton.cdiv(m, 32), triton.cdiv(n, 64))
    gemm_kernel[grid](a, b, bias, out, m, n, k, *a.stride(), *b.stride(), out.stride(0), BM=32, BN=64, BK=32, ACC=acc)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("a_transposed", [False, True])
@pytest.mark.parametrize("b_transposed", [False, True])
def test_gemm_with_epilogue(dtype: torch.dtype, a_transposed: bool, b_transposed: bool) -> None:
    for m, n, k in ((64, 64, 64), (50, 90, 70), (1, 3, 5)):
        a = (torch.randn(k, m).t() if a_transposed else torch.randn(m, k)).to(dtype)
        b = (torch.randn(n, k).t() if b_transposed else torch.randn(k, n)).to(dtype)
        bias, out = torch.randn(n), torch.empty(m, n)
        gemm(a, b, bias, out, tl.float32)
        expected = F.gelu(a.double() @ b.double() + bias)
        assert (out - expected).abs().max() < 1e-5 * k**0.5


@pytest.mark.parametrize(("dtype", "acc"), [(torch.int8, tl.int32), (torch.float64, tl.float64)])
def test_gemm_of_other_types(dtype: torch.dtype, acc: tl.dtype) -> None:
    a, b = (torch.randint(-100, 100, shape).to(dtype) for shape in ((50, 70), (70, 90)))
    out = torch.empty(50, 90, dtype=torch.int32 if dtype == torch.int8 else dtype)
    gemm(a, b, torch.empty(90), out, acc)
    assert torch.equal(out.double(), a.double() @ b.double())


@triton.jit
def batched_kernel(a_ptr, b_ptr, out_ptr):
    i, j, k = tl.arange(0, 4)[:, None, None], tl.arange(0, 16)[None, :, None], tl.arange(0, 16)[None, None, :]
    p = i * 256 + j * 16 + k
    tl.store(out_ptr + p, tl.dot(tl.load(a_ptr + p), tl.load(b_ptr + p)))


def test_batched_dot() -> None:
    a, b = torch.randn(4, 16, 16), torch.randn(4, 16, 16)
    out = torch.empty_like(a)
    batched_kernel[(1,)](a, b, out)
    torch.testing.assert_close(out.double(), a.double() @ b.double(), rtol=1e-5, atol=1e-5)


@triton.jit
def attention_kernel(
    q_ptr, k_ptr, v_ptr, cu_ptr, out_ptr, scale, row,
    D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, CAUSAL: tl.constexpr,
):  # fmt: skip
    block, head, sequence = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    start = tl.load(cu_ptr + sequence)
    length = tl.load(cu_ptr + sequence + 1) - start
    if block * BM >= length:
        return
    rm, rn, rd = block * BM + tl.arange(0, BM), tl.arange(0, BN), tl.arange(0, D)
    base = start * row + head * D
    rows = rm[:, None] < length
    q = tl.load(q_ptr + base + rm[:, None] * row + rd[None, :], mask=rows, other=0.0)
    top = tl.full([BM], float("-inf"), tl.float32)
    total = tl.zeros([BM], tl.float32)
    acc = tl.zeros([BM, D], tl.float32)
    for n in range(0, length, BN):
        keys = n + rn
        inside = keys[:, None] < length
        k = tl.load(k_ptr + base + keys[:, None] * row + rd[None, :], mask=inside, other=0.0)
        v = tl.load(v_ptr + base + keys[:, None] * row + rd[None, :], mask=inside, other=0.0)
        scores = tl.dot(q, tl.trans(k)) * scale
        keep = keys[None, :] < length
        if CAUSAL:
            keep = keep & (rm[:, None] >= keys[None, :])
        scores = tl.where(keep, scores, float("-inf"))
        new_top = tl.maximum(top, tl.max(scores, 1))
        p = tl.exp(scores - new_top[:, None])
        shrink = tl.exp(top - new_top)
        total = total * shrink + tl.sum(p, 1)
        acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None])
        top = new_top
    tl.store(out_ptr + base + rm[:, None] * row + rd[None, :], acc / total[:, None], mask=rows)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_over_packed_sequences(causal: bool, dtype: torch.dtype) -> None:
    lengths, heads, dim = [70, 33, 1, 64, 0], 2, 32
    rows = sum(lengths)
    q, k, v = (torch.randn(rows, heads, dim).to(dtype) for _ in range(3))
    cu = torch.tensor([0, *torch.tensor(lengths).cumsum(0)], dtype=torch.int32)
    out = torch.full((rows, heads, dim), float("nan"))
    attention_kernel[(3, heads, len(lengths))](
        q, k, v, cu, out, dim**-0.5, heads * dim, D=dim, BM=32, BN=32, CAUSAL=causal
    )
    for first, last in itertools.pairwise(cu):
        one = [t[first:last].double().transpose(0, 1) for t in (q, k, v)]
        expected = F.scaled_dot_product_attention(*one, is_causal=causal).transpose(0, 1)
        tolerance = 1e-5 if dtype == torch.float32 else 2e-2
        torch.testing.assert_close(out[first:last].double(), expected, rtol=tolerance, atol=tolerance)


@triton.jit
def norm_kernel(x_ptr, r_ptr, w_ptr, b_ptr, out_ptr, rows, n, eps, BM: tl.constexpr, BN: tl.constexpr):
    r, c = tl.program_id(0) * BM + tl.arange(0, BM), tl.arange(0, BN)
    mask = (r[:, None] < rows) & (c[None, :] < n)
    p = r[:, None] * n + c[None, :]
    x = (tl.load(x_ptr + p, mask=mask, other=0.0) + tl.load(r_ptr + p, mask=mask, other=0.0)).to(tl.float32)
    mean = tl.sum(x, 1) / n
    centred = tl.where(c[None, :] < n, x - mean[:, None], 0.0)
    scale = tl.rsqrt(tl.sum(centred * centred, 1) / n + eps)
    w, b = tl.load(w_ptr + c, mask=c < n), tl.load(b_ptr + c, mask=c < n)
    tl.store(out_ptr + p, centred * scale[:, None] * w[None, :] + b[None, :], mask=mask)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("rows", "n"), [(1, 1), (9, 100), (16, 128)])
def test_residual_layer_norm(dtype: torch.dtype, rows: int, n: int) -> None:
    x, r = torch.randn(rows, n).to(dtype), torch.randn(rows, n).to(dtype)
    w, b = torch.randn(n), torch.randn(n)
    out = torch.empty(rows, n)
    norm_kernel[(triton.cdiv(rows, 4),)](x, r, w, b, out, rows, n, 1e-5, BM=4, BN=128)
    summed = (x + r).double()
    expected = F.layer_norm(summed, (n,), w.double(), b.double(), 1e-5)
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)


@triton.jit
def softmax_kernel(x_ptr, out_ptr, stride, n, BLOCK: tl.constexpr):
    row, c = tl.program_id(0), tl.arange(0, BLOCK)
    x = tl.load(x_ptr + row * stride + c, mask=c < n, other=-float("inf"))
    e = tl.exp(x - tl.max(x, 0))
    tl.store(out_ptr + row * n + c, e / tl.sum(e, 0), mask=c < n)


@pytest.mark.parametrize("n", [1, 7, 64, 1000])
def test_softmax(n: int) -> None:
    x = (torch.randn(5, n + 3) * 5)[:, :n]
    out = torch.empty(5, n)
    softmax_kernel[(5,)](x, out, x.stride(0), n, BLOCK=max(triton.next_power_of_2(n), 16))
    torch.testing.assert_close(out.double(), x.double().softmax(1), rtol=1e-5, atol=1e-7)
