"""Products of few rows whose K is cut into parts, against fp64."""

import pytest
import torch
from tests.codegen.bodies import Body, assert_matches, emit
from tests.codegen.test_emit_blocks import finite_rows, rounded

from tilewright.errors import CodegenError
from tilewright.ir.regions import GEMM_VARIANTS, Anchor
from tilewright.ir.sizes import TOKENS
from tilewright.ops.block_linear import BLOCK_LINEAR_INT8
from tilewright.ops.blocks import FORMATS

aten = torch.ops.aten
SPLIT = [variant for variant in GEMM_VARIANTS if ":" in variant]


def linear_body(n: int, k: int, dtype: torch.dtype, bias: bool) -> Body:
    """The product and an activation of it; both are results."""
    body = Body()
    x, weight = body.input((TOKENS, k), dtype), body.input((n, k), dtype)
    body.out = body.call(aten.linear.default, x, weight, body.input((n,), dtype) if bias else None)  # type: ignore[attr-defined]
    return body


@pytest.mark.parametrize("variant", SPLIT)
def test_parts_add_up(variant: str) -> None:
    torch.manual_seed(0)
    body = linear_body(100, 1024, torch.float32, bias=True)
    gm = body.module(body.out, body.call(aten.relu.default, body.out))  # type: ignore[attr-defined]
    weight, bias = torch.randn(100, 1024), torch.randn(100)
    for rows in (0, 1, 3, 9):
        given = [torch.randn(rows, 1024), weight, bias]
        assert_matches(gm, given, {TOKENS: rows}, 2e-6, anchor=Anchor.GEMM, variant=variant, weights={1: weight})


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 1e-2), (torch.float64, 1e-14)])
def test_types(dtype: torch.dtype, tolerance: float) -> None:
    body = linear_body(64, 512, dtype, bias=False)
    gm, weight = body.module(body.out), torch.randn(64, 512, dtype=dtype)  # type: ignore[attr-defined]
    given = [torch.randn(2, 512, dtype=dtype), weight]
    options = {"anchor": Anchor.GEMM, "variant": "triton_few:2", "weights": {1: weight}}
    assert_matches(gm, given, {TOKENS: 2}, tolerance, interleaved={torch.bfloat16: 2}, **options)


@pytest.mark.parametrize("name", ["Q8_0", "Q4_K", "Q6_K", "int4"])
def test_weights_in_blocks(name: str) -> None:
    body, k = Body(), 2048
    x, weight = body.input((TOKENS, k), torch.int8), body.input((70, FORMATS[name].row_bytes(k)), torch.uint8)
    scales, sums = body.input((TOKENS, k // 32)), body.input((TOKENS, k // 32))
    more = (name, scales, sums if FORMATS[name].has_minimums else None)
    gm = body.module(body.call(BLOCK_LINEAR_INT8, x, weight, None, *more))
    (values, scale, total), data = rounded(3, k), finite_rows(name, 70, k)
    for variant in ("triton_one:8", "triton_few:4"):
        given = [values, data, scale, total]
        assert_matches(gm, given, {TOKENS: 3}, 2e-6, anchor=Anchor.GEMM, variant=variant, weights={1: data})


def test_parts_must_be_whole_steps() -> None:
    for k in (576, 100):
        body = linear_body(64, k, torch.float32, bias=False)
        with pytest.raises(CodegenError, match="no 8 equal parts"):
            emit(body.module(body.out), Anchor.GEMM, "triton_few:8", weights={1: torch.zeros(64, k)})  # type: ignore[attr-defined]
