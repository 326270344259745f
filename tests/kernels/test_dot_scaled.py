"""``tl.dot_scaled``: products of narrow floats with a scale for each group of them."""

import pytest
import torch
import triton
import triton.language as tl

M, N, K = 32, 16, 64
DTYPES = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2, "bf16": torch.bfloat16, "fp16": torch.float16}
E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6], dtype=torch.float64)


@triton.jit
def scaled_kernel(
    a_ptr, b_ptr, a_scale_ptr, b_scale_ptr, out_ptr, A: tl.constexpr, B: tl.constexpr, A_PACK: tl.constexpr,
    B_PACK: tl.constexpr, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, A_SCALED: tl.constexpr,
    B_SCALED: tl.constexpr, GROUP: tl.constexpr, ALONG_K: tl.constexpr,
):  # fmt: skip
    A_ROWS: tl.constexpr = M if ALONG_K else M // A_PACK
    A_COLUMNS: tl.constexpr = K // A_PACK if ALONG_K else K
    B_ROWS: tl.constexpr = K // B_PACK if ALONG_K else K
    B_COLUMNS: tl.constexpr = N if ALONG_K else N // B_PACK
    a = tl.load(a_ptr + tl.arange(0, A_ROWS)[:, None] * A_COLUMNS + tl.arange(0, A_COLUMNS)[None, :])
    b = tl.load(b_ptr + tl.arange(0, B_ROWS)[:, None] * B_COLUMNS + tl.arange(0, B_COLUMNS)[None, :])
    groups = tl.arange(0, K // GROUP)[None, :]
    a_scale = None
    if A_SCALED:
        a_scale = tl.load(a_scale_ptr + tl.arange(0, M)[:, None] * (K // GROUP) + groups)
    b_scale = None
    if B_SCALED:
        b_scale = tl.load(b_scale_ptr + tl.arange(0, N)[:, None] * (K // GROUP) + groups)
    acc = tl.full([M, N], 1.0, tl.float32)
    acc = tl.dot_scaled(a, a_scale, A, b, b_scale, B, acc, lhs_k_pack=ALONG_K, rhs_k_pack=ALONG_K)
    tl.store(out_ptr + tl.arange(0, M)[:, None] * N + tl.arange(0, N)[None, :], acc)


def operand(form: str, rows: int, along_k: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Random elements as they are stored, [rows, K] or packed along one axis, and their values in fp64."""
    if form != "e2m1":
        stored = torch.randn(rows, K).to(DTYPES[form])
        return stored, stored.double()
    codes = torch.randint(0, 16, (rows, K), dtype=torch.uint8)
    pairs = codes.reshape(rows, K // 2, 2).unbind(2) if along_k else codes.reshape(rows // 2, 2, K).unbind(1)
    sign = torch.where(codes >= 8, -1.0, 1.0).double()
    return (pairs[0] | pairs[1] << 4).contiguous(), E2M1[(codes & 7).long()] * sign


def launch(a: torch.Tensor, b: torch.Tensor, scales: list[torch.Tensor | None], forms: list[str], group: int = 32,
           along_k: bool = True) -> torch.Tensor:  # fmt: skip
    out = torch.empty(M, N)
    packs = [2 if form == "e2m1" else 1 for form in forms]
    scaled_kernel[(1,)](
        a, b.t().contiguous(), scales[0], scales[1], out, *forms, *packs, M, N, K, scales[0] is not None,
        scales[1] is not None, group, along_k,
    )  # fmt: skip
    return out


def widened(values: torch.Tensor, scale: torch.Tensor | None) -> torch.Tensor:
    if scale is None:
        return values
    wide = scale.double() if scale.is_floating_point() else 2.0 ** (scale.double() - 127)
    return values * wide.repeat_interleave(K // scale.shape[1], 1)


@pytest.mark.parametrize("b_form", ["e2m1", "e4m3", "e5m2", "bf16", "fp16"])
@pytest.mark.parametrize("a_form", ["e2m1", "e5m2", "fp16"])
def test_every_format_with_and_without_scales(a_form: str, b_form: str) -> None:
    (a, a_values), (b, b_values) = operand(a_form, M, True), operand(b_form, N, True)
    scales = [
        None if form in ("bf16", "fp16") else torch.randint(110, 140, (rows, K // 32), dtype=torch.uint8)
        for form, rows in ((a_form, M), (b_form, N))
    ]
    out = launch(a, b, scales, [a_form, b_form])
    expected = 1 + widened(a_values, scales[0]) @ widened(b_values, scales[1]).t()
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item())


def test_pairs_packed_along_rows_and_columns() -> None:
    (a, a_values), (b, b_values) = operand("e2m1", M, False), operand("e2m1", N, False)
    out = launch(a, b, [None, None], ["e2m1", "e2m1"], along_k=False)
    assert torch.equal(out.double(), 1 + a_values @ b_values.t())


def test_scales_in_e4m3_for_groups_of_16() -> None:
    (a, a_values), (b, b_values) = operand("e2m1", M, True), operand("e2m1", N, True)
    scales = [(torch.rand(rows, K // 16) + 0.1).to(torch.float8_e4m3fn) for rows in (M, N)]
    out = launch(a, b, [*scales], ["e2m1", "e2m1"], group=16)
    expected = 1 + widened(a_values, scales[0]) @ widened(b_values, scales[1]).t()
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)


def test_the_smallest_scale_and_nan() -> None:
    a, b = torch.full((M, K), 6.0).to(torch.float8_e5m2), torch.full((N, K), 2.0**127, dtype=torch.bfloat16)
    scale = torch.zeros(M, K // 32, dtype=torch.uint8)
    scale[0] = 255
    out = launch(a, b, [scale, None], ["e5m2", "bf16"])
    assert out[0].isnan().all()
    assert torch.equal(out[1:], torch.full((M - 1, N), 1.0 + 6 * K))
