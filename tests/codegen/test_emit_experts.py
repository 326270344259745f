"""Kernels of mixtures of experts: tables of rows, grouped products, and the selection that a router makes."""

import operator

import pytest
import torch
from tests.codegen.bodies import Body, Memory, assert_matches, emit, launch, run

from tilewright.ir.facts import TensorType, TupleType, set_fact
from tilewright.ir.program import View
from tilewright.ir.regions import Anchor
from tilewright.ir.sizes import TOKENS
from tilewright.ops.experts import GROUPED_LINEAR, ROUTE
from tilewright.ops.selection import TOP_INDICES

aten = torch.ops.aten


def chosen(rows: int, k: int, count: int, how: str) -> torch.Tensor:
    """Experts of each row, different ones in a row unless all rows have one."""
    if how == "one":
        return torch.full((rows, k), count - 1)
    least = count // 2 if how == "half" else 0  # the experts in front have no row
    return (
        torch.stack([least + torch.randperm(count - least)[:k] for _ in range(rows)])
        if rows
        else torch.zeros(0, k).long()
    )


@pytest.mark.parametrize(
    ("rows", "k", "count", "how"),
    [(1, 1, 1, "any"), (1, 2, 8, "any"), (7, 3, 5, "half"), (300, 8, 64, "any"), (512, 2, 9, "one"), (0, 2, 8, "any")],
)
def test_tables(rows: int, k: int, count: int, how: str) -> None:
    experts = chosen(rows, k, count, how)
    body = Body()
    node = body.graph.call_function(ROUTE, (body.input((TOKENS, k), torch.int64), count))
    kinds = (TensorType((count + 1,), torch.int32), TensorType((TOKENS, k), torch.int32))
    set_fact(node, TupleType(kinds))
    outputs = [body.graph.call_function(operator.getitem, (node, place)) for place in range(2)]
    for item, kind in zip(outputs, kinds, strict=True):
        set_fact(item, kind)
    steps, builder, call = emit(body.module(*outputs), Anchor.ROUTE)
    memory = Memory(builder, {0: experts}, {TOKENS: rows})
    for step in steps:
        launch(step, memory)
    for view, expected in zip(call.outputs, ROUTE(experts, count), strict=True):
        assert torch.equal(memory.tensor(view), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("rows", "k", "count", "how", "n", "depth", "shared"),
    [
        (1, 2, 8, "any", 64, 32, True),
        (7, 3, 5, "half", 96, 40, False),
        (300, 2, 3, "any", 48, 300, True),
        (33, 1, 4, "one", 130, 64, False),
        (0, 2, 4, "any", 64, 32, True),
    ],
)
def test_grouped_product(
    rows: int, k: int, count: int, how: str, n: int, depth: int, shared: bool, dtype: torch.dtype
) -> None:
    """With a column behind it; x has a row for each token or for each token and expert, its rows lying apart."""
    body = Body()
    x, weight = body.input((TOKENS, 1 if shared else k, depth), dtype), body.input((count, n, depth), dtype)
    experts = body.input((TOKENS, k), torch.int64)
    tables = body.input((count + 1,), torch.int32), body.input((TOKENS, k), torch.int32)
    scale = body.input((TOKENS, k, 1), dtype)
    product = body.call(aten.mul.Tensor, body.call(GROUPED_LINEAR, x, weight, experts, *tables), scale)
    ids = chosen(rows, k, count, how)
    wide = torch.randn(rows, 1 if shared else k, depth + 5).to(dtype)
    tensors = [
        wide[..., :depth],
        torch.randn(count, n, depth).to(dtype),
        ids,
        *ROUTE(ids, count),
        torch.randn(rows, k, 1),
    ]
    tensors[-1] = tensors[-1].to(dtype)
    middle = 1 if shared else k
    strides = (middle * (depth + 5), depth + 5, 1)
    group = {torch.bfloat16: 2}
    tolerance = 2e-2 if dtype == torch.bfloat16 else 1e-5
    assert_matches(
        body.module(product), tensors, {TOKENS: rows}, tolerance, anchor=Anchor.EXPERTS, weights={1: tensors[1]},
        views={0: lambda value: View(value, (TOKENS, middle, depth), strides)}, interleaved=group,
    )  # fmt: skip


@pytest.mark.parametrize(("n", "k"), [(1, 1), (8, 2), (64, 8), (60, 1), (9, 9), (256, 6)])
def test_largest_of_a_row(n: int, k: int) -> None:
    """Places and values; with ties, infinities and fewer finite values than are asked for."""
    body = Body()
    x = body.input((TOKENS, n))
    places = body.call(TOP_INDICES, x, k)
    values = body.call(aten.gather.default, x, -1, places)
    rows = torch.randn(40, n)
    rows[1] = 3.0
    rows[2] = float("-inf")
    rows[3, : n // 2] = float("inf")
    rows[4] = torch.randint(3, (n,)).float()
    found = run(body.module(places, values), [rows], {TOKENS: 40})
    assert torch.equal(found[0], TOP_INDICES(rows, k))
    assert torch.equal(found[1], torch.topk(rows, k).values)


def test_nan_is_largest() -> None:
    body = Body()
    rows = torch.tensor([[0.0, float("nan"), 2.0, 1.0], [float("nan")] * 4])
    found = run(body.module(body.call(TOP_INDICES, body.input((TOKENS, 4)), 2)), [rows], {TOKENS: 2})
    assert found[0].tolist() == [[1, 2], [0, 1]]


def test_places_out_of_range_read_the_row() -> None:
    body = Body()
    x, places = body.input((TOKENS, 5)), body.input((TOKENS, 2), torch.int64)
    rows = torch.arange(10.0).view(2, 5)
    found = run(
        body.module(body.call(aten.gather.default, x, 1, places)), [rows, torch.tensor([[-7, 99], [1, 4]])], {TOKENS: 2}
    )
    assert found[0].tolist() == [[0.0, 4.0], [6.0, 9.0]]


@pytest.mark.parametrize("width", [40, 700])
def test_sum_over_an_inner_axis_in_front_of_a_norm(width: int) -> None:
    """What follows the experts: the sum of a token's rows, the residual, and the next norm, as one kernel."""
    body = Body()
    parts, residual, weight = body.input((TOKENS, 3, width)), body.input((TOKENS, width)), body.input((width,))
    added = body.call(aten.add.Tensor, residual, body.call(aten.sum.dim_IntList, parts, [1], False))
    normed = body.call(aten.rms_norm.default, added, [width], weight, 1e-6)
    tensors = [torch.randn(9, 3, width), torch.randn(9, width), torch.randn(width)]
    gm = body.module(added, normed)
    assert_matches(gm, tensors, {TOKENS: 9}, 1e-5)
    assert len(emit(gm)[0]) == 1
