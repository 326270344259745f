"""Operands of dot products: indices kept in range, weights in groups, odd sizes, mixed types; with and without AMX."""

from collections.abc import Callable

import pytest
import torch
import triton
import triton.language as tl

from tilewright import settings
from tilewright.codegen.cpu.target import CpuTarget

_HOST = CpuTarget.host()
FEATURES = ["native", *(["avx512"] if _HOST.bf16_dot and _HOST.int8_dot else []), "avx2"]


def with_features(kernel: triton.runtime.JITFunction, features: str) -> Callable[..., Callable[..., None]]:
    """Launcher of a copy of a kernel that is compiled for an instruction set."""
    copy = triton.jit(kernel.fn)

    def launch(grid: tuple[int, ...], *args: object, **constants: object) -> None:
        with settings.scope(cpu_features=features):
            copy[grid](*args, **constants)

    return launch


@triton.jit
def matmul(
    a_ptr, b_ptr, out_ptr, M, N, K, a_row, a_col, b_row, b_col, FORM: tl.constexpr, OUT: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * BM + tl.arange(0, BM)
    cols = tl.program_id(1) * BN + tl.arange(0, BN)
    if FORM == "remainder":
        r, c = rows % M, cols % N
    elif FORM == "where":
        r, c = tl.where(rows < M, rows, 0), tl.where(cols < N, cols, 0)
    else:
        r, c = tl.minimum(rows, M - 1), tl.minimum(cols, N - 1)
    ks = tl.arange(0, BK)
    a = a_ptr + r[:, None] * a_row + ks[None, :] * a_col
    b = b_ptr + ks[:, None] * b_row + c[None, :] * b_col
    acc = tl.zeros([BM, BN], OUT)
    for k in range(0, tl.cdiv(K, BK)):
        x = tl.load(a, mask=ks[None, :] < K - k * BK, other=0)
        y = tl.load(b, mask=ks[:, None] < K - k * BK, other=0)
        acc = tl.dot(x, y, acc, out_dtype=OUT)
        a += BK * a_col
        b += BK * b_row
    tl.store(out_ptr + rows[:, None] * N + cols[None, :], acc, mask=(rows[:, None] < M) & (cols[None, :] < N))


def operand(rows: int, columns: int, dtype: torch.dtype, transposed: bool) -> torch.Tensor:
    """Random values that fp16 sums of some products hold."""
    shape = (columns, rows) if transposed else (rows, columns)
    values = torch.randint(-128, 128, shape) if dtype == torch.int8 else torch.randn(shape)
    values = values.to(dtype)
    return values.t() if transposed else values


def check(m: int, n: int, k: int, dtype: torch.dtype, form: str, features: str, turned: tuple[bool, bool]) -> None:
    a, b = operand(m, k, dtype, turned[0]), operand(k, n, dtype, turned[1])
    out_dtype, kind = (torch.int32, tl.int32) if dtype == torch.int8 else (torch.float32, tl.float32)
    out = torch.full((m, n), 77, dtype=out_dtype)
    launch = with_features(matmul, features)
    launch(
        (triton.cdiv(m, 32), triton.cdiv(n, 32)), a, b, out, m, n, k, *a.stride(), *b.stride(), FORM=form, OUT=kind,
        BM=32, BN=32, BK=32,
    )  # fmt: skip
    exact, bound = a.double() @ b.double(), a.double().abs() @ b.double().abs()
    assert ((out.double() - exact).abs() <= k * 2.0**-24 * bound).all()


@pytest.mark.parametrize("form", ["remainder", "where", "minimum"])
@pytest.mark.parametrize("turned", [(False, False), (True, True)])
def test_an_index_kept_in_range_changes_nothing_inside_and_repeats_rows_outside(form, turned):
    check(70, 45, 64, torch.float32, form, "native", turned)
    check(64, 96, 33, torch.bfloat16, form, "native", turned)


@pytest.mark.parametrize("features", FEATURES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.int8])
@pytest.mark.parametrize("sizes", [(1, 3, 17), (17, 130, 1), (131, 17, 70)])
def test_odd_sizes(features, dtype, sizes):
    for turned in ((False, False), (False, True), (True, False)):
        check(*sizes, dtype, "remainder", features, turned)


@triton.jit
def masked_rows(a_ptr, b_ptr, start_ptr, out_ptr, M, K, N: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr):
    rows, cols = tl.program_id(0) * BM + tl.arange(0, BM), tl.arange(0, N)
    acc = tl.load(start_ptr + rows[:, None] * N + cols[None, :])
    for k in range(0, K, BK):
        ks = k + tl.arange(0, BK)
        a = tl.load(a_ptr + rows[:, None] * K + ks[None, :], mask=(rows[:, None] < M) & (ks[None, :] < K))
        b = tl.load(b_ptr + ks[:, None] * N + cols[None, :], mask=ks[:, None] < K, other=0)
        acc = tl.dot(a, b, acc, out_dtype=acc.dtype)
    tl.store(out_ptr + rows[:, None] * N + cols[None, :], acc)


@pytest.mark.parametrize("features", FEATURES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
@pytest.mark.parametrize(("m", "k"), [(1, 64), (16, 64), (49, 70), (64, 64), (67, 128)])
def test_rows_that_are_masked_off_add_nothing(features, dtype, m, k):
    a, b = operand(m, k, dtype, False), operand(k, 32, dtype, False)
    start = torch.randn(128, 32).to(torch.int32 if dtype == torch.int8 else torch.float32)
    out = torch.empty_like(start)
    with_features(masked_rows, features)((2,), a, b, start, out, m, k, N=32, BM=64, BK=64)
    exact = start.double()
    exact[:m] += a.double() @ b.double()
    torch.testing.assert_close(out.double(), exact, rtol=1e-5, atol=1e-4)


@triton.jit
def masked_and_whole(a_ptr, b_ptr, out_ptr, M, N: tl.constexpr):
    i = tl.arange(0, N)
    place = i[:, None] * N + i[None, :]
    b = tl.load(b_ptr + place)
    acc = tl.dot(tl.load(a_ptr + place, mask=i[:, None] < M), b) + 1
    acc = tl.dot(tl.load(a_ptr + place), b, acc)
    acc = tl.dot(tl.load(a_ptr + place, mask=i[:, None] < M), b, acc)
    tl.store(out_ptr + place, acc)


@pytest.mark.parametrize("features", FEATURES)
@pytest.mark.parametrize("m", [1, 17, 64])
def test_products_of_one_shape_with_masked_and_with_all_rows(features, m):
    a, b, out = operand(64, 64, torch.float32, False), operand(64, 64, torch.float32, False), torch.empty(64, 64)
    with_features(masked_and_whole, features)((1,), a, b, out, m, N=64)
    exact = (3 * (a.double() @ b.double()) + 1)[:m]  # the rows behind were loaded undefined
    torch.testing.assert_close(out[:m].double(), exact, rtol=1e-5, atol=1e-4)


@triton.jit
def grouped(x_ptr, w_ptr, out_ptr, K, N: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, G: tl.constexpr):
    rows, cols, acc = tl.arange(0, BM), tl.arange(0, N), tl.zeros([BM, N], out_ptr.dtype.element_ty)
    for k in range(0, K, BK):
        x = tl.load(x_ptr + rows[:, None] * K + k + tl.arange(0, BK)[None, :])
        groups = k // G + tl.arange(0, BK // G)
        place = (groups[:, None, None] * N + cols[None, :, None]) * G + tl.arange(0, G)[None, None, :]
        acc = tl.dot(x, tl.load(w_ptr + place).permute(0, 2, 1).reshape(BK, N), acc, out_dtype=acc.dtype)
    tl.store(out_ptr + rows[:, None] * N + cols[None, :], acc)


@pytest.mark.parametrize("features", FEATURES)
@pytest.mark.parametrize(
    ("dtype", "group"),
    [(torch.bfloat16, 2), (torch.int8, 4), (torch.int8, 2), (torch.bfloat16, 4), (torch.float32, 2)],
)
def test_weights_in_groups_of_k(features, dtype, group):
    m, n, k = 32, 64, 192
    x, weight = operand(m, k, dtype, False), operand(k, n, dtype, False)
    laid_out = weight.view(k // group, group, n).transpose(1, 2).contiguous()
    out = torch.empty(m, n, dtype=torch.int32 if dtype == torch.int8 else torch.float32)
    with_features(grouped, features)((1,), x, laid_out, out, k, N=n, BM=m, BK=64, G=group)
    torch.testing.assert_close(out.double(), x.double() @ weight.double(), rtol=1e-5, atol=1e-4)


@triton.jit
def unpacked(
    x_ptr, w_ptr, out_ptr, N: tl.constexpr, BM: tl.constexpr, K: tl.constexpr, SHAPE: tl.constexpr, OFFSET: tl.constexpr
):
    rows, cols = tl.arange(0, BM), tl.arange(0, N)
    if SHAPE == 2:
        place = tl.arange(0, K // 8)[:, None] * (4 * N) + tl.arange(0, 4 * N)[None, :]
    else:
        place = (tl.arange(0, K // 8)[:, None, None] * N + cols[None, :, None]) * 4 + tl.arange(0, 4)[None, None, :]
    packed = tl.load(w_ptr + place)
    acc = tl.zeros([BM, N], out_ptr.dtype.element_ty)
    for half in tl.static_range(2):
        part = tl.load(x_ptr + rows[:, None] * K + half * (K // 2) + tl.arange(0, K // 2)[None, :])
        numbers = ((packed >> (4 * half)) & 15).to(tl.int8, bitcast=True) - OFFSET
        numbers = numbers.reshape(K // 8, N, 4).permute(0, 2, 1).reshape(K // 2, N)
        acc = tl.dot(part, numbers.to(part.dtype), acc, input_precision="ieee", out_dtype=acc.dtype)
    tl.store(out_ptr + rows[:, None] * N + cols[None, :], acc)


@pytest.mark.parametrize("features", FEATURES)
@pytest.mark.parametrize(("shape", "offset"), [(2, 8), (3, 8), (2, 0)])
@pytest.mark.parametrize(("m", "n", "k"), [(1, 64, 64), (5, 16, 32), (16, 4, 64), (8, 1, 16), (8, 64, 64)])
@pytest.mark.parametrize("dtype", [torch.int8, torch.float32])
def test_weights_unpacked_in_groups(features, m, n, k, shape, offset, dtype):
    rows = 1 << (m - 1).bit_length()
    x = torch.randint(-128, 128, (rows, k), dtype=torch.int8).to(dtype)  # in fp32 all sums are exact
    weight = torch.randint(0, 16, (k, n), dtype=torch.int8) - offset
    low, high = (part.view(k // 8, 4, n).transpose(1, 2) + offset for part in weight.chunk(2))
    packed = (low | (high << 4)).to(torch.uint8).contiguous()
    out = torch.empty(rows, n, dtype=torch.int32 if dtype == torch.int8 else torch.float32)
    with_features(unpacked, features)((1,), x, packed, out, N=n, BM=rows, K=k, SHAPE=shape, OFFSET=offset)
    assert torch.equal(out.long(), x.long() @ weight.long())


@triton.jit
def two_products(q_ptr, k_ptr, v_ptr, out_ptr, M: tl.constexpr, N: tl.constexpr, D: tl.constexpr):
    m, n, d = tl.arange(0, M), tl.arange(0, N), tl.arange(0, D)
    q = tl.load(q_ptr + m[:, None] * D + d[None, :])
    s = tl.dot(q, tl.load(k_ptr + n[:, None] * D + d[None, :]).T)
    out = tl.dot(s.to(tl.bfloat16), tl.load(v_ptr + n[:, None] * D + d[None, :]))
    tl.store(out_ptr + m[:, None] * D + d[None, :], out)


@pytest.mark.parametrize("features", FEATURES)
@pytest.mark.parametrize(("m", "n", "d"), [(16, 16, 64), (64, 32, 16), (4, 64, 8)])
def test_products_with_tiles_of_different_shapes(features, m, n, d):
    q, k, v = (torch.randint(-2, 3, (rows, d)).bfloat16() for rows in (m, n, n))
    out = torch.empty(m, d)
    with_features(two_products, features)((1,), q, k, v, out, M=m, N=n, D=d)
    scores = (q.double() @ k.double().T).bfloat16().double()
    torch.testing.assert_close(out.double(), scores @ v.double(), rtol=1e-6, atol=1e-6)


@triton.jit
def mixed(a_ptr, b_ptr, out_ptr, AS: tl.constexpr, OUT: tl.constexpr):
    r, c = tl.arange(0, 32)[:, None], tl.arange(0, 32)[None, :]
    a, b = tl.load(a_ptr + r * 32 + c), tl.load(b_ptr + r * 32 + c)
    tl.store(out_ptr + r * 32 + c, tl.dot(a.to(AS), b.to(AS), out_dtype=OUT))


@pytest.mark.parametrize("features", FEATURES)
@pytest.mark.parametrize(
    ("source", "compute", "out"),
    [
        (torch.float8_e4m3fn, tl.float8e4nv, torch.float32),
        (torch.float8_e5m2, tl.float8e5, torch.float32),
        (torch.float8_e5m2, tl.float16, torch.float16),
        (torch.float16, tl.float16, torch.float16),
        (torch.bfloat16, tl.float32, torch.float32),
        (torch.int8, tl.bfloat16, torch.float32),
    ],
)
def test_mixed_types(features, source, compute, out):
    a, b = ((torch.randn(32, 32) * 8).to(source) for _ in range(2))
    result = torch.empty(32, 32, dtype=out)
    kinds = {torch.float32: tl.float32, torch.float16: tl.float16}
    with_features(mixed, features)((1,), a, b, result, AS=compute, OUT=kinds[out])
    exact = a.double() @ b.double()
    tolerance = 1e-5 if out == torch.float32 else 2e-3
    torch.testing.assert_close(result.double(), exact, rtol=tolerance, atol=tolerance * exact.abs().max().item())


@pytest.mark.skipif(not _HOST.amx, reason="the processor has no AMX")
def test_the_vendor_and_our_kernels_take_turns_on_tile_registers():
    x, w = torch.randn(64, 128).bfloat16(), torch.randn(128, 64).bfloat16()
    xi, wi = (
        torch.randint(-128, 128, (64, 128), dtype=torch.int8),
        torch.randint(-128, 128, (128, 64), dtype=torch.int8),
    )
    for _ in range(3):
        check(70, 45, 64, torch.bfloat16, "where", "native", (False, True))
        torch.testing.assert_close((x @ w).double(), x.double() @ w.double(), rtol=1e-2, atol=1e-1)
        check(40, 64, 96, torch.int8, "where", "native", (False, False))
        assert torch.equal(torch._int_mm(xi, wi).double(), xi.double() @ wi.double())


def test_where_tiles_are_not_permitted_the_target_has_none(monkeypatch):
    monkeypatch.setattr("tilewright.codegen.cpu.target._tiles_permitted", lambda: False)
    refused = CpuTarget.host.__wrapped__()
    assert not refused.amx
    assert "+amx" not in refused.features
    assert refused.bf16_dot == _HOST.bf16_dot
