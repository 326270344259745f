"""Products of experts with weights in whole numbers and in blocks, against fp64 of the same numbers."""

import pytest
import torch
from tests.codegen.bodies import Body, assert_matches
from tests.codegen.test_emit_blocks import PANELS, finite_rows, rounded
from torch import Tensor
from torch.fx import Node

from tilewright.ir.regions import Anchor
from tilewright.ir.sizes import TOKENS
from tilewright.ops.blocks import FORMATS
from tilewright.ops.expert_blocks import GROUPED_BLOCK_LINEAR, GROUPED_BLOCK_LINEAR_INT8, GROUPED_INT8_LINEAR
from tilewright.ops.experts import ROUTE

aten = torch.ops.aten
# Rows of each expert: none, one, two, whole tiles, and one or some above them.
COUNTS = [(0, 1, 2), (8, 9, 16), (17, 0, 23), (70, 1, 0), (0, 0, 0)]


def routed(counts: tuple[int, ...], k: int) -> tuple[int, Tensor]:
    """Number of tokens and experts [T, k] with so many rows for each expert, in any order."""
    experts = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    experts = torch.cat([experts, experts.new_full((-len(experts) % k,), len(counts) - 1)])
    return len(experts) // k, experts[torch.randperm(len(experts))].view(-1, k)


def tables(body: Body, count: int, k: int) -> list[Node]:
    return [
        body.input((TOKENS, k), torch.int64),
        body.input((count + 1,), torch.int32),
        body.input((TOKENS, k), torch.int32),
    ]


@pytest.mark.parametrize("counts", COUNTS)
@pytest.mark.parametrize(("n", "depth", "shared"), [(64, 64, True), (130, 320, False)])
def test_whole_numbers(counts: tuple[int, ...], n: int, depth: int, shared: bool) -> None:
    """With the scale of the row behind it."""
    body, k, count = Body(), 2, len(counts)
    middle = 1 if shared else k
    x, weight = body.input((TOKENS, middle, depth), torch.int8), body.input((count, n, depth), torch.int8)
    given = tables(body, count, k)
    out = body.call(GROUPED_INT8_LINEAR, x, weight, *given, body.input((count, n)))
    out = body.call(aten.mul.Tensor, out, body.input((TOKENS, middle, 1)))
    tokens, experts = routed(counts, k)
    rows, weights = (
        torch.randint(-127, 128, s, dtype=torch.int8) for s in ((tokens, middle, depth), (count, n, depth))
    )
    tensors = [rows, weights, experts, *ROUTE(experts, count), torch.rand(count, n), torch.rand(tokens, middle, 1)]
    assert_matches(
        body.module(out), tensors, {TOKENS: tokens}, 1e-6, anchor=Anchor.EXPERTS, weights={1: weights},
        interleaved={torch.int8: 4},
    )  # fmt: skip


def stacked(name: str, count: int, n: int, depth: int) -> Tensor:
    return finite_rows(name, count * n, depth).view(count, n, -1)


@pytest.mark.parametrize("name", PANELS)
def test_blocks_of_rounded_rows(name: str) -> None:
    n, depth, k = 100, 512, 2
    for counts, shared in ((COUNTS[1], True), (COUNTS[2], False)):
        body, count, middle = Body(), len(counts), 1 if shared else k
        x = body.input((TOKENS, middle, depth), torch.int8)
        weight = body.input((count, n, FORMATS[name].row_bytes(depth)), torch.uint8)
        given = tables(body, count, k)
        scales, sums = (body.input((TOKENS, middle, depth // 32)) for _ in range(2))
        minimums = sums if FORMATS[name].has_minimums else None
        out = body.call(GROUPED_BLOCK_LINEAR_INT8, x, weight, *given, name, scales, minimums)
        out = body.call(aten.mul.Tensor, out, body.input((TOKENS, k, 1)))
        tokens, experts = routed(counts, k)
        data = stacked(name, count, n, depth)
        values, *parts = (part.view(tokens, middle, -1) for part in rounded(tokens * middle, depth))
        tensors = [values, data, experts, *ROUTE(experts, count), *parts, torch.rand(tokens, k, 1)]
        gm = body.module(out)
        assert_matches(gm, tensors, {TOKENS: tokens}, 2e-6, anchor=Anchor.EXPERTS, weights={1: data})


@pytest.mark.parametrize("counts", COUNTS)
def test_row_counts_with_blocks(counts: tuple[int, ...]) -> None:
    """Rows as they are, each tile unpacking to floating point."""
    body, n, depth, k, count = Body(), 64, 128, 1, len(counts)
    x = body.input((TOKENS, k, depth))
    weight = body.input((count, n, FORMATS["int4"].row_bytes(depth)), torch.uint8)
    gm = body.module(body.call(GROUPED_BLOCK_LINEAR, x, weight, *tables(body, count, k), "int4"))
    tokens, experts = routed(counts, k)
    data = stacked("int4", count, n, depth)
    tensors = [torch.randn(tokens, k, depth), data, experts, *ROUTE(experts, count)]
    assert_matches(gm, tensors, {TOKENS: tokens}, 2e-6, anchor=Anchor.EXPERTS, weights={1: data})
