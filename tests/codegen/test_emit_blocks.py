"""Products with weights in block formats, every format and tile, against fp64 of the same whole numbers."""

import pytest
import torch
from tests.codegen.bodies import Body, assert_matches, emit
from tests.graph.test_block_formats import random_rows

from tilewright.errors import CodegenError
from tilewright.ir.regions import Anchor
from tilewright.ir.sizes import TOKENS
from tilewright.ops.block_linear import BLOCK_EMBEDDING, BLOCK_LINEAR, BLOCK_LINEAR_INT8
from tilewright.ops.block_panels import has_panels
from tilewright.ops.blocks import FORMATS, quantize

aten = torch.ops.aten
PANELS = [name for name in FORMATS if has_panels(name)]
TILES = ["triton_one", "triton_few", "triton", "triton_many"]
_HALVES = {"Q4_K": (1, 3), "Q5_K": (1, 3), "Q6_K": (209,), "int4": (1, 3)}


def finite_rows(name: str, rows: int, k: int) -> torch.Tensor:
    """Random bytes, but for the exponents of scales: these are below 2, some of them denormal or zero."""
    data = random_rows(name, rows, k, seed=rows + k)
    blocks = data.view(rows, -1, FORMATS[name].nbytes)
    for place in _HALVES.get(name, (1,)):
        blocks[..., place] &= 0xBF
        blocks[: rows // 3, :, place] &= 0x83
    return data


def rounded(rows: int, k: int) -> list[torch.Tensor]:
    """Bytes, scales and sums of rows; one block is zero."""
    torch.manual_seed(rows + k)  # where all products of one element cancel, the largest of them is no measure
    values = torch.randint(-127, 128, (rows, k), dtype=torch.int8)
    values[:, :32] = 0
    values[: rows // 2, 32:64] = 127
    scales = torch.rand(rows, k // 32)
    return [values, scales, values.view(rows, k // 32, 32).float().sum(-1) * scales]


def block_body(name: str, n: int, k: int, bias: bool = True) -> Body:
    body = Body()
    x = body.input((TOKENS, k), torch.int8)
    weight = body.input((n, FORMATS[name].row_bytes(k)), torch.uint8)
    added = body.input((n,)) if bias else None
    scales, sums = body.input((TOKENS, k // 32)), body.input((TOKENS, k // 32))
    out = body.call(BLOCK_LINEAR_INT8, x, weight, added, name, scales, sums if FORMATS[name].has_minimums else None)
    body.last = body.call(aten.relu.default, out) if bias else out  # type: ignore[attr-defined]
    return body


def check(name: str, rows: int, n: int, k: int, variant: str, bias: bool = True) -> None:
    body = block_body(name, n, k, bias)
    gm, (x, scales, sums) = body.module(body.last), rounded(rows, k)  # type: ignore[attr-defined]
    weight = finite_rows(name, n, k)
    tensors = [x, weight, *([torch.randn(n)] if bias else []), scales, sums]
    assert_matches(gm, tensors, {TOKENS: rows}, 2e-6, anchor=Anchor.GEMM, variant=variant, weights={1: weight})


@pytest.mark.parametrize("variant", TILES)
@pytest.mark.parametrize("name", PANELS)
def test_formats_and_tiles(name: str, variant: str) -> None:
    for rows in (1, 3, 40):
        check(name, rows, 100, 512, variant)


@pytest.mark.parametrize("name", ["Q4_K", "Q8_0"])
def test_row_counts(name: str) -> None:
    for rows, variant in ((0, "triton_one"), (8, "triton"), (300, "triton_many")):
        check(name, rows, 64, 768, variant, bias=False)


@pytest.mark.parametrize("name", PANELS)
def test_one_block(name: str) -> None:
    k = max(FORMATS[name].block, 64)
    check(name, 2, 1, k, "triton_few")


@pytest.mark.parametrize("name", PANELS)
def test_rows_that_are_not_rounded(name: str) -> None:
    body, k = Body(), 512
    x, weight = body.input((TOKENS, k)), body.input((100, FORMATS[name].row_bytes(k)), torch.uint8)
    gm, data = body.module(body.call(BLOCK_LINEAR, x, weight, body.input((100,)), name)), finite_rows(name, 100, k)
    for rows, variant in ((1, "triton_one"), (11, "triton"), (40, "triton_many")):
        tensors = [torch.randn(rows, k), data, torch.randn(100)]
        assert_matches(gm, tensors, {TOKENS: rows}, 2e-6, anchor=Anchor.GEMM, variant=variant, weights={1: data})


def test_rows_in_fp64_have_no_kernel() -> None:
    body = Body()
    x, weight = body.input((TOKENS, 64), torch.float64), body.input((8, 68), torch.uint8)
    gm = body.module(body.call(BLOCK_LINEAR, x, weight, None, "Q8_0"))
    with pytest.raises(CodegenError, match="these rows are fp64"):
        emit(gm, Anchor.GEMM, "triton", weights={1: finite_rows("Q8_0", 8, 64)})


@pytest.mark.parametrize("name", [name for name, form in FORMATS.items() if form.decode])
def test_rows_are_widened_where_they_are_looked_up(name: str) -> None:
    body = Body()
    table = finite_rows(name, 37, 768) if name != "int8" else quantize("int8", torch.randn(37, 768))
    ids, weight = body.input((TOKENS,), torch.int64), body.input(tuple(table.shape), torch.uint8)
    gm = body.module(body.call(BLOCK_EMBEDDING, weight, ids, name))
    ids_given = torch.tensor([36, 0, 5, 5, 12])
    assert_matches(gm, [ids_given, table], {TOKENS: 5}, 1e-7, weights={1: table})
