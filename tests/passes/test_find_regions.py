"""Regions on hand-built graphs: what goes in, and the regions that must come out, side by side."""

import random

import pytest
import torch
from tests.graphs import GraphBuilder, packed_bert
from torch.fx import GraphModule, Interpreter

from tilewright.ir.facts import find_fact
from tilewright.ir.regions import Anchor, Region, RegionTag
from tilewright.ir.sizes import BATCH, SEQ, TOKENS, Size
from tilewright.ops import Flow, Traits, register
from tilewright.passes.base import run_pass
from tilewright.passes.regions.anchors import is_view
from tilewright.passes.regions.find_regions import FindRegions
from tilewright.passes.regions.outline_regions import OutlineRegions

aten = torch.ops.aten
packing = torch.ops.tilewright
Found = list[tuple[str, str]]


def fused(g: GraphBuilder, *outputs: torch.fx.Node, fuse: bool = True) -> GraphModule:
    """The outlined graph, after a check that it still computes what the graph computed."""
    gm = g.done(*outputs)
    gm, _ = run_pass(FindRegions(fuse), gm)
    gm, _ = run_pass(OutlineRegions(), gm)
    results = Interpreter(gm).run(*g.example)
    for result, expected in zip(results, g.expected, strict=True):
        torch.testing.assert_close(result, expected, rtol=0, atol=0)
    return gm


def regions(gm: GraphModule) -> Found:
    """(anchor, names of the ops inside) of each region, in order."""
    found = []
    for node in gm.graph.nodes:
        region = find_fact(node, Region)
        if region is not None:
            body = gm.get_submodule(str(node.target)).graph.nodes
            names = [n.name for n in body if n.op == "call_function" and not n.name.startswith("getitem")]
            found.append((region.anchor.value, " ".join(names)))
    return found


def refusals(gm: GraphModule, member: str) -> dict[str, str]:
    """Neighbours refused by the region that holds ``member``."""
    for node in gm.graph.nodes:
        region = find_fact(node, Region)
        if region is not None and any(n.name == member for n in gm.get_submodule(str(node.target)).graph.nodes):
            return dict(region.refused)
    raise AssertionError(f"no region holds {member}")


def test_packed_encoder_layer() -> None:
    g = packed_bert(layers=2)
    layer = [
        ("gemm", "l{}_q"),
        ("gemm", "l{}_k"),
        ("gemm", "l{}_v"),
        ("attention", "l{}_attention"),
        ("gemm", "l{}_out l{}_out_residual"),
        ("row", "l{}_norm1"),
        ("gemm", "l{}_ff1 l{}_gelu"),
        ("gemm", "l{}_ff2 l{}_ff2_residual"),
        ("row", "l{}_norm2"),
    ]
    expected = [
        ("index", "column pack"),
        ("row", "gather_ids gather_positions word_embedding position_embedding embedding_sum embedding_norm"),
        *((anchor, names.replace("{}", str(i))) for i in range(2) for anchor, names in layer),
        ("row", "scatter"),
        ("row", "first"),
        ("gemm", "pooler pooler_tanh"),
    ]
    assert regions(fused(g, *g.outputs)) == expected


def test_without_fusion_every_op_is_alone() -> None:
    g = packed_bert(layers=1)
    gm = fused(g, *g.outputs, fuse=False)
    assert all(len(names.split()) == 1 for _, names in regions(gm))
    assert set(refusals(gm, "l0_gelu").values()) == {"fusion is off at this optimization level"}


def test_rows_take_prologue_and_epilogue_of_reductions() -> None:
    g = GraphBuilder()
    x, y = g.input("x", TOKENS, 24), g.input("y", TOKENS, 24)
    total = g.call(aten.add.Tensor, x, y, name="total")
    scores = g.call(aten.softmax.int, total, -1, name="scores")
    mean = g.call(aten.mean.dim, scores, [-1], name="mean")
    column = g.call(aten.unsqueeze.default, mean, 1, name="column")
    out = g.call(aten.mul.Tensor, scores, column, name="out")
    gm = fused(g, out)
    assert regions(gm) == [("row", "total scores mean column out")]


def test_views_between_regions_stay_outside() -> None:
    g = GraphBuilder()
    x = g.input("x", TOKENS, 24)
    y = g.call(aten.relu.default, x, name="y")
    turned = g.call(aten.permute.default, y, [1, 0], name="turned")
    z = g.call(aten.exp.default, turned, name="z")
    gm = fused(g, z)
    assert regions(gm) == [("row", "y"), ("row", "z")]
    assert refusals(gm, "z")["y"] == "'turned' moves axis 0 of 'y', so a tile of one is not a tile of the other"
    assert [n.name for n in gm.graph.nodes if n.target is aten.permute.default] == ["turned"]


def test_a_value_that_meets_itself_transposed_is_stored() -> None:
    g = GraphBuilder()
    x = g.input("x", 24, 24)
    y = g.call(aten.relu.default, x, name="y")
    z = g.call(aten.add.Tensor, y, g.call(aten.permute.default, y, [1, 0]), name="z")
    gm = fused(g, z)
    assert regions(gm) == [("row", "y"), ("row", "z")]


@pytest.mark.parametrize("other", [(24,), (TOKENS, 1), (1,), (), (TOKENS, 24), (1, 24)])
def test_epilogue_operands(other: tuple[Size, ...]) -> None:
    g = GraphBuilder()
    x, y = g.input("x", TOKENS, 8), g.input("y", *other)
    out = g.call(aten.mul.Tensor, g.linear(x, "gemm", 24), y, name="out")
    assert regions(fused(g, out)) == [("gemm", "gemm out")]


def test_epilogue_refuses_an_operand_with_rows_of_its_own() -> None:
    g = GraphBuilder()
    x, y = g.input("x", BATCH, SEQ, 8), g.input("y", 1, SEQ, 24)
    out = g.call(aten.mul.Tensor, g.linear(x, "gemm", 24), y, name="out")
    gm = fused(g, out)
    assert regions(gm) == [("gemm", "gemm"), ("row", "out")]
    assert refusals(gm, "out")["gemm"] == "operand 'y' of 'out' is neither full, a row, a column nor a number"


def test_gated_product_joins_one_of_two_gemms() -> None:
    g = GraphBuilder()
    x = g.input("x", TOKENS, 8)
    gate = g.call(aten.silu.default, g.linear(x, "gate", 24), name="act")
    out = g.call(aten.mul.Tensor, gate, g.linear(x, "up", 24), name="out")
    gm = fused(g, out)
    assert regions(gm) == [("gemm", "gate act"), ("gemm", "up out")]
    assert "one GEMM" in refusals(gm, "out")["act"]


def test_a_norm_does_not_join_a_gemm_and_says_why() -> None:
    g = GraphBuilder()
    x = g.input("x", TOKENS, 8)
    gm = fused(g, g.norm(g.linear(x, "gemm", 24), "norm"))
    why = "'norm' needs all of axis 1 of 'gemm', which is divided among programs"
    assert refusals(gm, "norm")["gemm"] == refusals(gm, "gemm")["norm"] == why


def test_result_of_a_gemm_read_twice_is_stored_by_one_region() -> None:
    g = GraphBuilder()
    x = g.input("x", TOKENS, 8)
    h = g.linear(x, "gemm", 24)
    gm = fused(g, g.call(aten.gelu.default, h, name="act"), g.norm(h, "norm"))
    assert regions(gm) == [("gemm", "gemm act"), ("row", "norm")]


def test_regions_stay_convex() -> None:
    """``out`` may not join ``a``: the softmax over turned axes lies between and waits for ``a``."""
    g = GraphBuilder()
    x = g.input("x", TOKENS, 8)
    a = g.call(aten.relu.default, x, name="a")
    between = g.norm(g.linear(a, "gemm", 8), "between")
    out = g.call(aten.add.Tensor, a, between, name="out")
    gm = fused(g, out)
    assert regions(gm) == [("row", "a"), ("gemm", "gemm"), ("row", "between out")]
    assert "wait for its own result" in refusals(gm, "out")["a"]


def test_cheap_positions_are_computed_again_in_each_row() -> None:
    g = GraphBuilder()
    x = g.input("x", BATCH, SEQ, 24)
    places = g.call(aten.arange.start_step, 0, g.size(x, 1), 1, dtype=torch.int64, name="places")
    row = g.call(aten.unsqueeze.default, places, 0, name="row")
    table = g.weight("table", 20, 24)
    out = g.call(aten.add.Tensor, x, g.call(aten.embedding.default, table, row, name="embedded"), name="out")
    assert regions(fused(g, out)) == [("row", "places row embedded out")]


def test_cheap_positions_are_computed_where_they_are_gathered() -> None:
    g = GraphBuilder()
    row_index = g.input("row_index", TOKENS, dtype=torch.int32)
    ids = g.input("ids", BATCH, SEQ, dtype=torch.int64)
    places = g.call(aten.arange.start_step, 0, g.size(ids, 1), 1, dtype=torch.int64, name="places")
    grid = g.call(aten.expand.default, g.call(aten.unsqueeze.default, places, 0, name="row"), [7, 13], name="grid")
    packed = g.call(packing.gather_rows.default, grid, row_index, name="packed")
    gm = fused(g, g.call(aten.embedding.default, g.weight("table", 20, 24), packed, name="out"))
    assert regions(gm) == [("row", "places row grid packed out")]


def test_rotation_of_halves_is_one_region() -> None:
    g = GraphBuilder()
    x, cos, sin = g.input("x", TOKENS, 2, 8), g.input("cos", TOKENS, 1, 8), g.input("sin", TOKENS, 1, 8)
    low, high = g.call(aten.slice.Tensor, x, 2, 0, 4), g.call(aten.slice.Tensor, x, 2, 4, 8)
    turned = g.call(aten.cat.default, [g.call(aten.neg.default, high, name="minus"), low], 2, name="turned")
    a = g.call(aten.mul.Tensor, x, cos, name="a")
    out = g.call(aten.add.Tensor, a, g.call(aten.mul.Tensor, turned, sin, name="b"), name="out")
    assert regions(fused(g, out)) == [("row", "minus turned a b out")]


def test_a_concatenation_of_reductions_reads_them_from_memory() -> None:
    g = GraphBuilder()
    x = g.input("x", TOKENS, 10)
    gm = fused(g, g.call(aten.cat.default, [g.norm(x, "norm"), x], 1, name="out"))
    assert regions(gm) == [("row", "norm"), ("row", "out")]
    assert refusals(gm, "out")["norm"] == "'out' reads 'norm' at other places along axis 1, which other tiles may hold"


def test_dear_work_is_not_repeated_by_a_broadcast() -> None:
    g = GraphBuilder()
    x, y = g.input("x", BATCH, SEQ, 24), g.input("y", 1, SEQ, 24)
    out = g.call(aten.add.Tensor, x, g.call(aten.exp.default, y, name="dear"), name="out")
    gm = fused(g, out)
    assert regions(gm) == [("row", "dear"), ("row", "out")]
    assert "dear" in refusals(gm, "out")


@pytest.mark.parametrize("axis", [0, 1])
def test_softmax_off_the_last_axis_and_sums_over_several_run_eager_with_a_reason(axis: int) -> None:
    g = GraphBuilder()
    x = g.input("x", BATCH, SEQ, 24)
    total = g.call(aten.sum.dim_IntList, x, [axis, 2], name="out")
    gm = fused(g, total, g.call(aten.softmax.int, x, axis, name="soft"))
    assert regions(gm) == [("opaque", "out"), ("opaque", "soft")]
    found = [find_fact(n, Region) for n in gm.graph.nodes if find_fact(n, Region)]
    assert [f"axis {axis}" in r.reason or f"axes ({axis}, 2)" in r.reason for r in found if r] == [True, True]


def test_unknown_ops_merge_and_carry_the_reason() -> None:
    g = GraphBuilder()
    x = g.input("x", TOKENS, 24)
    y = g.call(aten.relu.default, x, name="y")
    a = g.call(aten.roll.default, y, [1], [0], name="a")
    b = g.call(aten.bmm.default, *[g.call(aten.unsqueeze.default, a, 0)] * 1, g.weight("w", 1, 24, 24), name="b")
    z = g.call(aten.relu.default, b, name="z")
    gm = fused(g, z)
    assert regions(gm) == [("row", "y"), ("opaque", "a unsqueeze_default b"), ("row", "z")]
    region = next(r for n in gm.graph.nodes if (r := find_fact(n, Region)) and r.anchor is Anchor.OPAQUE)
    assert "aten.roll.default has no declared traits" in region.reason
    assert "a product of two computed tensors outside attention has no kernel" in region.reason
    assert refusals(gm, "z")["b"].startswith("'a' runs eager: ")


def test_a_new_op_with_declared_traits_fuses() -> None:
    library = torch.library.Library("tilewright_test", "FRAGMENT")
    library.define("squared_relu(Tensor x) -> Tensor")
    library.impl("squared_relu", lambda x: x.relu().square(), "CompositeExplicitAutograd")
    op = torch.ops.tilewright_test.squared_relu.default
    register(op, Traits(Flow.POINTWISE, triton="tl.maximum({0}, 0.0) * tl.maximum({0}, 0.0)"))
    g = GraphBuilder()
    x = g.input("x", TOKENS, 8)
    assert regions(fused(g, g.call(op, g.linear(x, "gemm", 24), name="act"))) == [("gemm", "gemm act")]


def test_a_reshape_that_no_strides_express_gets_a_copy() -> None:
    g = GraphBuilder()
    x = g.input("x", BATCH, SEQ, 24)
    turned = g.call(aten.permute.default, x, [1, 0, 2])
    flat = g.call(aten.reshape.default, turned, [7 * 13, 24], name="flat")
    gm = fused(g, g.linear(flat, "gemm", 8))
    assert regions(gm) == [("row", "clone_default"), ("gemm", "gemm")]


def test_returned_views_own_their_memory() -> None:
    g = GraphBuilder()
    x, w = g.input("x", TOKENS, 24), g.weight("w", 4, 6)
    y = g.call(aten.relu.default, x, name="y")
    heads = g.call(aten.reshape.default, y, [53, 4, 6])
    half = g.call(aten.slice.Tensor, y, 1, 0, 12)
    gm = fused(g, x, w, heads, half, y, g.call(aten.permute.default, x, [1, 0]))
    assert regions(gm) == [
        ("row", "y"),
        ("row", "clone_default"),
        ("row", "clone_default_1"),
        ("row", "clone_default_2"),
    ]


def test_tags_are_used_up_and_analysis_leaves_the_graph_alone() -> None:
    g = packed_bert(layers=1)
    gm = g.done(*g.outputs)
    text = str(gm.graph)
    gm, record = run_pass(FindRegions(), gm)
    assert str(gm.graph) == text
    assert record.counts == {"gemm": 7, "attention": 1, "row": 5, "index": 1}
    gm, _ = run_pass(OutlineRegions(), gm)
    bodies = [gm.get_submodule(str(n.target)).graph for n in gm.graph.nodes if n.op == "call_module"]
    assert not any(find_fact(n, RegionTag) for graph in (gm.graph, *bodies) for n in graph.nodes)


def random_graph(seed: int) -> tuple[GraphBuilder, list[torch.fx.Node]]:
    """Twelve random ops over [24, 24] values, so that any two can be combined, in any order of use."""
    g = GraphBuilder(seed=seed)
    draw = random.Random(seed)
    values = [g.input("x", 24, 24), g.input("y", 24, 24)]
    for step in range(12):
        a, b = draw.choice(values), draw.choice(values[-3:])
        values.append(
            draw.choice(
                [
                    lambda a=a, b=b: g.call(aten.add.Tensor, a, b),
                    lambda a=a: g.call(aten.tanh.default, a),
                    lambda b=b, step=step: g.linear(b, f"gemm{step}", 24),
                    lambda b=b: g.call(aten.softmax.int, b, -1),
                    lambda a=a: g.call(aten.permute.default, a, [1, 0]),
                    lambda a=a: g.call(aten.unsqueeze.default, g.call(aten.mean.dim, a, [1]), draw.choice([0, 1])),
                    lambda a=a: g.call(aten.roll.default, a, [1], [0]),
                ]
            )()
        )
        values[-1] = values[-1] if g.values[values[-1]].shape == (24, 24) else g.call(aten.mul.Tensor, b, values[-1])
    unused = [node for node in values[2:] if not node.users]
    return g, unused


@pytest.mark.parametrize("fuse", [True, False])
def test_random_graphs_stay_convex_and_compute_the_same(fuse: bool) -> None:
    """A region that waited for its own result could not be called at all, so outlining would fail."""
    for seed in range(60):
        g, outputs = random_graph(seed)
        computing = sorted(n.name for n in g.graph.nodes if n.op == "call_function" and not is_view(n))
        inside = [name for _, names in regions(fused(g, *outputs, fuse=fuse)) for name in names.split()]
        held = [name for name in inside if not name.startswith(("clone", "permute", "unsqueeze"))]
        assert sorted(held) == computing
